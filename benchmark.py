"""Any model that hears on any benchmark: questions, or pairs of clips.

in   a model folder; JSON lines of questions, or of pairs, or two folders of clips
out  a .json with the score, its 95 % interval and every answer
see  sBLIMP and sWUGGY (arXiv:2011.11588), spoken StoryCloze (arXiv:2305.13009), SALMon
     (arXiv:2409.07437) for pairs
run  python benchmark.py questions out/merged questions.jsonl --out scores.json

A question is {"audio" or "said", "text", "instruction", "choices", "answer", "metric",
"group"}: something to ask, and the answer. "said" is what prosody.py makes of audio whose
words are known; with --transcriber the model hears the audio itself. Where a question has
"said" or "words", as in a manifest, "text" is what is said, and is not written beside it;
a model that has to be told the words gets it.
Metrics: "exact" (in lower case), "ends" (the reply ends with the answer), "contains" (the
answer's words stand in the reply), "wer" (word error rate), "choice" (by the likeliest
letter). Questions with a "group" are scored group by group, too. Those that name the same
"fact" count once in an interval. A reply is cut behind --limit tokens; one that has not
ended there is wrong by "exact" and "ends".

What has been done is kept in OUT.pieces: after a stop the same command goes on there.
`lam` asks the sums of three models at several lam, in memory, and names the best.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch

import audio
import listen
import prosody
import tokenize_audio
from evaluate import (
    BATCH,
    LIMIT,
    edit_distance,
    facts,
    means,
    model_at,
    normal,
    ratio,
    replies,
    share,
    share_of,
    where_made,
)
from merge import Merge, add_signs, signs_of
from model import Config
from vocab import Said

METRICS = ["exact", "ends", "contains", "wer", "choice"]
ROWS = "merged", "typed", "cascade", "speech", "instruct_rows"  # of speedrun_manner.sh
LAMS = [n / 20 for n in range(4, 18)]  # 0.2, 0.25, ... 0.85
READ = 16  # prompts read at once for the likelihood of all their ids


# --- work that goes on after a stop -------------------------------------------


def in_batches(args, items, work, clips):
    """work(list of items) -> list of results, for all items, in batches; clips: their paths."""
    runs.may_write(args.out, args.overwrite)
    settings = runs.recipe(inputs(args))["inputs"] | {"limit": args.limit}
    settings["audio"] = audio.identity([{"audio": str(path)} for path in clips])
    unit = args.action.removesuffix("s")
    return runs.in_pieces(args.out, settings, items, work, BATCH, args.action, unit)


def inputs(args):
    """The files and folders that scores are made from."""
    return [args.folder, args.asked, args.hubert, args.transcriber]


def finish(args, scores, answers):
    """Write the scores and every answer, and print the scores."""
    made = scores | {"replies": answers, "made": runs.recipe(inputs(args))}
    runs.finish_pieces(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    print(json.dumps(scores, indent=1))


def opened(args):
    """(model, vocabulary, ears) of the folder that is asked."""
    return listen.load(
        args.folder, args.device, args.hubert, torch.float32, args.transcriber
    )


@torch.inference_mode()
def log_probabilities(model, prompts):
    """Yield (T, V) for each prompt (a list of ids): behind every id, those of the next."""
    device = model.lm_head.weight.device
    for a in range(0, len(prompts), READ):
        part = [torch.tensor(prompt) for prompt in prompts[a : a + READ]]
        # What fills up a batch stands behind the prompts, where they do not see it.
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)  # (B, T)
        for hidden, prompt in zip(model.model(ids), part):          # (T, C)
            yield model.lm_head(hidden[: len(prompt)]).float().log_softmax(-1)


# --- questions ----------------------------------------------------------------


def read_questions(path):
    """The questions of a benchmark, each with a metric, checked."""
    questions = runs.read_lines(path)
    for number, question in enumerate(questions, 1):
        if not question.get("metric"):
            question["metric"] = "choice" if question.get("choices") else "exact"
        wrong = what_is_wrong(question)
        if wrong:
            raise ValueError(f"{path}, question {number}: {wrong}")
    if not questions:
        raise ValueError(f"{path}: empty; wanted at least one question")
    return questions


def what_is_wrong(question):
    """Why a question cannot be scored, or None."""
    if question["metric"] not in METRICS:
        return f"metric {question['metric']!r}, wanted one of {', '.join(METRICS)}"
    answer = question.get("answer")
    if not isinstance(answer, str) or not answer.strip():
        return "no answer, wanted a string with something in it"
    asked = "audio", "text", "instruction"
    if question["metric"] == "wer" and not spoken_words(answer):
        return "an answer without a word, wanted one to count errors in"
    if not any(question.get(name) for name in (*asked, "said")):
        return "nothing to ask, wanted audio, said, text or instruction"
    for name in asked:
        if not isinstance(question.get(name) or "", str):
            return f"got {name} = {str(question[name])[:40]}, wanted a string"
    if not isinstance(question.get("group") or "", str):
        return f"got group = {str(question['group'])[:40]}, wanted a string"
    if question["metric"] == "choice":
        choices = question.get("choices")
        texts = isinstance(choices, list) and all(isinstance(c, str) for c in choices)
        if not texts or answer not in choices + [chr(65 + i) for i in range(len(choices))]:
            return "answer is none of its choices nor their letters"
        if len(choices) > 26:
            return f"{len(choices)} choices, wanted at most 26"
    return None


def letter_ids(vocab, n):
    """The ids with which replies begin that are the letters A, B, C ... of n choices."""
    ids = [vocab.encode(chr(65 + i))[0] for i in range(n)]
    if n > 26 or len(set(ids)) < n:
        raise ValueError(
            f"{n} choices: wanted at most 26, with letters that this tokenizer tells "
            "apart"
        )
    return ids


def meaning(letter, question):
    """What a letter stands for, in the form of the answer: the text of a choice, or itself."""
    letter = letter.upper()
    in_words = question["answer"] in question["choices"]
    return question["choices"][ord(letter) - 65] if in_words else letter


def score_questions(args):
    """Score a model on questions."""
    questions = read_questions(args.asked)
    model, vocab, ears = opened(args)
    can_hear(args, questions, ears)
    clips = [Path(args.asked).parent / q["audio"] for q in questions if q.get("audio")]
    replied = in_batches(args, questions, answering(args, model, vocab, ears), clips)
    tell_cut(args, vocab, replied)
    finish(args, all_scores(questions, replied), replied)

    # To see what the scores are of: the first question of each group, and what was answered.
    shown = set()
    for question, text in zip(questions, replied):
        group = question.get("group")
        if group not in shown:
            names = "audio", "text", "instruction"
            asked = [question[name] for name in names if question.get(name)]
            print(f"{group or 'for example'}: {' | '.join(asked)}\n    {text or '(no end)'}")
        shown.add(group)


def answering(args, model, vocab, ears):
    """A function from some questions to what the model replies to each."""
    folder = Path(args.asked).parent

    def content(question):
        """A user's turn: what is heard, if anything, then what is written."""
        transcribed = question.get("said") or question.get("words")
        names = ["instruction"] if transcribed else ["text", "instruction"]
        words = [question[name] for name in names if question.get(name)]
        if question["metric"] == "choice":
            choices = enumerate(question["choices"])
            words += [f"{chr(65 + i)}. {choice}" for i, choice in choices]
            words.append("Answer with the letter.")
        text = "\n".join(words)
        heard = args.transcriber and question.get("audio")
        if question.get("said") and not heard:  # its text is in it
            units = Said.read(question["said"], args.asked)
        elif question.get("audio"):
            samples = audio.load(folder / question["audio"])
            units = listen.hear(ears, samples, question.get("text"), question.get("words"))
        else:
            return [text]
        return [units] + ([" " + text] if text else [])

    def work(part):
        """The replies to some questions; to a choice, its letter."""
        prompts = [vocab.turn([{"role": "user", "content": content(q)}]) for q in part]
        replied = {}
        for metrics, whole in ((("exact", "ends"), True), (("contains", "wer"), False)):
            asked = [i for i, q in enumerate(part) if q["metric"] in metrics]
            if asked:
                starts = [prompts[i] for i in asked]
                texts = replies(model, vocab, starts, limit=args.limit, whole=whole)
                replied |= dict(zip(asked, texts))
        chosen = [i for i in range(len(part)) if i not in replied]
        for i, likely in zip(
            chosen, log_probabilities(model, [prompts[i] for i in chosen])
        ):
            ids = letter_ids(vocab, len(part[i]["choices"]))
            replied[i] = chr(65 + int(likely[-1, ids].argmax()))
        if ears:
            ears.forget()
        return [replied[i] for i in range(len(part))]

    return work


