"""Does the sum follow spoken instructions? The results table, the sweep of lam, the size of both deltas; a report over seeds. And any
model on any benchmark of questions (`benchmark`) or of pairs of clips (`pairs`); several on the same questions (`compare`).

in   the recipe's four model folders and questions.jsonl; or a model and rows      out  table.json, table.png, a report of several; scores
see  95 % intervals: the bootstrap (Efron 1979), drawing facts rather than questions; Wilson's (1927) where items are independent
run  python evaluate.py table --base out/base --instruct out/instruct --speech out/speech --merged out/merged \\
         --questions out/toy/questions.jsonl --out out/table.json

rows     base, instruct; instruct_rows (instruct with the speech model's new rows: hearing by lookup alone); speech; merged;
         cascade (the speech model writes down what it heard, instruct answers that). base hears through those same new rows.
columns  typed, typed_unseen (facts no training asked), typed_noisy (misspelt: what a perfect ear could reach); spoken_heard
         (voices of the training speech), spoken_near (new variants), spoken_near_unseen, spoken_far (new accents): the share
         answered exactly after lower-casing and stripping, the model stopping by itself; wer_near: word error rate of its
         transcripts; text_loss: nats per token of plain statements of the facts asked about.

Every row writes under the same mask (text rows and ends of turn) and is asked with the better of two prompts: its chat
template, or a plain "question: ... answer:" page; which of them is chosen on typed dev questions.
"""
import argparse
import io
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
import torch.nn.functional as F

import audio
import weights
from merge import Merge
from model import LM, Config, generate
from tokenize_audio import AudioTokenizer, edit_distance
from vocab import Vocab

ROWS = ["base", "instruct", "instruct_rows", "speech", "merged", "cascade"]
COLUMNS = ["typed", "typed_unseen", "typed_noisy", "spoken_heard", "spoken_near", "spoken_near_unseen", "spoken_far", "wer_near", "text_loss"]
NEEDED = [("instruct", "typed"), ("merged", "typed"), *((name, "spoken_near") for name in ("base", "instruct_rows", "speech", "merged", "cascade"))]     # never empty
LAMS = [0.0, 0.25, 0.5, 0.7, 0.85, 1.0, 1.15, 1.3]
LIMIT, BATCH = 40, 64              # tokens in an answer or a transcript (longer ones never ended), questions answered at once


# --- answering -------------------------------------------------------------------------------------------------------------

def replies(model, vocab, prompts, extra_stop=(), bar=None):
    """The text a model writes after each prompt (lists of ids), or None where it did not stop by itself."""
    stop, out = [*vocab.stop, *extra_stop], [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))       # like lengths together: less padding
    for a in range(0, len(order), BATCH):
        part = order[a:a + BATCH]
        written = torch.stack(list(generate(model, [torch.tensor(prompts[i]) for i in part], LIMIT, stop, vocab.text_rows()))).T.tolist()
        for i, ids in zip(part, written):
            end = next((n for n, token in enumerate(ids) if token in stop), None)
            out[i] = None if end is None else vocab.decode(ids[:end])
        if bar:
            bar.update(len(part))
    return out


def normal(text):
    return (text or "").lower().strip()


def answers(model, vocab, contents, prompt, bar=None):
    """Replies to questions given as text or units, asked in the "chat" template or on a plain "page"."""
    if prompt == "chat":
        return replies(model, vocab, [vocab.turn([{"role": "user", "content": c}]) for c in contents], bar=bar)
    return replies(model, vocab, [vocab.page(c) for c in contents], vocab.encode("\n")[:1], bar)


def better_prompt(model, vocab, dev, bar=None):
    """"chat" or "page": with which of them the model answers more of the typed dev questions; "chat" where both do as well."""
    right = {prompt: exact(answers(model, vocab, [q["question"] for q in dev], prompt, bar), dev)["value"] for prompt in ("chat", "page")}
    return max(right, key=right.get)


