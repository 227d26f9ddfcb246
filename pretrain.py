"""Train a language model, from nothing or from a folder, by next-token loss on documents.

in   --size and a tokenizer, or --init MODEL; --text, --chat or --units
out  a model folder, with log.jsonl and loss.png in it
see  SpeechCombine: speech pre-training starts from the *base*; Spirit LM (arXiv:2402.05755) for
     interleaved documents; Muon (arXiv:2502.16982); LoRA (arXiv:2106.09685)
run  python pretrain.py --init out/base --units out/units --text out/toy/base.jsonl --out out/speech

One loop makes all three models, and stands first. What is given decides the stage, and the
stage the settings (`STAGES`): text alone trains a base, chats an instruct model, units or
prosody a speech model. Loss is on text tokens, in chats on those of replies alone; on units
if --unit-loss says so. With --imitate, interleaved text bears none: a teacher's hidden states
take its place. What a small model needs beyond the loop is in align.py; `--plain` turns that
off, and --layers, --embeddings and --rows-first with it.

A stop costs at most the steps since the last checkpoint. The same command resumes there;
on a CPU the result is then bit-identical.
"""

import argparse
import datetime
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import runs  # before torch: it sets how OpenMP waits
import torch
from tqdm import tqdm

import weights
from align import Align, frozen_rows
from documents import (
    Documents,
    batches_ahead,
    cut,
    pack,
    read_chats,
    read_corpus,
    read_text,
    text_of,
)
from fused import linear_cross_entropy
from model import SIZES, LM, Config, LoRA, add_lora, add_rows, merge_lora
from muon import Muon
from prosody import is_prosody
from vocab import Vocab

NEW_FASTER = 10  # new rows start from noise: they learn this much faster than the blocks
CONTEXT = 256  # of a new model, at least: the toy's longest rows, and all that it may chat in
FILTER_BATCHES = 8  # batches of text that the filter of --keep-text is made from
SAVE_EVERY, LOG_EVERY = 200, 50  # steps
# Operations a second in bfloat16 (datasheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}


# --- the loop -----------------------------------------------------------------


@dataclass
class Run:
    """A run of `train`: what is trained, on what, with what."""

    args: argparse.Namespace
    model: LM
    vocab: Vocab
    units: range  # rows of the embedding that are units
    body: list  # parameters of the blocks, and the last norm
    tables: list  # embedding and head
    frozen: torch.Tensor                         # (V,) bool: rows of the tables that stay
    align: Align  # what a small model needs beyond the loss
    optimizers: list
    streams: dict  # {number of a batch in a step: where its documents come from}
    log: "Log"
    checkpoint: runs.Checkpoint


def train(args, out, rank, world):
    """Train as `args` say, into the folder `out`; process `rank` of `world`."""
    run = set_up(args, out, rank, world)
    first = resume(run, world) + 1
    batches = batches_ahead(run.streams.values(), args.batch, args.length, first, args.steps)
    behind = {}  # part -> the state of its stream after its last batch
    for step in runs.Bar(
        range(first, args.steps + 1),
        desc=f"training {args.out}",
        unit="step",
        initial=first - 1,
        total=args.steps,
        smoothing=0.05,
        disable=rank > 0,
    ):
        # The learning rate. New rows go first, while the blocks stand still.
        lr = learning_rate(step - 1, args.steps, args.lr)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["faster"]
        for p in run.body:
            p.requires_grad_(step > args.rows_first * args.steps)

        # Forward and backward, batch by batch: gradients add up.
        run.model.zero_grad(set_to_none=True)
        mean = torch.zeros((), device=args.device)
        for part in run.streams:
            batch, behind[part] = next(batches)
            minimised, loss = forward(run, batch, step, part)
            (minimised / args.accumulate).backward()
            mean += minimised.detach() / args.accumulate

        # Sum the gradients of all processes, zero those of frozen rows, clip.
        if world > 1:
            trained_now = [p for p in [*run.body, *run.tables] if p.grad is not None]
            for x in [mean, *(p.grad for p in trained_now)]:
                torch.distributed.all_reduce(x)
        for p in run.tables:
            p.grad[run.frozen] = 0
        norm = torch.nn.utils.clip_grad_norm_([*run.body, *run.tables], 1.0).item()
        if not (torch.isfinite(mean) and math.isfinite(norm)):
            raise ValueError(
                f"step {step}: the loss is {mean.item()}, its gradient's norm {norm}; what was "
                f"saved last is kept in {out}; to begin again with a lower --lr, remove it"
            )

        for optimizer in run.optimizers:
            optimizer.step()
        run.align.after_step()

        if rank == 0 and (step % LOG_EVERY == 0 or step == args.steps):
            run.log.write(step, mean.item(), loss, lr, norm)
        if step % SAVE_EVERY == 0:
            save_checkpoint(run, step, behind, rank, world)
    if rank == 0:
        save(run, out)