def can_hear(args, questions, ears):
    """A ValueError now, not when its turn comes, if a model cannot hear a question."""
    if any(q.get("audio") or q.get("said") for q in questions) and not ears:
        raise ValueError(f"{args.folder}: cannot hear, and a question has audio")
    if any(q.get("said") for q in questions) and not isinstance(ears, prosody.Ears):
        raise ValueError(
            f'{args.asked}: has questions with "said", words with their prosody, and '
            f"{args.folder} does not read such; give a model that was trained on prosody"
        )
    heard = [
        q for q in questions if q.get("audio") and (args.transcriber or not q.get("said"))
    ]
    if not all(tells_words(q) for q in heard):
        listen.wants_words(args.folder, ears)
    if heard:
        listen.can_open([Path(args.asked).parent / q["audio"] for q in heard], ears)


def tells_words(question):
    """Is its text what is said, and not what is asked for?"""
    transcribed = question.get("words") and (question.get("text") or "").strip()
    return bool(transcribed and question["metric"] != "wer")


def tell_cut(args, vocab, replied):
    """Say how many replies may have had more to say."""
    cut = sum(text is None or len(vocab.encode(text)) >= args.limit for text in replied)
    if cut:
        print(
            f"{cut} of {len(replied)} replies had not ended after {args.limit} tokens (--limit)",
            file=sys.stderr,
        )