def transcripts(model, vocab, contents, bar=None):
    return [normal(reply).removesuffix(".") for reply in replies(model, vocab, [vocab.heard(c) for c in contents], bar=bar)]


# --- scoring ---------------------------------------------------------------------------------------------------------------

def share(right):
    """{"value", "n", "low", "high"} of a list of booleans, with Wilson's 95 % interval."""
    n, z = len(right), 1.96
    if not n:
        return None
    p = sum(right) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return cell(p, n, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))


def ratio(parts, wholes, groups=None):
    """sum(parts) / sum(wholes) over n items, with a bootstrap 95 % interval: 1,000 draws (seed 0) of the items, or of whole `groups` of
    them. What belongs together, like four questions about one fact, is right or wrong together, and says less than four do."""
    _, group = np.unique(range(len(parts)) if groups is None else groups, return_inverse=True)
    part, whole = (np.bincount(group, weights=np.array(values, dtype=float)) for values in (parts, wholes))         # a group each
    drawn = np.random.default_rng(0).integers(len(part), size=(1000, len(part)))
    low, high = np.percentile(part[drawn].sum(1) / whole[drawn].sum(1), [2.5, 97.5])
    return cell(part.sum() / whole.sum(), len(parts), low, high)


def cell(value, n, low, high):
    return {"value": round(float(value), 4), "n": int(n), "low": round(float(low), 4) + 0.0, "high": round(float(high), 4)}


def exact(said, questions):
    """Share of questions answered exactly, with an interval by facts; None of no questions."""
    right = [normal(text) == normal(q["answer"]) for text, q in zip(said, questions)]
    if len(set(right)) < 2:                                                  # of all or none no draw differs: Wilson's interval of so many facts
        each = right[:len(set(facts(questions)))]
        return share(each) | {"n": len(right)} if each else None
    return ratio(right, [1] * len(right), facts(questions))


def facts(questions):
    """What each question is about; a question that names no fact stands for itself."""
    return [q.get("fact", q["question"]) for q in questions]


def word_errors(heard, questions):
    words = [q["question"].split() for q in questions]
    return ratio([edit_distance(text.split(), w) for text, w in zip(heard, words)], [len(w) for w in words], facts(questions))


@torch.inference_mode()
def text_loss(model, vocab, questions):
    """Nats per token of each question's `text`, a plain statement of its fact. The first token is given: documents begin with it in
    training too, nothing stands before."""
    sums, counts, barred = [], [], torch.ones(model.config.vocab_size, dtype=torch.bool)
    barred[vocab.text_rows()] = False                                        # as in decoding: text rows only
    for q in questions:
        ids = torch.tensor(vocab.text(q["text"])[0])
        logits = model(ids[None, :-1].to(model.lm_head.weight.device))[0].float()
        logits[:, barred.to(logits.device)] = -math.inf
        sums.append(F.cross_entropy(logits, ids[1:].to(logits.device), reduction="sum").item())
        counts.append(len(ids) - 1)
    return ratio(sums, counts, facts(questions))


def hear(ears, folder, questions, group):
    """The units of every question, as voices of `group` say it."""
    return [ears(audio.load(folder / q["audio"][group]))[0] for q in runs.Bar(questions, desc=f"hearing {len(questions)} questions, {group}", unit="question")]


def unseen(said, questions):
    """`exact` of those questions that no training asked."""
    return exact([text for text, q in zip(said, questions) if not q["seen"]], [q for q in questions if not q["seen"]])


