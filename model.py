"""One compact decoder transformer that loads open LLM weights: Llama, SmolLM2, Qwen2, Qwen2.5 and Qwen3 families.

in   ids (rows of the embedding), or embeddings         out  logits over all rows; `generate` yields ids
see  Llama 2 (arXiv:2307.09288), RoFormer (arXiv:2104.09864), GQA (arXiv:2305.13245), Qwen3 (arXiv:2505.09388)
run  python model.py out/base                           # a folder's config, parameter count and dtype

Tensor names are Hugging Face's own, so a folder loads without a converter. One of them misleads:
`post_attention_layernorm` is the norm *before* the MLP.

Dimension key:  B batch   T positions in this call   S positions with the cache   C hidden_size
                H query heads   K key-value heads   D head_dim   F intermediate_size   V rows of the embedding
"""
import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import weights
from fused import attention

ARCHITECTURES = {                                       # what differs between the families: (qkv bias, q/k norm)
    "LlamaForCausalLM": (False, False),                 # Llama 2 and 3, TinyLlama, SmolLM2
    "Qwen2ForCausalLM": (True, False),                  # Qwen2, Qwen2.5
    "Qwen3ForCausalLM": (False, True),
}

SIZES = {      # the one dial for a model from scratch: layers, C, H, F; head_dim is 64. Parameters without the embedding:
    "micro": dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=1, intermediate_size=128),        #   0.1 M, tests
    "nano": dict(num_hidden_layers=6, hidden_size=256, num_attention_heads=4, intermediate_size=768),        #   5.1 M, a laptop
    "small": dict(num_hidden_layers=8, hidden_size=512, num_attention_heads=8, intermediate_size=1536),      #    27 M, any GPU
    "medium": dict(num_hidden_layers=12, hidden_size=768, num_attention_heads=12, intermediate_size=2048),   #    85 M, one big GPU
}


