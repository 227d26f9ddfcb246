"""What would the paper's own scale take? A plan, not a measurement: Qwen3-8B with LoRA on
30,000 hours of speech, by pretrain.py as it is.

in   results/bench-*.json, for rates that were measured
out  a table, which the README shows
run  python bench/plan.py

Parameters are counted on the model itself, without memory; bytes follow what pretrain.py keeps
(float32 weights, products in bfloat16, --recompute, no imitation).
"""

import json
import sys

import torch

from bench import ROOT

sys.path.insert(0, str(ROOT))
import weights
from fused import CHUNK
from model import LM, Config, add_lora

# Qwen3-8B, with rows for 500 units and two markers.
SHAPE = dict(
    architecture="Qwen3ForCausalLM", vocab_size=152576, hidden_size=4096,
    intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
)
RANK, HOURS = 64, 30_000  # the paper's
UNITS = 17.1  # a second, with runs collapsed: Spirit LM's totals
WORDS = 2.5  # a second, of English
TOKENS = 1.3  # of a word
TEXT = 0.2  # of all tokens: plain text that keeps the base a base
ROW, BATCH = 2048, 8  # tokens in a row, rows in a batch

# Products a second of one H200: measured through torch; and of its datasheet, with an assumed
# share of that (published runs of this size: 0.33 to 0.39).
GEMM = 790e12
PEAK, SHARE = 989e12, 0.3


def rate(kind, name, field):
    """A figure that bench/ measured, or None."""
    path = ROOT / f"results/bench-{kind}.json"
    if not path.exists():
        return None
    found = [row[field] for row in json.loads(path.read_text()) if row["name"].startswith(name)]
    return found[0] if found else None


def rows():
    with torch.device("meta"), weights.Unfilled():
        model = LM(Config(**SHAPE))
        plain = sum(p.numel() for p in model.parameters())
        add_lora(model, RANK, RANK)
    size = sum(p.numel() for p in model.parameters())
    c = SHAPE["hidden_size"]
    f = SHAPE["intermediate_size"]
    v = SHAPE["vocab_size"]
    n = ROW * BATCH
    low = size - plain
    tables = 2 * v * c
    memory = {
        "weights, float32": 4 * size,
        "gradients and optimizer state (LoRA: 8 bytes, rows: 12)": 8 * low + 12 * tables,
        f"states between blocks, {n:,} tokens": 4 * n * c * SHAPE["num_hidden_layers"],
        # Its activations: some of 2 bytes, some of 4.
        "one block, computed again": n * (10 * c + 5 * f) * 3,
        "loss: logits of a chunk, gradients of the head for text and units": (
            6 * CHUNK * v + (4 + 4 + 4 + 2) * v * c
        ),
    }
    measured = rate("h200", "train/1B", "bound_share")
    # Forward, forward again, gradients of inputs: 2 each; of LoRA's weights 2 more; the
    # embedding is looked up.
    work = 6 * (plain - v * c) + 8 * low
    speed = (measured * GEMM if measured else SHARE * PEAK) / work
    tokens = HOURS * 3600 * (UNITS + WORDS * TOKENS) / (1 - TEXT)
    yield "parameters", f"{plain / 1e9:.2f} B, LoRA of rank {RANK} {low / 1e6:.0f} M", "counted"
    for what, value in memory.items():
        yield what, f"{value / 1e9:.1f} GB", "counted" if what.startswith("weights") else "computed"
    yield "memory of a card", f"{sum(memory.values()) / 1e9:.0f} GB", "sum"
    mixed = f"{UNITS} units and {WORDS} words a second, a fifth plain text"
    yield "tokens, one pass over 30,000 hours", f"{tokens / 1e9:.1f} B", mixed
    yield "tokens a second on one H200", f"{speed:,.0f}", (
        f"{measured:.0%} of 790 TFLOP/s, measured"
        if measured
        else f"{SHARE:.0%} of 989 TFLOP/s, assumed: nothing measured yet"
    )
    yield "GPU-hours of training", f"{tokens / speed / 3600:.0f}", "tokens over speed"
    gpu = rate("h200", "tokenize/bf16 against transformers bf16", "ours")
    cpu = rate("cpu", "tokenize/corpus encode", "ours")
    if gpu:
        yield "GPU-hours of encoding", f"{HOURS / gpu:.1f}", f"{gpu:,.0f} times real time, measured"
    times = f"{cpu:.1f} times real time, measured"
    yield "hours of encoding on two CPU cores", f"{HOURS / cpu:,.0f}", times
    seconds = HOURS * 3600
    yield "disk: units and durations", f"{seconds * UNITS * 4 / 1e9:.1f} GB", "4 bytes a unit"


def table():
    return ["| what | plan | from |", "|---|---|---|"] + [
        f"| {' | '.join(row)} |" for row in rows()
    ]


if __name__ == "__main__":
    print("\n".join(table()))