def score(model, vocab, questions, spoken, prompt, bar=None):
    """(a model's row of the table, what it said to spoken_near). `spoken` {group: units of every question}: none for a model that cannot hear."""
    row, near = dict.fromkeys(COLUMNS), None
    said = answers(model, vocab, [q["question"] for q in questions], prompt, bar)
    row["typed"], row["typed_unseen"] = exact(said, questions), unseen(said, questions)
    row["typed_noisy"] = exact(answers(model, vocab, [q.get("noisy", q["question"]) for q in questions], prompt, bar), questions)
    row["text_loss"] = text_loss(model, vocab, questions)
    for group, contents in spoken.items():
        said = answers(model, vocab, contents, prompt, bar)
        row[f"spoken_{group}"] = exact(said, questions)
        if group == "near":
            near, row["spoken_near_unseen"], row["wer_near"] = said, unseen(said, questions), word_errors(transcripts(model, vocab, contents, bar), questions)
    return row, near


# --- the table -------------------------------------------------------------------------------------------------------------

def read_questions(path):
    rows = weights.read_lines(path)
    for number, row in enumerate(rows, 1):
        lacking = [name for name in ("question", "answer", "audio", "split", "seen") if name not in row]
        if lacking:
            raise ValueError(f"{path}, row {number}: no {lacking[0]!r}; wanted question, answer, audio, split and seen")
        if not isinstance(row["question"], str) or not isinstance(row["audio"], dict) or not {"heard", "near", "far"} <= row["audio"].keys():
            raise ValueError(f'{path}, row {number}: wanted "question" to be text and "audio" to name heard, near and far')
    if not {"dev", "test"} <= {row["split"] for row in rows}:
        raise ValueError(f"{path}: wanted both splits, dev and test")
    return rows


def model_at(plan, config, lam, device):
    """The merge at a lam, in memory. lam = 0 is instruct_rows."""
    with torch.device("meta"):
        model = LM(config)
    model.load_state_dict({name: plan.merged(name, lam).float() for name in plan.names}, strict=False, assign=True)
    model.tie()
    return model.to(device).eval()


def with_new_rows(model, speech):
    """A model that never heard, given the speech model's rows after its own."""
    have, model.config.vocab_size = model.config.vocab_size, speech.config.vocab_size
    for ours, theirs in ((model.model.embed_tokens, speech.model.embed_tokens), (model.lm_head, speech.lm_head)):
        ours.weight = torch.nn.Parameter(torch.cat([ours.weight[:have], theirs.weight[have:]]).detach())
    model.tie()
    return model