def all_scores(questions, replied):
    """{metric: cell} of what was replied to all questions, and to those of each group."""
    scores = scores_by_metric(questions, replied)
    groups = sorted({q["group"] for q in questions if q.get("group")})
    if groups:
        scores["groups"] = {}
    for group in groups:
        among = [n for n, q in enumerate(questions) if q.get("group") == group]
        part = scores_by_metric([questions[n] for n in among], [replied[n] for n in among])
        scores["groups"][group] = part
    return scores


def contains(text, answer):
    """Do the words of an answer stand in a text, next to each other and whole?"""
    return bool(re.search(rf"(?<!\w){re.escape(normal(answer))}(?!\w)", text))


def ends(text, answer):
    """Does a text end with an answer, whose first word is whole there?"""
    return bool(re.search(rf"(?<!\w){re.escape(normal(answer))}$", text))


def spoken_words(text):
    """The words of a transcript; the full stop that it ends with is none."""
    return normal(text).removesuffix(".").split()


def scores_by_metric(questions, replied):
    """{metric: cell} of what was replied to questions; intervals by "fact", where named."""
    right = {
        "exact": lambda text, q: text == normal(q["answer"]),
        "ends": lambda text, q: ends(text, q["answer"]),
        "contains": lambda text, q: contains(text, q["answer"]),
        "choice": lambda text, q: meaning(text, q) == q["answer"],
    }
    scores = {}
    for metric in METRICS:
        asked = [
            (normal(text), q) for text, q in zip(replied, questions) if q["metric"] == metric
        ]
        about = facts([q for _, q in asked])
        if asked and metric == "wer":
            heard = [spoken_words(text) for text, _ in asked]
            words = [spoken_words(q["answer"]) for _, q in asked]
            wrong = [edit_distance(a, b) for a, b in zip(heard, words)]
            scores[metric] = ratio(wrong, [len(w) for w in words], about)
        elif asked:
            found = [right[metric](text, q) for text, q in asked]
            alone = len(set(about)) == len(about)
            scores[metric] = share(found) if alone else share_of(found, about)
    return scores


def scores_by_group(file):
    """{group: its cell} of a file of `questions`."""
    return cells_of(runs.read_json(file, ["groups"])["groups"], file)


def cells_of(groups, where):
    """{group: its cell} of {group: {metric: cell}}, of one metric each."""
    made = {}
    for name, cells in groups.items() if isinstance(groups, dict) else ():
        cell = next(iter(cells.values()), None) if isinstance(cells, dict) else None
        if isinstance(cells, dict) and len(cells) > 1:
            raise ValueError(
                f"{where}: group {name!r} is scored by {' and '.join(cells)}; wanted one metric "
                "in a group, to show it in one column"
            )
        if isinstance(cell, dict) and isinstance(cell.get("value"), float):
            made[name] = cell
    if not made or len(made) < len(groups):
        raise ValueError(f"{where}: no scores by group; wanted questions that have groups, scored")
    return made


