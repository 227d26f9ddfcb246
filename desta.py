r"""DeSTA2: an adapter lets a frozen instruct model hear; the model writes its own training answers.

in   a manifest with "text", "seconds" and "style"; a frozen instruct model; a frozen Whisper or
     HuBERT
out  targets.jsonl; a folder of encoder states; a folder that chat.py takes like a model's
see  DeSTA2 (arXiv:2409.20007), DeSTA2.5-Audio (arXiv:2507.02768); Q-Former (arXiv:2301.12597)
run  python desta.py train targets.jsonl --model weights/SmolLM2-135M-Instruct \
         --states out/states --out out/desta

write   The instruct model reads a description of a clip, and answers a prompt about it. What
        it writes is the target.
encode  The encoder's states of every clip are computed once, and kept.
train   The model gets the same prompt, and the clip in place of its description. The adapter
        learns to turn the states into vectors that make the model say what it said before.

No weight of the instruct model moves, so typed turns are its own, to the bit. It needs no
data but descriptions: nobody wrote an answer.
"""

import argparse
import functools
import json
import math
import re
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import audio
import weights
from fused import linear_cross_entropy
from hubert import Hubert
from model import LM, generate
from vocab import Vocab
from whisper import SECONDS, Whisper

# Around a description, or what was heard.
OPEN, CLOSE = "<start_audio>", "<end_audio>\n\n"

# DeSTA2's own. A small model wants a plain sentence, and a question that it has an answer to.
QUESTION = "What can you hear from the audio?"
TEMPLATE = "[00:00-{end}] {text} ({style})"
TAPS = 4  # blocks of the encoder that are listened to
LIMIT = 64  # tokens of a target; a longer one goes round in circles
BATCH = 32  # targets written at once
AT_ONCE = 8  # clips encoded at once
DROPOUT = 0.1  # in a Q-Former, as in BERT
SAVE_EVERY, LOG_EVERY = 100, 20  # steps


# --- descriptions, and what a turn is -----------------------------------------


def described_clips(path):
    """The entries of a manifest, each found to have what a description is made of."""
    entries = audio.read_manifest(path)
    if not entries:
        raise ValueError(f"{path}: empty; wanted at least one clip")
    for number, entry in enumerate(entries, 1):
        style = entry.get("style")
        named = isinstance(style, dict) and style and {*style} == {*entries[0]["style"]}
        words = named and all(
            isinstance(value, str) and re.search(r"\w", value) for value in style.values()
        )
        seconds = entry.get("seconds")
        timed = isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
        if not (words and timed and entry.get("text")):
            raise ValueError(
                f"{path}, entry {number}: wanted text, seconds, and a style of the same "
                "names in all entries, with words as values"
            )
    return entries


def description(entry, template):
    """A clip in words. Names in the template: text, end, style, what the style has, a caption.

    [00:00-{end}] {text} ({style}) is [00:00-00:03] hello there (Gender: woman, Rate: fast)
    """
    seconds = math.ceil(entry["seconds"])
    style = [f"{name.capitalize()}: {value}" for name, value in entry["style"].items()]
    names = {
        "text": entry["text"],
        "end": f"{seconds // 60:02d}:{seconds % 60:02d}",
        "style": ", ".join(style),
    }
    if entry.get("caption"):
        names["caption"] = entry["caption"]
    try:
        text = template.format(**entry["style"] | names)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"--template {template!r}: {error} cannot be filled in; a clip has "
            f"{', '.join(entry['style'] | names)}"
        ) from None
    return OPEN + text + CLOSE


