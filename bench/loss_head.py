"""How fast and how small is the loss of a large vocabulary? fused.linear_cross_entropy against
all logits at once, forward and backward.

in   nothing
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): loss_head/...
run  python bench/loss_head.py    # two minutes on two cores

8,192 targets, width 256, 32,000 rows in float32 on a CPU; 32,768 targets, 896, 152,448 in
bfloat16 on a GPU. Each way in a process of its own, so that its peak of memory is its own; the
gate: losses and gradients must agree. `--real` weighs our way at the GPU's size on a CPU (all
logits would take some 60 GB there), against the goal of 3 GB.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from fused import linear_cross_entropy

SHAPES = {"cpu": (8192, 256, 32_000, torch.float32), "cuda": (32_768, 896, 152_448, torch.bfloat16)}
WAYS = {
    "ours": lambda h, w, t: linear_cross_entropy(h, w, t, torch.ones(len(t), device=h.device))[0],
    "F.cross_entropy of all logits": lambda h, w, t: F.cross_entropy(
        (h @ w.T).float(), t, reduction="sum"
    ),
}


def one(way, device, rounds, shape):
    """Time a way, and measure what it takes above its inputs, in this process."""
    N, C, V, dtype = shape
    torch.manual_seed(0)
    h = torch.randn(N, C, device=device, dtype=dtype, requires_grad=True)
    w = (torch.randn(V, C, device=device) / C**0.5).to(dtype).requires_grad_()
    t, times = torch.randint(0, V, (N,), device=device), []
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def resident(which):
        line = next(line for line in open("/proc/self/status") if line.startswith(which))
        return int(line.split()[1]) / 1e3

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else resident("VmRSS")
    for _ in range(rounds + 1):
        h.grad = w.grad = None
        sync()
        began = time.perf_counter()
        loss = WAYS[way](h, w, t)
        loss.backward()
        sync()
        times.append(1000 * (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else resident("VmHWM")
    print(
        json.dumps(
            {
                "ms": median(times[1:] or times),
                "mb": round(peak - before),
                "loss": loss.item(),
                "gradients": [h.grad.float().norm().item(), w.grad.float().norm().item()],
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description="Time and weigh the loss of a large vocabulary.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--way", choices=WAYS, help="only this one, here, as JSON")
    parser.add_argument(
        "--real", action="store_true", help="a CPU takes the GPU's size: only the memory of ours"
    )
    args = parser.parse_args()
    args.device = "cpu" if args.real else args.device
    if args.way:
        one(args.way, args.device, args.rounds, SHAPES["cuda" if args.real else args.device])
        return

    def run(way, rounds):
        words = ["--way", way, "--rounds", str(rounds), "--device", args.device]
        words += ["--real"] * args.real
        done = subprocess.run(
            [sys.executable, __file__, *words], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    if args.real:
        N, C, V, _ = SHAPES["cuda"]
        record(
            "cpu", "loss_head/memory at a real size",
            f"MB above the inputs, forward + backward, {N} targets, width {C}, {V} rows",
            run("ours", 0)["mb"], 3000, "the goal", better="less",
        )
        return
    got = {way: run(way, args.rounds) for way in WAYS}
    ours = got.pop("ours")
    for way, theirs in got.items():
        for a, b in zip([ours["loss"], *ours["gradients"]], [theirs["loss"], *theirs["gradients"]]):
            assert abs(a - b) < 1e-2 * abs(b), f"{way} and ours disagree: {b} and {a}"
        N, C, V, _ = SHAPES[args.device]
        kind = "h200" if args.device == "cuda" else "cpu"
        shape = f"forward + backward, {N} targets, width {C}, {V} rows"
        record(
            kind, f"loss_head/time against {way}", f"ms, {shape}", ours["ms"], theirs["ms"],
            way, better="less",
        )
        record(
            kind, f"loss_head/memory against {way}", f"MB above the inputs, {shape}",
            ours["mb"], theirs["mb"], way, better="less",
        )


if __name__ == "__main__":
    main()
