"""Continue pre-training a language model on text, on chats, or on speech units and text: one plain loop for all three.

in   a tokenizer and a --size, or --init MODEL; --text, --chat or --units     out  a model folder (log.jsonl and loss.png in it)
see  SpeechCombine: speech pre-training starts from the *base*; Spirit LM (arXiv:2402.05755) for interleaved documents;
     Muon (arXiv:2502.16982) for steps of one size in all directions of a matrix; L2-SP (arXiv:1802.01483) for the pull to the weights
     it starts from; Adam-NSCL (arXiv:2103.07113) for changes that old inputs do not feel
run  python pretrain.py --init out/base --units out/units --text out/toy/base.jsonl --out out/speech

What is given decides the stage, and the stage the defaults (STAGES): text alone trains a base, chats an instruct model, units
a speech model. A stop costs at most the steps since the last checkpoint: the same command goes on from there, to the bit.
"""
import argparse
import copy
import datetime
import json
import math
import os
import time
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F
from tqdm import tqdm

import weights
from audio import Units
from documents import Documents, cut, pack, read_chats, read_text
from fused import linear_cross_entropy
from model import SIZES, LM, Config, LoRA, add_lora, add_rows, merge_lora
from muon import Muon
from vocab import Document, Vocab

STAGES = {     # tuned on the nano toy; a real model wants a tenth of these rates or less (README)
    "text": dict(steps=700, lr=2e-3, layers="0:1", pace=8.0, keep_text=0.0, imitate=0.0, rows_first=0, rows=16, length=128, mix="text=1"),
    "chat": dict(steps=600, lr=1.5e-3, layers="0.5:1", pace=8.0, keep_text=0.0, imitate=0.0, rows_first=0, rows=16, length=128, mix="chat=1"),
    "units": dict(steps=1000, lr=1.5e-3, layers="0:1", pace=1.0, keep_text=0.01, imitate=7.0, rows_first=50, rows=8, length=256, mix="interleave=0.35,transcribe=0.65"),
}
ROWS_FASTER = 10                   # new rows start from noise, the body from a trained model: they learn this much faster
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}     # products in bf16, operations a second (datasheets)
SAVE_EVERY, LOG_EVERY = 200, 50     # steps
EARS = 6                            # one block in six is ears: there units become words, which need not be thought of as text yet


# --- the loss --------------------------------------------------------------------------------------------------------------

def paced(start, most, rng):
    """Positions (B, T) of ids whose documents begin at `start` (B, T): in half of the documents one after the other; in the others in
    stretches of about eight ids, every other one with random gaps of up to `most` positions a token on average.

    Speech takes several units for a word, so in a spoken turn words stand further apart than in any text. A model that is used to
    distances reads on; one that knows only short ones forgets what was asked, and no training on speech can mend a delta that was
    learnt without it. Large models know distance from long contexts; a small one learns it here, from text (arXiv:2305.16843).
    """
    draw, at = lambda: torch.rand(start.shape, generator=rng), torch.arange(start.shape[1]).expand_as(start)
    plain, since = (draw() < 0.5).gather(1, start), torch.where(draw() < 1 / 8, at, 0).cummax(1).values       # (B, T): where the stretch began
    pace = (most * (2 * draw() - 1)).clamp(min=1).gather(1, since).masked_fill(plain, 1)                      # (B, T)
    position = (1 + ((2 * pace - 1) * draw()).long()).cumsum(1)            # (B, T)
    return position - position.gather(1, start)