def forward(run, batch, step, part):
    """(what is minimised, its `Loss`) of batch number `part` of a step."""
    args = run.args
    batch |= run.align.positions(batch["start"], step, part)
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    states = []
    with runs.autocast(args.device, runs.DTYPES[args.dtype]):
        masked = run.align.loss_mask(batch)
        loss = next_token_loss(run.model, batch, run.units, args.unit_loss, masked, states)
        minimised = loss.mean + run.align.loss(states, batch)
    run.log.hear(batch["ids"])
    return minimised, loss


def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (
        0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    )


# --- the loss -----------------------------------------------------------------


class Loss(NamedTuple):
    mean: torch.Tensor  # weighted, over the targets that bear loss
    each: torch.Tensor  # (N,): cross-entropy of every target that bears loss, for the log
    is_unit: torch.Tensor                                           # (N,) bool
    kind: torch.Tensor                                    # (N,): the number of its layout


def next_token_loss(model, batch, units, unit_weight=1.0, masked=None, states=None):
    """The loss of the next token, a `Loss`, of a packed batch.

    units        rows of the embedding that are units, or prosody bins, a range; empty for text
    unit_weight  how much a unit counts beside a text token in the mean
    masked       (B, T) bool: targets of text that bear no loss, whatever the batch says
    states       a list that gets the hidden states of every block, (B, T, C) each

    Text and units have separate softmaxes: decoding allows one kind at a time, so the
    model need not predict which comes. Rows that never compete do not push each other away.
    """
    hidden = model.model(
        batch["ids"], start=batch["start"], positions=batch.get("position"), states=states
    )                                                               # (B, T, C)
    target = batch["target"]                                        # (B, T)
    is_unit = (target >= units.start) & (target < units.stop)       # (B, T)
    at = batch["loss"] > 0                                          # (B, T)
    if unit_weight == 0:
        at = at & ~is_unit
    if masked is not None:
        at = at & (~masked | is_unit)
    hidden, target, is_unit = hidden[at], target[at], is_unit[at]   # (N, C), (N,), (N,)

    head = model.lm_head.weight                                     # (V, C)
    row = torch.arange(len(head), device=head.device)
    not_text = (row >= units.start) & (row < units.stop) if units else None
    weight = batch["loss"][at] * torch.where(is_unit, unit_weight, 1.0)     # (N,)
    each = torch.zeros_like(weight)                                 # (N,)
    total, each[~is_unit] = linear_cross_entropy(
        hidden[~is_unit], head, target[~is_unit], weight[~is_unit], not_text
    )
    if unit_weight and units:
        of_units, each[is_unit] = linear_cross_entropy(
            hidden[is_unit],
            head[units.start : units.stop],
            target[is_unit] - units.start,
            weight[is_unit],
        )
        total = total + of_units
    return Loss(total / weight.sum().clamp(min=1), each, is_unit, batch["kind"][at])


# --- the settings of each stage -----------------------------------------------

# What --plain sets.
PLAIN = dict(
    pace=1.0,  # positions are not stretched
    imitate=0.0,  # no teacher
    keep_text=0.0,  # no filter
    rows_first=0.0,  # blocks learn from the first step on
    layers="0:1",  # all of them
    embeddings="all",  # and every row
)
# The settings of each stage, for the toy world. A real model wants a tenth of these rates
# or less, unless its change is a --lora.
STAGES = {
    # A base: from nothing, on text, and used to gaps between positions.
    "text": PLAIN | dict(mix="text=1", steps=700, lr=2e-3, batch=16, length=128, pace=8.0),
    # An instruct model: the upper half of the blocks learns to reply. No word's row
    # moves, so that a spoken word still looks like the written one.
    "chat": PLAIN
    | dict(
        mix="chat=1",
        steps=600,
        lr=1.5e-3,
        batch=16,
        length=128,
        embeddings="special",
        pace=8.0,
        layers="0.5:1",
    ),
    # A speech model: transcripts, and speech and text by turns, beside the base as a teacher.
    "units": PLAIN
    | dict(
        mix="interleave=0.35,transcribe=0.65",
        steps=1000,
        lr=1.5e-3,
        batch=8,
        length=256,
        embeddings="new",
        imitate=7.0,
        keep_text=0.01,
        rows_first=0.05,
    ),
    # A speech model with the paper's documents and loss: transcripts beside the speech. Ours
    # are Muon, the choice of parameters that move, and a softmax of their own for units.
    "prosody": PLAIN
    | dict(
        mix="captioned=0.8,text=0.2",
        steps=1600,
        lr=5e-4,
        batch=16,
        length=128,
        embeddings="new",
    ),
}
LAYOUTS = "text", "chat", "interleave", "transcribe", "captioned"


