"""DeSTA2's ears: an adapter turns encoder states into vectors among the LM's embeddings.

in   encoder states (taps, frames, C); a folder of desta.py train
out  vectors that stand in a turn where text would; (model, tokens, ears) for a chat
see  DeSTA2 (arXiv:2409.20007), DeSTA2.5-Audio (arXiv:2507.02768); Q-Former (arXiv:2301.12597)
run  python chat.py out/desta out/question.wav

Two adapters: *qformer* (DeSTA2's), in which learned queries look at the states, and
*concat*, which joins some frames at a time.

Dimension key:  B clips   T frames   C width of the encoder   Q queries   V rows of the embedding
                E their width, "out"
"""

import math
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from torch import nn

import audio
import weights
from encoder import Encoder
from model import LM
from targets import CLOSE, OPEN
from vocab import Vocab
from whisper import Whisper
from whisper_model import SECONDS

DROPOUT = 0.1  # in a Q-Former, as in BERT


# --- the adapters -------------------------------------------------------------


class QFormer(nn.Module):
    """Learned queries look at the states; each mixes what it got from the taps.

    Each tap has queries of its own, and all taps share the layers, with norms behind each
    part, as in BERT. A clip becomes as many vectors as there are queries, however long it is.
    """

    def __init__(self, shape):
        super().__init__()
        taps, width, queries = shape["taps"], shape["width"], shape["queries"]
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(taps, queries, width)))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, shape["heads"], 4 * width, DROPOUT, "gelu", batch_first=True
            )
            for _ in range(shape["layers"])
        )
        self.mixing = nn.Parameter(torch.zeros(queries, taps))
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, shape["out"])

    def forward(self, states, real):
        B, taps, T, C = states.shape
        x = self.queries.expand(B, -1, -1, -1).flatten(0, 1)        # (B * taps, Q, C)
        padding = ~real.repeat_interleave(taps, 0)                  # (B * taps, T)
        for layer in self.layers:
            x = layer(x, states.flatten(0, 1), memory_key_padding_mask=padding)
        x = x.view(B, taps, -1, C)                                  # (B, taps, Q, C)
        x = torch.einsum("btqc,qt->bqc", x, self.mixing.softmax(-1))  # (B, Q, C)
        return self.proj(self.norm(x))                              # (B, Q, E)

    def count(self, frames):
        return self.mixing.shape[0]