class Table(nn.Module):
    """An embedding of V rows, and behind them what was heard: id V + n is vector number n."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight                              # (V, C)
        self.heard = self.weight.new_zeros(0, self.weight.shape[1])  # (vectors, C)

    def forward(self, ids):
        is_vector = ids >= len(self.weight)
        x = F.embedding(ids.masked_fill(is_vector, 0), self.weight)
        if not is_vector.any():
            return x
        vectors = self.heard[ids[is_vector] - len(self.weight)]
        return x.index_put((is_vector,), vectors.to(x.dtype))


class Listener(Vocab):
    """A model's tokens. A clip is the numbers of its vectors; it stands where text would.

    first        id of the first vector: as many as the embedding has rows
    transcripts  {the number of a clip's first vector: what is said in it}
    """

    def __init__(self, folder, first=0):
        super().__init__(folder)
        self.first = first
        self.transcripts = {}

    def span(self, numbers):
        """`<start_audio>` vectors, transcript `<end_audio>`."""
        vectors = (self.first + np.asarray(numbers)).tolist()
        self.special |= {f"<|heard_{i - self.first}|>": i for i in vectors}  # `spelled` shows them
        words = self.encode(self.transcripts.get(int(numbers[0]), ""))
        return self.encode(OPEN) + vectors + words + self.encode(CLOSE)

    def forget(self):
        self.transcripts.clear()
        self.special = {name: i for name, i in self.special.items() if i < self.first}

    def heard(self, numbers):
        """The prompt that asks for a transcript."""
        return self.ask(numbers, "Write down what was said.")

    def ask(self, heard, question):
        """The ids of a turn about what was heard, numbers of vectors or a description.

        Where nothing is asked, it stands alone, as a spoken question does.
        """
        content = [heard, f" {question}"] if question else [heard]
        return self.turn([{"role": "user", "content": content}])


# --- what hears: a frozen encoder, and the adapter ----------------------------


def is_whisper(folder):
    """Is it a folder of a Whisper?"""
    file = Path(folder) / "config.json"
    return file.exists() and runs.read_json(file).get("model_type") == "whisper"


class Encoder:
    """A frozen Whisper or HuBERT: the states of clips behind TAPS of its blocks."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.device, self.dtype = device, dtype
        self.whisper = Whisper(folder, device, dtype) if is_whisper(folder) else None
        if self.whisper:
            config = self.whisper.config
            self.hop = audio.HOP
            blocks, self.width = config.encoder_layers, config.d_model
            self.heads = config.encoder_attention_heads
        else:
            self.hubert = Hubert.load(folder, device)
            config = self.hubert.config
            self.hop = self.hubert.hop()
            blocks, self.width = config.num_hidden_layers, config.hidden_size
            self.heads = config.num_attention_heads
        # Of 12 blocks the 3rd, 6th, 9th and 12th. Where there are fewer than TAPS, all of them.
        self.taps = sorted({(n + 1) * blocks // TAPS - 1 for n in range(TAPS)} - {-1})

    @torch.inference_mode()
    def states(self, clips):
        """(taps, frames, C) float32 of every clip of at most 30 seconds, N // hop frames."""
        if self.whisper:
            return self.whisper.states(clips, self.taps)
        out = []
        for clip in clips:
            samples = torch.as_tensor(clip)[None].to(self.device)   # (1, N)
            states = []  # of every block
            with runs.autocast(self.device, self.dtype):
                self.hubert(samples, self.taps[-1] + 1, states=states)
            out.append(torch.cat([states[tap] for tap in self.taps]).float())
        return out


class QFormer(nn.Module):
    """Learned queries look at the states of every tap, and each mixes what it got from them.

    One stack of layers for all taps, norms behind each part, as in BERT. A clip becomes as
    many vectors as there are queries, however long it is.
    """

    def __init__(self, shape):
        super().__init__()
        taps, width, queries = shape["taps"], shape["width"], shape["queries"]
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(taps, queries, width)))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, shape["heads"], 4 * width, DROPOUT, "gelu", batch_first=True
            )
            for _ in range(shape["layers"])
        )
        self.mixing = nn.Parameter(torch.zeros(queries, taps))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, shape["out"])

    def forward(self, states, real):
        B, taps, T, C = states.shape
        x = self.queries.expand(B, -1, -1, -1).flatten(0, 1)        # (B * taps, Q, C)
        padding = ~real.repeat_interleave(taps, 0)                  # (B * taps, T)
        for layer in self.layers:
            x = layer(x, states.flatten(0, 1), memory_key_padding_mask=padding)
        x = x.view(B, taps, -1, C)                                  # (B, taps, Q, C)
        x = torch.einsum("btqc,qt->bqc", x, self.mixing.softmax(-1))  # (B, Q, C)
        return self.proj(self.norm(x))                              # (B, Q, out)

    def count(self, frames):
        return self.mixing.shape[0]