def table(args):
    began, folder = time.time(), Path(args.questions).parent
    weights.free(args.out, args.overwrite)
    weights.unchanged(args.merged, [args.base, args.instruct, args.speech])
    questions = read_questions(args.questions)
    test, dev = ([q for q in questions if q["split"] == split] for split in ("test", "dev"))
    plan = Merge(args.base, args.instruct, args.speech)
    vocab, plain, config = Vocab(args.speech), Vocab(args.instruct), Config.read(args.speech)
    ears = AudioTokenizer(args.speech, args.device, args.hubert)
    models = {name: LM.load(folder_, args.device, torch.float32).eval()
              for name, folder_ in (("base", args.base), ("instruct", args.instruct), ("speech", args.speech), ("merged", args.merged))}
    models["base"] = with_new_rows(models["base"], models["speech"])
    models["instruct_rows"] = model_at(plan, config, 0.0, args.device)

    spoken = {group: hear(ears, folder, test, group) for group in ("heard", "near", "far")}
    dev_near = hear(ears, folder, dev, "near")

    rows, prompts, examples = {}, {}, []
    replies_in_all = len(test) * (5 * 2 + 4 * 4 + 3) + len(dev) * (5 * 2 + 3 * len(LAMS))      # typed, noisy; spoken, transcripts; cascade; prompts, sweep
    with runs.Bar(total=replies_in_all, desc="answering", unit="reply") as bar:
        for name, model in models.items():                                   # instruct has no rows for units: it cannot be spoken to
            words, sounds = (plain, {}) if name == "instruct" else (vocab, spoken)
            prompts[name] = better_prompt(model, words, dev, bar)
            rows[name], near = score(model, words, test, sounds, prompts[name], bar)
            if name == "merged":
                examples = [{"question": q["question"], "answer": q["answer"], "said": text} for q, text in zip(test[:20], near)]
        rows["cascade"] = dict.fromkeys(COLUMNS)
        for group, contents in spoken.items():
            heard = transcripts(models["speech"], vocab, contents)
            said = answers(models["instruct"], plain, heard, prompts["instruct"], bar)
            rows["cascade"][f"spoken_{group}"] = exact(said, test)
            if group == "near":
                rows["cascade"] |= {"spoken_near_unseen": unseen(said, test), "wer_near": word_errors(heard, test)}
        sweep = []
        for lam in LAMS:                                                     # on dev questions only: settings are never chosen on the test split
            model = model_at(plan, config, lam, args.device)
            sweep.append({"lam": lam, "typed": exact(answers(model, vocab, [q["question"] for q in dev], prompts["merged"], bar), dev)["value"],
                          "spoken_near": exact(answers(model, vocab, dev_near, prompts["merged"], bar), dev)["value"],
                          "wer_near": word_errors(transcripts(model, vocab, dev_near, bar), dev)["value"]})
    report = plan.run(1.0, 1.0)
    trained = [weights.read_json(Path(f) / "training.json") for f in (args.base, args.instruct, args.speech) if (Path(f) / "training.json").exists()]
    seconds = {"training": round(sum(t["seconds"] for t in trained), 1), "table": round(time.time() - began, 1)}
    result = {"seed": int(trained[0]["settings"]["seed"]) if trained else None, "rows": {name: rows[name] for name in ROWS}, "lam_sweep": sweep, "rel": report["rel"],
              "cosine": report["cosine"], "seconds": seconds, "prompts": prompts,
              "dtype": sorted({t["settings"]["dtype"] for t in trained}),
              "examples": examples, "made": weights.recipe([args.base, args.instruct, args.speech, args.merged, args.questions])}
    draw([result], Path(args.out).with_suffix(".png"))
    weights.write_file(args.out, json.dumps(result, indent=1) + "\n", args.overwrite)
    show(result)


def read_table(path):
    result = weights.read_json(path, ["seed", "rows", "lam_sweep", "rel", "seconds", "dtype", "examples"])
    cells = [result["rows"].get(name, {}).get(column) for name, column in NEEDED] if isinstance(result["rows"], dict) else [None]
    if not all(isinstance(cell, dict) and "value" in cell for cell in cells):
        raise ValueError(f"{path}: a cell of its rows is missing; make it again with evaluate.py table")
    if not result["lam_sweep"] or not all(isinstance(row, dict) and {"lam", "typed", "spoken_near", "wer_near"} <= row.keys() for row in result["lam_sweep"]):
        raise ValueError(f"{path}: its sweep of lam is empty or damaged; make it again with evaluate.py table")
    return result


def grid(rows):
    """Rows of the table, {name: {column: cell}}, for a human; columns that none of them has are left out."""
    columns = [c for c in COLUMNS if any(row[c] for row in rows.values())]
    width = max(14, 2 + max(map(len, rows)))
    lines = [" " * width + "".join(f"{c.replace('spoken_', 'sp_').replace('unseen', 'uns'):>13}" for c in columns)]
    return "\n".join(lines + [f"{name:{width}}" + "".join(f"{'-' if row[c] is None else format(row[c]['value'], '.3f'):>13}" for c in columns) for name, row in rows.items()])


def show(result):
    """The table for a human."""
    print("\n" + grid({name: result["rows"][name] for name in ROWS}))
    n = result["rows"]["merged"]["typed"]["n"]
    print(f"\n{n} test questions; exact answers. "
          f"|delta| / |base|: instruct {result['rel']['instruct']:.3f}, speech {result['rel']['speech']:.3f}")
    print("lam (dev):  " + "   ".join(f"{row['lam']:g}: typed {row['typed']:.2f} spoken {row['spoken_near']:.2f}" for row in result["lam_sweep"]))
    for e in result["examples"][:4]:
        print(f'  spoken: "{e["question"]}"   wanted: "{e["answer"]}"   said: "{e["said"]}"')


