import torch

from fused import attention


def slow_attention(q, k, v, start):
    """The definition, in float64: query i of the last T positions sees keys start[i] to i. q (B, H, T, D), k and v (B, KV, S, D)."""
    B, H, T, D = q.shape
    S, group = k.shape[2], H // k.shape[1]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                i, a = S - T + t, int(start[b, t])
                keys, values = k[b, h // group, a:i + 1].double(), v[b, h // group, a:i + 1].double()
                out[b, h, t] = (keys @ q[b, h, t].double() / D ** 0.5).softmax(0) @ values
    return out


def random(B, H, KV, T, S, D):
    torch.manual_seed(0)
    return torch.randn(B, H, T, D), torch.randn(B, KV, S, D), torch.randn(B, KV, S, D)


def test_packed_documents_do_not_see_each_other():
    q, k, v = random(2, 4, 2, 11, 11, 8)
    start = torch.tensor([[0] * 4 + [4] * 5 + [9] * 2, [0] * 11])
    assert torch.allclose(attention(q, k, v, start).double(), slow_attention(q, k, v, start), atol=1e-5)


def test_without_starts_it_is_plain_causal_attention_with_grouped_heads():
    q, k, v = random(2, 6, 2, 9, 9, 4)
    assert torch.allclose(attention(q, k, v).double(), slow_attention(q, k, v, torch.zeros(2, 9)), atol=1e-5)


def test_with_a_cache_the_queries_are_the_last_positions():
    for T in (1, 3):
        q, k, v = random(2, 2, 2, T, 10, 4)
        start = torch.tensor([[2] * T, [0] * T])
        assert torch.allclose(attention(q, k, v, start).double(), slow_attention(q, k, v, start), atol=1e-5)
        assert torch.allclose(attention(q, k, v).double(), slow_attention(q, k, v, torch.zeros(2, T)), atol=1e-5)


def test_gradients_are_those_of_the_definition():
    q, k, v = (t.requires_grad_() for t in random(1, 2, 1, 6, 6, 4))
    start = torch.tensor([[0, 0, 0, 3, 3, 3]])
    ours = torch.autograd.grad(attention(q, k, v, start).pow(2).sum(), (q, k, v))
    keep = (torch.arange(6) >= start[0][:, None]) & (torch.arange(6) <= torch.arange(6)[:, None])
    kk, vv = k.expand(1, 2, 6, 4).double(), v.expand(1, 2, 6, 4).double()
    y = (q.double() @ kk.transpose(-1, -2) / 2).masked_fill(~keep, -torch.inf).softmax(-1) @ vv
    for a, b in zip(ours, torch.autograd.grad(y.pow(2).sum(), (q, k, v))):
        assert torch.allclose(a, b, atol=1e-4)
