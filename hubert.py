"""HuBERT: samples -> convolutions -> a transformer whose middle layers tell phones apart.

in   16 kHz samples, a Hugging Face HuBERT folder
out  the hidden states of a layer, 50 frames a second; or a small HuBERT, trained here
see  HuBERT (arXiv:2106.07447), wav2vec 2.0 (arXiv:2006.11477)
run  python hubert.py train --units out/units_mfcc --out out/hubert

`train` is HuBERT's first iteration in miniature: hide stretches of the sound, and predict
the clusters of the hidden frames from what is around them. Clusters are the units of any
earlier codebook, those of MFCCs to begin with.

*Layer n* is the residual stream after n blocks (0: before the first), without the last norm that
large models end with.
Dimension key:  B batch   N samples   T frames   C hidden_size   H heads   D head width
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import audio
import weights


@dataclass
class Config:
    """What of a HuBERT `config.json` shapes the network; defaults are the model of `train`."""

    conv_dim: tuple = (64,) * 7
    conv_kernel: tuple = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: tuple = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    feat_extract_norm: str = "group"  # over time in the first layer; "layer": a norm in each
    feat_proj_layer_norm: bool = True
    hidden_size: int = 192
    intermediate_size: int = 576
    num_hidden_layers: int = 5
    num_attention_heads: int = 3
    num_conv_pos_embeddings: int = 32
    num_conv_pos_embedding_groups: int = 16
    conv_pos_batch_norm: bool = False  # True in the 25 Hz mHuBERT: in place of weight norm
    do_stable_layer_norm: bool = True  # norms before a part (large), or after a sum (base)
    layer_norm_eps: float = 1e-5
    do_normalize: bool = False  # of preprocessor_config.json: mean 0, variance 1 per clip

    @classmethod
    def read(cls, folder):
        path = Path(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; wanted a Hugging Face HuBERT folder")
        raw = runs.read_json(path)
        if raw.get("model_type") != "hubert":
            raise ValueError(
                f"{path}: model_type {raw.get('model_type')!r}, wanted 'hubert'"
            )
        preprocessor = Path(folder) / "preprocessor_config.json"
        # A file that lacks a key means what `transformers` takes.
        raw["do_normalize"] = preprocessor.exists() and runs.read_json(preprocessor).get(
            "do_normalize", True
        )
        raw.setdefault("do_stable_layer_norm", False)
        for file, name in ((path, "do_stable_layer_norm"), (preprocessor, "do_normalize")):
            if not isinstance(raw[name], bool):
                raise ValueError(f"{file}: got {name} = {raw[name]!r}, wanted true or false")
        for name in ("hidden_act", "feat_extract_activation"):
            if raw.get(name, "gelu") != "gelu":
                raise ValueError(
                    f"{path}: {name} {raw[name]!r} is not supported; wanted 'gelu'"
                )
        given = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        for name, own in vars(cls()).items():
            value = given.get(name, own)
            listed = isinstance(value, (list, tuple))
            numbers = value if listed else [value]
            whole = all(type(number) is int and number > 0 for number in numbers)
            if type(own) in (int, tuple) and not (whole and listed == isinstance(own, tuple)):
                raise ValueError(f"{path}: got {name} = {value!r}, wanted whole numbers above 0")
        made = cls(**given)
        if len({*map(len, (made.conv_dim, made.conv_kernel, made.conv_stride))}) > 1:
            raise ValueError(
                f"{path}: conv_dim, conv_kernel and conv_stride differ in length; wanted one "
                "number of each for every layer"
            )
        return made

    def write(self, folder):
        raw = {name: value for name, value in vars(self).items() if name != "do_normalize"}
        raw |= {
            "architectures": ["HubertModel"],
            "model_type": "hubert",
            "hidden_act": "gelu",
            "feat_extract_activation": "gelu",
            "num_feat_extract_layers": len(self.conv_dim),
        }
        heard = {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "sampling_rate": audio.SAMPLE_RATE,
            "do_normalize": self.do_normalize,
        }
        (Path(folder) / "config.json").write_text(json.dumps(raw, indent=1) + "\n")
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(heard) + "\n")


# --- the network, under Hugging Face's names ----------------------------------


class ConvLayer(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        norm, width = config.feat_extract_norm, config.conv_dim[i]
        self.kind = norm if i == 0 or norm == "layer" else None
        self.conv = nn.Conv1d(
            config.conv_dim[i - 1] if i else 1,
            width,
            config.conv_kernel[i],
            config.conv_stride[i],
            bias=config.conv_bias,
        )
        if self.kind == "group":
            self.layer_norm = nn.GroupNorm(width, width)
        elif self.kind == "layer":
            self.layer_norm = nn.LayerNorm(width)

    def forward(self, x, counts=None):
        """x (B, channels, time); counts (B,): how much of the time is the clip's, if not all."""
        x = self.conv(x)
        if self.kind == "group" and counts is None:
            x = self.layer_norm(x)  # a channel over all of its time
        elif self.kind == "group":  # over the clip's time alone
            for row, n in zip(x, counts.tolist()):
                row[:, :n] = self.layer_norm(row[None, :, :n])[0]
        elif self.kind == "layer":
            x = self.layer_norm(x.transpose(1, 2)).transpose(1, 2)  # all channels at a time
        return F.gelu(x)