def draw(results, path):
    """The ladder (what each row reaches, from typed to a far accent) and the lam sweep, averaged over seeds."""
    from matplotlib.figure import Figure
    mean = lambda values: float(np.mean(values)) if values else math.nan
    figure = Figure(figsize=(11, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    ladder = ["typed", "typed_noisy", "spoken_heard", "spoken_near", "spoken_far"]
    for name in ROWS:
        left.plot(ladder, [mean([r["rows"][name][c]["value"] for r in results if r["rows"][name][c]]) for c in ladder], marker="o", label=name)
    left.set(ylabel="answered exactly", ylim=(-0.03, 1.03), title="The ladder: test questions")
    left.tick_params(axis="x", rotation=20)
    left.legend()
    for column, label in (("typed", "typed"), ("spoken_near", "spoken (near voices)")):
        right.plot(LAMS, [mean([row[column] for r in results for row in r["lam_sweep"] if row["lam"] == lam]) for lam in LAMS], marker="o", label=label)
    right.set(xlabel="lam", ylim=(-0.03, 1.03), title="The lam sweep: dev questions")
    right.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    weights.write_file(path, picture.getvalue(), overwrite=True)             # it belongs to its table, which is guarded


def report(args):
    results = [read_table(path) for path in args.tables]
    made = {"seeds": [{name: r[name] for name in ("seed", "rows", "lam_sweep", "rel", "seconds", "dtype")} for r in results],
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads" + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
            "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    weights.write_file(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    draw(results, Path(args.out).with_suffix(".png"))
    print(markdown(made["seeds"]))


def markdown(seeds):
    """The README's tables: the mean over seeds of every cell; and a line per seed, with what counts most: the sum's spoken score as a share
    of instruct's typed one, and beside it the spoken score of the best of its parents."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in ROWS:
        cells = [[s["rows"][name][c]["value"] for s in seeds if s["rows"][name][c]] for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(f"{np.mean(c):.2f}" if c else "" for c in cells) + " |")
    lines += ["", "| seed | instruct typed | merged typed | merged spoken_near | best parent's | merged spoken_near / instruct typed | instruct's delta | speech's delta |", "|---|---|---|---|---|---|---|---|"]
    for s in seeds:
        value = lambda row, column: s["rows"][row][column]["value"]
        typed, both, spoken = value("instruct", "typed"), value("merged", "typed"), value("merged", "spoken_near")
        parent = max(value(row, "spoken_near") for row in ("base", "instruct_rows", "speech"))
        lines.append(f"| {s['seed']} | {typed:.2f} | {both:.2f} | {spoken:.2f} | {parent:.2f} | {spoken / typed if typed else math.nan:.2f} | "
                     f"{s['rel']['instruct']:.2f} | {s['rel']['speech']:.2f} |")
    return "\n".join(lines)


# --- two experiments (experiments.sh) --------------------------------------------------------------------------------------

def swept(sweep):
    """How much hearing to add: a table's sweep of lam, and in a sentence what it says."""
    lines = [f"{'lam':>6}{'typed':>10}{'spoken':>10}{'word error':>12}   (dev questions)"]
    lines += [f"{row['lam']:6g}{row['typed']:10.2f}{row['spoken_near']:10.2f}{row['wer_near']:12.2f}" for row in sweep]
    best = max(sweep, key=lambda row: row["spoken_near"])
    half = next(row for row in sweep if row["spoken_near"] >= best["spoken_near"] / 2)
    if not best["spoken_near"]:
        return "\n".join([*lines, "", "No lam answers a spoken question."])
    return "\n".join(lines) + (f"\n\nHalf of the best spoken score ({best['spoken_near']:.2f}, at lam {best['lam']:g}) is there at lam {half['lam']:g}; "
                               f"typed turns go from {sweep[0]['typed']:.2f} without hearing to {best['typed']:.2f} where spoken ones are best.")


def compare(args):
    """The same test questions, typed and aloud, to several models that hear: which answers them?"""
    weights.free(args.out, args.overwrite)
    if len(set(args.folders)) < 2:
        raise ValueError(f"compare: got {args.folders[0]} alone, wanted two models or more")
    questions, rows = read_questions(args.questions), {}
    test, dev = ([q for q in questions if q["split"] == split] for split in ("test", "dev"))
    ears = {folder: AudioTokenizer(folder, args.device, args.hubert) for folder in args.folders}      # who cannot hear is told before the first is asked
    for folder in args.folders:
        model, vocab = LM.load(folder, args.device, torch.float32).eval(), Vocab(folder)
        near = hear(ears[folder], Path(args.questions).parent, test, "near")
        with runs.Bar(total=4 * len(test) + 2 * len(dev), desc=f"answering {folder}", unit="reply") as bar:
            rows[folder], _ = score(model, vocab, test, {"near": near}, better_prompt(model, vocab, dev, bar), bar)
    weights.write_file(args.out, json.dumps({"rows": rows, "made": weights.recipe([*args.folders, args.questions])}, indent=1) + "\n", args.overwrite)
    print(f"\n{grid(rows)}\n\n{finding(rows)}")


def finding(rows):
    """One sentence: what the first model answers when spoken to, what the others do and whether chance could part them from it; and all of them typed to."""
    (name, first), *others = rows.items()
    said = [f"{name} answers {first['spoken_near']['value']:.2f} of {first['typed']['n']} questions"]
    for other, row in others:
        less, more = sorted((first["spoken_near"], row["spoken_near"]), key=lambda cell: cell["value"])
        said.append(f"{other} {row['spoken_near']['value']:.2f} ({'more than chance apart' if less['high'] < more['low'] else 'may be chance: 95 % intervals overlap'})")
    return f"Asked aloud, {', '.join(said)}; typed, {', '.join(format(row['typed']['value'], '.2f') for row in rows.values())}."


# --- any benchmark ---------------------------------------------------------------------------------------------------------

METRICS = ["exact", "wer", "choice"]


def kept(args, made, items, work):
    """work(list of items) -> list of results, for all items in batches. Every batch joins OUT.rows at once: after a stop the same command goes on there."""
    weights.free(args.out, args.overwrite)
    partial = Path(f"{args.out}.rows")
    text = partial.read_text() if partial.exists() else ""
    try:
        lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]      # a kill may have left half a line
    except ValueError:
        lines = [None]
    if lines and lines[0] != made:
        raise ValueError(f"{partial} is damaged, or was begun with another model or other rows; give what it was begun with, or remove it")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines or [made]))
    done = lines[1:]
    with open(partial, "a") as file, runs.Bar(total=len(items), initial=len(done), desc=args.action, unit="row") as bar:
        while len(done) < len(items):
            got = work(items[len(done):len(done) + BATCH])
            file.writelines(json.dumps(result) + "\n" for result in got)
            file.flush()
            done += got
            bar.update(len(got))
    return done


