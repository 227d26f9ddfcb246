import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fused
from conftest import ROOT
from fused import attention


def slow_attention(q, k, v, start):
    """The definition, in float64: query i of the last T positions sees keys start[i] to i. q
    (B, H, T, D), k and v (B, KV, S, D).
    """
    B, H, T, D = q.shape
    S, group = k.shape[2], H // k.shape[1]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                i, a = S - T + t, int(start[b, t])
                keys = k[b, h // group, a : i + 1].double()
                values = v[b, h // group, a : i + 1].double()
                out[b, h, t] = (keys @ q[b, h, t].double() / D**0.5).softmax(0) @ values
    return out


def random(B, H, KV, T, S, D):
    torch.manual_seed(0)
    return torch.randn(B, H, T, D), torch.randn(B, KV, S, D), torch.randn(B, KV, S, D)


def test_packed_documents_do_not_see_each_other():
    q, k, v = random(2, 4, 2, 11, 11, 8)
    start = torch.tensor([[0] * 4 + [4] * 5 + [9] * 2, [0] * 11])
    assert torch.allclose(
        attention(q, k, v, start).double(), slow_attention(q, k, v, start), atol=1e-5
    )


def test_documents_attended_to_one_by_one_give_what_one_mask_gives(monkeypatch):
    q, k, v = random(2, 4, 2, 64, 64, 8)
    start = torch.tensor([[0] * 40 + [40] * 24, [0] * 64])
    one_by_one = attention(q, k, v, start)
    monkeypatch.setattr(fused, "LOOP_FROM", 1000)
    assert torch.allclose(one_by_one, attention(q, k, v, start), atol=1e-6)
    assert torch.allclose(one_by_one.double(), slow_attention(q, k, v, start), atol=1e-5)


def test_without_starts_it_is_plain_causal_attention_with_grouped_heads():
    q, k, v = random(2, 6, 2, 9, 9, 4)
    assert torch.allclose(
        attention(q, k, v).double(), slow_attention(q, k, v, torch.zeros(2, 9)), atol=1e-5
    )


def test_with_a_cache_the_queries_are_the_last_positions():
    for T in (1, 3):
        q, k, v = random(2, 2, 2, T, 10, 4)
        start = torch.tensor([[2] * T, [0] * T])
        assert torch.allclose(
            attention(q, k, v, start).double(), slow_attention(q, k, v, start), atol=1e-5
        )
        assert torch.allclose(
            attention(q, k, v).double(), slow_attention(q, k, v, torch.zeros(2, T)), atol=1e-5
        )


def test_gradients_are_those_of_the_definition():
    q, k, v = (t.requires_grad_() for t in random(1, 2, 1, 6, 6, 4))
    start = torch.tensor([[0, 0, 0, 3, 3, 3]])
    ours = torch.autograd.grad(attention(q, k, v, start).pow(2).sum(), (q, k, v))
    keep = (torch.arange(6) >= start[0][:, None]) & (torch.arange(6) <= torch.arange(6)[:, None])
    kk, vv = k.expand(1, 2, 6, 4).double(), v.expand(1, 2, 6, 4).double()
    y = (q.double() @ kk.transpose(-1, -2) / 2).masked_fill(~keep, -torch.inf).softmax(-1) @ vv
    for a, b in zip(ours, torch.autograd.grad(y.pow(2).sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-4)


def test_short_rows_in_bfloat16_are_attended_to_by_hand_with_the_same_result_and_gradients(
    monkeypatch,
):
    exact = [x.double().requires_grad_() for x in random(2, 4, 2, 40, 40, 16)]
    start = torch.tensor([[0] * 25 + [25] * 15, [0] * 3 + [3] * 37])
    hands = []
    monkeypatch.setattr(
        fused, "by_hand", lambda *parts, real=fused.by_hand: hands.append(1) or real(*parts)
    )
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    got, wanted = attention(*half, start), attention(*exact, start)
    assert hands == [1] and got.dtype == torch.bfloat16
    for mine, theirs in [
        (got, wanted),
        *zip(
            torch.autograd.grad(got.float().pow(2).sum(), half),
            torch.autograd.grad(wanted.pow(2).sum(), exact),
        ),
    ]:
        assert (mine.double() - theirs).norm() < 0.02 * theirs.norm()
    with torch.no_grad():
        attention(*half, start)
    # Without a gradient nothing needs to be kept.
    assert hands == [1]


# --- the kernels: numbers by Triton's interpreter where there is no GPU, machine code by
# its compiler ---

GPU = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {  # B, H, KV, T, D, where documents of the first row begin
    "documents that cross tiles": (2, 4, 2, 150, 64, [40, 41, 100]),
    "one document": (1, 3, 3, 70, 32, []),
    "a width that is no power of two": (1, 2, 1, 130, 80, [64, 129]),
    "Qwen's heads": (1, 14, 2, 70, 64, [5]),
    "wide heads": (1, 2, 2, 65, 128, [1, 63]),
    "every token alone": (1, 1, 1, 66, 16, list(range(1, 66))),
}


@pytest.mark.parametrize(
    "dtype, tolerance",
    [
        (torch.float32, 1e-5),
        (torch.float16, 2e-3),
        *([(torch.bfloat16, 1e-2)] if GPU == "cuda" else []),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_give_the_definition_and_its_gradients(case, dtype, tolerance):
    pytest.importorskip("triton")
    B, H, KV, T, D, begins = CASES[case]
    torch.manual_seed(0)
    exact = [
        torch.randn(B, heads, T, D, dtype=torch.float64, device=GPU).requires_grad_()
        for heads in (H, KV, KV)
    ]
    g = torch.randn(B, H, T, D, dtype=torch.float64, device=GPU)
    start = torch.zeros(B, T, dtype=torch.int32, device=GPU)
    for begin in begins:
        start[0, begin:] = begin
    key = torch.arange(T, device=GPU)
    visible = (key >= start[:, :, None]) & (key <= key[:, None])
    wanted = F.scaled_dot_product_attention(*exact, attn_mask=visible[:, None], enable_gqa=True)
    wanted.backward(g)
    ours = [x.detach().to(dtype).requires_grad_() for x in exact]
    got = fused.Flash.apply(*ours, start)
    got.backward(g.to(dtype))
    for mine, theirs in [(got, wanted), *((a.grad, b.grad) for a, b in zip(ours, exact))]:
        assert (mine.double() - theirs).norm() < tolerance * (1 + theirs.norm())


def test_what_the_kernels_cannot_do_is_refused_by_name():
    pytest.importorskip("triton")
    x = torch.zeros(1, 2, 8, 32, device=GPU)
    start = torch.zeros(1, 8, dtype=torch.int32, device=GPU)
    with pytest.raises(ValueError, match="a head width of at most 128"):
        fused.Flash.apply(*[torch.zeros(1, 2, 8, 256, device=GPU)] * 3, start)
    with pytest.raises(ValueError, match="wanted one dtype"):
        fused.Flash.apply(x, x.half(), x, start)
    if GPU == "cpu":
        with pytest.raises(ValueError, match="interpreter takes bfloat16 for whole numbers"):
            fused.Flash.apply(*[x.bfloat16()] * 3, start)


COMPILE = """
import re, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import fused
types = {"START": "*i32", "END": "*i32", "GO": "*fp32", "LSE": "*fp32", "scale": "fp32"}
types |= dict.fromkeys(["H", "KV", "T", "D"], "i32")

def compiled(arch, D, kernel, M):
    fixed = {"WIDTH": D, "M": M, "N": fused.TILE}
    signature = {name: types.get(name, "*bf16") for name in kernel.arg_names}
    signature |= dict.fromkeys(fixed, "constexpr")
    whole = [name == "D" or kind.startswith("*") for name, kind in signature.items()]
    aligned = {(n,): [["tt.divisibility", 16]] for n, true in enumerate(whole) if true}
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=fused.LAUNCH)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        words = [dump, "--dump-resource-usage", file.name]
        used = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\\d+)", used)[1]
    products = len(re.findall("wgmma.mma_async" if arch == 90 else "mma.sync", made.asm["ptx"]))
    return arch, D, stack, made.metadata.shared, products, kernel.__name__

kernels = []
for arch in (80, 90):
    for D in (64, 128):
        forward = 128 if D <= 64 else 64
        kernels.append((arch, D, fused.forward_kernel, forward))
        kernels.append((arch, D, fused.query_kernel, 64))
        kernels.append((arch, D, fused.key_kernel, 32))
with ThreadPoolExecutor(2) as pool:
    for row in pool.map(compiled, *zip(*kernels)):
        print(*row)
"""


def test_every_kernel_compiles_for_a100_and_h100_without_spills_and_on_tensor_cores(tmp_path):
    pytest.importorskip("triton")
    # The compiler reads a kernel's source from its file.
    (tmp_path / "compile.py").write_text(COMPILE)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "compile.py")], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 12
    for arch, D, stack, shared, products, name in rows:
        assert int(stack) == 0, f"{name} spills on sm_{arch} at width {D}"
        assert int(shared) <= {"80": 163, "90": 227}[arch] << 10
        assert int(products) > 0, (name, arch, D)


# --- the loss ---


@pytest.mark.parametrize("barring", [False, True])
def test_the_loss_in_pieces_is_the_loss_in_one_with_its_gradients(monkeypatch, barring):
    monkeypatch.setattr(fused, "CHUNK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(40, 12)
    weight = torch.randn(90, 12)
    loss_weight = torch.rand(40)
    target = torch.randint(0, 50, (40,))
    masked = torch.arange(90) >= 50 if barring else None
    a = [x.clone().requires_grad_() for x in (hidden, weight)]
    b = [x.double().requires_grad_() for x in (hidden, weight)]
    total, each = fused.linear_cross_entropy(*a, target, loss_weight, masked)
    logits = b[0] @ b[1].T
    wanted = F.cross_entropy(
        logits if masked is None else logits.masked_fill(masked, -torch.inf), target,
        reduction="none",
    )
    (3 * total).backward()
    (3 * (wanted * loss_weight).sum()).backward()
    assert torch.allclose(each.double(), wanted, atol=1e-5) and not each.requires_grad
    assert all(torch.allclose(x.grad.double(), y.grad, atol=1e-5) for x, y in zip(a, b))


def test_the_loss_never_holds_all_logits():
    """4,096 targets on 60,000 rows: 983 MB of logits, and as much again for their gradient, if
    made at once.
    """
    code = (
        "import sys; sys.path.append('tests'); from memory import peak\n"
        "import torch, fused; torch.set_num_threads(1); fused.CHUNK = 256\n"
        "h, w = torch.randn(4096, 16, requires_grad=True), torch.randn(60000, 16, "
        "requires_grad=True)\n"
        "before = peak()\n"
        "fused.linear_cross_entropy(h, w, torch.randint(0, 60000, (4096,)), "
        "torch.ones(4096))[0].backward()\n"
        "print(round(peak() - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and int(done.stdout) < 400, done.stdout + done.stderr
