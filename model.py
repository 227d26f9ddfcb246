"""One compact decoder transformer that loads open LLM weights: Llama, SmolLM2, Qwen2.5, Qwen3.

in   ids (rows of the embedding), or embeddings
out  logits over all rows; `generate` yields ids
see  Llama 2 (arXiv:2307.09288), RoFormer (arXiv:2104.09864), GQA (arXiv:2305.13245), Qwen3
     (arXiv:2505.09388), LoRA (arXiv:2106.09685)
run  python model.py out/base           # a folder's config, parameter count and dtype

Tensor names are Hugging Face's own, so a folder loads without a converter. One of them
misleads: `post_attention_layernorm` is the norm *before* the MLP.

Dimension key:  B batch   T positions in this call   S positions with the cache   C hidden_size
                H query heads   K key-value heads   D head_dim   V rows of the embedding
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights
from fused import attention

# What differs between the families: (biases of q, k and v; norms of q and k).
SIZED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
ARCHITECTURES = {
    "LlamaForCausalLM": (False, False),  # Llama 2 and 3, TinyLlama, SmolLM2
    "Qwen2ForCausalLM": (True, False),  # Qwen2, Qwen2.5
    "Qwen3ForCausalLM": (False, True),
}


def shape(layers, hidden, heads, intermediate):
    return dict(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=intermediate,
    )


# The one dial for a model from scratch. Parameters are without the embedding.
SIZES = {
    "micro": shape(2, 64, 1, 128),  #   0.1 M, tests
    "nano": shape(6, 256, 4, 768),  #   5.1 M, a laptop
    "small": shape(8, 512, 8, 1536),  #    27 M, any GPU
    "medium": shape(12, 768, 12, 2048),  #    85 M, one big GPU
}


def check_numbers(path, raw, numbers):
    """A ValueError for a size of a config.json, or another number of it, that cannot be one."""
    given = [name for name in ("num_key_value_heads", "head_dim") if raw.get(name) is not None]
    for name in (*SIZED, *given):
        if name not in raw:
            raise ValueError(f"{path}: the key {name!r} is missing")
        if type(raw[name]) is not int or raw[name] < 1:
            raise ValueError(f"{path}: got {name} = {raw[name]!r}, wanted a number from 1 on")
    for name, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{path}: got {name} = {value!r}, wanted a number above 0")


@dataclass
class Config:
    """The dimensions of a model, as `config.json` names them; `raw` has that file's other keys."""

    architecture: str = "LlamaForCausalLM"
    vocab_size: int = 384
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # Llama-3's stretched frequencies, or None
    tie_word_embeddings: bool = True
    raw: dict = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder):
        """Config of a Hugging Face folder; ValueError names whatever this model cannot do."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; a model folder needs a config.json")
        raw = runs.read_json(path)
        named = raw.get("architectures")
        architecture = named[0] if isinstance(named, list) and named else named
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: architecture {architecture} is not supported; wanted one of "
                f"{', '.join(ARCHITECTURES)}"
            )

        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: got rope_scaling = {rope!r}, wanted an object of numbers")
        kind = rope.get("rope_type", rope.get("type", "default"))
        for what, got, good in [
            ("hidden_act", raw.get("hidden_act", "silu"), ["silu"]),
            ("rope type", kind, ["default", "llama3"]),
            ("mlp_bias", raw.get("mlp_bias", False), [False]),
            ("attention_bias", raw.get("attention_bias", False), [False]),
            ("use_sliding_window", raw.get("use_sliding_window", False), [False]),
        ]:
            if got not in good:
                raise ValueError(
                    f"{path}: {what} {got!r} is not supported; wanted "
                    f"{' or '.join(map(str, good))}"
                )

        numbers = {
            "max_position_embeddings": raw.get("max_position_embeddings", 2048),
            "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
            "rope_theta": raw.get("rope_theta") or rope.get("rope_theta", 10000.0),
        }
        check_numbers(path, raw, numbers | {n: rope.get(n) for n in LLAMA3 if kind == "llama3"})
        heads = raw["num_attention_heads"]
        return cls(
            architecture=architecture,
            **{name: raw[name] for name in SIZED},
            **numbers,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rope_scaling=rope if kind == "llama3" else None,
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            raw=raw,
        )

    def write(self, folder, dtype):
        """config.json, with the weights' dtype: transformers loads them in the one it names."""
        own = {
            name: value
            for name, value in vars(self).items()
            if name not in ("architecture", "raw")
        }
        own |= {
            "architectures": [self.architecture],
            "model_type": self.architecture.removesuffix("ForCausalLM").lower(),
            "hidden_act": "silu",
            "torch_dtype": str(dtype).removeprefix("torch."),
        }

        # Said once, in the older spelling, which all read.
        raw = {
            name: value
            for name, value in self.raw.items()
            if name not in ("rope_parameters", "dtype")
        }
        (Path(folder) / "config.json").write_text(json.dumps(raw | own, indent=1) + "\n")