def losses(model, batch, first_unit, k, unit_worth=1.0, silent=None, states=None):
    """(the mean loss, the cross-entropy of each target that bears loss, whether it is a unit, its layout), the last three 1-D.

    The softmax of a text target runs over text rows alone, that of a unit over unit rows: which modality comes next is not
    the model's to guess (the decoder holds it), and no row is pushed away by a modality it never competes with.
    unit_worth: a unit's weight beside a text token's in the mean; silent (B, T) bool: targets that bear no loss, whatever the batch says.
    """
    hidden = model.model(batch["ids"], start=batch["start"], positions=batch.get("position"), states=states)          # (B, T, C)
    head, target = model.lm_head.weight, batch["target"]
    is_unit = (target >= first_unit) & (target < first_unit + k)            # (B, T)
    at = (batch["loss"] > 0) & (unit_worth > 0 or ~is_unit)
    at = at if silent is None else at & ~silent
    hidden, target, is_unit = hidden[at], target[at], is_unit[at]           # (N, C), (N,), (N,): N targets bear loss
    row = torch.arange(len(head), device=head.device)
    units = (row >= first_unit) & (row < first_unit + k) if k else None
    each, total = torch.zeros(len(target), device=head.device), 0.0 * (hidden.sum() + head.sum())
    for which, rows, barred, worth in ((~is_unit, slice(None), units, 1.0), (is_unit, slice(first_unit, first_unit + k), None, unit_worth)):
        if which.any():
            part, each[which] = linear_cross_entropy(hidden[which], head[rows], target[which] - (rows.start or 0), torch.full_like(each[which], worth), barred)
            total = total + part
    return total / (unit_worth * is_unit + ~is_unit).sum().clamp(min=1), each, is_unit, batch["kind"][at]