class Concat(nn.Module):
    """The last tap's frames, joined some at a time, through an MLP: 12.5 vectors a second."""

    def __init__(self, shape):
        super().__init__()
        self.join = shape["join"]
        self.up = nn.Linear(self.join * shape["width"], 2 * shape["out"])
        self.proj = nn.Linear(2 * shape["out"], shape["out"])

    def forward(self, states, real):
        x = states[:, -1] * real[:, :, None]                        # (B, T, C)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.join))
        x = x.unflatten(1, (-1, self.join)).flatten(2)           # (B, T / join, join * C)
        return self.proj(F.gelu(self.up(x)))                        # (B, T / join, out)

    def count(self, frames):
        return -(-frames // self.join)


ADAPTERS = {"qformer": QFormer, "concat": Concat}


class Adapter(nn.Module):
    """Encoder states of clips -> vectors among the model's embedding rows. `shape` is its JSON."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.kind = ADAPTERS[shape["kind"]](shape)
        # As loud as a row of the embedding, to begin with.
        fan_in = self.kind.proj.in_features
        nn.init.normal_(self.kind.proj.weight, std=shape["loudness"] / math.sqrt(fan_in))
        nn.init.zeros_(self.kind.proj.bias)

    def forward(self, states):
        """[(vectors, out)] of a list of states (taps, frames, C)."""
        frames = [x.shape[1] for x in states]
        x = torch.stack([F.pad(x, (0, 0, 0, max(frames) - x.shape[1])) for x in states])
        x = F.layer_norm(x, x.shape[-1:])  # blocks differ in loudness; (B, taps, T, C)
        at = torch.arange(max(frames), device=x.device)
        real = at < torch.tensor(frames, device=x.device)[:, None]  # (B, T)
        return [y[: self.kind.count(n)] for y, n in zip(self.kind(x, real), frames)]


class Ears:
    """Sound -> (numbers of its vectors, None), for the model and the listener that share them.

    has_words    does a transcript stand beside the vectors?
    transcriber  samples -> text; None if there is none, or who calls it says the words
    """

    most = SECONDS  # of a clip
    makes = "vectors"

    def __init__(self, encoder, adapter, table, listener, has_words):
        self.encoder, self.adapter = encoder, adapter
        self.hop = encoder.hop
        self.table, self.listener = table, listener
        self.has_words = has_words
        self.transcriber = None

    @property
    def lacks_words(self):
        """Must the caller give the transcript?"""
        return self.has_words and not self.transcriber

    @torch.inference_mode()
    def __call__(self, samples, text=None):
        if len(samples) > SECONDS * audio.SAMPLE_RATE:
            raise ValueError(f"more than {SECONDS} seconds; give a part of it")
        if len(samples) < self.hop:
            raise ValueError(f"{len(samples)} samples are under one frame ({self.hop})")
        states = [x.to(self.table.weight.device) for x in self.encoder.states([samples])]
        first = len(self.table.heard)
        self.table.heard = torch.cat([self.table.heard, *self.adapter(states)])
        numbers = np.arange(first, len(self.table.heard))
        if self.has_words:
            words = self.transcriber(samples) if text is None else text
            self.listener.transcripts[first] = words
        return numbers, None

    def forget(self):
        """Free what was heard: no turn holds its numbers any more."""
        self.table.heard = self.table.heard[:0]
        self.listener.forget()


def frozen(folder, device, dtype=None):
    """(an instruct model that stays, its table of rows and vectors, its tokens)."""
    model = LM.load(folder, device, dtype).eval().requires_grad_(False)
    table = Table(model.model.embed_tokens)
    model.model.embed_tokens = table
    return model, table, Listener(folder, len(table.weight))


def load(folder, device="cpu", dtype=None):
    """(model, vocabulary, ears) of a folder of `train`."""
    made = runs.read_json(
        Path(folder) / "desta.json",
        ["model", "encoder", "transcriber", "sha256", "adapter"],
    )
    for name in ("sha256", "adapter"):
        if not isinstance(made[name], dict):
            raise ValueError(
                f"{folder}/desta.json: got {name} = {made[name]!r}, wanted an object"
            )
    made.setdefault("has_words", bool(made["transcriber"]))  # files of earlier versions lack it
    for name in ("model", "encoder", "transcriber"):
        if made[name]:
            runs.still(made[name], made["sha256"].get(name), name, folder)
    model, table, listener = frozen(made["model"], device, dtype)
    if made["adapter"].get("kind") not in ADAPTERS:
        raise ValueError(
            f"{folder}/desta.json: got the adapter {made['adapter'].get('kind')!r}, wanted "
            f"{' or '.join(ADAPTERS)}"
        )
    try:
        with torch.device("meta"), weights.Unfilled():
            adapter = Adapter(made["adapter"])
    except KeyError as lacking:
        raise ValueError(f"{folder}/desta.json: its adapter has no {lacking}") from None
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{folder}/desta.json: no such adapter can be made: {error}") from None
    weights.load_into(adapter, folder)
    encoder = Encoder(made["encoder"], device)
    ears = Ears(encoder, adapter.to(device).eval(), table, listener, made["has_words"])
    if made["transcriber"]:
        same = made["transcriber"] == made["encoder"]
        whisper = encoder.whisper if same else Whisper(made["transcriber"], device)
        ears.transcriber = lambda samples: whisper.transcripts([samples])[0]
    return model, listener, ears


# --- write: what the model says of a description ------------------------------


def write(args):
    """Targets: every clip and prompt, with what the model answers on reading the description."""
    entries = described_clips(args.manifest)
    told = [description(entry, args.template) for entry in entries]
    model = LM.load(args.model, args.device, torch.float32).eval()
    vocab = Listener(args.model)
    questions = args.prompt or [QUESTION]
    asked = [
        (entry | {"prompt": question}, text)
        for entry, text in zip(entries, told)
        for question in questions
    ]

    def work(part):
        prompts = [torch.tensor(vocab.ask(text, entry["prompt"])) for entry, text in part]
        steps = list(generate(model, prompts, LIMIT, vocab.stop, vocab.text_rows()))
        texts = []
        for ids in torch.stack(steps).T.tolist():                   # (B, steps)
            end = next((n for n, i in enumerate(ids) if i in vocab.stop), None)
            texts.append(None if end is None else vocab.decode(ids[:end]).strip())
        return texts

    settings = runs.recipe([args.manifest, args.model])["inputs"]
    settings |= {"prompt": json.dumps(args.prompt), "template": args.template}
    texts = runs.in_pieces(
        args.out, settings, asked, work, BATCH, "writing targets", "target"
    )
    kept = [entry | {"target": text} for (entry, _), text in zip(asked, texts) if text]
    if not kept:
        runs.pieces_of(args.out).unlink(missing_ok=True)
        raise ValueError(
            f"{args.model}: none of its {len(asked)} replies can be a target: they are empty, or "
            f"do not end within {LIMIT} tokens; try another --prompt or --template"
        )
    lines = "".join(json.dumps(entry) + "\n" for entry in kept)
    runs.finish_pieces(args.out, lines, args.overwrite)
    print(
        f"{args.out}: {len(kept)} targets of {len(asked)}; the others were empty, or did "
        f"not end within {LIMIT} tokens"
    )


# --- encode: the frozen encoder's states, once --------------------------------


def encode(args, out):
    """A folder of states: states.bin (float16), index.npy (first frame of each clip)."""
    entries = audio.read_manifest(args.manifest)
    if not entries:
        raise ValueError(f"{args.manifest}: empty; wanted at least one clip")
    encoder = Encoder(args.encoder, args.device, runs.DTYPES[args.dtype])
    audio.can_be_heard(entries, encoder.hop, SECONDS)
    settings = {"audio": audio.identity(entries), "dtype": args.dtype}
    settings["encoder"] = runs.fingerprint(args.encoder)
    checkpoint = runs.Checkpoint(out / "checkpoint.pt", settings)
    saved = checkpoint.read("counts")
    counts = saved[0] if saved else []
    per_frame = len(encoder.taps) * encoder.width
    # What a kill left behind the last save is cut off.
    with runs.reopened(out / "states.bin", 2 * per_frame * sum(counts)) as file:
        bar = runs.Bar(total=len(entries), initial=len(counts), desc="encoding", unit="clip")
        while len(counts) < len(entries):
            part = entries[len(counts) : len(counts) + AT_ONCE]
            clips = [audio.load(entry["audio"]) for entry in part]
            for entry, states in zip(part, encoder.states(clips)):  # (taps, frames, C)
                kept = states.half()
                if not kept.isfinite().all():
                    raise ValueError(
                        f"{entry['audio']}: a state of {args.encoder} is no number of float16; "
                        "take the clip out, or another encoder"
                    )
                file.write(kept.cpu().numpy().tobytes())
                counts.append(states.shape[1])
            runs.settle(file)
            checkpoint.write(counts=counts)
            bar.update(len(part))
        bar.close()
    np.save(out / "index.npy", np.cumsum([0, *counts]))
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (out / "manifest.jsonl").write_text(lines)
    meta = {"encoder": str(Path(args.encoder).resolve()), "taps": encoder.taps}
    meta |= {"width": encoder.width, "heads": encoder.heads}
    meta["sha256"] = settings["encoder"]
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


class States:
    """A folder of `encode`: states[path of audio] is (taps, frames, C) float32."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(
                f"{folder}: no encoder states; make them with desta.py encode"
            )
        self.meta = runs.read_json(
            folder / "meta.json", ["encoder", "taps", "width", "heads", "sha256"]
        )
        try:
            self.at = np.load(folder / "index.npy")
        except (EOFError, ValueError):
            raise ValueError(f"{folder}/index.npy: cut; encode again") from None
        entries = runs.read_lines(folder / "manifest.jsonl")
        self.number = {entry["audio"]: n for n, entry in enumerate(entries)}
        self.per_frame = len(self.meta["taps"]) * self.meta["width"]
        file = folder / "states.bin"
        if file.stat().st_size != 2 * self.per_frame * self.at[-1]:
            raise ValueError(f"{file}: cut, or of another encoding; encode again")
        self.data = np.memmap(file, dtype=np.float16, mode="r")

    def must_have(self, entries):
        """Refuse entries of a manifest that were not encoded."""
        for entry in entries:
            if entry["audio"] not in self.number:
                raise ValueError(
                    f"{entry['audio']}: has no encoder states; encode the manifest it is in"
                )

    def __getitem__(self, path):
        n = self.number[path]
        a, b = self.at[n] * self.per_frame, self.at[n + 1] * self.per_frame
        x = torch.from_numpy(self.data[a:b].astype(np.float32))
        return x.view(len(self.meta["taps"]), -1, self.meta["width"])


