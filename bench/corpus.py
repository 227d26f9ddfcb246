"""A small corpus as its user would do it: fit and encode 251 utterances with a random
HuBERT-base of real size, killed once and gone on with.

in   ../shared/data/librispeech_mini (or --audio FOLDER)
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): tokenize/corpus *
run  python bench/corpus.py    # about ten minutes on two cores

Whole processes, decoding and start included. The gate: every clip is there once, in order, and
one in ten has the units that it has when heard alone.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import ROOT, record

sys.path.insert(0, str(ROOT))
import audio
from hubert import Config, Hubert
from tokenize_audio import AudioTokenizer


def main():
    parser = argparse.ArgumentParser(description="Fit and encode a corpus, killed once.")
    parser.add_argument(
        "--audio", default=ROOT.parent / "shared/data/librispeech_mini", help="a folder of audio"
    )
    parser.add_argument("--bf16", action="store_true", help="encode with products in bfloat16")
    args = parser.parse_args()
    entries = audio.read_manifest(args.audio)
    with tempfile.TemporaryDirectory() as folder:
        at = lambda name: str(Path(folder) / name)
        # Facebook/hubert-base-ls960.
        base = Config(
            conv_dim=(512,) * 7, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12, num_conv_pos_embeddings=128, do_stable_layer_norm=False,
        )
        Path(at("hubert")).mkdir()
        Hubert.fresh(base, 0).save(at("hubert"))
        script = [sys.executable, str(ROOT / "tokenize_audio.py")]
        began = time.perf_counter()
        subprocess.run(
            [
                *script, "fit", "--manifest", str(args.audio), "--hubert", at("hubert"),
                "--layer", "9", "--k", "500", "--out", at("codebook"),
            ],
            check=True,
        )
        fitted = time.perf_counter() - began
        words = [
            *script, "encode", "--manifest", str(args.audio), "--codebook", at("codebook"),
            "--out", at("units"), "--dtype", "bfloat16" if args.bf16 else "float32",
        ]
        began, counts = time.perf_counter(), Path(at("units.partial")) / "counts.bin"
        first = subprocess.Popen(words)
        while not counts.exists() or counts.stat().st_size < 8 * len(entries) // 2:
            assert first.poll() is None, "it ended before it could be killed"
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
        killed = time.perf_counter() - began
        subprocess.run(words, check=True)
        encoded = time.perf_counter() - began
        units = audio.Units(at("units"))
        ears = AudioTokenizer(at("codebook"), dtype=torch.bfloat16 if args.bf16 else torch.float32)
        assert [entry["audio"] for entry in units.entries] == [
            entry["audio"] for entry in entries
        ], "every clip once, in order"
        seconds, same = sum(entry["seconds"] for entry in units.entries), []
        for i in range(0, len(entries), 10):
            alone, heard = ears(audio.load(entries[i]["audio"]))[0], units[i][0]
            same.append(len(alone) == len(heard) and np.mean(alone == heard))
        assert (
            np.mean(same) > 0.99
        ), f"units of batches and of single clips agree in {np.mean(same):.3f}"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for name, took in (
        ("fit", fitted),
        ("encode" + " bf16" * args.bf16 + ", killed once", encoded),
    ):
        record(
            {"cpu": "cpu", "cuda": "h200"}[kind],
            f"tokenize/corpus {name}",
            "x real time, whole process, HuBERT-base, layer 9",
            seconds / took,
            1.0,
            "real time",
            clips=len(entries),
            seconds=round(seconds),
            killed_after=round(killed),
            agree=round(float(np.mean(same)), 4),
        )


if __name__ == "__main__":
    main()
