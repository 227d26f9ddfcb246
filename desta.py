r"""DeSTA2: a frozen instruct model hears through an adapter; it writes its own training answers.

in   a manifest with "text", "seconds" and "style"; a frozen instruct model; a frozen Whisper or
     HuBERT
out  targets.jsonl; a folder of encoder states; a folder that chat.py takes like a model's
see  DeSTA2 (arXiv:2409.20007), DeSTA2.5-Audio (arXiv:2507.02768)
run  python desta.py train targets.jsonl --model weights/SmolLM2-135M-Instruct \
         --states out/states --out out/desta

write   (targets.py) The instruct model reads a description of a clip, and answers a prompt
        about it. What it writes is the target.
encode  (encoder.py) The encoder's states of every clip are computed once, and kept.
train   (here) The model gets the same prompt, and the clip in place of its description. The
        adapter (adapter.py) learns to turn the states into vectors that make the model say
        what it said before.

In training the words beside a clip are the manifest's; in a chat a Whisper writes them, or who
speaks gives them. No weight of the instruct model moves, so typed turns are its own, to the bit.
"""

import argparse
import functools
import json
import math
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
from torch import nn
from tqdm import tqdm

import audio
import encoder
import targets
import weights
from adapter import ADAPTERS, Adapter, frozen
from encoder import States, kind_of
from fused import linear_cross_entropy
from whisper import Whisper

SAVE_EVERY, LOG_EVERY = 100, 20  # steps