# --- train: the adapter -------------------------------------------------------


def read_targets(path):
    """The entries of a file of targets, checked."""
    entries = runs.read_lines(path)
    if not entries:
        raise ValueError(f"{path}: empty; wanted at least one target")
    for number, entry in enumerate(entries, 1):
        for name in ("audio", "text", "prompt", "target"):
            if not isinstance(entry.get(name), str) or not (entry[name] or name == "prompt"):
                raise ValueError(
                    f"{path}, entry {number}: got {name} = {str(entry.get(name))[:40]}, wanted "
                    "text; make it with desta.py write"
                )
    return entries


def loss_of(model, table, listener, adapter, entries, states, transcript):
    """Mean cross-entropy of the targets, each behind the turn that is about its clip's sound."""
    vectors = adapter([states[entry["audio"]].to(table.weight.device) for entry in entries])

    # This batch's vectors stand behind the embedding's rows, in place of the last batch's.
    table.heard = torch.cat(vectors)
    listener.transcripts = {}
    documents = []
    first = 0
    for entry, heard in zip(entries, vectors):
        if transcript:
            listener.transcripts[first] = entry["text"]
        asked = listener.ask(np.arange(first, first + len(heard)), entry["prompt"])
        end = listener.special[listener.template().end]
        documents.append((asked, listener.encode(entry["target"]) + [end]))
        first += len(heard)

    # What fills up a row stands behind its document, where nothing sees it.
    T = max(len(asked) + len(target) for asked, target in documents)
    ids = torch.full((len(entries), T), listener.eos)               # (B, T)
    bears = torch.zeros(len(entries), T, dtype=torch.bool)          # (B, T): is it a target?
    for n, (asked, target) in enumerate(documents):
        ids[n, : len(asked) + len(target)] = torch.tensor(asked + target)
        bears[n, len(asked) : len(asked) + len(target)] = True
    ids, bears = ids.to(table.weight.device), bears.to(table.weight.device)
    hidden = model.model(ids[:, :-1])[bears[:, 1:]]                 # (N, C)
    ones = torch.ones(len(hidden), device=hidden.device)
    total, _ = linear_cross_entropy(hidden, model.lm_head.weight, ids[bears], ones)
    return total / len(hidden)


