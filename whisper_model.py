"""The network of Whisper, under Hugging Face's names: log-mel frames, an encoder, a decoder.

in   16 kHz samples; the config.json of a Hugging Face Whisper folder
out  encoder states, 50 frames a second; the logits of the next token
see  Whisper (arXiv:2212.04356)
run  python whisper.py hear out/question.wav --whisper weights/whisper-tiny.en

The encoder always hears 30 seconds, silence behind a shorter clip. The decoder is a language model
that also looks at the encoder's states.

Dimension key:  B batch   T positions   S positions that are attended to   C d_model
                H heads   D head width   V tokens
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn

import audio

SECONDS = 30  # of sound that the encoder hears
WINDOW, HOP = 400, 160  # samples that a mel frame sees, and between two of them
FRAME = 2 * HOP  # samples of an encoder frame
TICK = 0.02  # seconds of an encoder frame, and between two time tokens


@dataclass
class Config:
    """What of a Whisper `config.json` shapes the network."""

    vocab_size: int
    d_model: int
    num_mel_bins: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_layers: int
    decoder_attention_heads: int
    decoder_ffn_dim: int
    max_source_positions: int = 1500
    max_target_positions: int = 448

    @classmethod
    def read(cls, folder):
        path = Path(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{path}: missing; wanted a Hugging Face Whisper folder"
            )
        needed = [*cls.__dataclass_fields__][:-2]
        raw = runs.read_json(path, ["model_type"])
        if raw["model_type"] != "whisper":
            raise ValueError(f"{path}: model_type {raw['model_type']!r}, wanted 'whisper'")
        raw = runs.read_json(path, needed)
        if raw.get("activation_function", "gelu") != "gelu" or raw.get("scale_embedding"):
            raise ValueError(
                f"{path}: another activation than gelu, or scaled embeddings, which no "
                "published Whisper has; not supported"
            )
        sizes = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(
                    f"{path}: got {name} = {size!r}, wanted a number of 1 or more"
                )
        config = cls(**sizes)
        for heads in (config.encoder_attention_heads, config.decoder_attention_heads):
            if config.d_model % heads:
                raise ValueError(
                    f"{path}: {heads} heads do not share d_model = {config.d_model} evenly"
                )
        if config.max_source_positions != SECONDS / TICK:
            raise ValueError(
                f"{path}: got max_source_positions = {config.max_source_positions}, wanted "
                f"{SECONDS / TICK:.0f}, frames of {SECONDS} seconds"
            )
        return config


# --- log-mel frames -----------------------------------------------------------


@lru_cache
def mel_filters(bands):
    """Triangles of equal area (WINDOW // 2 + 1, bands) on Slaney's mel scale.

    It is linear up to 1 kHz, which is 15 mel, and a logarithm above.
    """
    top = 15 + 27 * math.log(8) / math.log(6.4)  # of 8 kHz
    mel = np.linspace(0, top, bands + 2)
    hertz = np.where(mel < 15, 200 / 3 * mel, 1000 * 6.4 ** ((mel - 15) / 27))
    filters = audio.triangles(hertz) * 2 / (hertz[2:] - hertz[:-2])
    return torch.from_numpy(filters).float()


def log_mel(samples, bands):
    """(bands, 3000) float32 of at most 30 seconds of samples (N,), filled up with silence."""
    x = torch.zeros(SECONDS * audio.SAMPLE_RATE)
    x[: len(samples)] = torch.as_tensor(samples)
    hann = torch.hann_window(WINDOW)
    spectrum = torch.stft(x, WINDOW, HOP, window=hann, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2                          # (WINDOW // 2 + 1, 3000)
    loud = (mel_filters(bands).T @ power).clamp(min=1e-10).log10()  # (bands, 3000)
    return (torch.maximum(loud, loud.max() - 8) + 4) / 4


# --- the network, under Hugging Face's names ----------------------------------


class Attention(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.H = heads
        self.q_proj = nn.Linear(C, C)
        self.k_proj = nn.Linear(C, C, bias=False)
        self.v_proj = nn.Linear(C, C)
        self.out_proj = nn.Linear(C, C)

    def heads(self, x):
        B, T, _ = x.shape
        return x.view(B, T, self.H, -1).transpose(1, 2)             # (B, H, T, D)

    def keys_values(self, x):
        """Keys and values of x (B, S, C), (B, H, S, D) each."""
        return self.heads(self.k_proj(x)), self.heads(self.v_proj(x))

    def forward(self, x, k, v, causal=False, seen=None):
        """x (B, T, C) attends to k and v. `seen` gets the scores, (B, H, T, S)."""
        q = self.heads(self.q_proj(x))                              # (B, H, T, D)
        if seen is not None:
            seen.append(q @ k.mT / math.sqrt(q.shape[-1]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))          # (B, T, C)


class EncoderLayer(nn.Module):
    def __init__(self, C, heads, wide):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(C)
        self.self_attn = Attention(C, heads)
        self.final_layer_norm = nn.LayerNorm(C)
        self.fc1 = nn.Linear(C, wide)
        self.fc2 = nn.Linear(wide, C)

    def forward(self, x):
        h = self.self_attn_layer_norm(x)
        x = x + self.self_attn(h, *self.self_attn.keys_values(h))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class DecoderLayer(EncoderLayer):
    def __init__(self, C, heads, wide):
        super().__init__(C, heads, wide)
        self.encoder_attn_layer_norm = nn.LayerNorm(C)
        self.encoder_attn = Attention(C, heads)

    def forward(self, x, heard, past, seen=None):
        """x (B, T, C). heard: keys and values of the sound. past: those of earlier positions.

        Returns x, and `past` with this call's positions.
        """
        h = self.self_attn_layer_norm(x)
        k, v = self.self_attn.keys_values(h)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.self_attn(h, k, v, causal=past is None)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), *heard, seen=seen)
        x = x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))
        return x, (k, v)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, C, 3, padding=1)
        self.conv2 = nn.Conv1d(C, C, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, C)
        layer = C, config.encoder_attention_heads, config.encoder_ffn_dim
        layers = range(config.encoder_layers)
        self.layers = nn.ModuleList(EncoderLayer(*layer) for _ in layers)
        self.layer_norm = nn.LayerNorm(C)

    def forward(self, mel, states=None):
        """(B, 1500, C) of mel (B, bands, 3000). `states` gets what each block hands on."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel))))             # (B, C, 1500)
        x = x.transpose(1, 2) + self.embed_positions.weight         # (B, 1500, C)
        for layer in self.layers:
            x = layer(x)
            if states is not None:
                states.append(x)
        return self.layer_norm(x)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.d_model
        self.embed_tokens = nn.Embedding(config.vocab_size, C)
        self.embed_positions = nn.Embedding(config.max_target_positions, C)
        layer = C, config.decoder_attention_heads, config.decoder_ffn_dim
        layers = range(config.decoder_layers)
        self.layers = nn.ModuleList(DecoderLayer(*layer) for _ in layers)
        self.layer_norm = nn.LayerNorm(C)

    def hear(self, states):
        """Keys and values of encoder states (B, S, C), for every layer."""
        return [layer.encoder_attn.keys_values(states) for layer in self.layers]

    def forward(self, ids, heard, past=None, seen=None):
        """(logits (B, T, V), past) of ids (B, T); behind a `past`, T is 1."""
        past = past or [None] * len(self.layers)
        done = past[0][0].shape[2] if past[0] else 0
        at = self.embed_positions.weight[done : done + ids.shape[1]]  # (T, C)
        x = self.embed_tokens(ids) + at                             # (B, T, C)
        now = []
        for layer, of_sound, before in zip(self.layers, heard, past):
            x, after = layer(x, of_sound, before, seen)
            now.append(after)
        return self.layer_norm(x) @ self.embed_tokens.weight.T, now


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