# --- the network --------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        # In float32: squares of bfloat16 lose too much.
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


def rope(config, positions):
    """Cosine and sine of every position's rotation, (B, T, D / 2) each, float32.

    positions (B, T) int. Dimension i turns by theta^(-2i / D) radians a position.
    """
    half = config.head_dim // 2
    i = torch.arange(half, device=positions.device, dtype=torch.float32)  # (D / 2,)
    turn = config.rope_theta ** (-i / half)  # radians a position
    if config.rope_scaling:
        turn = stretched(turn, config.rope_scaling)
    angle = positions[:, :, None].float() * turn                    # (B, T, D / 2)
    return angle.cos(), angle.sin()


def stretched(turn, s):
    """Llama-3's longer context: slow waves are stretched, fast ones stay, a ramp between."""
    turns = s["original_max_position_embeddings"] * turn / (2 * math.pi)  # in the old context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return turn * (keep + (1 - keep) / s["factor"])


def rotate(x, cos, sin):
    """Rotate x (B, T, heads, D): dimension i pairs with i + D / 2, as Hugging Face's halves do."""
    a, b = x.float().chunk(2, dim=-1)                               # (B, T, heads, D / 2)
    cos, sin = cos[:, :, None], sin[:, :, None]                     # (B, T, 1, D / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        bias, self.norm = ARCHITECTURES[config.architecture]
        C, D = config.hidden_size, config.head_dim
        self.H, self.K = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(C, self.H * D, bias=bias)
        self.k_proj = Linear(C, self.K * D, bias=bias)
        self.v_proj = Linear(C, self.K * D, bias=bias)
        self.o_proj = Linear(self.H * D, C, bias=False)
        if self.norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, start, past):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, -1)                   # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.K, -1)                   # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.K, -1)                   # (B, T, K, D)
        if self.norm:
            q, k = self.q_norm(q), self.k_norm(k)

        # Under autocast q_norm hands on float32.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))            # (B, heads, T, D)
        if past is not None:
            k, v = past.extend(k, v)                                # (B, K, S, D)
        y = attention(q, k, v, start)                               # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))     # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, hidden, bias=False)
        self.up_proj = Linear(C, hidden, bias=False)
        self.down_proj = Linear(hidden, C, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, start, past):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, start, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute = False  # make a block's activations again for its gradient
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids=None, embeddings=None, start=None, cache=None, positions=None, states=None
    ):
        """Hidden states (B, T, C) of ids (B, T) or embeddings (B, T, C).

        start      (B, T): see fused.attention
        positions  (B, T); if none are given they count from `start`, so that a packed document is
                   computed as if alone
        states     a list that gets what each block hands on, (B, T, C)
        """
        x = self.embed_tokens(ids) if embeddings is None else embeddings  # (B, T, C)
        if positions is None:
            done = cache[0].length if cache else 0
            at = torch.arange(done, done + x.shape[1], device=x.device)[None]
            positions = at if start is None else at - start         # (1 or B, T)
        cos, sin = rope(self.config, positions)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, start, None, use_reentrant=False)
            else:
                x = layer(x, cos, sin, start, cache[i] if cache else None)
            if states is not None:
                states.append(x)                                    # (B, T, C)
        return self.norm(x)


