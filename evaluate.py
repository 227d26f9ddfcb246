r"""Does the sum follow spoken instructions? The results table, the sweep of lam, reports.

in   the recipe's four model folders and questions.jsonl; or models that hear; or a units folder
out  table.json and table.png; a report of several; a comparison
see  95 % intervals: the bootstrap (Efron 1979), drawing facts rather than questions; Wilson's
     (1927) where items are independent
run  python evaluate.py table --base out/base --instruct out/instruct --speech out/speech \
         --merged out/merged --questions out/toy/questions.jsonl --out out/table.json

rows
    base, instruct, speech, merged
    instruct_rows       instruct with the speech model's new rows: hearing by lookup alone. base
                        hears through those same rows.
    cascade             the speech model writes down what it heard, instruct answers that
columns: the share of questions answered exactly, in lower case, the model stopping by itself
    typed               ... typed_unseen: facts that no training asked; typed_noisy: misspelt, as a
                        good ear would hear them
    spoken_heard        by voices of the training speech; spoken_near: by new variants of them (and
                        spoken_near_unseen); spoken_far: with new accents
    wer_near            word error rate of transcripts
    text_loss           nats per token of plain statements of the facts asked about

Every row writes under the same mask (text rows and ends of turn) and is asked with the
better of two prompts: its chat template, or a plain "question: ... answer:" page. Which
of them is chosen on typed dev questions.
"""

import argparse
import io
import json
import math
import random
import re
import time
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F

import audio
import listen
import prosody
import targets
from adapter import Listener
from encoder import States
from merge import Merge, signs_of
from model import LM, Config, generate
from targets import CLOSE, OPEN
from tokenize_audio import AudioTokenizer, add_ears
from vocab import Vocab

ROWS = ["base", "instruct", "instruct_rows", "speech", "merged", "cascade"]
COLUMNS = [
    "typed",
    "typed_unseen",
    "typed_noisy",
    "spoken_heard",
    "spoken_near",
    "spoken_near_unseen",
    "spoken_far",
    "wer_near",
    "text_loss",
]
SHOWN = [
    "typed",
    "typed_unseen",
    "spoken_near",
    "spoken_near_unseen",
    "spoken_far",
    "wer_near",
]
GROUPS = ["heard", "near", "far"]  # of voices
LAMS = [0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3]
LIMIT = 40  # tokens in an answer or a transcript: longer ones never ended
BATCH = 64  # questions answered at once


# --- answering ----------------------------------------------------------------


def replies(model, vocab, prompts, limit=LIMIT, whole=True, page=False):
    """The text a model writes after each prompt (lists of ids), up to a line's end if `page`.

    Where it did not stop within the limit, None; if not `whole`, what it wrote so far.
    """
    ends = [i for i, text in vocab.bytes_of.items() if b"\n" in text] if page else []
    stop = [*vocab.stop, *ends]
    out = [None] * len(prompts)

    # Like lengths together: less padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for a in range(0, len(order), BATCH):
        part = order[a : a + BATCH]
        starts = [torch.tensor(prompts[i]) for i in part]
        steps = list(generate(model, starts, limit, stop, vocab.text_rows()))
        for i, ids in zip(part, torch.stack(steps).T.tolist()):     # (B, steps)
            end = next((n for n, token in enumerate(ids) if token in stop), None)
            if end is None and whole:
                continue
            if end is not None and ids[end] in ends:  # with a full stop before it, say
                end += 1
            text = vocab.decode(ids[:end])
            out[i] = text.split("\n")[0] if page else text
    return out


def normal(text):
    """A reply as it is compared: in lower case, without space around it; "" for none."""
    return (text or "").lower().strip()


def answers(model, vocab, contents, prompt):
    """Replies to questions, text or units, in the "chat" template or on a plain "page"."""
    if prompt == "chat":
        turns = [vocab.turn([{"role": "user", "content": content}]) for content in contents]
        return replies(model, vocab, turns)
    pages = [vocab.page(content) for content in contents]
    return replies(model, vocab, pages, page=True)


def better_prompt(model, vocab, dev):
    """The prompt, "chat" or "page", with which a model answers more typed dev questions.

    "chat" where both do as well.
    """
    texts = [q["question"] for q in dev]
    right = {}
    for prompt in ("chat", "page"):
        right[prompt] = exact(answers(model, vocab, texts, prompt), dev)["value"]
    return max(right, key=right.get)


def transcripts(model, vocab, contents):
    """What the model writes down of units, without the full stop that it ends with."""
    written = replies(model, vocab, [vocab.heard(content) for content in contents])
    return [normal(reply).removesuffix(".") for reply in written]


def hear(ears, folder, questions, group):
    """The units of every question, as voices of `group` say it."""
    bar = runs.Bar(
        questions, desc=f"hearing {len(questions)} questions, {group}", unit="question"
    )
    return [ears(audio.load(folder / q["audio"][group]))[0] for q in bar]


# --- scoring ------------------------------------------------------------------


def cell(value, n, low, high):
    """A cell of a table: a value of n items and its 95 % interval."""
    low, high = round(float(low), 4) + 0.0, round(float(high), 4)  # + 0.0: never -0.0
    return {"value": round(float(value), 4), "n": int(n), "low": low, "high": high}


