"""How much of the machine does a training step use? pretrain.py's own loop on the toy's text,
beside one large product.

in   nothing
out  a row of results/bench-cpu.json: step/...
run  python bench/step.py [--dtype float32]    # half a minute; a minute in float32

tokens a second x 6 x parameters are the operations that a step needs at least: two for every
weight and token forward, four backward. The bound is the rate of a product of the step's own
size, 2048 x 256 x 768, in the same dtype, measured before and after.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import ROOT, record

sys.path.insert(0, str(ROOT))
import runs
import toy
import weights

STEPS, PRODUCT = 100, (2048, 256, 768)


def main():
    parser = argparse.ArgumentParser(
        description="Share of the machine's product rate that a training step reaches."
    )
    runs.add_dtype(parser)
    dtype = runs.arithmetic(parser.parse_args().dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        folder, world, rng = Path(folder), toy.World(0), random.Random(0)
        toy.write_tokenizer(
            toy.word_counts(world, random.Random("tokenizer 0")), folder / "tokenizer"
        )
        (folder / "base.jsonl").write_text(
            "".join(
                json.dumps({"text": toy.base_document(world, rng)}) + "\n" for _ in range(10_000)
            )
        )
        before = runs.product_rate(dtype, PRODUCT)
        subprocess.run(
            [
                sys.executable, ROOT / "pretrain.py", "--size", "nano",
                "--tokenizer", folder / "tokenizer", "--text", folder / "base.jsonl",
                "--steps", str(STEPS), "--dtype", runs.name_of(dtype), "--device", "cpu",
                "--out", folder / "base",
            ],
            check=True,
        )
        bound = (before + runs.product_rate(dtype, PRODUCT)) / 2
        tensors = weights.Tensors(folder / "base")
        size = sum(tensors[name].numel() for name in tensors)
        speed = json.loads((folder / "base/log.jsonl").read_text().splitlines()[-1])[
            "tokens_per_second"
        ]
    record(
        "cpu", f"step/nano-{runs.name_of(dtype)}", "GFLOP/s, 6 x parameters x tokens a second",
        6 * size * speed / 1e9, bound / 1e9, f"one product {'x'.join(map(str, PRODUCT))}",
        bound_share=round(6 * size * speed / bound, 3), tokens_per_second=speed,
    )


if __name__ == "__main__":
    main()
