"""What a frozen encoder makes of sound: the states of every clip, computed once and kept.

in   a Whisper or HuBERT folder; clips
out  states behind four of its blocks, (taps, frames, C); a folder of them for a whole corpus
see  DeSTA2 (arXiv:2409.20007), whose adapter listens to four blocks
run  python desta.py encode clips.jsonl --encoder weights/whisper-tiny.en --out out/states
"""

import json
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch

import audio
from hubert import Hubert
from whisper import Whisper
from whisper_model import FRAME, SECONDS

TAPS = 4  # blocks of the encoder that are listened to
AT_ONCE = 8  # clips encoded at once


def kind_of(folder):
    """What a folder's config.json says that it is; None without one."""
    file = Path(folder) / "config.json"
    return runs.read_json(file).get("model_type") if file.exists() else None


class Encoder:
    """A frozen Whisper or HuBERT: the states of clips behind TAPS of its blocks."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.device, self.dtype = device, dtype
        kind = kind_of(folder)
        if kind not in ("whisper", "hubert"):
            raise ValueError(
                f"{folder}: wanted a Whisper or HuBERT folder, whose config.json has such a "
                f"model_type; got {kind}"
            )
        self.whisper = Whisper(folder, device, dtype) if kind == "whisper" else None
        if self.whisper:
            config = self.whisper.config
            self.hop = FRAME
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


# --- the states of a corpus, once ---------------------------------------------


def add_flags(add):
    """Flags of desta.py encode alone."""
    add("manifest", help="JSON lines, or a folder of audio")
    add("--encoder", required=True, help="a Whisper or HuBERT folder")


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
                        f"{entry['audio']}: a state of {args.encoder} does not fit float16 (above "
                        "65504, or no number); take the clip out, or another encoder"
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
        for name, kind in {"encoder": str, "taps": list, "width": int, "heads": int}.items():
            if not isinstance(self.meta[name], kind):
                raise ValueError(
                    f"{folder}/meta.json: got {name} = {self.meta[name]!r}; encode again"
                )
        try:
            self.at = np.load(folder / "index.npy")
        except (EOFError, ValueError):
            raise ValueError(f"{folder}/index.npy: cut; encode again") from None
        entries = audio.read_manifest(folder / "manifest.jsonl")
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