def share(right, n=None):
    """The cell of a list of 0 to 1, mostly booleans, with Wilson's interval; None of none.

    n is how many of them count as drawn apart; all, if it is not given.
    """
    n = n or len(right)
    z = 1.96
    if not n:
        return None
    p = sum(right) / len(right)
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return cell(p, len(right), (middle - half) / scale, (middle + half) / scale)


def ratio(parts, wholes, groups=None):
    """The cell of sum(parts) / sum(wholes) over n items, with a bootstrap interval.

    1,000 draws (seed 0) of the items, or of whole `groups` of them. What belongs
    together, like four questions about one fact, is right or wrong together, and says
    less than four do.
    """
    if groups is None:
        groups = range(len(parts))
    _, group = np.unique(groups, return_inverse=True)
    part = np.bincount(group, weights=np.array(parts, dtype=float))  # (groups,)
    whole = np.bincount(group, weights=np.array(wholes, dtype=float))
    drawn = np.random.default_rng(0).integers(len(part), size=(1000, len(part)))
    low, high = np.percentile(part[drawn].sum(1) / whole[drawn].sum(1), [2.5, 97.5])
    return cell(part.sum() / whole.sum(), len(parts), low, high)


def facts(questions):
    """What each question, or one of a benchmark, is about; without a "fact", itself."""
    return [
        str(q.get("question", f"entry {n}") if q.get("fact") is None else q["fact"])
        for n, q in enumerate(questions)
    ]


def exact(replied, questions):
    """Share of questions answered exactly, with an interval by facts; None of no questions."""
    right = [normal(text) == normal(q["answer"]) for text, q in zip(replied, questions)]
    return share_of(right, facts(questions))


def share_of(right, groups):
    """The share of right replies; its interval draws whole groups, like the questions on a fact."""
    by_group = {}
    for one, group in zip(right, groups):
        by_group.setdefault(group, []).append(one)
    means = {sum(part) / len(part) for part in by_group.values()}
    if len(means) < 2:  # no draw differs: Wilson's interval, of so many groups
        return share(right, len(by_group))
    return ratio(right, [1] * len(right), groups)


def unseen(replied, questions):
    """`exact` of those questions that no training asked."""
    kept = [(text, q) for text, q in zip(replied, questions) if not q["seen"]]
    return exact([text for text, _ in kept], [q for _, q in kept])


