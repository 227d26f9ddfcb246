"""How fast does speech become units? A random HuBERT-base of real size on real utterances,
against transformers and the one-file loop.

in   ../shared/data/librispeech_mini (or --audio FOLDER)
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): tokenize/*
run  python bench/tokenizer.py    # wants bench/requirements.txt; about six minutes on two cores

Audio is decoded beforehand for all; layer 9, 500 centroids, nearest one. Peers hear in batches
of eight of like length, padded, with a mask; minimal HuBERT scripts hear one file at a time in
float32. First the gate: our units must be those of transformers on single clips.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
import audio
import runs
from hubert import Config, Hubert
from tokenize_audio import AudioTokenizer, collapse, nearest

LAYER, K = 9, 500


def main():
    parser = argparse.ArgumentParser(description="Time tokenize_audio against transformers.")
    parser.add_argument(
        "--audio", default=ROOT.parent / "shared/data/librispeech_mini", help="a folder of audio"
    )
    parser.add_argument("--clips", type=int, default=24, help="utterances (default 24)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    import transformers

    entries = audio.read_manifest(args.audio)
    chosen = np.linspace(0, len(entries) - 1, args.clips).astype(int)
    clips = [audio.load(entries[i]["audio"]) for i in chosen]
    seconds = sum(map(len, clips)) / audio.SAMPLE_RATE
    with tempfile.TemporaryDirectory() as folder:
        hubert = Path(folder) / "hubert-base"
        hubert.mkdir()
        # Facebook/hubert-base-ls960.
        base = Config(
            conv_dim=(512,) * 7, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, num_conv_pos_embeddings=128, do_stable_layer_norm=False,
        )
        Hubert.fresh(base, 0).save(hubert)
        theirs = transformers.HubertModel.from_pretrained(hubert).to(args.device).eval()
        with torch.inference_mode():
            some = Hubert.load(hubert, args.device)(
                torch.from_numpy(clips[0])[None].to(args.device), LAYER
            )[0]
        centroids = (some - some.mean(0))[
            torch.randperm(len(some), generator=torch.Generator().manual_seed(0))[:K]
        ].clone()
        save_file({"centroids": centroids.cpu()}, Path(folder) / "codebook.safetensors")
        recipe = {
            "features": {
                "kind": "hubert",
                "path": str(hubert),
                "layer": LAYER,
                "sha256": runs.fingerprint(hubert),
            },
            "k": len(centroids),
            "frame_rate": 50,
            "collapse": True,
            "switch": 0,
            "sha256": runs.fingerprint(Path(folder) / "codebook.safetensors"),
        }
        (Path(folder) / "codebook.json").write_text(json.dumps(recipe))
        ears = {
            bf16: AudioTokenizer(
                folder, args.device, dtype=torch.bfloat16 if bf16 else torch.float32
            )
            for bf16 in (False, True)
        }
    hear = lambda bf16: [units for units, _ in ears[bf16].many(clips)]

    @torch.inference_mode()
    def peer(bf16, batch):
        out = [None] * len(clips)
        order = sorted(range(len(clips)), key=lambda i: len(clips[i]))
        for a in range(0, len(order), batch):
            part = order[a : a + batch]
            x = torch.nn.utils.rnn.pad_sequence(
                [torch.nn.functional.pad(torch.from_numpy(clips[i]), (40, 40)) for i in part],
                batch_first=True,
            ).to(args.device)
            mask = torch.stack(
                [(torch.arange(x.shape[1]) < len(clips[i]) + 80).long() for i in part]
            ).to(args.device)
            with torch.autocast(args.device, torch.bfloat16, enabled=bf16):
                y = (
                    theirs(x, attention_mask=mask if batch > 1 else None, output_hidden_states=True)
                    .hidden_states[LAYER]
                    .float()
                )
            for i, row in zip(part, y):
                row = row[: len(clips[i]) // audio.HOP]
                out[i] = collapse(nearest(row - row.mean(0), centroids).cpu().numpy())[0]
        return out

    alone, said = peer(False, 1), hear(False)
    agree = lambda a, b: np.mean([len(x) == len(y) and (x == y).mean() for x, y in zip(a, b)])
    assert (
        agree(alone, said) > 0.99
    ), f"our units agree with transformers' on single clips in {agree(alone, said):.3f}"
    work = {
        "ours fp32": lambda: hear(False),
        "ours bf16": lambda: hear(True),
        "transformers fp32": lambda: peer(False, 8),
        "transformers bf16": lambda: peer(True, 8),
        "one file at a time": lambda: peer(False, 1),
    }
    times, units = {name: [] for name in work}, {}
    for _ in range(args.rounds):
        for name, run in work.items():
            began = time.perf_counter()
            units[name] = run()
            times[name].append(time.perf_counter() - began)
            print(f"{name:20} {seconds / times[name][-1]:6.2f} x real time", flush=True)
    rate = {name: seconds / median(t) for name, t in times.items()}
    kind = "cpu" if args.device == "cpu" else "h200"
    flips = {
        "same_clips_in_bf16": round(
            float(
                np.mean(
                    [np.array_equal(a, b) for a, b in zip(units["ours fp32"], units["ours bf16"])]
                )
            ),
            3,
        )
    }
    for mine, other in (
        ("fp32", "transformers fp32"),
        ("bf16", "transformers bf16"),
        ("bf16", "transformers fp32"),
        ("bf16", "one file at a time"),
    ):
        record(
            kind, f"tokenize/{mine} against {other}", "x real time, HuBERT-base, layer 9",
            rate[f"ours {mine}"], rate[other],
            f"{other}, transformers {transformers.__version__}", clips=len(clips),
            seconds=round(seconds), **flips,
        )


if __name__ == "__main__":
    main()