# --- what is trained ----------------------------------------------------------


def unfreeze(model, layers, embeddings):
    """Make trainable what is trained, and freeze the rest.

    Returns the parameters of blocks and last norm that move, and those of embedding and head.

    layers      (first, last), shares of the depth: block i of n if first <= i / n < last
    embeddings  as `frozen_rows` has it. With "new", norms and biases stay too: then every depth
                reads text at the scale that it always had.
    Where the blocks have LoRA, it is trained in place of their matrices.
    """
    for p in model.parameters():
        p.requires_grad_(False)
    blocks = model.model.layers
    lora = isinstance(blocks[0].self_attn.q_proj, LoRA)
    body = []
    for i, block in enumerate(blocks):
        if layers[0] <= i / len(blocks) < layers[1]:
            body += [
                p
                for name, p in block.named_parameters()
                if not lora or name.endswith((".A", ".B"))
            ]
    if not body:
        raise ValueError(
            f"--layers {layers[0]:g}:{layers[1]:g}: none of {len(blocks)} blocks "
            "begins between those shares of the depth; widen them"
        )

    if embeddings == "new":
        body = [p for p in body if p.dim() == 2]
    elif not lora:
        body += model.model.norm.parameters()
    tables = [model.model.embed_tokens.weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head.weight)
    for p in [*body, *tables]:
        p.requires_grad_(True)
    return body, tables


