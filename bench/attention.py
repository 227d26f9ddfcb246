"""How fast is attention over packed documents, forward and backward? fused.attention against
one mask for all, and on a GPU against its other rivals.

in   nothing
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): attention/documents, and on a
     GPU attention/causal
run  python bench/attention.py    # a minute on two cores

Qwen2.5-0.5B's heads (14 of 64, 2 for keys), one row of 2,048 on a CPU, 16 of them on a GPU,
documents of 256. Interleaved rounds, medians; a GPU's rivals: varlen attention (documents one
behind the other, no rows), FlexAttention with a document mask, its building counted, and where
there are no documents PyTorch's flash and cuDNN kernels. First the gate: all must agree, in
what they give and in the gradient of the queries.
"""

import argparse
import inspect
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from fused import attention

H, KV, D, T, DOCUMENT = 14, 2, 64, 2048, 256


def varlen(q, k, v):
    """(torch's attention over documents of DOCUMENT tokens, its inputs): what it wants is
    (tokens, heads, D), so its inputs are copies, made once.
    """
    from torch.nn.attention.varlen import varlen_attn

    # (B * T, heads, D).
    q, k, v = (
        x.detach().transpose(1, 2).flatten(0, 1).contiguous().requires_grad_() for x in (q, k, v)
    )
    ends = torch.arange(0, len(q) + 1, DOCUMENT, device=q.device, dtype=torch.int32)
    grouped = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )
    # (B, H, T, D).
    return lambda: varlen_attn(
        q, k, v, ends, ends, DOCUMENT, DOCUMENT, window_size=(-1, 0), **grouped
    ).unflatten(0, (-1, T)).transpose(1, 2), (q, k, v)


def main():
    parser = argparse.ArgumentParser(description="Time attention over packed documents.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    torch.manual_seed(0)
    B, dtype = (16, torch.bfloat16) if gpu else (1, torch.float32)
    q, k, v = (
        torch.randn(B, heads, T, D, device=args.device, dtype=dtype, requires_grad=True)
        for heads in (H, KV, KV)
    )
    leaves = (q, k, v)
    g = torch.randn(B, H, T, D, device=args.device, dtype=dtype)
    place = torch.arange(T, device=args.device)
    documents = (place // DOCUMENT * DOCUMENT).expand(B, T)
    whole = torch.zeros(B, T, dtype=torch.long, device=args.device)
    mask = (place >= documents[0][:, None]) & (place <= place[:, None])  # (T, T)

    def plain(backend):
        def work():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return work

    races = {
        "documents": {
            "ours": lambda: attention(q, k, v, documents),
            "one mask": lambda: F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=True
            ),
        }
    }
    if gpu:
        races["documents"]["varlen"], others = varlen(q, k, v)
        leaves = (*leaves, *others)
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = torch.compile(flex_attention)
        same = lambda b, h, i, j: (j <= i) & (documents[b, i] == documents[b, j])
        races["documents"]["FlexAttention"] = lambda: flex(
            q, k, v,
            block_mask=create_block_mask(same, B, None, T, T, device=args.device, _compile=True),
            enable_gqa=True,
        )
        races["causal"] = {
            "ours": lambda: attention(q, k, v, whole),
            "SDPA flash": plain(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": plain(SDPBackend.CUDNN_ATTENTION),
        }
    for race, runs in races.items():
        said = {}
        for name, run in runs.items():
            for x in leaves:
                x.grad = None
            y = run()
            y.backward(g)
            slope = next(x.grad for x in leaves if x.grad is not None).float()
            # (B, H, T, D) each.
            said[name] = y.detach().float(), (
                slope if slope.dim() == 4 else slope.unflatten(0, (-1, T)).transpose(1, 2)
            )
            for ours, theirs in zip(said["ours"], said[name]):
                assert (ours - theirs).norm() < (
                    2e-2 if gpu else 1e-5
                ) * ours.norm(), f"{name} and ours disagree"
        phases, times = ("forward", "forward + backward"), {}
        for _ in range(args.rounds):
            for name, run in runs.items():
                for phase in phases:
                    for _ in ("warm", "timed"):
                        for x in leaves:
                            x.grad = None
                        if gpu:
                            torch.cuda.synchronize()
                        began = time.perf_counter()
                        with torch.set_grad_enabled(phase != "forward"):
                            y = run()
                        if phase != "forward":
                            y.backward(g)
                        if gpu:
                            torch.cuda.synchronize()
                    times.setdefault((name, phase), []).append(1000 * (time.perf_counter() - began))
        shape = f"{B} x {T}" + (f", documents of {DOCUMENT}" if race == "documents" else "")
        for name in [name for name in runs if name != "ours"]:
            for phase in phases:
                record(
                    "h200" if gpu else "cpu", f"attention/{race}, {phase}, against {name}",
                    f"ms, {shape}", median(times["ours", phase]), median(times[name, phase]),
                    f"{name}, torch {torch.__version__.partition('+')[0]}", better="less",
                )


if __name__ == "__main__":
    main()