def finished(args, result):
    weights.write_file(args.out, json.dumps(result, indent=1) + "\n", args.overwrite)
    Path(f"{args.out}.rows").unlink()
    print(json.dumps({name: value for name, value in result.items() if name not in ("made", "rows")}, indent=1))


@torch.inference_mode()
def at_every_place(model, prompts):
    """Log-probabilities (T, V) behind every id of each prompt (lists of ids), one prompt after the other."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True).to(model.lm_head.weight.device)      # (B, T): what is behind the end is not seen
    hidden = model.model(ids)                                              # (B, T, C)
    for row, prompt in zip(hidden, prompts):
        yield model.lm_head(row[:len(prompt)]).float().log_softmax(-1)


def letters(vocab, n):
    """The id with which a reply begins that is the letter A, B, C ... of n choices."""
    ids = [vocab.encode(chr(65 + i))[0] for i in range(n)]
    if n > 26 or len(set(ids)) < n:
        raise ValueError(f"{n} choices: wanted at most 26, with letters that this tokenizer tells apart")
    return ids


def read_benchmark(path):
    rows = weights.read_lines(path)
    for number, row in enumerate(rows, 1):
        row["metric"] = row.get("metric") or ("choice" if row.get("choices") else "exact")
        wrong = (row["metric"] not in METRICS and f"metric {row['metric']!r}, wanted one of {', '.join(METRICS)}" or
                 not (isinstance(row.get("answer"), str) and row["answer"].strip()) and "no answer, wanted a string with something in it" or
                 not any(row.get(name) for name in ("audio", "text", "instruction")) and "nothing to ask, wanted audio, text or instruction" or
                 next((f"got {name} = {str(row[name])[:40]}, wanted a string" for name in ("audio", "text", "instruction") if not isinstance(row.get(name) or "", str)), None) or
                 row["metric"] == "choice" and (not isinstance(row.get("choices"), list) or not all(isinstance(c, str) for c in row["choices"]) or row["answer"] not in row["choices"] + [chr(65 + i) for i in range(len(row["choices"]))])
                 and "answer is none of its choices nor their letters")
        if wrong:
            raise ValueError(f"{path}, row {number}: {wrong}")
    return rows


def chosen(letter, row):
    """What a letter stands for, in the form of the row's answer: the text of a choice, or the letter where the answer is none of the texts."""
    return row["choices"][ord(letter.upper()) - 65] if row["answer"] in row["choices"] else letter.upper()