def imitation(states, batch, reader, first_new):
    """(named, unlike): how far the model is from hearing as `reader`, the frozen model it started from, reads the same in writing.

    named   behind the first blocks, the ears, a word's last unit must point to the word (its last token): cross-entropy over text rows.
    unlike  behind every later block its state must be the reader's state on that word, and beside speech that on the same text: square
            difference of what each block hands on (B, T, C), in the `measure` of what texts differ by; 0 alike, 2 unrelated. The reader reads at the pace of the speech: every word stands at the position where it has been said.

    Weights cannot tell apart what is alike, so a delta that was learnt on text then works on speech. (Matching a frozen model's states:
    FitNets, arXiv:1412.6550; in speech DiVA, arXiv:2410.02678, from an *instruct* model. Here from the base: no instruction is heard.)
    """
    if not batch["read"].shape[1]:                                         # a batch without speech: nothing to imitate
        return 0.0, 0.0
    theirs, place = [], batch["place"].clamp(min=0)                        # (B, R): fillers say nothing
    at = torch.arange(batch["ids"].shape[1], device=place.device)          # (T,)
    position = batch["position"] if "position" in batch else at - batch["start"]                                  # (B, T)
    with torch.no_grad():
        reader.model(batch["read"], start=batch["read_start"], positions=position.gather(1, place), states=theirs)
    row, at = (batch["place"] >= 0).nonzero(as_tuple=True)                  # (N,) each: N ids are read
    place = place[row, at]                                                 # (N,): where they are heard
    speech = (batch["ids"][row, place] >= first_new).float()               # (N,)
    parts = torch.stack([speech / speech.sum().clamp(min=1), (1 - speech) / (1 - speech).sum().clamp(min=1)])     # (2, N): speech, text
    unlike, ears = 0.0, max(1, len(states) // EARS)
    for n, (ours, theirs_) in enumerate(zip(states, theirs)):
        ours, theirs_ = (F.rms_norm(x.float(), x.shape[-1:]) for x in (ours[row, place], theirs_[row, at]))       # (N, C)
        worth = parts.sum(0) if n >= ears else parts[1]                    # (N,): behind the ears all, before that text alone
        apart = ours - theirs_
        unlike = unlike + ((apart @ measure(theirs_) * apart).mean(-1) * worth).sum() / max(1, len(states) - ears)
    word = speech > 0                                                      # (N,)
    heard = F.rms_norm(states[ears - 1][row, place][word].float(), states[0].shape[-1:])                          # (words, C)
    named, _ = linear_cross_entropy(heard, reader.model.embed_tokens.weight[:first_new], batch["read"][row, at][word], parts[0][word])
    return named, unlike


@torch.no_grad()
def measure(states):
    """The matrix M (C, C) in which d.M.d counts a difference d of two states by how much texts differ there, (N, C) states given: a few directions
    of a transformer's states are loud, and what tells one word from another is not among them (Mahalanobis, a tenth of the mean added)."""
    with torch.autocast(states.device.type, enabled=False):
        spread = states.T @ states / len(states)                           # (C, C); its mean eigenvalue is 1, as states are normalised
        inverse = torch.linalg.inv(spread + 0.1 * torch.eye(len(spread), device=spread.device))
        return inverse * len(spread) / (inverse * spread).sum()


def imitated(batch):
    """(B, T): does the reader read the document that this id belongs to? Not if it was cut into pieces."""
    row, at = (batch["place"] >= 0).nonzero(as_tuple=True)                  # (N,) each
    read = torch.zeros_like(batch["start"], dtype=torch.bool)              # (B, T)
    read[row, batch["start"][row, batch["place"][row, at]]] = True
    return read.gather(1, batch["start"])


@torch.no_grad()
def validate(model, held_out, length, filler, first_unit, k, device):
    """Mean cross-entropy per layout on the held-out documents, units and text apart: {"text": 1.2, "interleave units": 2.3}."""
    said = {}
    for name, documents in held_out.items():
        left, sums = [(cut(document, length)[0], kind) for document, kind in documents], {}
        while left:
            batch, left = pack(left, 8, length, filler)
            _, ce, is_unit, _ = losses(model, {n: t.to(device) for n, t in batch.items()}, first_unit, k)
            for label, which in ((name, ~is_unit), (name + " units", is_unit)):
                if which.any():
                    total, count = sums.get(label, (0.0, 0))
                    sums[label] = (total + ce[which].sum().item(), count + int(which.sum()))
        said |= {label: total / count for label, (total, count) in sums.items()}
    return said


def learning_rate(step, steps, peak):
    """Linear warm-up over the first twentieth, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


# --- the run ---------------------------------------------------------------------------------------------------------------

def start_model(args):
    """The model and vocabulary a run starts from, and the first row and number of its units (0, 0 if it reads none)."""
    if args.init:
        model, vocab = LM.load(args.init, dtype=torch.float32), Vocab(args.init)
    else:
        vocab = Vocab(args.tokenizer)
        config = Config(vocab_size=vocab.size, num_key_value_heads=SIZES[args.size]["num_attention_heads"], **SIZES[args.size],
                        raw={"eos_token_id": vocab.eos, "bos_token_id": None})
        model = LM.fresh(config, args.seed)
    if vocab.size > model.config.vocab_size:
        raise ValueError(f"{args.init or args.tokenizer}: the tokenizer knows {vocab.size} tokens, the embedding has {model.config.vocab_size} rows")
    if args.units:
        corpus = Units(args.units)
        meta = corpus.meta
        if vocab.speech and vocab.speech["codebook_sha256"] != meta["codebook_sha256"]:
            raise ValueError(f"{args.units} was encoded with another codebook than {args.init} learnt; encode with the codebook in {args.init}")
        if not vocab.speech:
            space = vocab.encode(" ")[0]
            used = {i for row in corpus.rows[:1000] for i in vocab.encode(row.get("text", ""))} or set(vocab.bytes_of)
            first = add_rows(model, 2 + meta["k"], {0: space, 1: space}, used, args.seed)  # the markers start as what a pause is in text
            vocab.with_speech(first, meta["k"])
            vocab.speech = {"speech": first, "end_speech": first + 1, "first_unit": first + 2, "k": meta["k"], "frame_rate": meta["frame_rate"],
                            "features": meta["features"], "codebook_sha256": meta["codebook_sha256"]}
    speech = vocab.speech or {"first_unit": 0, "k": 0}
    return model, vocab, speech["first_unit"], speech["k"]


def parameter_groups(model, layers, first_new):
    """What is trained: the blocks between two shares of the depth (0, 0.5: the lower half), or of them their LoRA alone, and the rows. With
    new rows (first_new > 0) text rows, head and norms stay, so that every depth reads text at the scale it always had."""
    for p in model.parameters():
        p.requires_grad_(False)
    depth = len(model.model.layers)
    low_rank = isinstance(model.model.layers[0].self_attn.q_proj, LoRA)
    body = [p for i, block in enumerate(model.model.layers) if layers[0] <= i / depth < layers[1]
            for name, p in block.named_parameters() if not low_rank or name.endswith((".A", ".B"))]
    if not body:
        raise ValueError(f"--layers {layers[0]:g}:{layers[1]:g}: none of {depth} blocks begins between those shares of the depth; widen them")
    rows = [model.model.embed_tokens.weight] + ([] if model.config.tie_word_embeddings else [model.lm_head.weight])
    body = [p for p in body if p.dim() == 2] if first_new else body + list(model.model.norm.parameters()) * (not low_rank)
    for p in [*body, *rows]:
        p.requires_grad_(True)
    return body, rows


def two_optimizers(body, rows, lr, decay, faster, dtype):
    """[Muon for the matrices of the body, AdamW for rows and norms]; rows learn `faster` times as fast. `dtype`: Muon's products."""
    matrices, vectors = ([p for p in body if (p.dim() == 2) == wanted] for wanted in (True, False))
    return [Muon([{"params": matrices, "faster": 1}], lr, decay, dtype=dtype),
            torch.optim.AdamW([{"params": rows, "faster": faster}, {"params": vectors, "faster": 1}], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


@torch.no_grad()
def text_filters(model, body, documents, strength, device, rows=8, length=256, batches=8):
    """{weight (out, in): matrix (in, in)} that takes out of a weight's change what text would feel of it.

    Let C be the mean of x x^T over the inputs x that text sends into a weight, scaled to a mean eigenvalue of 1. A change D adds D x
    to what the next layer gets, on average tr(D C D^T) squared. D (I + strength * C)^-1 is an implicit step down that: after every
    optimizer step what text uses is damped, what text leaves silent stays, and there the units find room. (Adam-NSCL, softened.)
    """
    sums, hooks = {}, []

    def listen(module, inputs):
        x = inputs[0].flatten(0, -2).float()                               # (B * T, in)
        with torch.autocast(x.device.type, enabled=False):                 # in bfloat16 a sum of squares could fall below a part of it
            sums[module.weight] = sums.get(module.weight, 0) + x.T @ x

    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and any(module.weight is p for p in body):
            hooks.append(module.register_forward_pre_hook(listen))
    for _ in range(batches):
        batch = documents.batch(rows, length)
        model.model(batch["ids"].to(device), start=batch["start"].to(device))
    for hook in hooks:
        hook.remove()
    scaled = {p: C * len(C) / C.trace() for p, C in sums.items()}          # I + strength * C: symmetric, no eigenvalue below 1
    return {p: torch.cholesky_inverse(torch.linalg.cholesky(torch.eye(len(C), device=device) + strength * C)) for p, C in scaled.items()}


def train(args, out, rank, world):
    torch.manual_seed(args.seed)
    device, dtype = args.device, runs.DTYPES[args.dtype]
    model, vocab, first_unit, k = start_model(args)
    first_new = first_unit - 2 if args.units else 0
    if args.lora:
        add_lora(model, args.lora, args.lora_alpha or 2 * args.lora)
    model.to(device)
    model.model.recompute = args.recompute
    sources = {"text": args.text and read_text(args.text),
               "chat": args.chat and read_chats(args.chat)}
    sources["interleave"] = sources["transcribe"] = args.units and Units(args.units)
    mix = {name: weight for name, weight in args.mix.items() if weight > 0}
    lacking = [name for name in mix if not sources[name]]
    if lacking:
        raise ValueError(f"--mix wants {', '.join(lacking)}, but no data for it is given (--text, --chat or --units)")
    if args.units and not args.unit_loss and not any(row.get("text") for row in sources["interleave"].rows):
        raise ValueError(f"{args.units}: no row has text, so there is no text to predict; give speech with its text, or --unit-loss above 0")
    long = [len(vocab.chat(messages).ids) for messages in (sources["chat"] or [])[:1000]]
    if args.chat and max(long) > args.length and rank == 0:
        tqdm.write(f"{args.chat}: {sum(n > args.length for n in long)} of the first {len(long)} chats are longer than a row of {args.length} ids and are cut: "
                   f"what comes later is learnt without its question. --length {max(long)} would hold them")
    documents = Documents(vocab, sources, mix, args.seed)
    held_out = documents.held_out()
    corpus = sources["interleave"]
    hours_of_a_unit = corpus.durations.sum() / len(corpus.durations) / corpus.meta["frame_rate"] / 3600 if corpus else 0.0

    body, rows = parameter_groups(model, args.layers, first_new)
    stay = torch.arange(model.config.vocab_size, device=device) < first_new     # text rows stay: other depths and other deltas rely on them
    if (args.layers[0] > 0 or args.lora) and not first_new:                # nor may behaviour move words: spoken ones would lack what it added to them
        stay |= ~torch.isin(torch.arange(len(stay), device=device), torch.tensor([*vocab.special.values()], device=device))
    filters = {}
    if not args.keep_text >= 0 or args.keep_text and not sources["text"]:
        raise ValueError(f"--keep-text {args.keep_text}: wanted 0 or more, and above 0 --text, documents that show which inputs text uses")
    on_gpu = runs.autocast(device, dtype if "cuda" in device else torch.float32)      # where float32 would miss the fused attention
    if args.keep_text:
        with on_gpu:
            filters = text_filters(model, body, Documents(vocab, sources, {"text": 1.0}, args.seed), args.keep_text, device, args.rows, args.length)
    reader = copy.deepcopy(model).requires_grad_(False) if args.imitate and args.units else None
    if args.compile:
        for block in [*model.model.layers, *(reader.model.layers if reader else ())]:
            block.compile()
    by_turns = list(mix).index("interleave") if "interleave" in mix else -1
    anchors = [p.detach().clone() for p in body] if args.pull or filters else []
    decay = 0.0 if args.init else 0.1                                      # tuning is pulled to its start, not to zero
    optimizers = two_optimizers(body, rows, args.lr, decay, ROWS_FASTER if first_new else 1, dtype)
    step, spent, heard = 0, 0.0, 0                                         # heard: units trained on; where processes share, an estimate from one
    checkpoint, log = out / "checkpoint.pt", out / "log.jsonl"
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "overwrite", "device")}
    settings |= {path: weights.fingerprint(path) for path in (args.init, args.tokenizer, args.text, args.chat, args.units) if path}
    if checkpoint.exists():
        saved = weights.read_checkpoint(checkpoint, "cpu", ["model", "optimizers", "step", "seconds", "heard", "drawn", "pending", "settings"])
        differs = [name for name in settings if saved["settings"].get(name) != settings[name]]
        if differs:
            raise ValueError(f"{out} holds a run with another {differs[0]} ({saved['settings'].get(differs[0])}, now {settings[differs[0]]}); "
                             "give what it was started with, or remove that folder")
        model.load_state_dict(saved["model"])
        model.tie()
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        step, spent, heard, documents.drawn = saved["step"], saved["seconds"], saved["heard"], saved["drawn"]
        documents.pending = [(Document(*document), kind) for document, kind in saved["pending"]]
        del saved                                                          # a second copy of all weights
        if rank == 0:
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            log.write_text("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step))      # a kill may have left half a line
            tqdm.write(f"resuming at step {step} of {args.steps}")
    elif rank == 0:
        log.unlink(missing_ok=True)                                        # of a run that ended before its first checkpoint

    if world > 1:
        steps = torch.tensor([step, -step], device=device)
        torch.distributed.all_reduce(steps, torch.distributed.ReduceOp.MAX)
        if steps[0] != -steps[1]:
            raise ValueError(f"this process is at step {step}, another at {max(steps.tolist())}: all must see the same {out}; put it on a shared disk")

    def save_checkpoint():
        state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step, "seconds": spent + time.time() - began, "heard": heard,
                 "drawn": documents.drawn, "pending": [(tuple(document), kind) for document, kind in documents.pending], "settings": settings}
        part = checkpoint.with_suffix(".tmp")
        try:
            with open(part, "wb") as file:
                torch.save(state, file)
                weights.settle(file)
        except (OSError, RuntimeError) as error:                           # torch says RuntimeError of a full disk
            part.unlink(missing_ok=True)
            raise OSError(f"{part} could not be written, is the disk full? ({str(error).splitlines()[0]}) What was saved before is kept") from None
        os.replace(part, checkpoint)

    began, first_step = time.time(), step
    for step in runs.Bar(range(step + 1, args.steps + 1), desc=f"training {args.out}", unit="step", initial=step, total=args.steps, smoothing=0.05, disable=rank > 0):
        lr = learning_rate(step - 1, args.steps, args.lr)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr * group["faster"]
        documents.progress = step / args.steps
        model.zero_grad(set_to_none=True)
        for p in body:                                                     # the new rows find their places first, so the body need not move for them
            p.requires_grad_(step > args.rows_first)
        mean = torch.zeros((), device=device)
        for part in range(args.accumulate):                                # a step is so many batches, and each process takes its share of them
            batch = documents.batch(args.rows, args.length)
            if part % world != rank:
                continue
            batch["position"] = paced(batch["start"], args.pace, torch.Generator().manual_seed(args.seed << 32 | part << 24 | step))
            batch, states = {name: tensor.to(device) for name, tensor in batch.items()}, []
            with runs.autocast(device, dtype):
                # what follows speech, trained on here, is what the sum would say to whatever it hears
                silent = (batch["kind"] == by_turns) & imitated(batch) if reader else None
                loss, ce, is_unit, kind = losses(model, batch, first_unit, k, args.unit_loss, silent, states)
                if reader:
                    loss = loss + args.imitate * sum(imitation(states, batch, reader, first_new))
            (loss / args.accumulate).backward()
            mean += loss.detach() / args.accumulate
            heard += world * int(((batch["ids"] >= first_unit) & (batch["ids"] < first_unit + k)).sum())
        if world > 1:
            for x in [mean, *(p.grad for p in [*body, *rows] if p.grad is not None)]:
                torch.distributed.all_reduce(x)
        if not torch.isfinite(mean):
            raise ValueError(f"step {step}: the loss is {mean.item()}; what was saved last is kept in {out}; to begin again with a lower --lr, remove it")
        for p in rows:
            p.grad[stay] = 0
        norm = torch.nn.utils.clip_grad_norm_([*body, *rows], 1.0).item()
        for optimizer in optimizers:
            optimizer.step()
        for p, anchor in zip(body, anchors):
            if p in filters:
                p.data.copy_(anchor + (p.data - anchor) @ filters[p])
            if args.pull:
                p.data.lerp_(anchor, min(1.0, lr * args.pull))             # decoupled decay, to the starting weights instead of to zero
        if rank == 0 and (step % LOG_EVERY == 0 or step == args.steps):
            rate = (step - first_step) * args.accumulate * args.rows * args.length / (time.time() - began)
            row = {"step": step, "loss": round(mean.item(), 4), "lr": lr, "gradient": round(norm, 3), "tokens_per_second": round(rate),
                   "layouts": {name: round(ce[(kind == i) & ~is_unit].mean().item(), 4) for i, name in enumerate(mix) if ((kind == i) & ~is_unit).any()}}
            if args.units:
                row["hours"] = round(heard * hours_of_a_unit, 3)
            peak = next((flops for name, flops in PEAKS.items() if "cuda" in device and name in torch.cuda.get_device_name()), None)
            if peak:
                row["share_of_peak"] = round(6 * sum(p.numel() for p in model.parameters()) * rate / (peak * world), 3)
            if step % (4 * LOG_EVERY) == 0 or step == args.steps:
                with on_gpu:
                    row["held_out"] = {name: round(value, 4) for name, value in validate(model, held_out, args.length, vocab.eos, first_unit, k, device).items()}
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            tqdm.write(" | ".join([f"step {step}/{args.steps}", f"loss {row['loss']:.3f}", *(f"{n} {v:.3f}" for n, v in row["layouts"].items()),
                                   f"lr {lr:.1e}", f"grad {norm:.2f}", f"{rate / 1000:.1f}k tok/s", *([f"{row['share_of_peak']:.0%} of peak"] if peak else []),
                                   *([f"{row['hours']:.2f} h heard"] if args.units else []), *(f"held-out {n} {v:.3f}" for n, v in row.get("held_out", {}).items())]))
        if rank == 0 and step % SAVE_EVERY == 0:
            save_checkpoint()

    if rank > 0:
        return
    if args.lora:
        merge_lora(model)
    model.save(out)
    vocab.save(out)
    hearing = Path(args.units) if args.units else Path(args.init) if args.init and vocab.speech else None
    if hearing:
        weights.copy_ears(hearing, out)
    (out / "training.json").write_text(json.dumps({"seconds": round(spent + time.time() - began, 1), "settings": settings}, indent=1) + "\n")
    draw(log, out / "loss.png")


def draw(log, path):
    """Losses over steps: of each layout in training, and on its held-out documents (dots)."""
    from matplotlib.figure import Figure
    rows, figure = [json.loads(line) for line in log.read_text().splitlines()], Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for kind, form in (("layouts", ".-"), ("held_out", "o")):
        for name in dict.fromkeys(name for row in rows for name in row.get(kind, {}) if not name.endswith(" units")):
            points = [(row["step"], row[kind][name]) for row in rows if name in row.get(kind, {})]
            axes.plot(*zip(*points), form, label=name + ", held out" * (kind == "held_out"))
    axes.set(xlabel="step", ylabel="nats per text token")
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def pairs(text):
    """"a=0.5,b=0.5" -> {"a": 0.5, "b": 0.5}."""
    mix = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in ("text", "chat", "interleave", "transcribe") or not value:
            raise argparse.ArgumentTypeError(f"got {item!r}, wanted LAYOUT=WEIGHT with a layout of text, chat, interleave, transcribe")
        mix[name] = float(value)
    return mix


def shares(text):
    """"0:0.5" -> (0.0, 0.5)."""
    try:
        first, last = (float(part) for part in text.split(":"))
    except ValueError:
        first = last = math.nan
    if not 0 <= first < last <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted two rising shares of the depth, like 0:0.5")
    return first, last


def main():
    rank, world = weights.processes()
    default = lambda name: "default: " + ", ".join(f"{settings[name]} for {stage}" for stage, settings in STAGES.items())
    parser = argparse.ArgumentParser(description="Pre-train, or continue to: text gives a base, chats an instruct model, units a speech model.")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--size", choices=SIZES, help="train from scratch at this size (wants --tokenizer)")
    start.add_argument("--init", help="a model folder to go on from")
    parser.add_argument("--tokenizer", help="folder of the text tokenizer, with --size")
    parser.add_argument("--text", help='JSON lines {"text"}, or a .txt with one document a line')
    parser.add_argument("--chat", help='JSON lines {"messages": [{"role", "content"}]}')
    parser.add_argument("--units", help="a folder of tokenize_audio.py encode")
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument("--steps", type=int, help=f"optimizer steps ({default('steps')})")
    parser.add_argument("--lr", type=float, help=f"peak learning rate ({default('lr')})")
    parser.add_argument("--mix", type=pairs, help=f"shares of layouts ({default('mix')})")
    parser.add_argument("--keep-text", type=float, help="how strongly changes of weights are kept out of what text uses; 0: not at all "
                        f"({default('keep_text')})")
    parser.add_argument("--imitate", type=float, help="weight, beside the loss of transcripts, of thinking at spoken words and beside them what the starting "
                        f"model thinks on reading the same; 0: none, then interleaved text bears a loss instead ({default('imitate')})")
    parser.add_argument("--pace", type=float, help="how far apart tokens may stand, in positions, as words do in speech; 1: one after the other "
                        f"({default('pace')})")
    parser.add_argument("--pull", type=float, default=0.0, help="strength of a plain pull to the starting weights, times the rate, each step (default 0)")
    parser.add_argument("--rows-first", type=int, help=f"steps in which only the new rows are trained ({default('rows_first')})")
    parser.add_argument("--layers", type=shares, help=f"train only the blocks between two shares of the depth ({default('layers')})")
    parser.add_argument("--unit-loss", type=float, default=0.0, help="weight of a unit's loss beside a text token's (default 0)")
    parser.add_argument("--rows", type=int, help=f"packed rows in a batch ({default('rows')})")
    parser.add_argument("--length", type=int, help=f"tokens in a row ({default('length')})")
    parser.add_argument("--accumulate", type=int, default=world, help="batches in a step, shared among the processes of torchrun (default: one each)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train changes of this rank beside frozen matrices, and add them when saving (default 0: the matrices)")
    parser.add_argument("--lora-alpha", type=float, default=0.0, help="scale of those changes, over the rank (default: twice the rank)")
    parser.add_argument("--recompute", action="store_true", help="keep no activations inside blocks, compute them again for the gradient: less memory, a third more work")
    runs.add_dtype(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and spans (default 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out when the run ends well")
    args = parser.parse_args()
    if args.size and not args.tokenizer:
        parser.error("--size wants --tokenizer, the folder of the text tokenizer to train with")
    stage = "units" if args.units else "chat" if args.chat else "text" if args.text else parser.error("nothing to train on: give --text, --chat or --units")
    if args.lora and args.keep_text is None:
        args.keep_text = 0.0                                               # it filters matrices, and those are frozen
    for name, value in STAGES[stage].items():
        if getattr(args, name) is None:
            setattr(args, name, {"mix": pairs, "layers": shares}[name](value) if isinstance(value, str) else value)
    if not (0 <= args.imitate < math.inf and (args.units or not args.imitate)):
        parser.error(f"--imitate {args.imitate}: wanted 0 or more, and above 0 --units: only speech can be like its text")
    if min(args.steps, args.rows, args.length - 1) < 1:
        parser.error(f"--steps {args.steps} --rows {args.rows} --length {args.length}: wanted at least one step, one row and two tokens")
    if args.lora and (args.keep_text or args.pull) or args.lora < 0 or args.lora_alpha < 0:
        parser.error(f"--lora {args.lora} --lora-alpha {args.lora_alpha}: wanted 0 or more, and with it neither --keep-text nor --pull, which hold matrices that it freezes")
    if args.accumulate < 1 or args.accumulate % world:
        parser.error(f"--accumulate {args.accumulate}: wanted at least 1, and as many for each of {world} processes")
    if not 0 <= args.seed < 1 << 31:
        parser.error(f"--seed {args.seed}: wanted 0 to 2147483647")
    if not (0 <= args.unit_loss < math.inf and 0 <= args.pull < math.inf):
        parser.error(f"--unit-loss {args.unit_loss} --pull {args.pull}: wanted 0 or more")
    if args.lora and args.size:
        parser.error("--lora trains beside frozen matrices, which --size would leave random; give --init")
    if not 1 <= args.pace < math.inf:
        parser.error(f"--pace {args.pace}: wanted 1 (one position a token) or more")
    for path in (args.init, args.tokenizer, args.text, args.chat, args.units):
        if path and not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if world > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(args.device)
        # the others wait while the first writes a checkpoint, which may be 50 GB
        torch.distributed.init_process_group("nccl" if "cuda" in args.device else "gloo", timeout=datetime.timedelta(hours=2))
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    if rank == 0:
        with weights.new_folder(args.out, [args.init, args.tokenizer, args.text, args.chat, args.units], args.overwrite, resume=True, scratch=["checkpoint.pt"]) as out:
            train(args, out, rank, world)
    else:
        train(args, Path(args.out).with_name(Path(args.out).name + ".partial"), rank, world)      # reads a checkpoint there, writes nothing
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    weights.run(main)