def train(args, out):
    """An adapter, into the folder `out`."""
    torch.manual_seed(args.seed)
    entries, states = targets.read(args.targets), States(args.states)
    states.must_have(entries)
    made = provenance(args, states.meta)
    model, table, listener = frozen(args.model, args.device, torch.float32)
    adapter = Adapter(shape_of(args, states.meta, table)).to(args.device)
    optimizer = torch.optim.AdamW(
        adapter.parameters(), betas=(0.9, 0.98), weight_decay=0.01
    )

    names = "adapter", "queries", "no_transcript", "steps", "batch", "lr", "seed", "dtype"
    settings = {name: str(getattr(args, name)) for name in names}
    inputs = args.targets, args.states, args.model
    settings |= {path: runs.fingerprint(path) for path in inputs}
    checkpoint = runs.Checkpoint(out / "checkpoint.pt", settings)
    step = 0
    saved = checkpoint.read("adapter", "optimizer", "step")
    if saved:
        adapter.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        step = saved[2]
        tqdm.write(f"resuming at step {step} of {args.steps}")
    runs.keep_log(out / "log.jsonl", step)

    steps = range(step + 1, args.steps + 1)
    about = {"desc": f"training {args.out}", "unit": "step", "total": args.steps}
    for step in runs.Bar(steps, initial=step, **about):
        # A warm-up over a tenth, times a cosine that falls to zero over all steps.
        warm = min(1, step / (0.1 * args.steps))
        done = (step - 1) / args.steps
        rate = args.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate

        torch.manual_seed(args.seed << 32 | step)  # dropout, the same in a resumed run
        part = [entries[i] for i in drawn(len(entries), args.batch, args.seed, step)]
        transcript = not args.no_transcript
        with runs.autocast(args.device, runs.DTYPES[args.dtype]):
            loss = loss_of(model, table, listener, adapter, part, states, transcript)
        if not torch.isfinite(loss):
            raise ValueError(f"step {step}: the loss is {loss.item()}; lower --lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()

        if step % LOG_EVERY == 0 or step == args.steps:
            write_log(out / "log.jsonl", step, args.steps, loss.item(), rate)
        if step % SAVE_EVERY == 0:
            state = {"adapter": adapter.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.write(step=step, **state)
    weights.save(out, adapter.state_dict())
    made["adapter"] = adapter.shape
    (out / "desta.json").write_text(json.dumps(made, indent=1) + "\n")


def loss_of(model, table, listener, adapter, entries, states, transcript):
    """Mean cross-entropy of the targets, each behind the turn about its clip's sound."""
    device = table.weight.device
    vectors = adapter([states[entry["audio"]].to(device) for entry in entries])

    # This batch's vectors stand behind the embedding's rows, in place of the last batch's.
    table.heard = torch.cat(vectors)
    listener.transcripts = {}
    documents = []
    first = 0
    for entry, heard in zip(entries, vectors):
        if transcript:
            listener.transcripts[first] = entry["text"]
        numbers = np.arange(first, first + len(heard))
        asked = targets.turn_about(listener, numbers, entry["prompt"])
        end = listener.special[listener.template().end]
        target = listener.encode(entry["target"]) + [end]
        documents.append((asked, target))
        first += len(heard)

    # What fills up a row stands behind its document, where nothing sees it.
    T = max(len(asked) + len(target) for asked, target in documents)
    ids = torch.full((len(entries), T), listener.eos)               # (B, T)
    bears = torch.zeros(len(entries), T, dtype=torch.bool)          # (B, T): is it a target?
    for n, (asked, target) in enumerate(documents):
        whole = len(asked) + len(target)
        ids[n, :whole] = torch.tensor(asked + target)
        bears[n, len(asked) : whole] = True
    ids = ids.to(device)
    bears = bears.to(device)
    hidden = model.model(ids[:, :-1])[bears[:, 1:]]                 # (N, C)
    ones = torch.ones(len(hidden), device=device)
    total, _ = linear_cross_entropy(hidden, model.lm_head.weight, ids[bears], ones)
    return total / len(hidden)


def drawn(n, batch, seed, step):
    """Which of n targets a step has: shuffled passes, one behind the other."""
    places = [divmod(at, n) for at in range((step - 1) * batch, step * batch)]
    return [int(shuffled(n, seed, passes)[i]) for passes, i in places]


@functools.lru_cache(2)  # a batch lies in one pass, or across two
def shuffled(n, seed, passes):
    return np.random.default_rng([seed, passes]).permutation(n)


def write_log(path, step, steps, loss, rate):
    """A line of the log, and one on the screen."""
    line = json.dumps({"step": step, "loss": round(loss, 4)})
    with open(path, "a") as log:
        log.write(line + "\n")
    tqdm.write(f"step {step}/{steps} | loss {loss:.3f} | lr {rate:.1e}")


def shape_of(args, meta, table):
    """The shape of an adapter between these states and this model."""
    return {
        "kind": args.adapter,
        "taps": len(meta["taps"]),
        "width": meta["width"],
        "heads": meta["heads"],
        "queries": args.queries,
        "layers": 2,
        "join": 4,
        "out": table.weight.shape[1],
        "loudness": table.weight.pow(2).mean().sqrt().item(),
    }


def provenance(args, meta):
    """What desta.json says of model, encoder, transcriber: where, and their fingerprints.

    Taken before training: they must be those that it used.
    """
    made = {"encoder": meta["encoder"]}
    made["model"] = str(Path(args.model).resolve())
    if args.no_transcript and args.transcriber:
        raise ValueError("--no-transcript with --transcriber: give one of the two")
    transcriber = args.transcriber
    if not (transcriber or args.no_transcript) and kind_of(meta["encoder"]) == "whisper":
        transcriber = meta["encoder"]
    if transcriber:
        if kind_of(transcriber) != "whisper":
            raise ValueError(
                f"{transcriber}: not a Whisper folder; give one, or leave --transcriber out"
            )
        Whisper(transcriber)  # an error now if a file of it is missing
    made["transcriber"] = transcriber and str(Path(transcriber).resolve())
    made["sha256"] = {name: runs.fingerprint(path) for name, path in made.items() if path}
    if made["sha256"]["encoder"] != meta["sha256"]:
        raise ValueError(
            f"{meta['encoder']} has changed since {args.states} was made with it; encode again"
        )
    return made | {"has_words": not args.no_transcript}


# --- the command --------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(
        description="An adapter through which a frozen instruct model hears."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    writing = commands.add_parser("write", help="have the model write targets")
    targets.add_flags(writing.add_argument)
    encoding = commands.add_parser("encode", help="compute encoder states of a corpus")
    encoder.add_flags(encoding.add_argument)
    training = commands.add_parser("train", help="train the adapter")
    add_flags(training.add_argument)
    for command in (writing, training):
        command.add_argument("--model", required=True, help="the frozen instruct model")
    for command in (encoding, training):
        runs.add_dtype(command)
    for command in (writing, encoding, training):
        runs.add_device(command)
        add = command.add_argument
        add("--out", required=True, help="what to write")
        add("--overwrite", action="store_true", help="replace an existing --out")
    return parser


def add_flags(add):
    add("targets", help="what desta.py write made")
    add("--states", required=True, help="what desta.py encode made")
    add("--adapter", choices=ADAPTERS, default="qformer", help="(default qformer)")
    add("--queries", type=runs.count, help="of a qformer (default 64)")
    add("--no-transcript", action="store_true", help="vectors alone, no words beside them")
    add(
        "--transcriber",
        help="the Whisper that writes those words in a chat (default: the encoder; if that is a "
        "HuBERT, who speaks gives them); in training they are the manifest's",
    )
    add("--steps", type=runs.count, default=1000, help="optimizer steps (default 1000)")
    add("--batch", type=runs.count, default=8, help="targets in a step (default 8)")
    add("--lr", type=runs.positive, default=5e-4, help="peak learning rate (default 5e-4)")
    add("--seed", type=runs.seed, default=0, help="of weights and data order (default 0)")


def main():
    args = arguments().parse_args()
    if args.action == "write":
        runs.may_write(args.out, args.overwrite)
        return targets.write(args)

    # The others make a folder.
    if args.action == "encode":
        work = encoder.encode
        inputs = [args.encoder]
        notes = {"audio": audio.identity(audio.read_manifest(args.manifest))}
    else:
        if args.queries and args.adapter != "qformer":
            raise ValueError(f"--queries {args.queries}: {args.adapter} has none; leave it out")
        args.queries = args.queries or 64
        work = train
        inputs = [args.model, args.states, args.targets]
        notes = {}
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    scratch = ["checkpoint.pt"]
    with runs.new_folder(args.out, inputs, args.overwrite, notes, scratch) as out:
        work(args, out)


if __name__ == "__main__":
    runs.run(main)