def two_optimizers(body, tables, lr, decay, faster, dtype):
    """[Muon for the matrices of the blocks, AdamW for norms and for embedding rows].

    Rows learn at `faster` times the rate. `dtype` is what Muon multiplies in.
    """
    matrices = [p for p in body if p.dim() == 2]
    vectors = [p for p in body if p.dim() != 2]
    adamw = torch.optim.AdamW(
        [{"params": tables, "faster": faster}, {"params": vectors, "faster": 1}],
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    return [Muon([{"params": matrices, "faster": 1}], lr, decay, dtype=dtype), adamw]


# --- what a run is made of ----------------------------------------------------


def set_up(args, out, rank, world):
    """The `Run` that the arguments describe; process `rank` of `world`."""
    torch.manual_seed(args.seed)
    model, vocab, units = start_model(args)
    first_new = units.start - 2 if args.units else 0  # two markers stand before the units
    if args.lora:
        add_lora(model, args.lora, args.lora_alpha or 2 * args.lora)
    model.to(args.device)
    model.model.recompute = args.recompute

    # A step is `accumulate` batches. This process makes its share of them, each from a
    # stream.
    sources, mix = read_sources(args)
    if vocab.speech:
        weights.codebook_files(args.units or args.init)  # `save` wants them, after the last step
    if rank == 0:
        warn_of_cuts(sources, vocab, args)
    counts = {"caption_loss": args.caption_loss, "echo_loss": args.echo_loss}
    streams = {
        part: Documents(vocab, sources, mix, args.seed, part, args.accumulate, **counts)
        for part in range(rank, args.accumulate, world)
    }

    body, tables = unfreeze(model, args.layers, args.embeddings)
    frozen = frozen_rows(args.embeddings, vocab, first_new, model.config.vocab_size)
    interleaved = list(mix).index("interleave") if "interleave" in mix else -1
    align = Align(args, model, interleaved, first_new)
    if args.keep_text:
        with forward_only(args):
            align.keep_text(model, body, text_batches(vocab, sources, args), args.keep_text)
    if args.compile:
        for block in [
            *model.model.layers,
            *(align.teacher.model.layers if align.teacher else ()),
        ]:
            block.compile()

    decay = 0.0 if args.init else 0.1  # a model that goes on gets no weight decay
    faster = NEW_FASTER if args.embeddings == "new" else 1
    dtype = runs.DTYPES[args.dtype]
    optimizers = two_optimizers(body, tables, args.lr, decay, faster, dtype)
    log = Log(args, out, model, vocab, units, mix, sources, streams[rank].held_out())
    checkpoint = runs.Checkpoint(out / "checkpoint.pt", settings_of(args))
    return Run(
        args=args,
        model=model,
        vocab=vocab,
        units=units,
        body=body,
        tables=tables,
        frozen=frozen.to(args.device),
        align=align,
        optimizers=optimizers,
        streams=streams,
        log=log,
        checkpoint=checkpoint,
    )


def start_model(args):
    """(model, vocabulary, rows of its units): --init's, with new rows for units, or a fresh one."""
    if args.init:
        model = LM.load(args.init, dtype=torch.float32)
        vocab = Vocab(args.init)
    else:
        vocab = Vocab(args.tokenizer)
        shape = SIZES[args.size]
        config = Config(
            vocab_size=vocab.size,
            num_key_value_heads=shape["num_attention_heads"],
            max_position_embeddings=max(CONTEXT, args.length),
            raw={"eos_token_id": vocab.eos, "bos_token_id": None},
            **shape,
        )
        model = LM.fresh(config, args.seed)
    if args.units:
        of_layout = read_corpus(args.units)  # all of its layouts have one codebook
        add_units(model, vocab, next(iter(of_layout.values())), args)

    speech = vocab.speech or {"first_unit": 0, "k": 0}
    return model, vocab, range(speech["first_unit"], speech["first_unit"] + speech["k"])


def add_units(model, vocab, corpus, args):
    """Give model and vocabulary rows for the units of a corpus, unless they have them."""
    meta = corpus.meta
    if vocab.speech:
        if vocab.speech["codebook_sha256"] != meta["codebook_sha256"]:
            raise ValueError(
                f"{args.units} was encoded with another codebook than {args.init} "
                f"learnt; encode with the codebook in {args.init}"
            )
        return

    # Units start from noise, spread as the rows of tokens that transcripts use. The two
    # markers of speech start as copies of the space token's row.
    space = vocab.encode(" ")[0]
    texts = [text_of(entry) for entry in corpus.entries[:1000]]
    used = {i for text in texts for i in vocab.encode(text)} or set(vocab.bytes_of)
    first = add_rows(model, 2 + meta["k"], {0: space, 1: space}, used, args.seed)
    vocab.with_speech(first, meta["k"], meta.get("names"))
    vocab.speech = {
        "speech": first,
        "end_speech": first + 1,
        "first_unit": first + 2,
        **{name: meta[name] for name in ("k", "frame_rate", "features")},
        "codebook_sha256": meta["codebook_sha256"],
    }


def read_sources(args):
    """({layout: its documents}, {layout: weight}) of a run, checked."""
    spoken = read_corpus(args.units)
    sources = {
        "text": args.text and read_text(args.text),
        "chat": args.chat and read_chats(args.chat),
        **spoken,
    }
    mix = {name: weight for name, weight in args.mix.items() if weight > 0}
    lacking = [name for name in mix if not sources.get(name)]
    if lacking:
        raise ValueError(
            f"--mix wants {', '.join(lacking)}, but no data for it is given (--text, "
            "--chat or --units)"
        )
    unread = [name for name in ("text", "chat") if sources[name] and name not in mix]
    if "interleave" in mix or args.keep_text:  # text stands beside speech, and makes the filter
        unread = [name for name in unread if name != "text"]
    if unread:
        raise ValueError(
            f"--{unread[0]} is given, and the mix is {', '.join(mix)}; leave it out, or name "
            "it in --mix"
        )
    entries = [entry for corpus in spoken.values() for entry in corpus.entries]
    if entries and not args.unit_loss and not any(map(text_of, entries)):
        raise ValueError(
            f"{args.units}: no entry has text, so there is no text to predict; give "
            "speech with its text, or --unit-loss above 0"
        )
    for entry in entries if "transcribe" in mix else ():
        if not text_of(entry).strip():
            raise ValueError(
                f"{args.units}: {entry['audio']} has no text to transcribe; take the entry out, or "
                "have whisper.py words write it"
            )
    if args.imitate and not any(entry.get("words") for entry in entries):
        raise ValueError(
            f"--imitate {args.imitate}: no entry of {args.units} has word times, and without them "
            "there is nothing to imitate; have whisper.py words find them, or give --imitate 0"
        )
    if args.keep_text and not sources["text"]:
        raise ValueError(
            f"--keep-text {args.keep_text}: wants --text, documents that show which inputs text "
            "uses"
        )
    return sources, mix


def text_batches(vocab, sources, args):
    """The batches of text that show the filter which inputs text uses."""
    documents = Documents(vocab, sources, {"text": 1.0}, args.seed)
    for _ in range(FILTER_BATCHES):
        batch = documents.batch(args.batch, args.length)
        yield {name: tensor.to(args.device) for name, tensor in batch.items()}


def forward_only(args):
    """For passes without a gradient: inside, a CPU multiplies in float32, a GPU in the run's dtype.

    (In float32 a GPU has no fused attention over grouped heads.)
    """
    dtype = runs.DTYPES[args.dtype] if "cuda" in args.device else torch.float32
    return runs.autocast(args.device, dtype)


# --- what it leaves, and going on after a stop --------------------------------


def save(run, out):
    """The finished model folder: weights, tokenizer, audio encoder, and how it was trained."""
    args = run.args
    if args.lora:
        merge_lora(run.model)
    run.model.save(out)
    run.vocab.save(out)
    hears = args.units or (args.init if run.vocab.speech else None)
    if hears:
        weights.copy_codebook(hears, out)
    made = {"seconds": round(run.log.seconds(), 1), "settings": run.checkpoint.settings}
    (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")
    run.log.draw()


def settings_of(args):
    """{name: text} of all that a resume must agree on: every flag, and its inputs' content."""
    names = [name for name in vars(args) if name not in ("out", "overwrite", "device")]
    inputs = [args.init, args.tokenizer, args.text, args.chat, args.units]
    return {name: str(getattr(args, name)) for name in names} | {
        path: runs.fingerprint(path) for path in inputs if path
    }


def resume(run, world):
    """Put back what a stopped run left; the step it had done, 0 if there was none."""
    step = 0
    log = run.log
    saved = run.checkpoint.read(
        "model", "optimizers", "step", "seconds", "heard", "streams"
    )
    if saved:
        parameters, states, step, log.spent, log.heard, documents = saved
        run.model.load_state_dict(parameters)
        run.model.tie()
        for optimizer, state in zip(run.optimizers, states):
            optimizer.load_state_dict(state)
        for part, stream in run.streams.items():
            stream.restore(documents[part])

    if world > 1:
        steps = torch.tensor([step, -step], device=run.args.device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            most, least = int(steps[0]), -int(steps[1])
            raise ValueError(
                f"this process is at step {step}, another at {least if step == most else most}: "
                f"all must see the same {run.checkpoint.path.parent}; put it on a "
                "shared disk"
            )
    log.resume(step)
    return step


def save_checkpoint(run, step, behind, rank, world):
    """Write all that `resume` needs. Every process sends the states of its streams to the first."""
    of_all = [behind]
    if world > 1:
        of_all = [None] * world
        torch.distributed.all_gather_object(of_all, behind)
    if rank == 0:
        run.checkpoint.write(
            model=run.model.state_dict(),
            optimizers=[o.state_dict() for o in run.optimizers],
            step=step,
            seconds=run.log.seconds(),
            heard=run.log.heard,
            streams={part: state for states in of_all for part, state in states.items()},
        )


# --- the log ------------------------------------------------------------------


class Log:
    """log.jsonl, a line on the screen now and then, loss.png; and how long and how much so far."""

    def __init__(self, args, out, model, vocab, units, mix, sources, held_out):
        self.args = args
        self.model = model
        self.units = units
        self.names = list(mix)
        self.held_out = held_out
        self.filler = vocab.eos
        self.path = out / "log.jsonl"
        self.picture = out / "loss.png"
        self.rank, self.world = runs.processes()
        self.spent = 0.0  # seconds before a stop
        self.heard = 0  # units trained on: this process's, times the number of processes
        corpus = sources.get("interleave") or sources.get("captioned")
        if corpus:
            self.unit_seconds = corpus.unit_seconds()

    def seconds(self):
        """Training time so far, earlier runs included."""
        return self.spent + time.time() - self.began

    def hear(self, ids):
        if self.units:
            inside = (ids >= self.units.start) & (ids < self.units.stop)
            self.heard += self.world * int(inside.sum())

    def resume(self, step):
        """Continue the log after this step."""
        self.first = step
        self.began = time.time()
        if self.rank == 0:
            runs.keep_log(self.path, step)
            if step:
                tqdm.write(f"resuming at step {step} of {self.args.steps}")

    def write(self, step, mean, loss, lr, norm):
        """A line of the log: the mean of a step's loss, and of its last batch by layout."""
        args = self.args
        tokens = (step - self.first) * args.accumulate * args.batch * args.length
        rate = tokens / (time.time() - self.began)
        line = {
            "step": step,
            "loss": round(mean, 4),
            "lr": lr,
            "gradient": round(norm, 3),
            "tokens_per_second": round(rate),
            "layouts": {},
        }
        for kind, name in enumerate(self.names):
            which = (loss.kind == kind) & ~loss.is_unit
            if which.any():
                line["layouts"][name] = round(loss.each[which].mean().item(), 4)
        if args.units:
            line["hours"] = round(self.heard * self.unit_seconds / 3600, 3)
        if peak := self.peak():
            size = sum(p.numel() for p in self.model.parameters())
            line["share_of_peak"] = round(6 * size * rate / (peak * self.world), 3)
        if step % (4 * LOG_EVERY) == 0 or step == args.steps:
            line["held_out"] = self.validate()

        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        tqdm.write(spelled(line, args.steps))

    def peak(self):
        """Operations a second of this card at best, if it is a known one."""
        if "cuda" not in self.args.device:
            return None
        card = torch.cuda.get_device_name()
        return next((peak for name, peak in PEAKS.items() if name in card), None)

    def validate(self):
        args = self.args
        with forward_only(args):
            means = validate(
                self.model, self.held_out, args.length, self.filler, self.units, args.device
            )
        return {name: round(mean, 4) for name, mean in means.items()}

    def draw(self):
        """Losses over steps: of each layout in training, and on its held-out documents (dots)."""
        from matplotlib.figure import Figure

        lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        figure = Figure(figsize=(7, 4), layout="tight")
        axes = figure.subplots()
        # A marker for each layout, so that they differ without their colours too.
        for kind, line, what in (("layouts", "-", ""), ("held_out", "", ", held out")):
            names = dict.fromkeys(name for line in lines for name in line.get(kind, {}))
            for name, marker in zip(names, itertools.cycle("os^Dv")):
                points = [
                    (line["step"], line[kind][name])
                    for line in lines
                    if name in line.get(kind, {})
                ]
                if not name.endswith(" units"):
                    axes.plot(*zip(*points), marker + line, label=name + what)
        axes.set(xlabel="step", ylabel="nats per text token")
        if axes.lines:
            axes.legend()
        figure.savefig(self.picture, dpi=120)


@torch.no_grad()
def validate(model, held_out, length, filler, units, device):
    """Mean cross-entropy of held-out documents by layout, units apart: {"text": 1.2}."""
    means = {}
    for name, documents in held_out.items():
        left = [(cut(document, length)[0], kind) for document, kind in documents]
        sums = {}
        while left:
            batch, left = pack(left, 8, length, filler)
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            loss = next_token_loss(model, batch, units)
            for label, which in ((name, ~loss.is_unit), (name + " units", loss.is_unit)):
                if which.any():
                    total, count = sums.get(label, (0.0, 0))
                    total += loss.each[which].sum().item()
                    sums[label] = total, count + int(which.sum())
        means |= {label: total / count for label, (total, count) in sums.items()}
    return means


def spelled(line, steps):
    """A line of the log for a human."""
    parts = [f"step {line['step']}/{steps}", f"loss {line['loss']:.3f}"]
    parts += [f"{name} {value:.3f}" for name, value in line["layouts"].items()]
    parts += [
        f"lr {line['lr']:.1e}",
        f"grad {line['gradient']:.2f}",
        f"{line['tokens_per_second'] / 1000:.1f}k tok/s",
    ]
    if "share_of_peak" in line:
        parts.append(f"{line['share_of_peak']:.0%} of peak")
    if "hours" in line:
        parts.append(f"{line['hours']:.2f} h heard")
    parts += [
        f"held-out {name} {value:.3f}" for name, value in line.get("held_out", {}).items()
    ]
    return " | ".join(parts)


def warn_of_cuts(sources, vocab, args):
    """Say how many chats and utterances, with all their text, are longer than a row and are cut.

    Text that may stand beside speech is not counted.
    """
    chats = sources["chat"] or []
    lengths = [len(vocab.chat(messages).ids) for messages in chats[:1000]]
    tell_cut(args.chat, "chats", lengths, "its question", args.length)

    lengths = []
    corpus = sources.get("captioned") or sources.get("transcribe")
    for i, entry in enumerate(corpus.entries[:1000] if corpus else ()):
        if "captioned" in sources:
            caption = entry.get("caption")
            after = f"\n{caption}." if caption else ""
            document = vocab.captioned("", corpus[i], "", after)
        else:
            document = vocab.transcribe([(text_of(entry), corpus[i][0])])
        lengths.append(len(document.ids))
    tell_cut(args.units, "utterances with their text", lengths, "its speech", args.length)


def tell_cut(path, what, lengths, lost, length):
    long = [n for n in lengths if n > length]
    if long:
        tqdm.write(
            f"{path}: {len(long)} of the first {len(lengths)} {what} are longer than a row of "
            f"{length} ids and are cut: what comes later is learnt without {lost}. --length "
            f"{max(long)} would hold them"
        )


# --- the command --------------------------------------------------------------


def layout_weights(text):
    """ "text=0.5,chat=0.5" -> {"text": 0.5, "chat": 0.5}."""
    mix = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in LAYOUTS or not value:
            raise argparse.ArgumentTypeError(
                f"got {item!r}, wanted LAYOUT=WEIGHT with a layout of "
                f"{', '.join(LAYOUTS)}"
            )
        mix[name] = float(value)
    if not all(0 <= weight < math.inf for weight in mix.values()) or not any(mix.values()):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted weights of 0 or more, one of them above 0"
        )
    return mix


def depth_shares(text):
    """ "0:0.5" -> (0.0, 0.5)."""
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        first = last = math.nan
    if not 0 <= first < last <= 1:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted two rising shares of the depth, like 0:0.5"
        )
    return first, last


def arguments():
    """The parser of this command."""

    def default(name):
        return "default: " + ", ".join(
            f"{STAGES[stage][name]} for {stage}" for stage in STAGES
        )

    parser = argparse.ArgumentParser(
        description="Pre-train, or continue to: text gives a base, "
        "chats an instruct model, units a speech model.",
        allow_abbrev=False,  # --rows was a flag, and would now mean --rows-first
    )
    add = parser.add_argument

    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument(
        "--size", choices=SIZES, help="train from scratch at this size (wants --tokenizer)"
    )
    start.add_argument("--init", help="a model folder to go on from")
    add("--tokenizer", help="folder of the text tokenizer, with --size")
    add("--text", help='JSON lines {"text"}, or a .txt with one document a line')
    add("--chat", help='JSON lines {"messages": [{"role", "content"}]}')
    add("--units", help="a folder of tokenize_audio.py encode, or of prosody.py")
    add("--out", required=True, help="model folder to write")

    add_recipe_flags(add, default)
    add_loss_flags(add)
    add_align_flags(add, default)

    # The machine.
    add(
        "--recompute",
        action="store_true",
        help="keep no activations inside blocks, compute them "
        "again for the gradient: less memory, a third more work",
    )
    runs.add_dtype(parser)
    add("--compile", action="store_true", help="torch.compile every block")
    add("--seed", type=runs.seed, default=0, help="of weights, data order and spans (default 0)")
    runs.add_device(parser)
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing --out when the run ends well",
    )
    return parser