def benchmark(args):
    """Score a model on JSON lines {"audio", "text", "instruction", "choices", "answer", "metric"}."""
    rows, folder = read_benchmark(args.rows), Path(args.rows).parent
    model, vocab = LM.load(args.folder, args.device, torch.float32).eval(), Vocab(args.folder)
    ears = AudioTokenizer(args.folder, args.device, args.hubert) if any(row.get("audio") for row in rows) else None

    def content(row):
        words = [row[name] for name in ("text", "instruction") if row.get(name)]
        if row["metric"] == "choice":
            words += [f"{chr(65 + i)}. {choice}" for i, choice in enumerate(row["choices"])] + ["Answer with the letter."]
        heard = [ears(audio.load(folder / row["audio"]))[0]] if row.get("audio") else []
        return heard + ([" " * bool(heard) + "\n".join(words)] if words else [])

    def work(part):
        prompts = [vocab.turn([{"role": "user", "content": content(row)}]) for row in part]
        open_ = [i for i, row in enumerate(part) if row["metric"] != "choice"]
        said = dict(zip(open_, replies(model, vocab, [prompts[i] for i in open_])))
        chosen = [i for i, row in enumerate(part) if row["metric"] == "choice"]
        for i, places in zip(chosen, at_every_place(model, [prompts[i] for i in chosen]) if chosen else ()):
            said[i] = chr(65 + int(places[-1, letters(vocab, len(part[i]["choices"]))].argmax()))
        return [said[i] for i in range(len(part))]

    said, result = kept(args, weights.recipe([args.folder, args.rows])["inputs"], rows, work), {}
    for metric in METRICS:
        pairs = [(normal(text), row) for text, row in zip(said, rows) if row["metric"] == metric]
        if not pairs:
            continue
        if metric == "wer":
            words = [normal(row["answer"]).removesuffix(".").split() for _, row in pairs]      # the full stop that transcripts end with is no word
            result[metric] = ratio([edit_distance(text.removesuffix(".").split(), w) for (text, _), w in zip(pairs, words)], [len(w) for w in words])
        elif metric == "exact":
            result[metric] = share([text == normal(row["answer"]) for text, row in pairs])
        else:
            result[metric] = share([chosen(text, row) == row["answer"] for text, row in pairs])
    finished(args, result | {"rows": said, "made": weights.recipe([args.folder, args.rows])})