def provenance(args, meta):
    """What desta.json says of model, encoder and transcriber: where, and their fingerprints.

    Taken before training: they must be those that it used.
    """
    made = {"model": str(Path(args.model).resolve()), "encoder": meta["encoder"]}
    if args.no_transcript and args.transcriber:
        raise ValueError("--no-transcript with --transcriber: give one of the two")
    transcriber = args.transcriber
    if not (transcriber or args.no_transcript) and is_whisper(meta["encoder"]):
        transcriber = meta["encoder"]
    if transcriber:
        if not is_whisper(transcriber):
            raise ValueError(
                f"{transcriber}: not a Whisper folder, so no transcript comes from it; give "
                "one as --transcriber, or --no-transcript, or neither: then the encoder writes "
                "the words if it is a Whisper, and else who listens says them"
            )
        Whisper(transcriber)  # an error now if a file of it is missing
    made["transcriber"] = transcriber and str(Path(transcriber).resolve())
    made["sha256"] = {name: runs.fingerprint(path) for name, path in made.items() if path}
    if made["sha256"]["encoder"] != meta["sha256"]:
        raise ValueError(
            f"{meta['encoder']} has changed since {args.states} was made with it; encode again"
        )
    return made | {"has_words": not args.no_transcript}


def shape_of(args, meta, table):
    """The shape of an adapter between these states and this model."""
    return {
        "kind": args.adapter,
        "taps": len(meta["taps"]),
        "width": meta["width"],
        "heads": meta["heads"],
        "queries": args.queries,
        "layers": 2,
        "join": 4,
        "out": table.weight.shape[1],
        "loudness": table.weight.pow(2).mean().sqrt().item(),
    }