@dataclass
class Config:
    """The dimensions of a model, as `config.json` names them. `raw` keeps that file's other keys for saving."""
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
    rope_scaling: dict = None                           # Llama-3's stretched frequencies, or None
    tie_word_embeddings: bool = True
    raw: dict = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, folder):
        """Config of a Hugging Face folder; ValueError names whatever this model cannot do."""
        path = Path(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; a model folder needs a config.json")
        raw = weights.read_json(path)
        architecture = (raw.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise ValueError(f"{path}: architecture {architecture} is not supported; wanted one of {', '.join(ARCHITECTURES)}")
        rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for what, got, good in [("hidden_act", raw.get("hidden_act", "silu"), ["silu"]), ("rope type", kind, ["default", "llama3"]),
                                ("mlp_bias", raw.get("mlp_bias", False), [False]), ("attention_bias", raw.get("attention_bias", False), [False]),
                                ("use_sliding_window", raw.get("use_sliding_window", False), [False])]:
            if got not in good:
                raise ValueError(f"{path}: {what} {got!r} is not supported; wanted {' or '.join(map(str, good))}")
        try:
            heads = raw["num_attention_heads"]
            return cls(architecture=architecture, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
                       intermediate_size=raw["intermediate_size"], num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
                       num_key_value_heads=raw.get("num_key_value_heads") or heads, head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                       max_position_embeddings=raw.get("max_position_embeddings", 2048), rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                       rope_theta=raw.get("rope_theta") or rope.get("rope_theta", 10000.0), rope_scaling=rope if kind == "llama3" else None,
                       tie_word_embeddings=raw.get("tie_word_embeddings", False), raw=raw)
        except KeyError as error:
            raise ValueError(f"{path}: the key {error} is missing") from None

    def write(self, folder, dtype):
        """config.json, with the dtype that the weights have: transformers loads them in the one that it names."""
        own = {name: value for name, value in vars(self).items() if name not in ("architecture", "raw")}
        own |= {"architectures": [self.architecture], "model_type": self.architecture.removesuffix("ForCausalLM").lower(), "hidden_act": "silu",
                "torch_dtype": str(dtype).removeprefix("torch.")}
        raw = {name: value for name, value in self.raw.items() if name not in ("rope_parameters", "dtype")}     # said once, in the older spelling all read
        (Path(folder) / "config.json").write_text(json.dumps(raw | own, indent=1) + "\n")


# --- the network -----------------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)                    # squares of bf16 lose too much


def rope(config, positions):
    """Cosine and sine of every position's rotation, (B, T, D / 2) each, float32. positions (B, T) int."""
    half = config.head_dim // 2
    turn = config.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)   # radians per position
    if config.rope_scaling:                             # Llama-3: slow waves are stretched by `factor`, fast ones kept, a ramp between
        s = config.rope_scaling
        turns = s["original_max_position_embeddings"] * turn / (2 * math.pi)                                  # full turns in the old context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        turn = turn * (keep + (1 - keep) / s["factor"])
    angle = positions[:, :, None].float() * turn                                                              # (B, T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate x (B, T, heads, D): dimension i pairs with i + D/2 (Hugging Face's split halves, not interleaved)."""
    a, b = x.float().chunk(2, dim=-1)                                      # (B, T, heads, D / 2) each
    cos, sin = cos[:, :, None], sin[:, :, None]                            # (B, T, 1, D / 2): the same for every head
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer. A CPU's library multiplies a single float32 vector on one core; parts of the matrix, as a batch, it multiplies on all."""

    def forward(self, x):
        one = x.numel() == x.shape[-1] and x.dtype == torch.float32 and not (x.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        if not one or len(self.weight) % (n := torch.get_num_threads()):
            return F.linear(x, self.weight, self.bias)
        parts = self.weight.view(n, -1, self.in_features).transpose(1, 2)  # (n, C in, C out / n)
        y = torch.bmm(x.view(1, 1, -1).expand(n, 1, -1), parts).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        bias, norm = ARCHITECTURES[config.architecture]
        C, D, self.H, self.K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = Linear(C, self.H * D, bias=bias)
        self.k_proj = Linear(C, self.K * D, bias=bias)
        self.v_proj = Linear(C, self.K * D, bias=bias)
        self.o_proj = Linear(self.H * D, C, bias=False)
        if norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)
        self.norm = norm

    def forward(self, x, cos, sin, start, past):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, -1)                          # (B, T, H, D)
        k = self.k_proj(x).view(B, T, self.K, -1)                          # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.K, -1)                          # (B, T, K, D)
        if self.norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)       # under autocast q_norm hands on float32
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))           # (B, H or K, T, D): heads become batch
        if past is not None:
            k, v = past.extend(k, v)                                       # (B, K, S, D)
        y = attention(q, k, v, start)                                      # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))            # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj = Linear(C, F_, bias=False), Linear(C, F_, bias=False)
        self.down_proj = Linear(F_, C, bias=False)

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
        self.config, self.recompute = config, False                        # recompute: make a block's activations again for its gradient
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids=None, embeddings=None, start=None, cache=None, positions=None, states=None):
        """Hidden states (B, T, C) of ids (B, T) or embeddings (B, T, C). `start` (B, T): see fused.attention; unless `positions` (B, T)
        are given, they count from there: a packed document is computed as if alone. A list `states` gets what each block hands on."""
        x = self.embed_tokens(ids) if embeddings is None else embeddings   # (B, T, C)
        done = cache[0].length if cache else 0
        if positions is None:
            positions = torch.arange(done, done + x.shape[1], device=x.device)[None] - (0 if start is None else start)     # (1 or B, T)
        cos, sin = rope(self.config, positions)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, start, None, use_reentrant=False)
            else:
                x = layer(x, cos, sin, start, cache[i] if cache else None)
            if states is not None:
                states.append(x)                                           # (B, T, C)
        return self.norm(x)