def add_recipe_flags(add, default):
    """The flags of the plain recipe."""
    add("--mix", type=layout_weights, help=f"shares of layouts ({default('mix')})")
    add("--steps", type=runs.count, help=f"optimizer steps ({default('steps')})")
    add("--lr", type=runs.positive, help=f"peak learning rate ({default('lr')})")
    add("--batch", type=runs.count, help=f"packed rows in a batch ({default('batch')})")
    add("--length", type=runs.number(int, 2), help=f"tokens in a row ({default('length')})")
    add(
        "--accumulate",
        type=runs.count,
        help="batches in a step, shared among the processes of torchrun "
        "(default: one each)",
    )
    add(
        "--lora",
        type=runs.number(int, 0),
        default=0,
        metavar="RANK",
        help="train changes of this rank beside "
        "frozen matrices, and add them when saving (default 0: the matrices)",
    )
    add(
        "--lora-alpha",
        type=runs.not_negative,
        default=0.0,
        help="scale of those changes, over the rank (default: twice the rank)",
    )


def add_loss_flags(add):
    """The flags of what counts how much, beside a token of text."""
    add(
        "--unit-loss",
        type=runs.not_negative,
        default=0.0,
        help="weight of a unit's loss beside a text token's (default 0)",
    )
    add(
        "--caption-loss",
        type=runs.positive,
        default=1.0,
        help="weight of the loss of a caption behind speech beside other text's (default 1; a "
        "large model, which hears a few hundred lines, wants more)",
    )
    add(
        "--echo-loss",
        type=runs.not_negative,
        default=1.0,
        help="weight of the loss of the words that stand again inside the speech (default 1; "
        "with 0 open weights heard more: what copies words learns to ignore the numbers "
        "between them)",
    )