class Concat(nn.Module):
    """The last tap's frames, four joined, through an MLP: 12.5 vectors a second."""

    def __init__(self, shape):
        super().__init__()
        self.join = shape["join"]
        self.up = nn.Linear(self.join * shape["width"], 2 * shape["out"])
        self.proj = nn.Linear(2 * shape["out"], shape["out"])

    def forward(self, states, real):
        x = states[:, -1]                                           # (B, T, C)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.join))
        x = x.unflatten(1, (-1, self.join)).flatten(2)           # (B, T / join, join * C)
        return self.proj(F.gelu(self.up(x)))                        # (B, T / join, E)

    def count(self, frames):
        return -(-frames // self.join)


ADAPTERS = {"qformer": QFormer, "concat": Concat}


class Adapter(nn.Module):
    """Encoder states of clips -> vectors like rows of the embedding. `shape` is its JSON."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.kind = ADAPTERS[shape["kind"]](shape)
        # As loud as a row of the embedding, to begin with (joined frames: a third of it).
        proj = self.kind.proj
        std = shape["loudness"] / math.sqrt(proj.in_features)
        nn.init.normal_(proj.weight, std=std)
        nn.init.zeros_(proj.bias)

    def forward(self, states):
        """[(vectors, E)] of a list of states (taps, frames, C)."""
        frames = [x.shape[1] for x in states]
        T = max(frames)
        x = torch.stack([F.pad(x, (0, 0, 0, T - x.shape[1])) for x in states])
        x = F.layer_norm(x, x.shape[-1:])  # blocks differ in loudness; (B, taps, T, C)
        ends = torch.tensor(frames, device=x.device)
        real = torch.arange(T, device=x.device) < ends[:, None]     # (B, T)

        # Vectors of the padding behind a clip are cut off.
        counts = [self.kind.count(n) for n in frames]
        return [y[:count] for y, count in zip(self.kind(x, real), counts)]


# --- what was heard, in a turn ------------------------------------------------


class Table(nn.Module):
    """An embedding of V rows, and behind them what was heard: id V + n is vector number n."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight                              # (V, E)
        self.heard = self.weight.new_zeros(0, self.weight.shape[1])  # (vectors, E)

    def forward(self, ids):
        is_vector = ids >= len(self.weight)
        x = F.embedding(ids.masked_fill(is_vector, 0), self.weight)
        if not is_vector.any():
            return x
        vectors = self.heard[ids[is_vector] - len(self.weight)]
        return x.index_put((is_vector,), vectors.to(x.dtype))


class Listener(Vocab):
    """A model's tokens. A clip is the numbers of its vectors; it stands where text would.

    first        the id of vector 0: the number of rows of the embedding
    transcripts  {the number of a clip's first vector: what is said in it}
    """

    def __init__(self, folder, first):
        super().__init__(folder)
        self.first = first
        self.transcripts = {}

    def span(self, numbers):
        """`<start_audio>` vectors, transcript `<end_audio>`."""
        vectors = (self.first + np.asarray(numbers)).tolist()
        self.special |= {f"<|heard_{i - self.first}|>": i for i in vectors}  # `spelled` shows them
        words = self.encode(self.transcripts.get(int(numbers[0]), ""))
        return self.encode(OPEN) + vectors + words + self.encode(CLOSE)

    def forget(self):
        self.transcripts.clear()
        self.special = {name: i for name, i in self.special.items() if i < self.first}


class Ears:
    """Sound -> (numbers of its vectors, None), for the model and listener that share them.

    None stands where units would have their durations.

    has_words    does a transcript stand beside the vectors?
    transcriber  samples -> text; None if the caller gives the words
    """

    most = SECONDS  # of a clip
    makes = "vectors"

    def __init__(self, encoder, adapter, table, listener, has_words):
        self.encoder, self.adapter = encoder, adapter
        self.hop = encoder.hop
        self.table, self.listener = table, listener
        self.has_words = has_words
        self.transcriber = None

    @property
    def lacks_words(self):
        """Must the caller give the transcript?"""
        return self.has_words and not self.transcriber

    @torch.inference_mode()
    def __call__(self, samples, text=None):
        if len(samples) > SECONDS * audio.SAMPLE_RATE:
            raise ValueError(f"more than {SECONDS} seconds; give a part of it")
        if len(samples) < self.hop:
            raise ValueError(f"{len(samples)} samples are under one frame ({self.hop})")
        [states] = self.encoder.states([samples])                   # (taps, frames, C)
        [vectors] = self.adapter([states.to(self.table.weight.device)])  # (vectors, E)
        first = len(self.table.heard)
        self.table.heard = torch.cat([self.table.heard, vectors])
        numbers = np.arange(first, first + len(vectors))
        if self.has_words:
            words = self.transcriber(samples) if text is None else text
            self.listener.transcripts[first] = words
        return numbers, None

    def forget(self):
        """Free what was heard: no turn holds its numbers any more."""
        self.table.heard = self.table.heard[:0]
        self.listener.forget()


def frozen(folder, device, dtype=None):
    """(an instruct model that stays, its table of rows and vectors, its tokens)."""
    model = LM.load(folder, device, dtype).eval().requires_grad_(False)
    table = Table(model.model.embed_tokens)
    model.model.embed_tokens = table
    return model, table, Listener(folder, len(table.weight))


def still(path, digest, name, folder):
    """Refuse what a folder was trained with, its `name`, where it is gone or has changed."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"{path}: the {name} of {folder} is not there; put it back, or write its new place "
            f"into {folder}/desta.json"
        )
    if runs.fingerprint(path) != digest:
        raise ValueError(f"{path} has changed since {folder} was trained with it")


def load(folder, device="cpu", dtype=None):
    """(model, vocabulary, ears) of a folder of `train`."""
    made = runs.read_json(
        Path(folder) / "desta.json",
        ["model", "encoder", "transcriber", "sha256", "adapter"],
    )
    for name in ("sha256", "adapter"):
        if not isinstance(made[name], dict):
            raise ValueError(
                f"{folder}/desta.json: got {name} = {made[name]!r}, wanted an object"
            )
    made.setdefault("has_words", bool(made["transcriber"]))  # files of earlier versions lack it
    for name in ("model", "encoder", "transcriber"):
        if name == "transcriber" and not made[name]:
            continue
        if not isinstance(made[name], str):
            raise ValueError(
                f"{folder}/desta.json: got {name} = {made[name]!r}, wanted a path"
            )
        still(made[name], made["sha256"].get(name), name, folder)
    model, table, listener = frozen(made["model"], device, dtype)
    if made["adapter"].get("kind") not in ADAPTERS:
        raise ValueError(
            f"{folder}/desta.json: got the adapter {made['adapter'].get('kind')!r}, wanted "
            f"{' or '.join(ADAPTERS)}"
        )
    try:
        with torch.device("meta"), weights.Unfilled():
            adapter = Adapter(made["adapter"])
    except KeyError as lacking:
        raise ValueError(f"{folder}/desta.json: its adapter has no {lacking}") from None
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{folder}/desta.json: no such adapter can be made: {error}") from None
    weights.load_into(adapter, folder)
    encoder = Encoder(made["encoder"], device)
    ears = Ears(encoder, adapter.to(device).eval(), table, listener, made["has_words"])
    if made["transcriber"]:
        same = made["transcriber"] == made["encoder"]
        whisper = encoder.whisper if same else Whisper(made["transcriber"], device)
        ears.transcriber = lambda samples: whisper.transcripts([samples])[0]
    return model, listener, ears