def edit_distance(a, b):
    """Least insertions, deletions and substitutions from sequence a to b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            least = min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
            diagonal, row[j] = row[j], least
    return row[-1]


def word_errors(heard, questions):
    """Word error rate of transcripts, with an interval by facts."""
    words = [normal(q["question"]).removesuffix(".").split() for q in questions]
    wrong = [edit_distance(text.split(), w) for text, w in zip(heard, words)]
    return ratio(wrong, [len(w) for w in words], facts(questions))


@torch.inference_mode()
def text_loss(model, vocab, questions):
    """Nats per token of each question's `text`, a plain statement of its fact.

    The first token is given: in training, too, nothing stands before it.
    """
    not_text = torch.ones(model.config.vocab_size, dtype=torch.bool)
    not_text[vocab.text_rows()] = False  # as in decoding: text rows only
    device = model.lm_head.weight.device
    sums, counts = [], []
    for q in questions:
        ids = torch.tensor(vocab.text(q["text"])[0], device=device)
        logits = model(ids[None, :-1])[0].float()                   # (T - 1, V)
        logits[:, not_text.to(device)] = -math.inf
        sums.append(F.cross_entropy(logits, ids[1:], reduction="sum").item())
        counts.append(len(ids) - 1)
    return ratio(sums, counts, facts(questions))


def score(model, vocab, questions, spoken, prompt):
    """(a model's row of the table, what it replied to spoken_near).

    spoken  {group: units of every question}; empty for a model that cannot hear
    """
    row = dict.fromkeys(COLUMNS)
    near = None
    replied = answers(model, vocab, [q["question"] for q in questions], prompt)
    row["typed"] = exact(replied, questions)
    row["typed_unseen"] = unseen(replied, questions)
    misspelt = [q.get("noisy", q["question"]) for q in questions]
    row["typed_noisy"] = exact(answers(model, vocab, misspelt, prompt), questions)
    if all("text" in q for q in questions):
        row["text_loss"] = text_loss(model, vocab, questions)

    for group, contents in spoken.items():
        replied = answers(model, vocab, contents, prompt)
        row[f"spoken_{group}"] = exact(replied, questions)
        if group == "near":
            near = replied
            row["spoken_near_unseen"] = unseen(replied, questions)
            row["wer_near"] = word_errors(transcripts(model, vocab, contents), questions)
    return row, near


# --- the table ----------------------------------------------------------------


def read_questions(path):
    """(test questions, dev questions) of a file that toy.py world writes, or of that form."""
    entries = runs.read_lines(path)
    for number, entry in enumerate(entries, 1):
        texts = [entry.get(name) for name in ("question", "answer", "split")]
        texts += [entry.get(name, "") for name in ("noisy", "text")]
        voices = entry.get("audio")
        heard = isinstance(voices, dict) and all(isinstance(voices.get(g), str) for g in GROUPS)
        written = all(isinstance(text, str) for text in texts) and all(map(str.strip, texts[:3]))
        if not heard or "seen" not in entry or not written:
            raise ValueError(
                f"{path}, entry {number}: wanted question, answer, split, seen, and \"audio\" that "
                "names heard, near and far; noisy and text may be left out"
            )
    test = [entry for entry in entries if entry["split"] == "test"]
    dev = [entry for entry in entries if entry["split"] == "dev"]
    if not test or not dev:
        raise ValueError(f"{path}: wanted both splits, dev and test")
    return test, dev


def model_at(plan, config, lam, device):
    """The sum at a lam, in memory. lam = 0 is instruct_rows."""
    model = LM.unfilled(config)
    state = {name: plan.merged(name, lam).float() for name in plan.names}
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return model.to(device).eval()


def with_new_rows(model, speech):
    """A model that never heard, given the speech model's rows after its own."""
    have = model.config.vocab_size
    model.config.vocab_size = speech.config.vocab_size
    for ours, theirs in (
        (model.model.embed_tokens, speech.model.embed_tokens),
        (model.lm_head, speech.lm_head),
    ):
        rows = torch.cat([ours.weight[:have], theirs.weight[have:]])
        ours.weight = torch.nn.Parameter(rows.detach())
    model.tie()
    return model


def load_rows(args, plan, config):
    """{row of the table: its model}, all but the cascade."""
    models = {}
    for name in ("base", "instruct", "speech", "merged"):
        models[name] = LM.load(getattr(args, name), args.device, torch.float32).eval()
    models["base"] = with_new_rows(models["base"], models["speech"])
    models["instruct_rows"] = model_at(plan, config, 0.0, args.device)
    return models


def same_parents(args):
    """A ValueError if --merged is not, or no longer, the sum of the other three."""
    parents = args.base, args.instruct, args.speech
    runs.unchanged(args.merged, parents)
    for parent in parents:
        if not runs.made_from(args.merged, parent):
            raise ValueError(
                f"{args.merged}: its recipe.json does not name {parent}; give the three "
                "that it is the sum of"
            )
    mu = runs.read_json(Path(args.merged) / "merge.json").get("mu", 1.0)
    if mu != 1:
        raise ValueError(
            f"{args.merged}: made with --mu {mu}, and the sums of the sweep have mu 1; "
            "wanted one that was merged without --mu"
        )


def can_be_said(vocab, questions, path):
    """A ValueError for a question or an answer that no reply of LIMIT tokens can be."""
    for text in [q[name] for q in questions for name in ("question", "answer")]:
        count = len(vocab.encode(text)) + 1  # and the end
        if count > LIMIT:
            raise ValueError(
                f"{path}: {text[:40]!r}... is {count} tokens long, and a reply or a "
                f"transcript has {LIMIT} at most; wanted shorter ones"
            )


def table(args):
    """Ask all rows everything, and write down what share they answer."""
    began = time.time()
    folder = Path(args.questions).parent
    runs.may_write(args.out, args.overwrite)
    same_parents(args)
    test, dev = read_questions(args.questions)
    plan = Merge(args.base, args.instruct, args.speech, signs_of(args.merged))
    config = Config.read(args.speech)
    vocab, plain = Vocab(args.speech), Vocab(args.instruct)
    can_be_said(vocab, test + dev, args.questions)
    ears = AudioTokenizer(args.speech, args.device, args.hubert)
    models = load_rows(args, plan, config)
    spoken = {group: hear(ears, folder, test, group) for group in GROUPS}
    dev_near = hear(ears, folder, dev, "near")

    rows, prompts, near = {}, {}, {}
    for name, model in runs.Bar(models.items(), desc="asking", unit="model"):
        # instruct has no rows for units: it cannot be spoken to.
        words, sounds = (plain, {}) if name == "instruct" else (vocab, spoken)
        prompts[name] = better_prompt(model, words, dev)
        rows[name], near[name] = score(model, words, test, sounds, prompts[name])

    # Two models in a chain: speech transcribes, instruct answers the transcripts.
    row = rows["cascade"] = dict.fromkeys(COLUMNS)
    for group, contents in spoken.items():
        heard = transcripts(models["speech"], vocab, contents)
        replied = answers(models["instruct"], plain, heard, prompts["instruct"])
        row[f"spoken_{group}"] = exact(replied, test)
        if group == "near":
            row["spoken_near_unseen"] = unseen(replied, test)
            row["wer_near"] = word_errors(heard, test)

    sweep = []
    for lam in runs.Bar(LAMS, desc="asking the sum", unit="lam"):
        model = model_at(plan, config, lam, args.device)
        sweep.append({"lam": lam} | swept_at(model, vocab, dev, dev_near, prompts["merged"]))

    deltas = plan.run(1.0, 1.0)
    result = how_trained(args) | {
        "rows": {name: rows[name] for name in ROWS},
        "lam_sweep": sweep,
        "rel": deltas["rel"],
        "cosine": deltas["cosine"],
        "prompts": prompts,
        "examples": [
            {"question": q["question"], "answer": q["answer"], "said": text}
            for q, text in zip(test[:20], near["merged"])
        ],
        "made": runs.recipe(
            [args.base, args.instruct, args.speech, args.merged, args.questions]
        ),
    }
    result["seconds"]["table"] = round(time.time() - began, 1)
    draw([result], Path(args.out).with_suffix(".png"))
    runs.write_file(args.out, json.dumps(result, indent=1) + "\n", args.overwrite)
    print(shown(result))


def how_trained(args):
    """{"seed", "dtype", "seconds"} of the models' training, as far as their folders tell."""
    files = [
        Path(path) / "training.json" for path in (args.base, args.instruct, args.speech)
    ]
    trained = [runs.read_json(file) for file in files if file.exists()]
    return {
        "seed": int(trained[0]["settings"]["seed"]) if trained else None,
        "dtype": sorted({made["settings"]["dtype"] for made in trained}),
        "seconds": {"training": round(sum(made["seconds"] for made in trained), 1)},
    }


def swept_at(model, vocab, dev, dev_near, prompt):
    """A row of the sweep: on dev questions, as settings are never chosen on test questions."""
    typed = answers(model, vocab, [q["question"] for q in dev], prompt)
    spoken = answers(model, vocab, dev_near, prompt)
    heard = transcripts(model, vocab, dev_near)
    return {
        "typed": exact(typed, dev)["value"],
        "spoken_near": exact(spoken, dev)["value"],
        "wer_near": word_errors(heard, dev)["value"],
    }


# --- showing it ---------------------------------------------------------------


def read_table(path):
    """A table.json, found to have all that is shown."""
    keys = ["seed", "rows", "lam_sweep", "rel", "seconds", "dtype", "examples", "made"]
    result = runs.read_json(path, keys)
    try:  # whatever may be asked of it
        _ = shown(result), swept(result["lam_sweep"]), markdown([result])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{path}: a part of it is missing or damaged; make it again with evaluate.py table"
        ) from None
    return result