def add_align_flags(add, default):
    """The flags of what a small model needs beyond the plain recipe (align.py)."""
    add(
        "--plain",
        action="store_true",
        help="turn off --pace, --imitate, --keep-text, --rows-first, --layers and "
        "--embeddings: every parameter is trained, by the loss of the next token alone (Muon "
        "stays, and the softmax of units apart from that of text)",
    )
    add(
        "--pace",
        type=runs.number(float, 1.0),
        help="stretch positions by random gaps, whose mean is 1 to this, as words are "
        f"apart in speech; 1: none ({default('pace')})",
    )
    add(
        "--imitate",
        type=runs.not_negative,
        help="weight of the distance to the hidden states of the starting "
        "model as it reads the transcript; 0: none, then interleaved text bears a loss instead "
        f"({default('imitate')})",
    )
    add(
        "--keep-text",
        type=runs.not_negative,
        help="strength of the filter that keeps changes of weights out "
        f"of what text uses; 0: none ({default('keep_text')})",
    )
    add(
        "--rows-first",
        type=runs.number(float, 0.0, 1.0),
        help="share of the steps in which only embedding rows are trained "
        f"({default('rows_first')})",
    )
    add(
        "--layers",
        type=depth_shares,
        help="of the blocks train only those between two shares of the depth "
        f"({default('layers')})",
    )
    add(
        "--embeddings",
        choices=["all", "special", "new"],
        help="embedding rows that are trained: "
        "all, special tokens, or units and markers of speech, and then no norm or bias either "
        f"({default('embeddings')}; with --lora special for text and chats)",
    )