def pairs(args):
    """Share of pairs of clips in which the model finds the good one likelier, per unit; ties half. (sBLIMP, sWUGGY, spoken StoryCloze, SALMon.)"""
    if Path(args.rows).is_dir():
        good = {path.relative_to(Path(args.rows) / "good"): path for path in sorted((Path(args.rows) / "good").rglob("*")) if path.suffix.lower() in audio.AUDIO}
        rows, folder = [{"good": str(path), "bad": str(Path(args.rows) / "bad" / name)} for name, path in good.items()], Path()
    else:
        rows, folder = weights.read_lines(args.rows), Path(args.rows).parent
    if not rows or not all(isinstance(row.get(side), str) for row in rows for side in ("good", "bad")):
        raise ValueError(f'{args.rows}: wanted folders good/ and bad/ with files of the same names, or JSON lines {{"good": path, "bad": path}}')
    model, vocab, ears = LM.load(args.folder, args.device, torch.float32).eval(), Vocab(args.folder), AudioTokenizer(args.folder, args.device, args.hubert)
    if not vocab.speech:
        raise ValueError(f"{args.folder}: cannot hear (no speech.json); give a speech model")
    first, k = vocab.speech["first_unit"], vocab.speech["k"]

    def hear(path):
        units, _ = ears(audio.load(path))
        if not len(units):
            raise ValueError(f"{path}: under one frame, nothing to compare")
        return vocab.span(units)[:-1]

    def work(part):
        prompts = [hear(folder / row[side]) for row in part for side in ("good", "bad")]
        mean = []
        for prompt, places in zip(prompts, at_every_place(model, prompts)):
            units = places[:-1, first:first + k].log_softmax(-1)           # (n, k): among units alone, as in training
            mean.append(units.gather(1, torch.tensor(prompt[1:], device=units.device)[:, None] - first).mean().item())
        return [[g, b] for g, b in zip(mean[::2], mean[1::2])]

    scores = kept(args, weights.recipe([args.folder, args.rows])["inputs"], rows, work)
    won = [1.0 if g > b else 0.5 if g == b else 0.0 for g, b in scores]
    finished(args, {"pairs": share(won), "rows": scores, "made": weights.recipe([args.folder, args.rows])})


def main():
    parser = argparse.ArgumentParser(description="Measure what the merged model can do, beside what it was made from.")
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
    five = commands.add_parser("compare", help="ask several models that hear the same test questions, typed and aloud")
    five.add_argument("folders", nargs="+", help="model folders that hear")
    for command in (one, five):
        command.add_argument("--questions", required=True, help="questions.jsonl of toy.py world, or of that form")
    three = commands.add_parser("benchmark", help='score a model on JSON lines {"audio", "text", "instruction", "choices", "answer", "metric"}')
    four = commands.add_parser("pairs", help="how often the good clip of a pair is likelier: a folder with good/ and bad/, or JSON lines")
    for command in (three, four):
        command.add_argument("folder", help="a model folder that hears")
        command.add_argument("rows", help="the rows" if command is three else "a folder with good/ and bad/, or JSON lines")
    for command in (one, three, four, five):
        command.add_argument("--hubert", help="the HuBERT folder, if it was too big to travel with the model")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
    for command in (one, two, three, four, five):
        command.add_argument("--out", required=True, help=".json to write; of table and report, a picture goes beside it as .png")
        command.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    if hasattr(args, "out") and Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: wanted a name that ends in .json")
    {"table": table, "report": report, "show": lambda args: show(read_table(args.table)), "lam": lambda args: print(swept(read_table(args.table)["lam_sweep"])), "compare": compare, "benchmark": benchmark, "pairs": pairs}[args.action](args)


if __name__ == "__main__":
    weights.run(main)
