"""What a language model must fuse to fit in memory and run fast. For now one function: attention over packed documents.

in   queries, keys, values of packed rows            out  the attended values
see  FlashAttention (arXiv:2205.14135); PyTorch's scaled_dot_product_attention does the work here
run  python -m pytest tests/test_fused.py
"""
import torch
import torch.nn.functional as F


def attention(q, k, v, start=None):
    """Causal attention in which a query sees no key before the start of its own document.

    q      (B, H, T, D)   queries; the last T of the S positions
    k, v   (B, KV, S, D)  keys and values, KV dividing H (grouped heads share them); S = T in training, S >= T with a cache
    start  (B, T) int     index of the first key each query may see; None: everything before it
    returns (B, H, T, D). Key j is visible to query i iff start[i] <= j <= i: that is the whole mask of packed documents.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if start is None and (T == S or T == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=grouped)
    key = torch.arange(S, device=q.device)                                                    # (S,)
    visible = key <= torch.arange(S - T, S, device=q.device)[:, None]                         # (T, S): the past and itself
    visible = visible[None, None] if start is None else (visible & (key >= start[:, :, None]))[:, None]   # (B or 1, 1, T, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
