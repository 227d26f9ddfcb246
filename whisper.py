"""Whisper: samples -> encoder states -> what was said, and when.

in   16 kHz samples or audio files, a Hugging Face Whisper folder; a manifest
out  encoder states, 50 frames a second; transcripts; a manifest with the times of words
see  Whisper (arXiv:2212.04356); dynamic time warping: Sakoe & Chiba (1978)
run  python whisper.py words clips.jsonl --whisper weights/whisper-base --out words.jsonl

The decoder begins with tokens that say what to do: `<|startoftranscript|>`, in a multilingual
model a language and `<|transcribe|>`, and `<|notimestamps|>` where no times are wanted. A time
is a token, too, one for every 0.02 seconds. whisper_model.py has the network.

Dimension key:  B batch   T positions   C d_model   V tokens
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn

import audio
import weights
from vocab import Vocab
from whisper_model import FRAME, SECONDS, TICK, Config, Model, log_mel

FIRST_BY = 1.0  # seconds: a window's first word begins by then
MULTILINGUAL = 51865  # tokens, at least; an English model has one less
MEDIAN = 7  # frames of the filter over a word's attention
BATCH = 8  # clips written down at once


class Whisper(nn.Module):
    """A Whisper folder: `states` of sound, `transcripts` of clips, `words` of a known text."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        super().__init__()
        self.config, self.vocab = Config.read(folder), Vocab(folder)
        self.device, self.dtype = device, dtype
        with torch.device("meta"), weights.Unfilled():
            self.model = Model(self.config)

        # The head is the embedding, whether or not the file has it twice.
        def ours(name):
            return None if name == "proj_out.weight" else name

        weights.load_into(self, folder, ours)
        self.to(device, torch.float32).eval().requires_grad_(False)
        self._read_tokens(folder)

    def _read_tokens(self, folder):
        """What may be written, and which heads know where in the sound a word is."""
        special = self.vocab.special
        named = (
            "<|startoftranscript|>",
            "<|notimestamps|>",
            "<|transcribe|>",
            "<|translate|>",
        )
        lost = [name for name in named if name not in special]
        if lost:
            raise ValueError(f"{folder}: its tokenizer has no {lost[0]}; not a Whisper's")
        self.begin, self.no_times, task, translate = (special[name] for name in named)
        self.times = self.no_times + 1  # the token of 0.00 s

        file = Path(folder) / "generation_config.json"
        made = {}
        if file.exists():
            made = runs.read_json(file)

        # An English model has tokens of languages too, and does not use them.
        many = made.get("is_multilingual", self.config.vocab_size >= MULTILINGUAL)
        languages = range(self.begin + 1, translate)
        self.languages = list(languages) if many else []
        self.task = [task] if many else []

        suppressed = made.get("suppress_tokens") or []
        ids = range(self.config.vocab_size)
        if not (isinstance(suppressed, list) and all(i in ids for i in suppressed)):
            raise ValueError(f"{file}: suppress_tokens names ids that the model does not have")

        # No markers but the end; at the beginning not the end either, nor a space alone.
        markers = [i for i in special.values() if i < self.times and i != self.vocab.eos]
        self.masked = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        self.masked[[*markers, *suppressed]] = True
        self.not_first = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        self.not_first[[*self.vocab.encode(" "), self.vocab.eos]] = True

        # Heads that are not named: all of the upper half.
        layers = range(self.config.decoder_layers)
        heads = range(self.config.decoder_attention_heads)
        known = [[layer, head] for layer in layers for head in heads]
        upper = known[len(layers) // 2 * len(heads) :]
        self.alignment = made.get("alignment_heads") or upper
        aligned = self.alignment
        if not (isinstance(aligned, list) and all(pair in known for pair in aligned)):
            raise ValueError(f"{file}: alignment_heads names heads that the model does not have")

    def encode(self, clips, blocks=None):
        """(B, 1500, C) of clips of at most 30 s; `blocks` gets what each block hands on."""
        mel = torch.stack([log_mel(clip, self.config.num_mel_bins) for clip in clips])
        return self.model.encoder(mel.to(self.device), blocks)

    @torch.inference_mode()
    def states(self, clips, layers=None):
        """Encoder states of clips of at most 30 s: of the last norm, a list of (frames, C).

        layers  numbers of blocks, from 0: what these hand on, (len(layers), frames, C) each
        A clip of N samples has N // 320 frames; those of the silence behind it are cut off.
        """
        each = []
        with runs.autocast(self.device, self.dtype):
            x = self.encode(clips, each)                            # (B, 1500, C)
        if layers is not None:
            x = torch.stack([each[n] for n in layers], 1)           # (B, layers, 1500, C)
        frames = [max(1, len(clip) // FRAME) for clip in clips]
        return [row[..., :n, :].float() for row, n in zip(x, frames)]

    @torch.inference_mode()
    def write(self, clips, times=False, limit=None):
        """Greedily: the ids that are written of clips of at most 30 s, without the prompt."""
        limit = limit or self.config.max_target_positions // 2
        with runs.autocast(self.device, self.dtype):
            decoder = self.model.decoder
            heard = decoder.hear(self.encode(clips))
            ids = self.prompts(heard, len(clips), times)            # (B, T)
            written, ended = [[] for _ in clips], [False] * len(clips)
            past = None
            while not all(ended) and len(written[0]) < limit:
                logits, past = decoder(ids, heard, past)
                logits = logits[:, -1].float().cpu()                # (B, V)
                for row, so_far in zip(logits, written):
                    row[self.not_now(row, so_far, times)] = -math.inf
                ids = logits.argmax(-1, keepdim=True).to(self.device)  # (B, 1)
                for n, i in enumerate(ids.flatten().tolist()):
                    ended[n] = ended[n] or i == self.vocab.eos
                    written[n].append(self.vocab.eos if ended[n] else i)
        return [row[: (row + [self.vocab.eos]).index(self.vocab.eos)] for row in written]

    def prompts(self, heard, B, times):
        """(B, T): what the decoder begins with. A multilingual model hears which language it is."""
        ids = torch.full((B, 1), self.begin, device=self.device)
        if self.languages:
            logits, _ = self.model.decoder(ids, heard)
            best = logits[:, -1, self.languages].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best + self.languages[0]], 1)
        fixed = [*self.task, *([] if times else [self.no_times])]
        fixed = torch.tensor(fixed, dtype=ids.dtype, device=self.device)
        return torch.cat([ids, fixed.expand(B, -1)], 1)

    def not_now(self, logits, so_far, times):
        """(V,) bool: tokens that may not come next. Times come in pairs, and never fall."""
        no = self.masked.clone()
        if not so_far:
            no |= self.not_first
        if not times:
            no[self.times :] = True
            return no

        # <|0.00|> a text<|2.40|><|2.60|> another<|4.80|>
        marks = [i for i in so_far if i >= self.times]
        last = bool(so_far) and so_far[-1] >= self.times
        before = len(so_far) < 2 or so_far[-2] >= self.times
        if not so_far:
            no[: self.times] = True
            no[self.times + 1 + round(FIRST_BY / TICK) :] = True
        elif last and before:
            no[self.times :] = True
        elif last:
            no[: self.vocab.eos] = True
        if marks:
            # The next text may begin where the last one ended. All else comes later.
            ended = last and not before
            earliest = marks[-1] if ended else marks[-1] + 1
            no[self.times : earliest] = True

        # All times together against the likeliest text.
        p = logits.masked_fill(no, -math.inf).log_softmax(-1)
        if p[self.times :].logsumexp(0) > p[: self.times].max():
            no[: self.times] = True
        return no

    def segments(self, samples):
        """[(begin, end, text)] of a clip of any length, in seconds: window by window.

        The next window begins where the last whole segment of this one ends.
        """
        out, at, rate = [], 0, audio.SAMPLE_RATE
        while at < len(samples):
            window = samples[at : at + SECONDS * rate]
            if not len(window):  # the header of an MP3 promised more
                break
            last = at + len(window) == len(samples)
            reached = len(window)  # samples that need no second reading
            begin, text = 0.0, []
            ids = self.write([window], times=True)[0]
            for n, i in enumerate(ids):
                if i < self.times:
                    text.append(i)
                    continue
                time = min((i - self.times) * TICK, len(window) / rate)
                if text:
                    out.append(
                        (at / rate + begin, at / rate + time, self.vocab.decode(text))
                    )
                    # What follows in this window may be cut: the next one reads it whole.
                    followed = n + 1 < len(ids) and not last
                    reached = round(time * rate) if followed else len(window)
                begin, text = time, []
            if text and reached == len(window):  # no time behind it, and no window to come
                out.append(
                    (at / rate + begin, (at + reached) / rate, self.vocab.decode(text))
                )
            at += reached or rate
        return out

    def transcripts(self, clips):
        """What is said in each clip."""
        texts = [None] * len(clips)
        short = [n for n, x in enumerate(clips) if len(x) <= SECONDS * audio.SAMPLE_RATE]
        for a in range(0, len(short), BATCH):
            part = short[a : a + BATCH]
            for n, ids in zip(part, self.write([clips[n][:] for n in part])):
                texts[n] = self.vocab.decode(ids).strip()
        for n, text in enumerate(texts):
            if text is None:
                parts = [part.strip() for _, _, part in self.segments(clips[n])]
                texts[n] = " ".join(parts)
        return texts

    @torch.inference_mode()
    def words(self, samples, text):
        """[[word, begin, end]] of what is said in a clip of at most 30 s, in seconds.

        None for a text that is longer than the decoder.

        Some heads look at the sound of the token that comes next. The decoder reads the
        text; a path from the first token and frame to the last ones goes where these heads
        look.
        """
        written = text.split()
        spelled = [self.vocab.encode(" " + word) for word in written]
        frames = max(1, len(samples) // FRAME)
        seen = []
        with runs.autocast(self.device, self.dtype):
            heard = self.model.decoder.hear(self.encode([samples]))
            prompt = self.prompts(heard, 1, times=False)            # (1, T)
            rest = torch.tensor([sum(spelled, [])], device=self.device, dtype=prompt.dtype)
            ids = torch.cat([prompt, rest], 1)
            if ids.shape[1] > self.config.max_target_positions:
                return None
            self.model.decoder(ids, heard, seen=seen)

        # Row n is where the heads look while token n is predicted; the last row's is the end.
        first = prompt.shape[1] - 1
        scores = torch.stack(
            [seen[layer][0, head, first:] for layer, head in self.alignment]
        )
        look = scores[..., :frames].float().softmax(-1)          # (heads, tokens + 1, frames)
        look = (look - look.mean(1, keepdim=True)) / look.std(1, keepdim=True)
        begins = warp(median(look).mean(0).cpu().numpy()) * TICK    # (tokens + 1,)
        edges = np.cumsum([0, *map(len, spelled)])
        times = begins[edges].round(2).tolist()
        return [[word, *pair] for word, pair in zip(written, zip(times, times[1:]))]


def median(x):
    """x (heads, tokens, frames), each number the median of the MEDIAN frames around it."""
    half = MEDIAN // 2
    if x.shape[-1] <= half:
        return x
    x = F.pad(x, (half, half), mode="reflect")
    return x.unfold(-1, MEDIAN, 1).median(-1).values


def warp(gain):
    """The frame where each token begins, (tokens,), on the path of most gain (tokens, frames).

    Dynamic time warping: the path goes on by a token, a frame, or both.
    """
    tokens, frames = gain.shape
    best = np.full((tokens + 1, frames + 1), -np.inf)
    best[0, 0] = 0
    for t in range(tokens):
        for f in range(frames):
            before = max(best[t, f], best[t, f + 1], best[t + 1, f])
            best[t + 1, f + 1] = gain[t, f] + before

    begins, t, f = np.zeros(tokens, dtype=int), tokens, frames
    while t and f:
        begins[t - 1] = f - 1
        steps = {
            (1, 1): best[t - 1, f - 1],
            (1, 0): best[t - 1, f],
            (0, 1): best[t, f - 1],
        }
        down, left = max(steps, key=steps.get)
        t, f = t - down, f - left
    return begins


# --- the command --------------------------------------------------------------


def hear(args, whisper):
    """Print what is said in each file, with times if they are asked for."""
    for path in args.audio:
        clip = audio.Recording(path)
        if not args.times:
            print(f"{path}: {whisper.transcripts([clip])[0]}")
            continue
        for begin, end, text in whisper.segments(clip):
            print(f"{path}: [{begin:6.2f} - {end:6.2f}]{text}")


def write_words(args, whisper):
    """A manifest again, each entry with "words"; with a "text", too, where it had none."""

    def work(part):
        clips = [audio.Recording(entry["audio"]) for entry in part]
        silent = [n for n, entry in enumerate(part) if not entry.get("text")]
        texts = whisper.transcripts([clips[n] for n in silent])
        part = [dict(entry) for entry in part]
        for n, text in zip(silent, texts):
            part[n]["text"] = text
        for entry, clip in zip(part, clips):
            short = len(clip) <= SECONDS * audio.SAMPLE_RATE
            words = whisper.words(clip[:], entry["text"]) if short else None
            if words:
                entry["words"] = words
            elif audio.wrong_words(entry, len(clip)):
                del entry["words"]  # of another text
        return part

    entries = audio.read_manifest(args.manifest)
    if not entries:
        raise ValueError(f"{args.manifest}: empty; wanted at least one clip")
    audio.lengths(entries)  # all can be opened
    settings = {"audio": audio.identity(entries), "whisper": runs.fingerprint(args.whisper)}
    settings["dtype"] = runs.name_of(whisper.dtype)
    entries = runs.in_pieces(args.out, settings, entries, work, 2 * BATCH, "words", "clip")
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    runs.finish_pieces(args.out, lines, args.overwrite)
    lacking = sum("words" not in entry for entry in entries)
    print(
        f"{args.out}: {len(entries)} clips, {lacking} without words: silent, or above {SECONDS} "
        "seconds, or of a text that is too long"
    )


def main():
    parser = argparse.ArgumentParser(description="Write down what is said, and when.")
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser("hear", help="print transcripts of audio files")
    one.add_argument("audio", nargs="+", help="audio files")
    one.add_argument("--times", action="store_true", help="in segments, with their times")
    two = commands.add_parser("words", help="find the time of every word of a corpus")
    two.add_argument("manifest", help="JSON lines, or a folder of audio")
    two.add_argument("--out", required=True, help=".jsonl manifest to write")
    two.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    for command in (one, two):
        command.add_argument("--whisper", required=True, help="a Whisper folder")
        runs.add_dtype(command)
        runs.add_device(command)
    args = parser.parse_args()
    if args.action == "words":
        runs.may_write(args.out, args.overwrite)
    dtype = runs.arithmetic(args.dtype, args.device)
    whisper = Whisper(args.whisper, args.device, dtype)
    if args.action == "hear":
        hear(args, whisper)
    else:
        write_words(args, whisper)


if __name__ == "__main__":
    runs.run(main)