class LM(nn.Module):
    """A decoder language model: `model` (the body) and `lm_head`, often the embedding itself."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids=None, embeddings=None, start=None, cache=None):
        """Logits (B, T, V)."""
        return self.lm_head(self.model(ids, embeddings, start, cache))

    @classmethod
    def fresh(cls, config, seed):
        """Random weights: normal 0.02.

        What writes to the residual stream is scaled down by the number of writers
        (GPT-2).
        """
        torch.manual_seed(seed)
        model = cls(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                writer = name.endswith(("o_proj.weight", "down_proj.weight"))
                writers = 2 * config.num_hidden_layers if writer else 1
                nn.init.normal_(p, std=0.02 / math.sqrt(writers))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return model

    @classmethod
    def unfilled(cls, config):
        """A model of names and shapes, on the meta device."""
        with torch.device("meta"), weights.Unfilled():
            return cls(config)

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """A model from a Hugging Face folder, in `dtype` or as stored."""
        config = Config.read(folder)
        tied = config.tie_word_embeddings
        model = cls.unfilled(config)

        # Some files hold the tied head and the frequencies of rotation beside the rest.
        def ours(name):
            twice = (
                tied and name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")
            )
            return None if twice else name

        weights.load_into(model, folder, ours, optional=["lm_head.weight"] if tied else [])
        model.tie()
        return model.to(device, dtype)

    def save(self, folder):
        """config.json and model.safetensors, as AutoModelForCausalLM reads them.

        The tokenizer is vocab.py's to save.
        """
        self.config.write(folder, self.lm_head.weight.dtype)
        state = self.state_dict()
        if self.config.tie_word_embeddings:
            del state["lm_head.weight"]
        weights.save(folder, state)


class Linear(nn.Linear):
    """A linear layer, faster on a CPU for a single vector.

    The library multiplies a single float32 vector on one core; parts of the matrix, as a
    batch, it multiplies on all.
    """

    def forward(self, x):
        single = x.numel() == x.shape[-1] and x.dtype == torch.float32 and not x.is_cuda
        learning = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if not single or learning:
            return F.linear(x, self.weight, self.bias)
        threads = torch.get_num_threads()
        if len(self.weight) % threads:
            return F.linear(x, self.weight, self.bias)
        parts = self.weight.view(threads, -1, self.in_features).mT  # (n, in, out / n)
        y = torch.bmm(x.view(1, 1, -1).expand(threads, 1, -1), parts)  # (n, 1, out / n)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


# --- more rows, and less to train ---------------------------------------------


def add_rows(model, count, like, among, seed):
    """Append rows for `count` new tokens to embedding and head; the first new id.

    like   {a new token's offset: an id whose row it starts from}: a marker that means something
    among  ids that text really uses. The other new rows start at their mean plus noise of a tenth
           of their spread: where the model's letters live, yet each in its own place. (A tied
           softmax has pushed unused rows far away.)
    The table is padded to a multiple of 128 rows.
    """
    first = model.config.vocab_size
    noise = torch.Generator().manual_seed(seed)
    total = math.ceil((first + count) / 128) * 128
    among = sorted(among)
    tables = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head)
    for module in tables:
        old = module.weight.data
        used = old[among].float()
        drawn = torch.randn(total - first, old.shape[1], generator=noise).to(old.device)
        new = used.mean(0) + 0.1 * used.std(0) * drawn
        for offset, known in like.items():
            new[offset] = old[known].float()
        module.weight = nn.Parameter(torch.cat([old, new.to(old.dtype)]))
    model.config.vocab_size = total
    model.model.embed_tokens.num_embeddings = total
    model.lm_head.out_features = total
    model.tie()
    return first


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank: W x + (alpha / rank) B A x.

    B begins at zero.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.A = nn.Parameter(
            torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features)
        )
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def add_lora(model, rank, alpha):
    """Put a LoRA around every matrix of every block."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, LoRA(linear, rank, alpha))


