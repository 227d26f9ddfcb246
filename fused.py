"""What a language model must fuse to fit in memory and to be fast: attention, and its loss.

in   queries, keys, values of packed rows; hidden states and the output embedding
out  attended values; cross-entropy
see  FlashAttention 2 (arXiv:2307.08691), online softmax (arXiv:1805.02867); Cut Your Losses
     (arXiv:2411.09009) for the loss
run  python -m pytest tests/test_fused.py

**Attention without its matrix.** A softmax over keys can be taken a tile of keys at a
time. Keep, for each query, the largest score so far m, the sum l of exp(score - m), and
the sum a of exp(score - m) * value. A tile may bring a larger maximum m'. Then l and a are
multiplied by exp(m - m'), so that they count from m', and the tile's own terms are added.
After the last tile a / l is attention. Only m + log l is kept for the backward pass, which
makes every probability again: p = exp(score - (m + log l)). With o = sum p v and the
gradient g of o, the gradient of a score is p * (g.v - g.o), and that of a value p * g.

**Packed documents.** Key j is visible to query i iff start[i] <= j <= i, or, seen from
the key, iff j <= i <= end[j]: two whole numbers a position are the mask, and a tile that
they exclude is never read. A row of four documents costs a quarter of the pairs of one of
its length.

Dimension key:  B batch   T queries   S keys   H heads   KV key heads   D head width
                N targets   C width   V rows of the head
"""

import math

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: PyTorch's own attention does the work
    triton = None

TILE = 64  # queries or keys of a tile
LAUNCH = {"num_warps": 8, "num_stages": 2}  # no spills on sm_80, sm_90: tests/test_fused.py
WIDEST = 128  # head width that the kernels take
CHUNK = 2048  # targets whose logits are alive at a time

# Packed rows on a CPU go the way that is fastest there:
#   documents of this mean length and more            one by one
#   shorter ones, training in bfloat16 in short rows   the formula written out
#   all others                                         under one mask
LOOP_FROM = 64  # ids
BY_HAND = 256  # ids, at most, of a short row


# --- attention ----------------------------------------------------------------