class LM(nn.Module):
    """A decoder language model: `model` (the body) and `lm_head`, which may be the embedding itself."""

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
        """Random weights: normal 0.02, what writes to the residual stream scaled down by its number of writers (GPT-2)."""
        torch.manual_seed(seed)
        model = cls(config)
        for name, p in model.named_parameters():
            if p.dim() == 2:
                writer = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers) if writer else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        return model

    @classmethod
    def load(cls, folder, device="cpu", dtype=None):
        """A model from a Hugging Face folder, in `dtype` or as stored."""
        config = Config.read(folder)
        with torch.device("meta"):
            model = cls(config)
        tied = config.tie_word_embeddings
        weights.load_into(model, folder, optional=["lm_head.weight"] if tied else [],
                          rename=lambda name: None if tied and name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq") else name)
        model.tie()
        return model.to(device, dtype)

    def save(self, folder):
        """config.json and model.safetensors, as AutoModelForCausalLM reads them. The tokenizer is vocab.py's to save."""
        self.config.write(folder, self.lm_head.weight.dtype)
        weights.save(folder, {name: p for name, p in self.state_dict().items() if not (self.config.tie_word_embeddings and name == "lm_head.weight")})


def add_rows(model, count, like, among, seed):
    """Append rows for new tokens to the embedding and to the head, then pad to a multiple of 128.

    New rows start at the mean of the rows `among` (ids that text really uses: a tied softmax has pushed the others far away)
    plus noise of a tenth of their spread: where the model's letters live, yet each in its own place. `like` maps a new token's offset to an
    id whose row it starts from instead: a marker starts as a token that already means something. Returns the first new id.
    """
    first, noise = model.config.vocab_size, torch.Generator().manual_seed(seed)
    total, among = math.ceil((first + count) / 128) * 128, sorted(among)
    for module in {model.model.embed_tokens, model.lm_head} if not model.config.tie_word_embeddings else {model.model.embed_tokens}:
        old = module.weight.data
        used = old[among].float()
        new = used.mean(0) + 0.1 * used.std(0) * torch.randn(total - first, old.shape[1], generator=noise).to(old.device)
        for offset, known in like.items():
            new[offset] = old[known].float()
        module.weight = nn.Parameter(torch.cat([old, new.to(old.dtype)]))
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = model.config.vocab_size = total
    model.tie()
    return first


class LoRA(nn.Module):
    """A frozen linear layer and a trained change of low rank beside it: W x + (alpha / rank) B A x (arXiv:2106.09685). B begins at zero."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
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
    """Add what every LoRA learnt to its matrix and take the LoRA away: the model has its own names again."""
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, lora in list(part.named_children()):
                if isinstance(lora, LoRA):
                    lora.linear.weight += lora.scale * (lora.B @ lora.A)
                    setattr(part, name, lora.linear)


# --- generation ------------------------------------------------------------------------------------------------------------

class Cache:
    """One layer's keys and values, preallocated for S positions."""

    def __init__(self, B, K, S, D, like):
        self.k, self.v, self.length = like.new_zeros(B, K, S, D), like.new_zeros(B, K, S, D), 0

    def extend(self, k, v):
        done = self.length + k.shape[2]
        self.k[:, :, self.length:done], self.v[:, :, self.length:done] = k, v
        self.length = done
        return self.k[:, :, :done], self.v[:, :, :done]                    # (B, K, S so far, D)


@torch.inference_mode()
def generate(model, prompts, limit, stop, allowed=None, temperature=0.0, top_p=1.0, seed=0):
    """Yield the next ids, (B,) each, until every row has yielded a stop id or `limit` ids came; a stopped row repeats its stop.

    prompts      a list of B prompts of any lengths: ids (T,) or embeddings (T, C)
    stop         ids that end a reply
    allowed      ids that may be generated; None: all rows
    temperature  0 is greedy; else the smallest set of tokens with probability `top_p` is sampled from
    """
    device, dtype = model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.dtype
    rows = [p.to(device, dtype) if p.is_floating_point() else model.model.embed_tokens(p.to(device)) for p in prompts]
    B, T = len(rows), max(len(r) for r in rows)
    x = torch.stack([F.pad(r, (0, 0, T - len(r), 0)) for r in rows])       # (B, T, C): padded on the left, so all end together
    first = start = None                                                   # rows of one length need no mask
    if any(len(r) < T for r in rows):
        first = torch.tensor([T - len(r) for r in rows], device=device)[:, None]                              # (B, 1): where a row begins
        start = torch.minimum(first, torch.arange(T, device=device))       # (B, T): a padded position sees only itself
    config = model.config
    cache = [Cache(B, config.num_key_value_heads, T + limit, config.head_dim, x) for _ in model.model.layers]
    barred = torch.full((config.vocab_size,), 0.0 if allowed is None else -math.inf, device=device)
    if allowed is not None:
        barred[torch.as_tensor(allowed, device=device)] = 0.0
    stops, ended, last = torch.tensor(stop, device=device), torch.zeros(B, dtype=torch.bool, device=device), None
    sampler = torch.Generator(device).manual_seed(seed)
    logits = model.lm_head(model.model(embeddings=x, start=start, cache=cache)[:, -1])                        # (B, V)
    for n in range(1, limit + 1):
        logits = logits.float() + barred                                   # (B, V)
        ids = logits.argmax(-1) if temperature == 0 else sample(logits / temperature, top_p, sampler)
        ids = torch.where(ended, last, ids) if last is not None else ids
        yield ids
        last, ended = ids, ended | torch.isin(ids, stops)
        if ended.all() or n == limit:
            return
        logits = model.lm_head(model.model(ids[:, None], start=first, cache=cache)[:, -1])


def sample(logits, top_p, generator):
    """One id per row of logits (B, V) from the nucleus (arXiv:1904.09751): the likeliest tokens that hold `top_p` together."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0                                       # the likeliest token always stays
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)                         # (B,)


def main():
    parser = argparse.ArgumentParser(description="Load a model folder and say what it is.")
    parser.add_argument("folder", help="a Hugging Face model folder")
    model = LM.load(parser.parse_args().folder)
    print(model.config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {str(model.lm_head.weight.dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    weights.run(main)