@torch.no_grad()
def merge_lora(model):
    """Add what every LoRA learnt to its matrix, and take the LoRA away."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, lora in list(part.named_children()):
                if isinstance(lora, LoRA):
                    lora.linear.weight += lora.scale * (lora.B @ lora.A)
                    setattr(part, name, lora.linear)


# --- generation ---------------------------------------------------------------


class Cache:
    """One layer's keys and values, preallocated for S positions."""

    def __init__(self, B, K, S, D, like):
        self.k = like.new_zeros(B, K, S, D)
        self.v = like.new_zeros(B, K, S, D)
        self.length = 0

    def extend(self, k, v):
        """All keys and values so far, (B, K, S so far, D) each, with these new ones."""
        done = self.length + k.shape[2]
        self.k[:, :, self.length : done] = k
        self.v[:, :, self.length : done] = v
        self.length = done
        return self.k[:, :, :done], self.v[:, :, :done]


@torch.inference_mode()
def generate(model, prompts, limit, stop, allowed=None, temperature=0.0, top_p=1.0, seed=0):
    """Yield the next ids, (B,) each, until every row has ended or `limit` ids came.

    prompts      a list of B prompts of any lengths: ids (T,) or embeddings (T, C)
    stop         ids that end a reply; a row that has ended repeats its own
    allowed      ids that may be generated; None: all rows
    temperature  0 is greedy; else the smallest set of tokens with probability `top_p` is sampled
                 from
    """
    table, config = model.model.embed_tokens, model.config
    device, dtype = table.weight.device, table.weight.dtype
    vectors = [
        p.to(device, dtype) if p.is_floating_point() else table(p.to(device)) for p in prompts
    ]
    x, first, start = padded(vectors)                               # (B, T, C)
    B, T, _ = x.shape
    cache = [
        Cache(B, config.num_key_value_heads, T + limit, config.head_dim, x)
        for _ in model.model.layers
    ]

    not_allowed = torch.zeros(config.vocab_size, device=device)
    if allowed is not None:
        not_allowed.fill_(-math.inf)[torch.as_tensor(allowed, device=device)] = 0.0
    stops = torch.tensor(stop, device=device)
    sampler = torch.Generator(device).manual_seed(seed)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    last = None
    hidden = model.model(embeddings=x, start=start, cache=cache)    # (B, T, C)
    for n in range(1, limit + 1):
        logits = model.lm_head(hidden[:, -1]).float() + not_allowed  # (B, V)
        if temperature == 0:
            ids = logits.argmax(-1)                                 # (B,)
        else:
            largest = logits.amax(-1, keepdim=True)  # so that no temperature makes it infinite
            ids = sample((logits - largest) / temperature, top_p, sampler)
        if last is not None:
            ids = torch.where(ended, last, ids)
        yield ids
        last, ended = ids, ended | torch.isin(ids, stops)
        if ended.all() or n == limit:
            return
        hidden = model.model(ids[:, None], start=first, cache=cache)  # (B, 1, C)


def padded(prompts):
    """(x (B, T, C), where each row begins (B, 1), `start` for attention (B, T)).

    Padded on the left, so that all prompts (T, C) end together. Of one length they need
    no mask: then the last two are None.
    """
    T = max(len(p) for p in prompts)
    x = torch.stack([F.pad(p, (0, 0, T - len(p), 0)) for p in prompts])  # (B, T, C)
    if all(len(p) == T for p in prompts):
        return x, None, None
    first = torch.tensor([T - len(p) for p in prompts], device=x.device)[:, None]  # (B, 1)
    start = torch.minimum(first, torch.arange(T, device=x.device))  # padding sees itself
    return x, first, start


def sample(logits, top_p, generator):
    """One id per row of logits (B, V) from the nucleus (arXiv:1904.09751).

    That is the likeliest tokens that hold `top_p` together; the likeliest one is always
    in it.
    """
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    drawn = torch.multinomial(p, 1, generator=generator)            # (B, 1)
    return order.gather(-1, drawn).squeeze(-1)                      # (B,)


def main():
    parser = argparse.ArgumentParser(description="Load a model folder and say what it is.")
    parser.add_argument("folder", help="a Hugging Face model folder")
    model = LM.load(parser.parse_args().folder)
    print(model.config)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{size:.2f} M parameters, {str(model.lm_head.weight.dtype).removeprefix('torch.')}"
    )


if __name__ == "__main__":
    runs.run(main)