def attention(q, k, v, start=None):
    """Causal attention in which a query sees no key before the start of its own document.

    q      (B, H, T, D)   queries; the last T of the S positions
    k, v   (B, KV, S, D)  keys and values, KV dividing H (grouped heads share them); S = T in
                          training, S >= T with a cache
    start  (B, T) int     index of the first key each query may see, never falling along a row;
                          None: everything before it
    returns (B, H, T, D). Key j is visible to query i iff start[i] <= j <= i: that is the whole mask
    of packed documents.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if start is None and T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

    # Whole packed rows: on a GPU by the kernels below, on a CPU in the way that is
    # fastest there.
    half = q.dtype in (torch.float16, torch.bfloat16)
    if T == S and q.is_cuda and triton and half and q.shape[-1] <= WIDEST:
        with torch.cuda.device(q.device):  # Triton launches where torch is
            return Flash.apply(
                q.contiguous(), k.contiguous(), v.contiguous(), start.int().contiguous()
            )
    key = torch.arange(S, device=q.device)                          # (S,)
    if T == S and not q.is_cuda:
        begins = start == key                                       # (B, T)
        if start.numel() >= LOOP_FROM * begins.sum():
            return one_by_one(q, k, v, begins)
        if T <= BY_HAND and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
            return by_hand(q, k, v, start, key)

    # With a cache, or under one mask. A single query at the end sees all.
    visible = None
    if T > 1 or start is not None:
        past = key <= torch.arange(S - T, S, device=q.device)[:, None]  # (T, S)
        visible = past[None, None]                                  # (1, 1, T, S)
        if start is not None:
            visible = (past & (key >= start[:, :, None]))[:, None]  # (B, 1, T, S)
    if T == 1:
        # Heads that share keys are as good as so many queries, and several times faster.
        shared = q.reshape(len(q), k.shape[1], -1, q.shape[3])      # (B, KV, H / KV, D)
        y = F.scaled_dot_product_attention(shared, k, v, attn_mask=visible)
        return y.reshape(q.shape)                                   # (B, H, 1, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)


def one_by_one(q, k, v, begins):
    """`attention` of whole rows, one document at a time. begins (B, T) bool: its first id."""
    grouped = q.shape[1] != k.shape[1]
    rows = []
    for b, row in enumerate(begins):
        cuts = [*row.nonzero()[:, 0].tolist(), begins.shape[1]]
        parts = []
        for a, c in zip(cuts, cuts[1:]):
            document = [x[b : b + 1, :, a:c] for x in (q, k, v)]    # (1, heads, c - a, D)
            flags = {"is_causal": True, "enable_gqa": grouped}
            parts.append(F.scaled_dot_product_attention(*document, **flags))
        rows.append(torch.cat(parts, dim=2))                        # (1, H, T, D)
    return torch.cat(rows)


def by_hand(q, k, v, start, key):
    """`attention` of whole rows as a formula: softmax(q k' / sqrt(D)) v.

    All probabilities are kept for the gradient, T x T of them a head: right for short
    rows. There a CPU, in bfloat16, needs a third of the time of PyTorch's fused backward
    pass.
    """
    B, H, T, D = q.shape
    unseen = (key > key[:, None]) | (key < start[:, :, None])       # (B, T, T)
    bias = torch.zeros(unseen.shape, dtype=q.dtype).masked_fill(unseen, -math.inf)
    groups = H // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)                          # (B, H, T, D)
    v = v.repeat_interleave(groups, dim=1)
    scores = q @ k.mT / D**0.5 + bias[:, None]                      # (B, H, T, T)
    return scores.softmax(-1, dtype=q.dtype) @ v                    # (B, H, T, D)


class Flash(torch.autograd.Function):
    """`attention` of whole packed rows (T = S) by the kernels below.

    q (B, H, T, D), k and v (B, KV, T, D), start (B, T) int32, all contiguous.
    """

    @staticmethod
    def forward(ctx, q, k, v, start):
        (B, H, T, D), KV = q.shape, k.shape[1]
        if not (k.dtype == v.dtype == q.dtype and D <= WIDEST and H % KV == 0):
            raise ValueError(
                f"attention: got queries {tuple(q.shape)} {q.dtype}, keys "
                f"{tuple(k.shape)} {k.dtype}, values {v.dtype}; wanted one dtype, a "
                f"head width of at most {WIDEST}, and key heads that divide the heads"
            )
        if q.dtype == torch.bfloat16 and not q.is_cuda:
            raise ValueError(
                "attention: Triton's interpreter takes bfloat16 for whole numbers; "
                "use float16 or float32 there"
            )
        o = torch.empty_like(q)
        lse = torch.empty(B, H, T, device=q.device)
        M = 2 * TILE if D <= 64 else TILE
        forward_kernel[(triton.cdiv(T, M), B * H)](
            q,
            k,
            v,
            start,
            o,
            lse,
            H,
            KV,
            T,
            D,
            LOG2E / math.sqrt(D),
            WIDTH=width(D),
            M=M,
            N=TILE,
            **LAUNCH,
        )
        ctx.save_for_backward(q, k, v, start, o, lse)
        return o

    @staticmethod
    def backward(ctx, g):
        q, k, v, start, o, lse = ctx.saved_tensors
        (B, H, T, D), KV = q.shape, k.shape[1]
        g = g.contiguous()
        go = (g.float() * o.float()).sum(-1)                # (B, H, T): g.o of each query

        # The last query that may see each key.
        position = torch.arange(T, device=q.device, dtype=torch.int32)
        position = position.expand(B, T).contiguous()
        end = torch.searchsorted(start, position, right=True).int() - 1  # (B, T)

        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        numbers, fixed = (H, KV, T, D, LOG2E / math.sqrt(D)), {"WIDTH": width(D), "N": TILE}
        query_kernel[(triton.cdiv(T, TILE), B * H)](
            q, k, v, start, g, go, lse, dq, *numbers, M=TILE, **fixed, **LAUNCH
        )
        # Two sums to hold: a larger M would spill.
        key_kernel[(triton.cdiv(T, TILE), B * KV)](
            q, k, v, end, g, go, lse, dk, dv, *numbers, M=TILE // 2, **fixed, **LAUNCH
        )
        return dq, dk, dv, None


# exp(x) = 2 ** (x * LOG2E): the hardware has powers of two, so scores are scaled once and
# for all.
LOG2E = math.log2(math.e)


def width(D):
    """A tile's width: a power of two that holds a head, and that a tensor core multiplies."""
    return max(16, 1 << (D - 1).bit_length())


if triton:
    LN2 = tl.constexpr(math.log(2))

    @triton.jit
    def load(X, row, T, D, i, WIDTH: tl.constexpr):
        """Positions i (n,) of head `row` of X (rows, T, D): (n, WIDTH), zeros outside."""
        d = tl.arange(0, WIDTH)
        X = X + row.to(tl.int64) * T * D   # a large batch has more than 2 ** 31 numbers
        inside = (i[:, None] < T) & (d[None, :] < D)
        return tl.load(X + i[:, None] * D + d[None, :], mask=inside, other=0.0)

    @triton.jit
    def store(X, row, T, D, i, x, WIDTH: tl.constexpr):
        d = tl.arange(0, WIDTH)
        X = X + row.to(tl.int64) * T * D
        inside = (i[:, None] < T) & (d[None, :] < D)
        tl.store(X + i[:, None] * D + d[None, :], x.to(X.dtype.element_ty), mask=inside)

    @triton.jit
    def attend(q, i, first, m, l, a, K, V, row, T, D, scale, begin, stop,
               MASKED: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
        """The online softmax over the keys from begin to stop.

        q (M, WIDTH) at positions i; running m, l (M,) and a (M, WIDTH).
        """
        for j0 in range(begin, stop, N):
            j = j0 + tl.arange(0, N)
            k = load(K, row, T, D, j, WIDTH)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (M, N)
            if MASKED:
                seen = (first[:, None] <= j[None, :]) & (j[None, :] <= i[:, None])
                score = tl.where(seen, score, -float("inf"))
            larger = tl.maximum(m, tl.max(score, 1))
            p = tl.exp2(score - larger[:, None])  # m starts finite, so nothing is inf - inf
            old = tl.exp2(m - larger)
            l = l * old + tl.sum(p, 1)
            values = load(V, row, T, D, j, WIDTH)
            a = a * old[:, None] + tl.dot(p.to(values.dtype), values, input_precision="ieee")
            m = larger
        return m, l, a

    @triton.jit
    def spans(first, i0, T, M: tl.constexpr, N: tl.constexpr):
        """Keys that a tile of queries from i0 on needs: (begin, whole, diagonal, stop).

        From `whole` to `diagonal` every query of the tile sees every key.
        """
        begin = tl.min(first) // N * N
        stop = tl.minimum(i0 + M, T)
        whole = tl.minimum(tl.cdiv(tl.max(first), N) * N, stop)  # some document begins before
        diagonal = tl.maximum((i0 + 1) // N * N, whole)  # from here on some key lies ahead
        return begin, whole, diagonal, stop

    @triton.jit
    def forward_kernel(Q, K, V, START, O, LSE, H, KV, T, D, scale,
                       WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """A program attends for M queries of one head.

        Q, O (B, H, T, D), K, V (B, KV, T, D), START (B, T), LSE (B, H, T) in powers of
        two.
        """
        i0 = tl.program_id(0) * M
        head = tl.program_id(1)
        b = head // H
        row = b * KV + head % H // (H // KV)  # of the keys that this head reads
        i = i0 + tl.arange(0, M)
        first = tl.load(START + b * T + tl.minimum(i, T - 1))  # beyond the row: never stored
        q = load(Q, head, T, D, i, WIDTH)
        m = tl.full([M], -1e30, tl.float32)
        l = tl.zeros([M], tl.float32)
        a = tl.zeros([M, WIDTH], tl.float32)
        begin, whole, diagonal, stop = spans(first, i0, T, M, N)
        m, l, a = attend(q, i, first, m, l, a, K, V, row, T, D, scale, begin, whole, True, WIDTH, N)
        m, l, a = attend(q, i, first, m, l, a, K, V, row, T, D, scale, whole, diagonal, False,
                         WIDTH, N)
        m, l, a = attend(q, i, first, m, l, a, K, V, row, T, D, scale, diagonal, stop, True,
                         WIDTH, N)
        store(O, head, T, D, i, a / l[:, None], WIDTH)
        tl.store(LSE + head * T + i, m + tl.log2(l), mask=i < T)

    @triton.jit
    def query_gradient(q, g, go, lse, i, first, dq, K, V, row, T, D, scale, begin, stop,
                       MASKED: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr):
        """dq (M, WIDTH) with what keys begin to stop add: the sum of p * (g.v - g.o) * k."""
        for j0 in range(begin, stop, N):
            j = j0 + tl.arange(0, N)
            k, v = load(K, row, T, D, j, WIDTH), load(V, row, T, D, j, WIDTH)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (M, N)
            p = tl.exp2(score - lse[:, None])
            if MASKED:
                seen = (first[:, None] <= j[None, :]) & (j[None, :] <= i[:, None])
                p = tl.where(seen, p, 0.0)
            ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - go[:, None])
            dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        return dq

    @triton.jit
    def query_kernel(Q, K, V, START, G, GO, LSE, DQ, H, KV, T, D, scale,
                     WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """A program makes the gradient of M queries of one head.

        G, DQ as Q (B, H, T, D); GO, LSE (B, H, T).
        """
        i0 = tl.program_id(0) * M
        head = tl.program_id(1)
        b = head // H
        row = b * KV + head % H // (H // KV)  # of the keys that this head reads
        i = i0 + tl.arange(0, M)
        first = tl.load(START + b * T + tl.minimum(i, T - 1))
        q, g = load(Q, head, T, D, i, WIDTH), load(G, head, T, D, i, WIDTH)
        go = tl.load(GO + head * T + i, mask=i < T, other=0.0)
        lse = tl.load(LSE + head * T + i, mask=i < T, other=float("inf"))  # beyond: p = 0
        begin, whole, diagonal, stop = spans(first, i0, T, M, N)
        dq = tl.zeros([M, WIDTH], tl.float32)
        dq = query_gradient(q, g, go, lse, i, first, dq, K, V, row, T, D, scale, begin, whole,
                            True, WIDTH, N)
        dq = query_gradient(q, g, go, lse, i, first, dq, K, V, row, T, D, scale, whole, diagonal,
                            False, WIDTH, N)
        dq = query_gradient(q, g, go, lse, i, first, dq, K, V, row, T, D, scale, diagonal, stop,
                            True, WIDTH, N)
        store(DQ, head, T, D, i, dq * (scale * LN2), WIDTH)

    @triton.jit
    def key_kernel(Q, K, V, END, G, GO, LSE, DK, DV, H, KV, T, D, scale,
                   WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """A program makes the gradients of N keys and values of one key head.

        They come from all query heads that share it: no two programs write to one place.
        DK, DV as K (B, KV, T, D); END (B, T).
        """
        j0, head = tl.program_id(0) * N, tl.program_id(1)
        b, j, group = head // KV, j0 + tl.arange(0, N), H // KV
        last = tl.load(END + b * T + tl.minimum(j, T - 1))
        k, v = load(K, head, T, D, j, WIDTH), load(V, head, T, D, j, WIDTH)
        dk, dv = tl.zeros([N, WIDTH], tl.float32), tl.zeros([N, WIDTH], tl.float32)
        for h in range(group):
            row = b * H + head % KV * group + h
            for i0 in range(j0 // M * M, tl.max(last) + 1, M):
                i = i0 + tl.arange(0, M)
                q, g = load(Q, row, T, D, i, WIDTH), load(G, row, T, D, i, WIDTH)
                go = tl.load(GO + row * T + i, mask=i < T, other=0.0)
                lse = tl.load(LSE + row * T + i, mask=i < T, other=float("inf"))
                score = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # (N, M)
                p = tl.exp2(score - lse[None, :])
                seen = (j[:, None] <= i[None, :]) & (i[None, :] <= last[:, None])
                p = tl.where(seen, p, 0.0)
                dv += tl.dot(p.to(g.dtype), g, input_precision="ieee")
                ds = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - go[None, :])
                dk += tl.dot(ds.to(q.dtype), q, input_precision="ieee")
        store(DK, head, T, D, j, dk * (scale * LN2), WIDTH)
        store(DV, head, T, D, j, dv, WIDTH)


# --- the loss -----------------------------------------------------------------


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, weight, target, loss_weight, masked):
        N = len(target)
        each = torch.empty(N, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        d_weight = None
        if weight.requires_grad:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)

        for a in range(0, N, CHUNK):
            part = slice(a, a + CHUNK)
            column = target[part, None]                             # (n, 1)
            logits = (hidden[part] @ weight.T).float()              # (n, V): all there ever is
            if masked is not None:
                logits.masked_fill_(masked, -math.inf)
            largest = logits.amax(-1, keepdim=True)                 # (n, 1)
            wanted = logits.gather(-1, column)                      # (n, 1)

            # In place from here on: a second copy would be the largest thing in memory.
            p = logits.sub_(largest).exp_()                         # (n, V)
            total = p.sum(-1, keepdim=True)                         # (n, 1)
            each[part] = (total.log() + largest - wanted)[:, 0]

            # The gradient of the logits, in place: loss_weight * (softmax - 1 at the target).
            if hidden.requires_grad or weight.requires_grad:
                value = loss_weight[part, None]                     # (n, 1)
                p.mul_(value / total).scatter_add_(-1, column, -value)
                gradient = p.to(hidden.dtype)                       # (n, V)
                logits = p = None  # or it would be there twice when the next chunk is made
                if d_hidden is not None:
                    d_hidden[part] = gradient @ weight
                if d_weight is not None:
                    d_weight += gradient.T @ hidden[part]
            logits = p = gradient = None
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(each)
        return (each * loss_weight).sum(), each

    @staticmethod
    def backward(ctx, g, _):
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * g
        if d_weight is not None:
            d_weight = (d_weight * g).to(ctx.dtype)
        return d_hidden, d_weight, None, None, None


def linear_cross_entropy(hidden, weight, target, loss_weight, masked=None):
    """(weighted sum of cross-entropies, cross-entropy of each target) of logits hidden @ weight'.

    hidden (N, C), weight (V, C), target (N,) int
    loss_weight (N,) float32: what each target's loss counts
    masked (V,) bool: rows that take no part in the softmax

    The logits never exist whole. The gradient is taken in the forward pass, CHUNK targets
    at a time, while their logits are there: nothing is computed twice. Under autocast
    products are made in its dtype, sums in float32. The second result is for the log: no
    gradient flows through it.
    """
    if not torch.is_grad_enabled():  # nobody will ask for gradients: do not make them
        hidden, weight = hidden.detach(), weight.detach()
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(kind, enabled=False):
        return LinearCrossEntropy.apply(hidden, weight, target, loss_weight, masked)