def grid(rows):
    """{name: {column: cell}} for a human; columns that no row has are left out."""
    columns = [c for c in COLUMNS if any(row[c] for row in rows.values())]
    width = max(14, 2 + max(map(len, rows)))
    heads = [c.replace("spoken_", "sp_").replace("unseen", "uns") for c in columns]
    lines = [" " * width + "".join(f"{head:>13}" for head in heads)]
    for name, row in rows.items():
        values = [
            "-" if row[c] is None else format(row[c]["value"], ".3f") for c in columns
        ]
        lines.append(f"{name:{width}}" + "".join(f"{value:>13}" for value in values))
    return "\n".join(lines)


def shown(result):
    """The table for a human."""
    rel = result["rel"]
    lines = [
        "",
        grid({name: result["rows"][name] for name in ROWS}),
        "",
        f"{result['rows']['merged']['typed']['n']} test questions; exact answers. "
        f"|delta| / |base|: instruct {rel['instruct']:.3f}, speech {rel['speech']:.3f}",
        "lam (dev):  " + "   ".join(
            f"{row['lam']:g}: typed {row['typed']:.2f} spoken {row['spoken_near']:.2f}"
            for row in result["lam_sweep"]
        ),
    ]
    for e in result["examples"][:4]:
        lines.append(
            f'  spoken: "{e["question"]}"   wanted: "{e["answer"]}"   said: "{e["said"]}"'
        )
    return "\n".join(lines)