def settled(parser, world):
    """The arguments, each with a value."""
    args = parser.parse_args()
    if args.size and not args.tokenizer:
        parser.error(
            "--size wants --tokenizer, the folder of the text tokenizer to train with"
        )
    stage = "chat" if args.chat else "text" if args.text else None
    if args.units:
        stage = "prosody" if is_prosody(args.units) else "units"
    if not stage:
        parser.error("nothing to train on: give --text, --chat or --units")

    defaults = dict(STAGES[stage], accumulate=world)
    if args.plain:
        given = [name for name in PLAIN if getattr(args, name) is not None]
        if given:
            parser.error(
                f"--plain turns --{given[0].replace('_', '-')} off; give one of the two"
            )
        defaults |= PLAIN
    if args.lora:
        defaults["keep_text"] = 0.0  # it filters matrices, and those are frozen
        if not args.units:
            defaults["embeddings"] = "special"

    # Parse again with the stage's defaults: of a text like "0:0.5", argparse makes what its
    # flag would.
    parser.set_defaults(**defaults)
    args = parser.parse_args()
    check(parser, args, world)
    return args


def check(parser, args, world):
    """An error for settings that make no sense."""
    if args.imitate and not args.units:
        parser.error(f"--imitate {args.imitate}: wants --units: only speech can be like its text")
    if args.imitate and args.units and is_prosody(args.units):
        parser.error(
            f"--imitate {args.imitate}: in {args.units} the text stands beside the speech, so "
            "there is nothing to imitate; leave the flag out"
        )
    if args.lora and args.keep_text:
        parser.error(f"--lora {args.lora}: it freezes what --keep-text holds; give one of the two")
    if args.accumulate % world:
        parser.error(
            f"--accumulate {args.accumulate}: wanted as many for each of {world} processes"
        )
    if args.unit_loss and not args.units:
        parser.error(f"--unit-loss {args.unit_loss}: no --units are given; leave it out")
    for flag, weight in (("caption", args.caption_loss), ("echo", args.echo_loss)):
        if weight != 1 and not (args.units and is_prosody(args.units)):
            parser.error(
                f"--{flag}-loss {weight:g}: only speech of prosody.py has captions and words; "
                "leave it out"
            )
    if args.lora_alpha and not args.lora:
        parser.error("--lora-alpha scales what --lora trains; give both")
    if args.init and args.tokenizer:
        parser.error("--init brings its own tokenizer; leave --tokenizer out")
    if args.lora and args.size:
        parser.error(
            "--lora trains beside frozen matrices, which --size would leave random; give "
            "--init"
        )
    frozen = args.layers != (0.0, 1.0) or args.embeddings != "all"
    if args.size and (frozen or args.imitate or args.keep_text):
        parser.error(
            "--size starts from noise, and these settings leave a part of it as it is, or learn "
            "from it; give --init, or --plain"
        )
    if args.embeddings == "new" and not args.units:
        parser.error(
            "--embeddings new: only units are new tokens; give --units, or train others"
        )


def main():
    rank, world = runs.processes()
    args = settled(arguments(), world)
    inputs = [args.init, args.tokenizer, args.text, args.chat, args.units]
    for path in inputs:
        if path and not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file or folder")

    args.device = runs.device_of_rank(args.device, world)
    if world > 1:
        if "cuda" in args.device:
            torch.cuda.set_device(args.device)
        # The others wait while the first writes a checkpoint, which may be 50 GB.
        torch.distributed.init_process_group(
            "nccl" if "cuda" in args.device else "gloo", timeout=datetime.timedelta(hours=2)
        )
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    if world > 1:  # each has measured for itself, beside the others; the first one's choice holds
        names = [args.dtype]
        torch.distributed.broadcast_object_list(names)
        args.dtype = names[0]

    if rank == 0:
        with runs.new_folder(
            args.out, inputs, args.overwrite, scratch=["checkpoint.pt"]
        ) as out:
            train(args, out, rank, world)
    else:  # reads a checkpoint there, writes nothing
        out = Path(args.out)
        out = out.resolve() if out.is_symlink() else out  # as new_folder does
        train(args, out.with_name(out.name + ".partial"), rank, world)
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    runs.run(main)