class FeatureExtractor(nn.Module):
    def __init__(self, config):
        super().__init__()
        layers = range(len(config.conv_dim))
        self.conv_layers = nn.ModuleList(ConvLayer(config, i) for i in layers)

    def forward(self, samples, counts=None):
        x = samples[:, None]                                        # (B, 1, N)
        for layer in self.conv_layers:
            if counts is not None:
                kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
                counts = (counts - kernel) // stride + 1
            x = layer(x, counts)
        return x.transpose(1, 2)                                    # (B, T, conv_dim)


class FeatureProjection(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.normed = config.feat_proj_layer_norm
        if self.normed:
            self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, x):
        return self.projection(self.layer_norm(x) if self.normed else x)


class PositionalConv(nn.Module):
    """Position from a wide grouped convolution.

    Its weight is stored as direction and length per tap ("weight norm"), or plain behind
    a batch norm.
    """

    def __init__(self, config):
        super().__init__()
        C, width = config.hidden_size, config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            C, C, width, padding=width // 2, groups=config.num_conv_pos_embedding_groups
        )
        self.batch_norm = nn.BatchNorm1d(C) if config.conv_pos_batch_norm else None
        self.conv = (
            conv if self.batch_norm else nn.utils.parametrizations.weight_norm(conv, dim=2)
        )

    def forward(self, x, real=None):
        """x (B, T, C); real (B, T) bool: frames of the clip. Beyond its end there is silence."""
        x = x.transpose(1, 2)                                       # (B, C, T)
        if self.batch_norm:
            x = self.batch_norm(x)
        if real is not None:
            x = x * real[:, None]
        # In float32 on a CPU: on one that has AMX, torch 2.13's bfloat16 convolution of groups of
        # 12 channels is wrong by more than its own size.
        with torch.autocast("cpu", enabled=False):
            y = self.conv(x.float())            # (B, C, T), one more if the width is even
        return F.gelu(y[:, :, : x.shape[2]]).transpose(1, 2)        # (B, T, C)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.H = config.hidden_size, config.num_attention_heads
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, C)
        self.v_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def forward(self, x, real=None):
        """Every frame of a clip, (B, T, C), sees every other."""
        B, T, C = x.shape

        def heads(y):
            return y.view(B, T, self.H, -1).transpose(1, 2)         # (B, H, T, D)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        mask = None if real is None else real[:, None, None]        # (B, 1, 1, T)
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, C))    # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.output_dense(F.gelu(self.intermediate_dense(x)))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm_first = config.do_stable_layer_norm

    def forward(self, x, real=None):
        if self.norm_first:
            x = x + self.attention(self.layer_norm(x), real)
            return x + self.feed_forward(self.final_layer_norm(x))
        x = self.layer_norm(x + self.attention(x, real))
        return self.final_layer_norm(x + self.feed_forward(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.pos_conv_embed = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm_first = config.do_stable_layer_norm

    def forward(self, x, layer, real=None, states=None):
        x = x + self.pos_conv_embed(x, real)
        if not self.norm_first:
            x = self.layer_norm(x)
        for block in self.layers[:layer]:
            x = block(x, real)
            if states is not None:
                states.append(x)
        return x


class Hubert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = Encoder(config)
        self.masked_spec_embed = nn.Parameter(nn.init.uniform_(torch.empty(config.hidden_size)))

    def hop(self):
        """Samples per frame: 320, or 640 for a model of 25 Hz."""
        return math.prod(self.config.conv_stride)

    def forward(self, samples, layer, hidden=None, lengths=None, states=None):
        """Layer `layer`'s residual stream, (B, T, C), of samples (B, N); T = N // hop exactly.

        lengths  (B,) int: clips of unequal length, filled up; the first lengths // hop frames of
                 each are what it gives alone
        hidden   (B, T) bool: frames replaced by the mask vector before the encoder
        states   a list, which gets what every layer hands on
        """
        # 40 samples more on each side, for 320 a frame: 50 frames a second, not 49.
        hop = self.hop()
        pad = (self.receptive_field() - self.hop()) // 2
        T = samples.shape[1] // hop
        device = samples.device

        counts = real = inside = None
        n = samples.shape[1]
        if lengths is not None:
            n = lengths[:, None]                                    # (B, 1)
            inside = torch.arange(samples.shape[1], device=device) < n  # (B, N)
            real = torch.arange(T, device=device) < n // hop        # (B, T)
            counts = lengths + 2 * pad                              # (B,)
            samples = samples * inside
        if self.config.do_normalize:
            samples = samples - samples.sum(-1, keepdim=True) / n
            samples = samples if lengths is None else samples * inside
            samples = samples * torch.rsqrt(samples.pow(2).sum(-1, keepdim=True) / n + 1e-7)

        samples = F.pad(samples, (pad, pad))
        x = self.feature_extractor(samples, counts)                 # (B, T or more, ...)
        x = self.feature_projection(x)[:, :T]                       # (B, T, C)
        if hidden is not None:
            x = torch.where(hidden[:, :, None], self.masked_spec_embed, x)
        return self.encoder(x, layer, real, states)

    def receptive_field(self):
        """Samples one frame is computed from: 400 for the published strides and kernels."""
        field, step = 1, 1
        for kernel, stride in zip(self.config.conv_kernel, self.config.conv_stride):
            field, step = field + (kernel - 1) * step, step * stride
        return field

    @classmethod
    def fresh(cls, config, seed):
        """Random weights: normal 0.02, and convolutions that keep the sound's scale.

        PyTorch's own would shrink it to nothing in seven layers.
        """
        torch.manual_seed(seed)
        model = cls(config)
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv1d) and name.startswith("feature_extractor"):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        return model

    @classmethod
    def load(cls, folder, device="cpu"):
        """A HuBERT from a Hugging Face folder, saved bare or under a head, which is dropped."""
        # Not on the meta device: weight_norm takes a norm, which imports the compiler there.
        with weights.Unfilled():
            model = cls(Config.read(folder))
        stored = weights.Tensors(folder)
        headed = any(name.startswith("hubert.") for name in stored)

        def ours(name):
            if headed and not name.startswith("hubert."):
                return None  # of a CTC or classification head
            name = name.removeprefix("hubert.")
            for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
                name = name.replace(
                    f"pos_conv_embed.conv.{old}",
                    f"pos_conv_embed.conv.parametrizations.weight.{new}",
                )
            return name

        # Some folders lack it; only training hides frames.
        nn.init.zeros_(model.masked_spec_embed)
        weights.load_into(model, folder, ours, optional=["masked_spec_embed"])
        return model.to(device, torch.float32).eval()

    def save(self, folder):
        self.config.write(folder)
        weights.save(folder, self.state_dict())


# --- masked prediction --------------------------------------------------------

CROP = 2 * audio.FRAME_RATE  # frames of a training clip: 2 seconds
SPAN, HIDDEN = 10, 0.065  # frames of a hidden stretch (200 ms); the share where one begins
SAVE_EVERY, LOG_EVERY = 100, 50  # steps


def hide(shape, rng):
    """Which frames to hide, (B, T) bool: about half of them, in stretches."""
    begins = rng.random(shape) < HIDDEN
    hidden = begins.copy()
    for shift in range(1, SPAN):
        hidden[:, shift:] |= begins[:, :-shift]
    return hidden


def crops(clips, labels, batch, rng):
    """Random clips of CROP frames: samples (B, CROP * HOP) float32 and their labels (B, CROP).

    Labels are -100 where a short clip was filled up.
    """
    samples = np.zeros((batch, CROP * audio.HOP), np.float32)
    targets = np.full((batch, CROP), -100)
    seconds = np.array([len(label) for label in labels], dtype=float)
    for b, i in enumerate(rng.choice(len(clips), batch, p=seconds / seconds.sum())):
        at = int(rng.integers(max(1, len(labels[i]) - CROP + 1)))
        sound = clips[i][at * audio.HOP : (at + CROP) * audio.HOP]
        label = labels[i][at : at + CROP]
        samples[b, : len(sound)] = sound
        targets[b, : len(label)] = label
    return torch.from_numpy(samples), torch.from_numpy(targets)


def masked_loss(logits, targets, hidden):
    """(loss, which frames count as hidden, (B, T) bool).

    logits (B, T, K), targets (B, T), -100 where a clip was filled up, hidden (B, T) bool.
    HuBERT's loss is on hidden frames alone. On a budget of minutes the seen ones, easier,
    give the convolutions their start.
    """
    real = targets >= 0                                             # (B, T)
    at, seen = hidden & real, ~hidden & real                        # (B, T) each
    loss = mean_loss(logits[at], targets[at]) + mean_loss(logits[seen], targets[seen])
    return loss, at


def mean_loss(logits, targets):
    """Mean cross-entropy of logits (n, K) and targets (n,); 0 of none."""
    return F.cross_entropy(logits, targets, reduction="sum") / max(1, len(targets))


def read_corpus(path):
    """(samples of every clip, unit of every frame of it, number of units) of a units folder.

    The samples take 0.23 GB an hour.
    """
    corpus = audio.Units(path)
    if corpus.meta["frame_rate"] != audio.FRAME_RATE:
        raise ValueError(
            f"{path}: {corpus.meta['frame_rate']} frames per second, wanted "
            f"{audio.FRAME_RATE}"
        )
    labels = []
    for i in range(len(corpus.entries)):
        units, durations = corpus[i]
        labels.append(np.repeat(units, durations).astype(np.int64))
    reading = runs.Bar(corpus.entries, desc="reading audio", unit="clip")
    return [audio.load(entry["audio"]) for entry in reading], labels, corpus.meta["k"]


def train(args, out):
    """Train a small HuBERT on a units folder's audio, with its units as the targets."""
    clips, labels, k = read_corpus(args.units)
    model = Hubert.fresh(Config(), args.seed)
    head = nn.Linear(model.config.hidden_size, k)  # not kept
    learner = nn.ModuleDict({"model": model, "head": head}).to(args.device)
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01
    )

    flags = "steps", "lr", "batch", "seed", "dtype"
    settings = {name: str(getattr(args, name)) for name in flags}
    settings["units"] = runs.fingerprint(args.units)
    checkpoint = runs.Checkpoint(out / "checkpoint.pt", settings)
    step = 0
    saved = checkpoint.read("learner", "optimizer", "step")
    if saved:
        learner.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step = saved[2]
        tqdm.write(f"resuming at step {step} of {args.steps}")
    runs.keep_log(out / "log.jsonl", step)

    for step in runs.Bar(
        range(step + 1, args.steps + 1),
        desc=f"training {args.out}",
        unit="step",
        initial=step,
        total=args.steps,
        smoothing=0.05,
    ):
        # Warm-up over a tenth, then a straight line to zero.
        rate = min(step / (0.1 * args.steps), (args.steps - step + 1) / (0.9 * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate

        rng = np.random.default_rng([args.seed, step])
        samples, targets = (
            x.to(args.device) for x in crops(clips, labels, args.batch, rng)
        )
        hidden = torch.from_numpy(hide(targets.shape, rng)).to(args.device)
        with runs.autocast(args.device, runs.DTYPES[args.dtype]):
            states = model(samples, model.config.num_hidden_layers, hidden)
            logits = head(states).float()                           # (B, T, K)
        loss, at = masked_loss(logits, targets, hidden)
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()

        if step % LOG_EVERY == 0 or step == args.steps:
            write_log(args, out / "log.jsonl", step, loss.item(), logits[at], targets[at])
        if step % SAVE_EVERY == 0:
            checkpoint.write(
                learner=learner.state_dict(), optimizer=optimizer.state_dict(), step=step
            )
    model.save(out)


def write_log(args, path, step, loss, logits, targets):
    """A line of the log, and one on the screen, from hidden frames: logits (n, K), targets (n,)."""
    right = (logits.argmax(-1) == targets).float().mean().item()
    line = {"step": step, "loss": round(loss, 4), "right": round(right, 4)}
    with open(path, "a") as log:
        log.write(json.dumps(line) + "\n")
    hours = step * args.batch * CROP / audio.FRAME_RATE / 3600
    tqdm.write(
        f"step {step}/{args.steps} | loss {loss:.3f} | hidden frames right {right:.1%} | "
        f"{hours:.2f} h heard"
    )


def main():
    parser = argparse.ArgumentParser(
        description="Train a small HuBERT to predict the units of hidden frames."
    )
    add = parser.add_argument
    add("action", choices=["train"])
    add(
        "--units",
        required=True,
        help="a units folder (tokenize_audio.py encode): the targets",
    )
    add("--out", required=True, help="HuBERT folder to write")
    add("--steps", type=runs.count, default=600, help="optimizer steps (default 600)")
    add("--batch", type=runs.count, default=16, help="two-second clips in a batch (default 16)")
    add("--lr", type=runs.positive, default=2e-3, help="peak learning rate (default 2e-3)")
    add("--seed", type=runs.seed, default=0, help="of weights, clips and masks (default 0)")
    runs.add_device(parser)
    runs.add_dtype(parser)
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing --out when the run ends well",
    )
    args = parser.parse_args()
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    with runs.new_folder(
        args.out, [args.units], args.overwrite, scratch=["checkpoint.pt"]
    ) as out:
        train(args, out)


if __name__ == "__main__":
    runs.run(main)