def draw(results, path):
    """The README's picture: the idea, what rows answer, the sweep of lam; means over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="tight")
    idea, bars, sweep = figure.subplots(1, 3, width_ratios=(1.1, 1.2, 0.9))
    draw_idea(idea)

    def mean(name, column):
        cells = [result["rows"][name][column] for result in results]
        return float(np.mean([c["value"] for c in cells if c])) if any(cells) else None

    names = [name for name in ROWS if name != "instruct_rows"]
    at = np.arange(len(names))
    for column, label, left, color in (
        ("typed", "typed", -0.2, "0.75"),
        ("spoken_near", "spoken, unheard voices", 0.2, "tab:blue"),
    ):
        values = [mean(name, column) for name in names]
        bars.bar(at + left, [value or 0 for value in values], 0.38, color=color, label=label)
        # Where there is no bar: nothing was right, or nothing was asked.
        for x, value in zip(at + left, values):
            if not value:
                bars.text(x, 0.02, "-" if value is None else "0", ha="center", color="0.3")
    bars.set(ylim=(0, 1.19), title="Test questions answered (units; -: not asked)")
    bars.set_ylabel(f"share, mean of seeds: {len(results)}")
    bars.set_xticks(at, names)
    bars.legend(loc="upper left", ncols=2, frameon=False)

    rows = [row for result in results for row in result["lam_sweep"]]
    for column, label, form in (("typed", "typed", "s--"), ("spoken_near", "spoken", "o-")):
        means = [
            float(np.mean([row[column] for row in rows if row["lam"] == lam]))
            for lam in LAMS
        ]
        color = "0.5" if column == "typed" else "tab:blue"
        sweep.plot(LAMS, means, form, color=color, label=label)
    sweep.set(
        xlabel="lam: how much hearing is added", ylim=(-0.03, 1.03), title="Dev questions"
    )
    sweep.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    # Its table is what is guarded.
    runs.write_file(path, picture.getvalue(), overwrite=True)


def draw_idea(axes):
    """Three models, a plus sign, and sound going in."""
    axes.set(xlim=(0, 10), ylim=(0, 10), title="merged = base + hearing + behaviour")
    axes.axis("off")
    boxes = {"base": (1.5, 5), "speech": (4.6, 8), "instruct": (4.6, 2), "merged": (8.2, 5)}
    for name, (x, y) in boxes.items():
        strong = name == "merged"
        axes.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            fontsize=12,
            bbox={"boxstyle": "round,pad=0.5", "facecolor": "0.85" if strong else "white"},
        )

    arrows = [
        ((2.2, 5.6), (3.7, 7.5)),
        ((2.2, 4.4), (3.6, 2.5)),
        ((5.5, 7.5), (7.3, 5.7)),
        ((5.6, 2.5), (7.3, 4.3)),
        ((8.2, 4.2), (8.2, 2.2)),
    ]
    for begin, end in arrows:
        axes.annotate("", end, begin, arrowprops={"arrowstyle": "->", "color": "0.4"})
    axes.text(1.0, 7.4, "units and text", fontsize=9, color="0.3")
    axes.text(1.2, 2.4, "typed chats", fontsize=9, color="0.3")
    axes.text(6.1, 5, "+", fontsize=24, ha="center", va="center")

    time = np.linspace(0, 1, 80)
    wave = np.sin(40 * time) * np.sin(np.pi * time) * (0.5 + 0.5 * np.sin(9 * time) ** 2)
    axes.plot(7.3 + 1.8 * time, 8.3 + 0.7 * wave, color="tab:blue", linewidth=1)
    axes.annotate(
        "", (8.2, 5.8), (8.2, 7.4), arrowprops={"arrowstyle": "->", "color": "tab:blue"}
    )
    axes.text(
        8.2, 1.6, '"the capital of\nfrance is paris."', fontsize=9, ha="center", va="center"
    )


def report(args):
    """Join the tables of several seeds, and print the README's."""
    results = [read_table(path) for path in args.tables]
    kept = "seed", "rows", "lam_sweep", "rel", "seconds", "dtype"
    seeds = [
        {name: result[name] for name in kept} | where_made(result["made"]) for result in results
    ]
    runs.write_file(args.out, json.dumps({"seeds": seeds}, indent=1) + "\n", args.overwrite)
    draw(results, Path(args.out).with_suffix(".png"))
    print(markdown(seeds))


def where_made(recipe):
    """The machine, with its threads, and the versions that a recipe names."""
    return {name: recipe.get(name) for name in ("machine", "versions")}


def means(seeds, names, columns):
    """A table of means over seeds, each {"rows": {name: {column: cell}}}."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in names:
        cells = [[s["rows"][name].get(c) for s in seeds] for c in columns]
        values = [[cell["value"] for cell in column if cell] for column in cells]
        shown = [f"{np.mean(column):.2f}" if column else "" for column in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def markdown(seeds):
    """The README's table, and a line with what counts most, seed by seed."""
    typed = [s["rows"]["instruct"]["typed"]["value"] for s in seeds]
    spoken = [s["rows"]["merged"]["spoken_near"]["value"] for s in seeds]
    shares = [a / b if b else math.nan for a, b in zip(spoken, typed)]
    return means(seeds, ROWS, SHOWN) + (
        f"\n\nmerged, spoken_near, by seed: {', '.join(f'{x:.2f}' for x in spoken)}; "
        f"divided by instruct's typed: {', '.join(f'{x:.2f}' for x in shares)}."
    )


# --- two experiments (experiments.sh) -----------------------------------------


def swept(sweep):
    """How much hearing to add: a table's sweep of lam, and in a sentence what it says."""
    lines = [f"{'lam':>6}{'typed':>10}{'spoken':>10}{'word error':>12}   (dev questions)"]
    for row in sweep:
        lines.append(
            f"{row['lam']:6g}{row['typed']:10.2f}{row['spoken_near']:10.2f}"
            f"{row['wer_near']:12.2f}"
        )
    best = max(sweep, key=lambda row: row["spoken_near"])
    if not best["spoken_near"]:
        return "\n".join([*lines, "", "No lam answers a spoken question."])
    half = next(row for row in sweep if row["spoken_near"] >= best["spoken_near"] / 2)
    return "\n".join(lines) + (
        f"\n\nHalf of the best spoken score ({best['spoken_near']:.2f}, at lam {best['lam']:g}) is "
        f"there at lam {half['lam']:g}; typed turns go from {sweep[0]['typed']:.2f} without "
        f"hearing to {best['typed']:.2f} where spoken ones are best."
    )


