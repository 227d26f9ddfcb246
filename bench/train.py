"""How fast is a training step on packed documents? Ours against transformers: the same
weights, documents, AdamW and precision.

in   nothing
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): train/...
run  python bench/train.py    # wants bench/requirements.txt; about six minutes on two cores

A step is forward, loss, backward and AdamW; in bfloat16 under autocast with float32 weights.
Documents have lengths of a lognormal law. Peers: one 4-D mask for the row; one document a row,
padded, in batches of like length; and on a GPU torch.compile, and Liger's loss (liger-kernel).
Each in a process of its own, in interleaved rounds; one that fails is named and left out; the
gate: the losses of the first three steps must agree. Share of the bound: products that the
targets need, at the rate of one large product.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from fused import linear_cross_entropy
from model import LM, Config

LLAMA, QWEN2 = "LlamaForCausalLM", "Qwen2ForCausalLM"
TINY = dict(
    architecture=LLAMA, vocab_size=8192, hidden_size=256, intermediate_size=768,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
)
HALF = dict(
    architecture=QWEN2, vocab_size=152448, hidden_size=896, intermediate_size=4864,
    num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, head_dim=64,
)
ONE = dict(
    architecture=LLAMA, vocab_size=128768, hidden_size=2048, intermediate_size=8192,
    num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
)
WORK = {  # name: (config, rows, tokens in a row, mean length of a document, dtype)
    "cpu": {
        "tiny-fp32-512": (TINY, 8, 512, 96, "float32"),
        "tiny-fp32-2048": (TINY, 2, 2048, 256, "float32"),
        "tiny-bf16-2048": (TINY, 2, 2048, 256, "bfloat16"),
    },
    "cuda": {
        "0.5B-2048": (HALF, 16, 2048, 512, "bfloat16"),
        "1B-4096": (ONE, 8, 4096, 512, "bfloat16"),
    },
}
WAYS = {
    "cpu": ["ours", "transformers, 4-D mask", "transformers, padded"],
    "cuda": [
        "ours", "ours, compiled", "transformers, 4-D mask", "transformers, padded",
        "transformers, 4-D mask, compiled", "transformers, 4-D mask, Liger",
    ],
}
STEPS = {"cpu": 4, "cuda": 20}


def documents(rows, length, mean, vocab):
    """Packed rows: ids, start and target (rows, length), target -1 where a document ends."""
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, vocab, (rows, length)))
    start, target = torch.zeros_like(ids), torch.full_like(ids, -1)
    for row in range(rows):
        a = 0
        while a < length:
            # Its mean is `mean`.
            end = min(length, a + max(8, int(rng.lognormal(np.log(mean) - 0.18, 0.6))))
            start[row, a:end], target[row, a : end - 1], a = a, ids[row, a + 1 : end], end
    return ids, start, target


def padded(ids, start, target, room):
    """The same documents one a row, in batches of like length and at most `room` tokens:
    [(ids, target)]. What is behind a document's end is not seen: no mask.
    """
    cuts = [
        (row, a, int((start[row] == a).sum()) + a)
        for row in range(len(ids))
        for a in start[row].unique().tolist()
    ]
    cuts, batches = sorted(cuts, key=lambda c: c[2] - c[1]), [[]]
    for cut in cuts:
        if (len(batches[-1]) + 1) * (cut[2] - cut[1]) > room:
            batches.append([])
        batches[-1].append(cut)
    fill = lambda x, batch, value: torch.nn.utils.rnn.pad_sequence(
        [x[row, a:b] for row, a, b in batch], batch_first=True, padding_value=value
    )
    return [(fill(ids, batch, 0), fill(target, batch, -1)) for batch in batches]


def one(way, name, device):
    """The times, losses and peak memory of a way's steps, in this process."""
    shape, rows, length, mean, dtype = WORK[device][name]
    torch.manual_seed(0)
    ours = LM.fresh(Config(**shape, tie_word_embeddings=True), 0)
    ids, start, target = documents(rows, length, mean, shape["vocab_size"])
    n = int((target >= 0).sum())
    if way.startswith("ours"):
        model, weight = ours.to(device), ours.lm_head.weight
        if "compiled" in way:
            for block in model.model.layers:
                block.compile()
        ids, start, at = ids.to(device), start.to(device), target.to(device) >= 0
        target = target.to(device)[at]

        def passes():
            hidden = model.model(ids, start=start)[at]  # (N, C)
            yield linear_cross_entropy(hidden, weight, target, torch.ones(n, device=device))[0] / n

    else:
        import transformers

        kind = "Qwen2" if shape["architecture"] == QWEN2 else "Llama"
        config = getattr(transformers, f"{kind}Config")(
            **{k: v for k, v in shape.items() if k != "architecture"}, tie_word_embeddings=True,
            rms_norm_eps=1e-6, rope_theta=1e4,
        )
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        model.load_state_dict(ours.state_dict())
        model.to(device)
        del ours
        batches = [
            tuple(x.to(device) for x in batch)
            for batch in padded(ids, start, target, rows * length // 4)
        ]
        place, target, ids = torch.arange(length), target.to(device).flatten(), ids.to(device)
        mask = ((place >= start[:, :, None]) & (place <= place[:, None]))[:, None].to(device)
        positions = (place - start).to(device)  # (B, 1, T, T), (B, T)

        def loss(hidden, target):
            logits = model.lm_head(hidden).flatten(0, 1).float()
            return F.cross_entropy(logits, target.flatten(), ignore_index=-1, reduction="sum") / n

        if "Liger" in way:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            fused = LigerFusedLinearCrossEntropyLoss(ignore_index=-1)

            def loss(hidden, target):
                hidden = hidden.flatten(0, 1).bfloat16()
                return fused(model.lm_head.weight.bfloat16(), hidden, target.flatten())

        def whole(x, y, **given):
            return loss(model.model(input_ids=x, use_cache=False, **given).last_hidden_state, y)

        if "compiled" in way:
            whole = torch.compile(whole)

        def passes():
            if "padded" in way:
                for x, y in batches:
                    yield whole(x, y)
            else:
                yield whole(ids, target, attention_mask=mask, position_ids=positions)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    times, said = [], []
    for _ in range(STEPS[device] + (2 if device == "cpu" else 10)):
        sync()
        began, total = time.perf_counter(), 0.0
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            for part in passes():
                part.backward()
                total += part.detach()
        optimizer.step()
        sync()
        times.append(1000 * (time.perf_counter() - began))
        said.append(float(total))
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024
        * int(
            next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
        )
    )
    a = torch.randn(2048, 2048, device=device, dtype=getattr(torch, dtype))
    flops = []
    for _ in range(10):
        sync()
        began = time.perf_counter()
        a @ a
        sync()
        flops.append(2 * 2048**3 / (time.perf_counter() - began))
    # The embedding is the head too, so it counts once; attention is left out.
    needed = 6 * sum(p.numel() for p in model.parameters()) * n
    print(
        json.dumps(
            {
                "ms": median(times[-STEPS[device] :]),
                "losses": said,
                "mb": round(peak / 1e6),
                "n": n,
                "bound_ms": 1000 * needed / (790e12 if device == "cuda" else median(flops)),
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description="Time a training step on packed documents.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--work", choices=[*WORK["cpu"], *WORK["cuda"]],
        help="only this workload (default: all of the device)",
    )
    parser.add_argument("--way", help="only this one, here, as JSON")
    args = parser.parse_args()
    if args.way:
        one(args.way, args.work, args.device)
        return
    for name in [args.work] if args.work else WORK[args.device]:
        got, ways = {}, list(WAYS[args.device])
        for _ in range(args.rounds):
            for way in list(ways):
                done = subprocess.run(
                    [
                        sys.executable, __file__, "--way", way, "--work", name,
                        "--device", args.device,
                    ],
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    print(
                        f"{name:16} {way:34} left out: "
                        f"{(done.stderr.strip().splitlines() or ['killed'])[-1][:200]}",
                        flush=True,
                    )
                    ways.remove(way)
                    got.pop(way, None)
                    continue
                got.setdefault(way, []).append(json.loads(done.stdout))
                print(
                    f"{name:16} {way:34} {got[way][-1]['ms']:9.1f} ms  {got[way][-1]['mb']:6} MB",
                    flush=True,
                )
        if "ours" not in got:  # said above why
            continue
        dtype, tokens = WORK[args.device][name][4], got["ours"][0]["n"]
        for way, runs in got.items():
            apart = max(
                abs(a - b) / b for a, b in zip(runs[0]["losses"][:3], got["ours"][0]["losses"])
            )
            assert apart < (
                1e-4 if dtype == "float32" else 2e-2
            ), f"{way} and ours disagree: losses {apart:.2g} apart"
        rate = {way: tokens / median(run["ms"] for run in runs) * 1000 for way, runs in got.items()}
        best = max((way for way in rate if way.startswith("ours")), key=rate.get)
        share = median(run["bound_ms"] / run["ms"] for run in got[best])
        for way in rate:
            if not way.startswith("ours"):
                record(
                    "h200" if args.device == "cuda" else "cpu", f"train/{name} against {way}",
                    "targets a second, forward + backward + AdamW", rate[best], rate[way], way,
                    bound_share=round(share, 2), ours_is=best, mb=got[best][0]["mb"],
                    peer_mb=got[way][0]["mb"],
                )


if __name__ == "__main__":
    main()