def choose_lam(args):
    """Ask the sums at several lam the same questions; the best has the highest mean of groups."""
    runs.may_write(args.out, args.overwrite)
    questions = read_questions(args.asked)
    if any(q["metric"] == "wer" for q in questions):
        raise ValueError(f"{args.asked}: scored by wer, of which less is better; wanted shares")

    # Before a model is loaded: has each question a group, and each group one metric? Any reply
    # tells; "A" is a choice, too.
    for number, question in enumerate(questions, 1):
        if not question.get("group"):
            raise ValueError(
                f"{args.asked}, question {number}: has no group; wanted one in each, as a lam is "
                "judged by the mean of groups"
            )
    cells_of(all_scores(questions, ["A"] * len(questions)).get("groups"), args.asked)
    vocab, ears = opened(args)[1:]  # of --speech: the sum has its tokens
    can_hear(args, questions, ears)
    clips = [Path(args.asked).parent / q["audio"] for q in questions if q.get("audio")]
    clips = [{"audio": str(path)} for path in clips]
    plan = Merge(args.base, args.instruct, args.folder, args.signs)
    config = Config.read(args.folder)

    def ask(lams):
        """[{group: its cell}] of the sum at one lam; the sum is gone before the next is made."""
        work = answering(args, model_at(plan, config, lams[0], args.device), vocab, ears)
        batches = [questions[a : a + BATCH] for a in range(0, len(questions), BATCH)]
        replied = [text for batch in batches for text in work(batch)]
        return [cells_of(all_scores(questions, replied).get("groups"), args.asked)]

    recipe = runs.recipe([args.base, args.instruct, args.folder, args.asked])
    settings = recipe["inputs"] | {"signs": args.signs, "audio": audio.identity(clips)}
    scores = runs.in_pieces(args.out, settings, LAMS, ask, 1, "asking the sum", "lam")
    scores = dict(zip(LAMS, scores))

    def mean(lam):
        return sum(cell["value"] for cell in scores[lam].values()) / len(scores[lam])

    best = max(scores, key=mean)
    made = {"lam": best, "signs": args.signs, "scores": scores, "made": recipe}
    runs.finish_pieces(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    print(table({f"lam {lam:g}": groups for lam, groups in scores.items()}))
    as_good = sum(mean(lam) == mean(best) for lam in scores)
    print(f"lam {best:g} has the best mean" + ", as others have" * (as_good > 1))


def show(args):
    """What several models scored, group by group, as a table."""
    made = {file.removesuffix(".json"): scores_by_group(file) for file in args.scores}
    if args.out:
        runs.write_file(args.out, json.dumps(made, indent=1) + "\n", args.overwrite)
    print(table(made))


def table(made):
    """{name: {group: cell}} as lines and columns."""
    names = sorted({name for groups in made.values() for name in groups})
    width = 2 + max(map(len, made))  # of the first column
    column = max(10, *(len(name) + 2 for name in names))  # of the others
    lines = [" " * width + "".join(f"{name:>{column}}" for name in names)]
    for line, groups in made.items():
        values = [
            format(groups[name]["value"], ".2f") if name in groups else "-" for name in names
        ]
        lines.append(f"{line:{width}}" + "".join(f"{value:>{column}}" for value in values))
    return "\n".join(lines)


def report(args):
    """Join what speedrun_manner.sh left of several seeds, and print the README's table."""
    seeds = [of_run(Path(folder)) for folder in args.folders]
    runs.write_file(args.out, json.dumps({"seeds": seeds}, indent=1) + "\n", args.overwrite)
    print(markdown(seeds))


def of_run(folder):
    """A run's settings, the size of its deltas, and what each of its models scored."""
    lacking = [f"{name}.json" for name in ROWS if not (folder / f"{name}.json").exists()]
    if lacking:
        raise ValueError(
            f"{folder}: no {lacking[0]}, so no finished run; run speedrun_manner.sh again"
        )
    seconds = {}
    for name in ("base", "instruct", "speech"):
        trained = runs.read_json(folder / name / "training.json", ["settings", "seconds"])
        seconds[name] = trained["seconds"]
    merged = runs.read_json(folder / "merged/merge.json", ["lam", "rel"])
    return {
        "seed": int(trained["settings"]["seed"]),
        "dtype": trained["settings"]["dtype"],
        "lam": merged["lam"],
        "signs": signs_of(folder / "merged"),
        "dev": runs.read_json(folder / "lam.json", ["scores"])["scores"],
        "rel": merged["rel"],
        "seconds": seconds,
        "rows": {name: scores_by_group(folder / f"{name}.json") for name in ROWS},
    } | where_made(runs.read_json(folder / "speech/recipe.json"))


def markdown(seeds):
    """A table of means over seeds: models down, the sum first; groups of questions across."""
    rows = seeds[0]["rows"]
    groups = sorted({group for scores in rows.values() for group in scores})
    return means(seeds, sorted(rows, key=lambda name: (name != "merged", name)), groups)


# --- pairs of clips -----------------------------------------------------------


def read_pairs(path):
    """([{"good": path, "bad": path}], the folder that the paths are relative to)."""
    path = Path(path)
    if path.is_dir():
        files = [
            file
            for file in audio.files_under(path / "good")
            if file.suffix.lower() in audio.AUDIO
        ]
        pairs = [
            {"good": str(file), "bad": str(path / "bad" / file.relative_to(path / "good"))}
            for file in files
        ]
        folder = Path()
    else:
        pairs = runs.read_lines(path)
        folder = path.parent
    if not pairs or not all(
        isinstance(pair.get(side), str) for pair in pairs for side in ("good", "bad")
    ):
        raise ValueError(
            f"{path}: wanted folders good/ and bad/ with files of the same names, or "
            'JSON lines {"good": path, "bad": path}'
        )
    return pairs, folder


def score_pairs(args):
    """Share of pairs in which the model finds the good clip likelier, per unit; ties half."""
    pairs, folder = read_pairs(args.asked)
    model, vocab, ears = opened(args)
    if not vocab.speech or vocab.reads_prosody():
        raise ValueError(f"{args.folder}: does not hear units; give a speech model that does")
    first, k = vocab.speech["first_unit"], vocab.speech["k"]
    clips = [folder / pair[side] for pair in pairs for side in ("good", "bad")]
    listen.can_open(clips, ears)
    before = len(vocab.begin) + 1  # ids that stand before the units

    def span(path):
        """The ids of a clip: as a document begins, the marker of speech, units."""
        units, _ = ears(audio.load(path))
        if not len(units):
            raise ValueError(f"{path}: under one frame, nothing to compare")
        return vocab.begin + vocab.span(units)[:-1]

    def work(part):
        """Mean log-probability of the units of [good, bad], of some pairs."""
        prompts = [span(folder / pair[side]) for pair in part for side in ("good", "bad")]
        means = []
        for prompt, likely in zip(prompts, log_probabilities(model, prompts)):
            among = likely[before - 1 : -1, first : first + k].log_softmax(-1)  # (n, k)
            unit = torch.tensor(prompt[before:], device=among.device)[:, None] - first
            means.append(among.gather(1, unit).mean().item())
        return [[good, bad] for good, bad in zip(means[::2], means[1::2])]

    means = in_batches(args, pairs, work, clips)
    won = [1.0 if good > bad else 0.5 if good == bad else 0.0 for good, bad in means]
    finish(args, {"pairs": share(won)}, means)


# --- the command --------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Score a model that hears on any benchmark."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    asked = commands.add_parser("questions", help="how many questions it answers")
    asked.add_argument("folder", help="a model folder that hears")
    asked.add_argument(
        "asked",
        metavar="questions",
        help='JSON lines {"audio", "text", "instruction", "choices", "answer", "metric"}',
    )
    asked.add_argument(
        "--limit",
        type=runs.count,
        default=LIMIT,
        help=f"tokens of a reply, at most (default {LIMIT})",
    )
    listen.add_ears(asked)

    pairs = commands.add_parser("pairs", help="how often the good clip of a pair is likelier")
    pairs.add_argument("folder", help="a model folder that hears")
    pairs.add_argument("asked", metavar="pairs", help="folder with good/ and bad/, or JSON lines")
    tokenize_audio.add_ears(pairs)
    pairs.set_defaults(limit=None, transcriber=None)  # of pairs, units alone are read

    lam = commands.add_parser("lam", help="which lam has the best sum, by some questions")
    for which in ("base", "instruct", "speech"):
        dest = "folder" if which == "speech" else which
        lam.add_argument(f"--{which}", dest=dest, required=True, help="a model folder")
    lam.add_argument("asked", metavar="questions", help="the questions, of the dev split")
    add_signs(lam)
    runs.add_device(lam)
    lam.set_defaults(hubert=None, transcriber=None, limit=LIMIT)

    shown = commands.add_parser("show", help="scores of several models, group by group")
    shown.add_argument("scores", nargs="+", help="files of `questions`")
    joined = commands.add_parser("report", help="join the runs of speedrun_manner.sh")
    joined.add_argument("folders", nargs="+", help="its out folders, one a seed")

    for command in (asked, pairs, lam, shown, joined):
        command.add_argument("--out", required=command is not shown, help=".json to write")
        command.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    if args.action != "show" and Path(args.out).suffix != ".json":
        raise ValueError(f"--out {args.out}: wanted a name that ends in .json")
    actions = {"questions": score_questions, "pairs": score_pairs, "lam": choose_lam}
    actions |= {"show": show, "report": report}
    actions[args.action](args)


if __name__ == "__main__":
    runs.run(main)