def train(args, out):
    """An adapter, into the folder `out`."""
    torch.manual_seed(args.seed)
    entries, states = read_targets(args.targets), States(args.states)
    states.must_have(entries)
    made = provenance(args, states.meta)
    model, table, listener = frozen(args.model, args.device, torch.float32)
    adapter = Adapter(shape_of(args, states.meta, table)).to(args.device)
    optimizer = torch.optim.AdamW(
        adapter.parameters(), betas=(0.9, 0.98), weight_decay=0.01
    )

    names = "adapter", "queries", "no_transcript", "steps", "batch", "lr", "seed", "dtype"
    settings = {name: str(getattr(args, name)) for name in names}
    inputs = args.targets, args.states, args.model
    settings |= {path: runs.fingerprint(path) for path in inputs}
    checkpoint = runs.Checkpoint(out / "checkpoint.pt", settings)
    step = 0
    saved = checkpoint.read("adapter", "optimizer", "step")
    if saved:
        adapter.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step = saved[2]
        tqdm.write(f"resuming at step {step} of {args.steps}")
    runs.keep_log(out / "log.jsonl", step)

    steps = range(step + 1, args.steps + 1)
    about = {"desc": f"training {args.out}", "unit": "step", "total": args.steps}
    for step in runs.Bar(steps, initial=step, **about):
        # Warm-up over a tenth, then a cosine to zero.
        warm = min(1, step / (0.1 * args.steps))
        rate = args.lr * warm * 0.5 * (1 + math.cos(math.pi * (step - 1) / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate

        torch.manual_seed(args.seed << 32 | step)  # dropout, the same in a resumed run
        part = [entries[i] for i in drawn(len(entries), args.batch, args.seed, step)]
        transcript = not args.no_transcript
        with runs.autocast(args.device, runs.DTYPES[args.dtype]):
            loss = loss_of(model, table, listener, adapter, part, states, transcript)
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

        if step % LOG_EVERY == 0 or step == args.steps:
            write_log(out / "log.jsonl", step, args.steps, loss.item(), rate)
        if step % SAVE_EVERY == 0:
            state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.write(step=step, **state)
    weights.save(out, adapter.state_dict())
    made["adapter"] = adapter.shape
    (out / "desta.json").write_text(json.dumps(made, indent=1) + "\n")


def write_log(path, step, steps, loss, rate):
    """A line of the log, and one on the screen."""
    with open(path, "a") as log:
        log.write(json.dumps({"step": step, "loss": round(loss, 4)}) + "\n")
    tqdm.write(f"step {step}/{steps} | loss {loss:.3f} | lr {rate:.1e}")


def drawn(n, batch, seed, step):
    """Which of n targets a step has: shuffled passes, one behind the other."""
    places = [divmod(at, n) for at in range((step - 1) * batch, step * batch)]
    return [int(shuffled(n, seed, passes)[i]) for passes, i in places]


@functools.lru_cache(2)  # a batch lies in one pass, or across two
def shuffled(n, seed, passes):
    return np.random.default_rng([seed, passes]).permutation(n)


# --- the command --------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(
        description="An adapter through which a frozen instruct model hears."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    writing = commands.add_parser("write", help="have the model write targets")
    writing.add_argument("manifest", help='JSON lines with "text", "style" and "seconds"')
    writing.add_argument(
        "--prompt", action="append", help=f'again for more; "" asks nothing ({QUESTION})'
    )
    writing.add_argument(
        "--template", default=TEMPLATE, help="of a description (default: %(default)s)"
    )
    encoding = commands.add_parser("encode", help="compute encoder states of a corpus")
    encoding.add_argument("manifest", help="JSON lines, or a folder of audio")
    encoding.add_argument("--encoder", required=True, help="a Whisper or HuBERT folder")
    training = commands.add_parser("train", help="train the adapter")
    add_training_flags(training.add_argument)
    for command in (writing, training):
        command.add_argument("--model", required=True, help="the frozen instruct model")
    for command in (encoding, training):
        runs.add_dtype(command)
    for command in (writing, encoding, training):
        runs.add_device(command)
        add = command.add_argument
        add("--out", required=True, help="what to write")
        add("--overwrite", action="store_true", help="replace an existing --out")
    return parser


def add_training_flags(add):
    add("targets", help="what desta.py write made")
    add("--states", required=True, help="what desta.py encode made")
    add("--adapter", choices=ADAPTERS, default="qformer", help="(default qformer)")
    add("--queries", type=runs.count, help="of a qformer (default 64)")
    add("--no-transcript", action="store_true", help="vectors alone, no words beside them")
    add(
        "--transcriber",
        help="the Whisper that writes those words (default: the encoder; if that is a HuBERT, who "
        "listens says them)",
    )
    add("--steps", type=runs.count, default=1000, help="optimizer steps (default 1000)")
    add("--batch", type=runs.count, default=8, help="targets in a step (default 8)")
    add("--lr", type=runs.positive, default=5e-4, help="peak learning rate (default 5e-4)")
    add("--seed", type=runs.seed, default=0, help="of weights and data order (default 0)")


def main():
    args = arguments().parse_args()
    if args.action == "train":
        if args.queries and args.adapter != "qformer":
            raise ValueError(f"--queries {args.queries}: {args.adapter} has none; leave it out")
        args.queries = 64 if args.queries is None else args.queries
    if args.action == "write":
        runs.may_write(args.out, args.overwrite)
        return write(args)
    notes = {}
    if args.action == "encode":
        work = encode
        inputs = [args.encoder]
        notes["audio"] = audio.identity(audio.read_manifest(args.manifest))
    else:
        work = train
        inputs = [args.model, args.states, args.targets]
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    scratch = ["checkpoint.pt"]
    with runs.new_folder(args.out, inputs, args.overwrite, notes, scratch) as out:
        work(args, out)


if __name__ == "__main__":
    runs.run(main)