def compare(args):
    """The same questions of a split, typed and aloud, to several models that hear."""
    runs.may_write(args.out, args.overwrite)
    if len(set(args.folders)) < 2:
        raise ValueError(f"compare: got {args.folders[0]} alone, wanted two models or more")
    test, dev = read_questions(args.questions)
    asked = dev if args.split == "dev" else test

    # Who cannot hear is told before the first hears.
    loaded = {
        folder: listen.load(folder, args.device, args.hubert, torch.float32)
        for folder in args.folders
    }
    for folder, (_, vocab, ears) in loaded.items():
        can_be_said(vocab, test + dev, args.questions)
        if not ears:
            raise ValueError(f"{folder}: cannot hear; wanted a model that does")
        listen.wants_words(folder, ears)
    near = {
        folder: hear(ears, Path(args.questions).parent, asked, "near")
        for folder, (_, _, ears) in loaded.items()
    }

    rows, right = {}, {}
    for folder, (model, vocab, _) in runs.Bar(loaded.items(), desc="asking", unit="model"):
        prompt = better_prompt(model, vocab, dev)
        rows[folder], replied = score(model, vocab, asked, {"near": near[folder]}, prompt)
        right[folder] = np.array(
            [normal(text) == normal(q["answer"]) for text, q in zip(replied, asked)], dtype=int
        )

    first, *others = rows
    ahead = {other: lead(right[first] - right[other], asked) for other in others}
    made = {
        "rows": rows,
        "ahead": ahead,
        "made": runs.recipe([*args.folders, args.questions]),
    }
    runs.write_file(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    print(f"\n{grid(rows)}\n\n{finding(rows, ahead)}")


def lead(more, questions):
    """A cell of `more` (1, 0 or -1 a question): what share more one model answers than another.

    "differ" counts the facts on which they differ.
    """
    differ = {fact for fact, one in zip(facts(questions), more) if one}
    return ratio(more, [1] * len(more), facts(questions)) | {"differ": len(differ)}


def finding(rows, ahead):
    """One sentence: what the first model answers when spoken to, and what the others do.

    ahead {name: cell}: how much more of the same questions the first answers than that
    one. Where they differ on fewer than six facts, chance could decide all of them (a
    sign test). Questions are compared one by one, as some are hard for all models: the
    intervals of two scores would overlap long after their difference is certain.
    """
    (name, first), *others = rows.items()
    n = first["typed"]["n"]
    parts = [f"{name} answers {first['spoken_near']['value']:.2f} of {n} questions"]
    for other, row in others:
        apart = ahead[other]
        verdict = "more than chance apart"
        if apart["differ"] < 6:
            verdict = f"may be chance: they differ on {apart['differ']} facts"
        elif apart["low"] <= 0 <= apart["high"]:
            verdict = "may be chance: the 95 % interval of their difference holds 0"
        parts.append(f"{other} {row['spoken_near']['value']:.2f} ({verdict})")
    typed = ", ".join(format(row["typed"]["value"], ".2f") for row in rows.values())
    return f"Asked aloud, {', '.join(parts)}; typed, {typed}."


# --- how it was said ----------------------------------------------------------

# Words for the same value: a style says "slowly", and a reply may say "slow".
SAME = [
    {"man", "male"},
    {"woman", "female"},
    {"fast", "quick", "quickly"},
    {"slow", "slowly"},
    {"normal"},
    {"loud", "loudly"},
    {"quiet", "quietly"},
]
FILLERS = {"a", "an", "the", "at", "in", "with"}  # "in a normal rate" is "at a normal rate"
RIDGE = 1.0  # of the probe: weight decay, in units of a clip's likeness to itself


def manner(args):
    """Does a model name how clips were said: on hearing them, and as the text that they would be?

    heard    the sound
    read     its description in words: what the model names when it is told
    cascade  the transcript alone, as the model's own ears wrote it; if they lack one, the clip's
    For an adapter of desta.py, and for a model that hears the prosody of words it is told.
    A reply names an attribute if it has the right value's word and no other value's, wherever
    they stand: what it quotes counts, and a "not" does not.
    """
    runs.may_write(args.out, args.overwrite)
    clips = targets.described_clips(args.clips)
    told = [targets.description(clip, args.template) for clip in clips]
    can_be_told_apart(clips, args.clips)
    model, vocab, ears = listen.load(args.folder, args.device, None, torch.float32)
    if not isinstance(vocab, Listener) and not isinstance(ears, prosody.Ears):
        raise ValueError(
            f"{args.folder}: wanted a folder of desta.py train, or a model that hears prosody"
        )
    listen.can_open([clip["audio"] for clip in clips], ears)
    bar = runs.Bar(clips, desc=f"hearing {len(clips)} clips", unit="clip")
    heard = [
        listen.hear(ears, audio.load(clip["audio"]), clip["text"], clip.get("words"))
        for clip in bar
    ]
    if isinstance(vocab, Listener):
        words = vocab.transcripts
        written = [words.get(int(n[0]), clip["text"]) for n, clip in zip(heard, clips)]
        written = [f"{OPEN}{text}{CLOSE}" for text in written]
    else:
        written = [clip["text"] for clip in clips]
    asked = {"heard": heard, "read": told, "cascade": written}

    rows, replied = {}, {}
    for name, contents in runs.Bar(asked.items(), desc="answering", unit="row"):
        prompts = [targets.turn_about(vocab, content, args.prompt) for content in contents]
        replied[name] = replies(model, vocab, prompts, limit=targets.LIMIT, whole=False)
        rows[name] = named(replied[name], clips)
    kept = "text", "speaker", "style"
    answers = [{name: clip.get(name) for name in kept} for clip in clips]
    for name, texts in replied.items():
        for answer, text in zip(answers, texts):
            answer[name] = text
    made = {
        "rows": rows,
        "words_told": ears.lacks_words,
        "answers": answers,
        "made": runs.recipe([args.folder, args.clips]),
    }
    runs.write_file(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    for name, row in rows.items():
        print_row(name, row)


def named(replied, clips):
    """{attribute: share of replies that name its value}, with intervals by speakers."""
    speakers = speakers_of(clips)
    row = {}
    for attribute in clips[0]["style"]:
        values = {clip["style"][attribute] for clip in clips}
        right = []
        for text, clip in zip(replied, clips):
            words = words_of(text)
            found = [value for value in values if names(words, value)]
            found = [value for value in found if not within(value, found)]
            right.append(found == [clip["style"][attribute]])
        row[attribute] = share_of(right, speakers)
    return row


def can_be_told_apart(clips, path):
    """A ValueError if a word names values of two attributes, as "normal" does of a rate, too."""
    values = {(name, value) for clip in clips for name, value in clip["style"].items()}
    for name, value in sorted(values):
        for other, alike in sorted(values):
            if name != other and names(words_of(value), alike):
                raise ValueError(
                    f"{path}: {value!r} is a value of {name}, and names {alike!r} of "
                    f"{other}, too; wanted other words, like 'at a normal rate' and 'at a "
                    "normal volume'"
                )


def words_of(text):
    return set(re.findall(r"\w+", text.lower()))


def names(words, value):
    """Do these words of a reply name a value, like "slowly" or "non-native"?"""
    wanted = words_of(value)
    same = next((same for same in SAME if same & wanted), set())
    return wanted - same - FILLERS <= words and bool(same & words or not same)


def within(value, found):
    """Is a value a part of another that was found, as "Irish" is of "Northern Irish"?"""
    return any(words_of(value) < words_of(other) for other in found)


def probe(args):
    """What an encoder alone knows of how clips were said, after so many voices.

    A linear map from the mean of its states, of all the blocks that an adapter hears, to the
    values of each attribute. It is fitted to the clips that the adapter learns from, by ridge
    regression, and asked about voices that it never met.
    """
    runs.may_write(args.out, args.overwrite)
    described = targets.described_clips(args.learnt)
    learnt = list({entry["audio"]: entry for entry in described}.values())
    clips = targets.described_clips(args.clips)
    states = States(args.states)
    states.must_have(learnt + clips)
    for key in ("audio", "speaker"):
        met, new = (
            {str(entry[key]) for entry in entries if entry.get(key) not in (None, "")}
            for entries in (learnt, clips)
        )
        if met & new:
            raise ValueError(
                f"{min(met & new)}: is in {args.learnt} too; wanted clips of other voices"
            )
    if {*learnt[0]["style"]} != {*clips[0]["style"]}:
        raise ValueError(
            f"{args.clips}: its style has {', '.join(clips[0]['style'])}; wanted "
            f"{', '.join(learnt[0]['style'])}, as in {args.learnt}"
        )

    def means(entries):
        """(clips, taps * C): each block as loud as the others, its mean over time."""
        of_clips = [states[entry["audio"]] for entry in entries]    # (taps, frames, C) each
        return torch.stack([F.layer_norm(x, x.shape[-1:]).mean(1).flatten() for x in of_clips])

    x, asked = means(learnt), means(clips)
    if not torch.cat([x, asked]).isfinite().all():
        raise ValueError(f"{args.states}: some states are not finite numbers; encode again")
    middle, spread = x.mean(0), x.std(0, correction=0) + 1e-6
    x, asked = (x - middle) / spread, (asked - middle) / spread

    # More numbers than clips: the weights are a sum of the clips, so solve for their shares.
    alike = x @ x.T / x.shape[1] + RIDGE * torch.eye(len(x))         # (learnt, learnt)
    row = {}
    for attribute in learnt[0]["style"]:
        values = sorted({clip["style"][attribute] for clip in learnt})
        y = [[float(clip["style"][attribute] == value) for value in values] for clip in learnt]
        y = torch.tensor(y)                                         # (learnt, values)
        shares = torch.linalg.solve(alike, y - y.mean(0))
        scores = y.mean(0) + asked @ x.T / x.shape[1] @ shares      # (clips, values)
        likeliest = [values[n] for n in scores.argmax(1)]
        right = [value == clip["style"][attribute] for value, clip in zip(likeliest, clips)]
        row[attribute] = share_of(right, speakers_of(clips))
    made = {"probe": row, "made": runs.recipe([args.learnt, args.clips, args.states])}
    runs.write_file(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    print_row("probe", row)


def speakers_of(clips):
    """Who says each clip; a clip that does not tell is a speaker of its own."""
    who = [clip.get("speaker") for clip in clips]
    return [f"clip {n}" if name in (None, "") else str(name) for n, name in enumerate(who)]


def print_row(name, row):
    cells = [f"{attribute} {cell['value']:.2f}" for attribute, cell in row.items()]
    print(f"{name:8} {'  '.join(cells)}")


# --- units --------------------------------------------------------------------


def units_report(folder):
    """How a corpus uses its units, and how alike a word is across voices."""
    corpus = audio.Units(folder)
    rate, k = corpus.meta["frame_rate"], corpus.meta["k"]
    counts = np.bincount(corpus.units, weights=corpus.durations, minlength=k)
    p = counts[counts > 0] / counts.sum()
    seconds = float(corpus.durations.sum() / rate)
    found = {
        "clips": len(corpus.entries),
        "hours": round(seconds / 3600, 3),
        "units_used": len(p),
        "of": k,
        "perplexity": round(float(np.exp(-(p * np.log(p)).sum())), 1),
        "units_per_second": round(len(corpus.units) / seconds, 2),
        "frames_per_run": round(float(corpus.durations.mean()), 2),
    }

    # {word: [(speaker, its units)]}, of words long enough to tell apart.
    words = {}
    for i, entry in enumerate(corpus.entries):
        for word, begin, end in entry.get("words") or []:
            units = audio.between(*corpus[i], begin, end, rate)
            if len(word) > 3 and len(units):
                spoken = words.setdefault(word.strip(".").lower(), [])
                spoken.append((entry.get("speaker"), units))

    # Of two voices: the same word twice, and another word in place of the second.
    rng = random.Random(0)
    same, other = [], []
    names = sorted(words)
    for word in names:
        others = [name for name in names if name != word] or [word]
        for _ in range(20):
            speaker, a = rng.choice(words[word])
            another, b = rng.choice(words[word])
            _, c = rng.choice(words[rng.choice(others)])
            if speaker != another:
                same.append(edit_distance(a, b) / max(len(a), len(b)))
                other.append(edit_distance(a, c) / max(len(a), len(c)))
    if same:
        found["distance_same_word_other_voice"] = round(float(np.mean(same)), 3)
        found["distance_other_word"] = round(float(np.mean(other)), 3)
    return found


# --- the command --------------------------------------------------------------


def arguments():
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        description="Measure what the merged model can do, beside what it was made from."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser("table", help="the results table of one run")
    for name in ("base", "instruct", "speech", "merged"):
        one.add_argument(f"--{name}", required=True, help=f"folder of the {name} model")
    again = commands.add_parser("show", help="print a table that was made")
    again.add_argument("table", help="a table.json")
    two = commands.add_parser("report", help="join the tables of several seeds")
    two.add_argument("tables", nargs="+", help="table.json files")
    sweep = commands.add_parser("lam", help="the sweep of lam of a table, and what it says")
    sweep.add_argument("table", help="a table.json")
    three = commands.add_parser(
        "compare", help="ask several models that hear the same questions, typed and aloud"
    )
    three.add_argument("folders", nargs="+", help="model folders that hear")
    three.add_argument(
        "--split",
        choices=["test", "dev"],
        default="test",
        help="questions to report on (default), or to choose settings on",
    )
    how = commands.add_parser("manner", help="does it name how a clip was said")
    how.add_argument("folder", help="a folder of desta.py train, or a model that hears prosody")
    how.add_argument("--clips", required=True, help='a manifest with "style", of other voices')
    how.add_argument("--prompt", required=True, help="what is asked about every clip")
    how.add_argument(
        "--template", default=targets.TEMPLATE, help="of a description (default: %(default)s)"
    )
    knows = commands.add_parser("probe", help="what an encoder knows of how clips were said")
    knows.add_argument("states", help="a folder of desta.py encode")
    knows.add_argument("--learnt", required=True, help="targets, or a manifest, to learn from")
    knows.add_argument("--clips", required=True, help='a manifest with "style", of other voices')
    units = commands.add_parser(
        "units",
        help="used units, perplexity, rate, and how alike a word is across voices",
    )
    units.add_argument("folder", help="a units folder of tokenize_audio.py encode")

    runs.add_device(how)
    for command in (one, three):
        command.add_argument(
            "--questions",
            required=True,
            help="questions.jsonl of toy.py world, or of that form",
        )
        add_ears(command)
    for command in (one, two, three, how, knows):
        command.add_argument(
            "--out",
            required=True,
            help=".json to write; of table and report, a picture goes beside it as .png",
        )
        command.add_argument(
            "--overwrite", action="store_true", help="replace an existing --out"
        )
    return parser


def main():
    args = arguments().parse_args()
    if hasattr(args, "out") and Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: wanted a name that ends in .json")
    actions = {"table": table, "report": report, "compare": compare}
    actions |= {"manner": manner, "probe": probe}
    actions["show"] = lambda args: print(shown(read_table(args.table)))
    actions["lam"] = lambda args: print(swept(read_table(args.table)["lam_sweep"]))
    actions["units"] = lambda args: print(json.dumps(units_report(args.folder), indent=1))
    actions[args.action](args)


if __name__ == "__main__":
    runs.run(main)
