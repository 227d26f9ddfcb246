import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import benchmark
import evaluate
import pretrain
from conftest import ROOT, call, first_on_path, shared, six_tokens, speedrun_commands
from evaluate import COLUMNS, LAMS, ROWS, exact, normal, ratio, share, word_errors
from merge import signs_of
from vocab import Vocab


def test_wilsons_interval_by_hand():
    # P = 0.8, n = 10: 0.490 to 0.943.
    cell = share([True] * 8 + [False] * 2)
    assert cell["value"] == 0.8
    assert math.isclose(cell["low"], 0.490, abs_tol=1e-3)
    assert math.isclose(cell["high"], 0.943, abs_tol=1e-3)
    assert share([False] * 5)["low"] == 0 and share([]) is None


def test_an_answer_counts_only_whole_and_only_if_the_model_stopped():
    questions = [{"question": str(n), "answer": "Paris"} for n in range(4)]
    cell = exact([" paris ", "paris.", "paris paris", None], questions)
    assert (cell["value"], cell["n"]) == (0.25, 4) and exact([], []) is None
    assert normal(None) == ""


@pytest.mark.parametrize(
    "chat, page, better", [("ab", "aa", "page"), ("aa", "ab", "chat"), ("ab", "ba", "chat")]
)
def test_the_better_prompt_is_chosen_by_the_typed_dev_questions(monkeypatch, chat, page, better):
    monkeypatch.setattr(
        evaluate, "answers",
        lambda model, vocab, contents, prompt: list({"chat": chat, "page": page}[prompt]),
    )
    assert evaluate.better_prompt(None, None, [{"question": "?", "answer": "a"}] * 2) == better


def test_the_prompt_decides_how_a_question_is_asked(speedrun, monkeypatch):
    vocab = evaluate.Vocab(speedrun / "merged")
    asked = []

    def replies(model, vocab, prompts, page=False):
        asked.append((prompts[0], page))
        return ["x"]

    monkeypatch.setattr(evaluate, "replies", replies)
    evaluate.answers(None, vocab, ["hi"], "chat")
    evaluate.answers(None, vocab, ["hi"], "page")
    assert asked == [
        (vocab.turn([{"role": "user", "content": "hi"}]), False),
        (vocab.page("hi"), True),
    ]


def test_word_error_rate_by_hand():
    cell = word_errors(["the cat sat", ""], [{"question": "the cat sits"}, {"question": "down"}])
    assert cell["value"] == 0.5
    assert cell["n"] == 2  # 2 wrong of 4 words


def test_a_ratio_is_of_sums_and_its_interval_holds_it():
    cell = ratio([1, 2, 3], [2, 2, 2])
    assert cell["value"] == 1.0 and cell["low"] <= 1.0 <= cell["high"]


def test_the_table_has_every_row_and_column_and_null_where_meaningless(speedrun):
    table = json.loads((speedrun / "table.json").read_text())
    assert list(table["rows"]) == ROWS
    assert all(list(row) == COLUMNS for row in table["rows"].values())
    null = {
        (name, column)
        for name, row in table["rows"].items()
        for column, cell in row.items()
        if cell is None
    }
    spoken = {c for c in COLUMNS if c.startswith(("spoken", "wer"))}
    assert null == {("instruct", c) for c in spoken} | {
        ("cascade", c) for c in COLUMNS if c not in spoken
    }
    test = [
        q
        for q in map(json.loads, (speedrun / "toy/questions.jsonl").read_text().splitlines())
        if q["split"] == "test"
    ]
    assert table["rows"]["merged"]["spoken_near"]["n"] == len(test)
    assert [row["lam"] for row in table["lam_sweep"]] == LAMS
    assert table["rows"]["merged"]["spoken_near_unseen"]["n"] == sum(not q["seen"] for q in test)
    assert (speedrun / "table.png").read_bytes().startswith(b"\x89PNG")


def table_of(speedrun):
    """The command that makes the table of a run, but for --out."""
    models = [f"--{name}={speedrun / name}" for name in ("base", "instruct", "speech", "merged")]
    questions = str(speedrun / "toy/questions.jsonl")
    return ["evaluate.py", "table", *models, "--questions", questions, "--device", "cpu"]


def test_the_lam_sweep_never_sees_a_test_question(speedrun, tmp_path, monkeypatch):
    asked, real = [], evaluate.answers

    def spy(model, vocab, contents, prompt):
        asked.append([c for c in contents if isinstance(c, str)])
        return real(model, vocab, contents, prompt)

    monkeypatch.setattr(evaluate, "answers", spy)
    monkeypatch.setattr(evaluate, "generate", six_tokens)
    call([*table_of(speedrun), "--out", str(tmp_path / "t.json")], monkeypatch)
    entries = [
        json.loads(line) for line in (speedrun / "toy/questions.jsonl").read_text().splitlines()
    ]
    dev = {q["question"] for q in entries if q["split"] == "dev"}
    sweep = asked[-2 * len(LAMS) :]
    assert all(set(texts) <= dev for texts in sweep)
    assert sum(bool(texts) for texts in sweep) == len(LAMS)
    first = json.loads((speedrun / "table.json").read_text())
    second = json.loads((tmp_path / "t.json").read_text())
    assert first["prompts"].keys() == {"base", "instruct", "speech", "merged", "instruct_rows"}
    assert set(first["dtype"]) <= {"float32", "bfloat16"}
    assert first["rows"] == second["rows"]
    assert first["lam_sweep"] == second["lam_sweep"], "the same models give the same table"


def test_a_report_joins_seeds_and_refuses_what_is_no_table(speedrun, tmp_path, monkeypatch, capsys):
    tables = [str(speedrun / "table.json")] * 2
    call(["evaluate.py", "report", *tables, "--out", str(tmp_path / "toy.json")], monkeypatch)
    made = json.loads((tmp_path / "toy.json").read_text())
    assert len(made["seeds"]) == 2
    assert {"seed", "rows", "lam_sweep", "rel", "seconds"} <= made["seeds"][0].keys()
    recipe = json.loads((speedrun / "table.json").read_text())["made"]
    assert made["seeds"][0]["machine"] == recipe["machine"], "of the table, not of the joining"
    assert " threads" in recipe["machine"]
    assert "| merged |" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        call(["evaluate.py", "report", *tables, "--out", str(tmp_path / "toy.json")], monkeypatch)
    for row, cell in (("instruct", "typed"), ("merged", "spoken_near")):
        table = json.loads((speedrun / "table.json").read_text())
        table["rows"][row][cell] = None
        (tmp_path / "less.json").write_text(json.dumps(table))
        with pytest.raises(ValueError, match="less.json: a part of it is missing"):
            call(
                [
                    "evaluate.py", "report", str(tmp_path / "less.json"),
                    "--out", str(tmp_path / "x.json"),
                ],
                monkeypatch,
            )
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ValueError, match="has no 'seed'"):
        call(
            [
                "evaluate.py", "report", str(tmp_path / "toy.json"),
                "--out", str(tmp_path / "x.json"),
            ],
            monkeypatch,
        )


def test_the_readmes_table_is_the_one_in_results():
    made = json.loads((ROOT / "results/toy.json").read_text())
    assert evaluate.markdown(made["seeds"]) in (ROOT / "README.md").read_text()


# --- any benchmark ---


def questions_for(speedrun, tmp_path):
    spoken = str(speedrun / "question.wav")
    entries = [
        {"audio": spoken, "answer": "the capital of france is paris."},
        {"text": "spell france", "answer": "f r a n c e"},
        {"audio": spoken, "instruction": "in a note", "answer": "x", "metric": "wer"},
        {"text": "which is a color", "choices": ["fox", "red", "rice"], "answer": "red"},
        {"audio": spoken, "instruction": "which city", "choices": ["paris", "rome"], "answer": "A"},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    return tmp_path / "questions.jsonl"


def test_a_benchmark_is_scored_by_its_metrics_and_goes_on_after_a_stop(
    speedrun, tmp_path, monkeypatch
):
    words = [
        "benchmark.py", "questions",
        str(speedrun / "merged"), str(questions_for(speedrun, tmp_path)),
        "--device", "cpu",
    ]
    call([*words, "--out", str(tmp_path / "straight.json")], monkeypatch)
    straight = json.loads((tmp_path / "straight.json").read_text())
    assert [straight[metric]["n"] for metric in ("exact", "wer", "choice")] == [2, 1, 2]
    assert len(straight["replies"]) == 5
    assert set(straight["replies"][3:]) <= set("ABC")
    assert (
        straight["choice"]["value"]
        == ((straight["replies"][3] == "B") + (straight["replies"][4] == "A")) / 2
    )
    monkeypatch.setattr(benchmark, "BATCH", 2)
    real, calls = benchmark.replies, []

    def dying(*rest, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*rest, **named)

    monkeypatch.setattr(benchmark, "replies", dying)
    with pytest.raises(KeyboardInterrupt):
        call([*words, "--out", str(tmp_path / "again.json")], monkeypatch)
    call([*words, "--out", str(tmp_path / "again.json")], monkeypatch)
    assert json.loads((tmp_path / "again.json").read_text())["replies"] == straight["replies"]
    assert len(calls) == 3
    assert not (tmp_path / "again.json.pieces").exists()


def test_a_reply_may_have_as_many_tokens_as_are_allowed_and_how_many_were_cut_is_told(
    speedrun, tmp_path, monkeypatch, capsys
):
    words = [
        "benchmark.py", "questions",
        str(speedrun / "merged"), str(questions_for(speedrun, tmp_path)),
        "--device", "cpu", "--out", str(tmp_path / "o.json"),
    ]

    def endless(model, prompts, limit, stop, allowed):
        return iter([torch.full((len(prompts),), allowed[70])] * limit)

    monkeypatch.setattr(evaluate, "generate", endless)
    for flags, limit in ((), evaluate.LIMIT), (("--limit", "7", "--overwrite"), 7):
        call([*words, *flags], monkeypatch)
        made = json.loads((tmp_path / "o.json").read_text())
        assert made["replies"][:2] == [None, None]
        assert len(benchmark.spoken_words(made["replies"][2])) == 1
        assert len(evaluate.Vocab(speedrun / "merged").encode(made["replies"][2])) == limit
        assert f"3 of 5 replies had not ended after {limit} tokens" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["limit", "hubert"])
def test_scores_go_on_only_with_what_they_were_begun_with(change, speedrun, tmp_path, monkeypatch):
    shutil.copytree(speedrun / "hubert", tmp_path / "hubert")
    words = [
        "benchmark.py", "questions",
        str(speedrun / "merged"), str(questions_for(speedrun, tmp_path)),
        "--hubert", str(tmp_path / "hubert"), "--device", "cpu",
        "--out", str(tmp_path / "o.json"),
    ]
    real, calls = benchmark.replies, []

    def dying(*given, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "BATCH", 1)
        patch.setattr(benchmark, "replies", dying)
        with pytest.raises(KeyboardInterrupt):
            call(words, monkeypatch)
    assert (tmp_path / "o.json.pieces").exists()
    if change == "hubert":
        (tmp_path / "hubert/note.txt").write_text("another one")
        monkeypatch.setattr(
            benchmark, "opened", lambda args: evaluate.listen.load(args.folder, "cpu")
        )
    with pytest.raises(ValueError, match="of a run with another"):
        call([*words, *(["--limit", "9"] if change == "limit" else [])], monkeypatch)


def test_a_choice_is_the_letter_that_is_likeliest_behind_the_prompt(
    speedrun, tmp_path, monkeypatch, capsys
):
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps({"text": "which", "choices": ["fox", "red", "rice"], "answer": answer})
            + "\n"
            for answer in ("red", "fox")
        )
    )
    likely = torch.zeros(4, 1000)
    likely[-1, evaluate.Vocab(speedrun / "merged").encode("B")[0]] = 1
    # Behind another id than the last.
    likely[0, evaluate.Vocab(speedrun / "merged").encode("A")[0]] = 9
    monkeypatch.setattr(
        benchmark, "log_probabilities", lambda model, prompts: [likely for _ in prompts]
    )
    call(
        [
            "benchmark.py", "questions",
            str(speedrun / "merged"), str(tmp_path / "questions.jsonl"),
            "--device", "cpu", "--out", str(tmp_path / "o.json"),
        ],
        monkeypatch,
    )
    made = json.loads((tmp_path / "o.json").read_text())
    assert made["replies"] == ["B", "B"] and made["choice"]["value"] == 0.5
    shown = capsys.readouterr().out
    assert shown.endswith("}\nfor example: which\n    B\n"), "the first question of each group"


@pytest.mark.parametrize(
    "entry, said",
    [
        ({"text": "hi"}, "no answer"),
        ({"answer": "x"}, "nothing to ask"),
        (
            {"text": "hi", "answer": "x", "metric": "bleu"},
            "wanted one of exact, ends, contains, wer, choice",
        ),
        ({"text": "hi", "answer": "z", "choices": ["a", "b"]}, "none of its choices"),
        ({"text": "hi", "answer": "x", "instruction": 5}, "got instruction = 5, wanted a string"),
        ({"text": "hi", "answer": "1", "choices": [1, 2]}, "none of its choices"),
        ({"text": "hi", "answer": ".", "metric": "wer"}, "an answer without a word"),
    ],
)
def test_a_question_that_cannot_be_scored_is_named(entry, said, speedrun, tmp_path, monkeypatch):
    (tmp_path / "questions.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(ValueError, match=f"question 1: .*{said}"):
        call(
            [
                "benchmark.py", "questions",
                str(speedrun / "merged"), str(tmp_path / "questions.jsonl"),
                "--out", str(tmp_path / "o.json"),
            ],
            monkeypatch,
        )


def test_pairs_of_known_order_are_all_right_shuffled_ones_half_and_ties_half(
    speedrun, tmp_path, monkeypatch
):
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
            "--unit-loss", "1", "--imitate", "0", "--keep-text", "0", "--mix", "interleave=1",
            "--text", str(speedrun / "toy/base.jsonl"), "--steps", "40", "--batch", "4",
            "--rows-first", "0", "--device", "cpu", "--out", str(tmp_path / "model"),
        ],
        monkeypatch,
    )
    for side in ("good", "bad"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i, entry in enumerate(audio.Units(speedrun / "units").entries[:6]):
        samples = audio.load(entry["audio"])
        soundfile.write(tmp_path / f"pairs/good/{i}.wav", samples, 16000)
        soundfile.write(
            tmp_path / f"pairs/bad/{i}.wav", 0.3 * noise.standard_normal(len(samples)), 16000
        )

    def run(entries, out, model="model"):
        call(
            [
                "benchmark.py", "pairs", str(tmp_path / model), str(entries), "--device", "cpu",
                "--out", str(tmp_path / out),
            ],
            monkeypatch,
        )
        return json.loads((tmp_path / out).read_text())["pairs"]["value"]

    (tmp_path / "linked").mkdir()
    for side in ("good", "bad"):
        (tmp_path / "linked" / side).mkdir()
        (tmp_path / "linked" / side / "part").symlink_to(tmp_path / "pairs" / side)
    assert run(tmp_path / "linked", "known.json") == 1.0
    assert len(json.loads((tmp_path / "known.json").read_text())["replies"]) == 6
    shuffled = [
        {"good": f"pairs/{a}/{i}.wav", "bad": f"pairs/{b}/{i}.wav"}
        for i in range(6)
        for a, b in [("good", "bad") if i % 2 else ("bad", "good")]
    ]
    (tmp_path / "shuffled.jsonl").write_text("".join(json.dumps(e) + "\n" for e in shuffled))
    assert run(tmp_path / "shuffled.jsonl", "shuffled.json") == 0.5
    (tmp_path / "ties.jsonl").write_text(
        json.dumps({"good": "pairs/good/0.wav", "bad": "pairs/good/0.wav"}) + "\n"
    )
    assert run(tmp_path / "ties.jsonl", "ties.json") == 0.5
    with pytest.raises(ValueError, match="good/ and bad/"):
        run(tmp_path, "none.json")


def test_the_experiment_on_lam_says_where_hearing_comes_in(tmp_path, speedrun, monkeypatch, capsys):
    table = json.loads((speedrun / "table.json").read_text())
    table["lam_sweep"] = [
        {"lam": lam, "typed": typed, "spoken_near": spoken, "wer_near": 0.5}
        for lam, typed, spoken in (
            (0, 0.9, 0.0),
            (0.5, 0.9, 0.1),
            (0.7, 0.88, 0.3),
            (1, 0.8, 0.5),
            (1.3, 0.6, 0.4),
        )
    ]
    (tmp_path / "table.json").write_text(json.dumps(table))
    call(["evaluate.py", "lam", str(tmp_path / "table.json")], monkeypatch)
    assert (
        "Half of the best spoken score (0.50, at lam 1) is there at lam 0.7; typed turns "
        "go from 0.90 without hearing to 0.80"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("sweep", [[], [{"lam": 1}], [None]])
def test_a_table_with_a_damaged_sweep_gets_its_line(sweep, tmp_path, speedrun, monkeypatch):
    (tmp_path / "table.json").write_text(
        json.dumps(json.loads((speedrun / "table.json").read_text()) | {"lam_sweep": sweep})
    )
    with pytest.raises(ValueError, match="a part of it is missing or damaged"):
        call(["evaluate.py", "lam", str(tmp_path / "table.json")], monkeypatch)


def test_one_model_is_not_compared_with_itself(speedrun, tmp_path, monkeypatch):
    merged = str(speedrun / "merged")
    with pytest.raises(ValueError, match="wanted two models or more"):
        call(
            [
                "evaluate.py", "compare", merged, merged,
                "--questions", str(speedrun / "toy/questions.jsonl"),
                "--out", str(tmp_path / "x.json"),
            ],
            monkeypatch,
        )


def test_comparing_models_asks_them_what_the_table_asks(speedrun, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "generate", six_tokens)  # as the table was made
    merged, out = str(speedrun / "merged"), str(tmp_path / "start.json")
    call(
        [
            "evaluate.py", "compare", merged, str(speedrun / "speech"),
            "--questions", str(speedrun / "toy/questions.jsonl"), "--device", "cpu",
            "--out", out,
        ],
        monkeypatch,
    )
    rows = json.loads((tmp_path / "start.json").read_text())["rows"]
    table = json.loads((speedrun / "table.json").read_text())["rows"]
    for column in (
        "typed", "typed_unseen", "typed_noisy", "spoken_near", "spoken_near_unseen", "wer_near",
        "text_loss",
    ):
        assert rows[merged][column] == table["merged"][column]
        assert rows[str(speedrun / "speech")][column] == table["speech"][column]
    made = json.loads((tmp_path / "start.json").read_text())
    assert evaluate.finding(rows, made["ahead"]) in capsys.readouterr().out


def test_a_clip_of_a_pair_stands_where_a_document_begins(speedrun, tmp_path, monkeypatch):
    """Llama 3 begins every document with a token of its own."""
    model, vocab, ears = evaluate.listen.load(speedrun / "speech")
    vocab.begin = [3]
    read = []

    def likely(model, prompts):
        """Behind id number n, all units are as likely but unit n, which has half of the whole."""
        read.extend(prompts)
        first, k = vocab.speech["first_unit"], vocab.speech["k"]
        likely = torch.zeros(len(prompts[0]), vocab.size)
        for n in range(len(likely)):
            likely[n, first + n % k] = math.log(k - 1)
        return [likely] * len(prompts)

    monkeypatch.setattr(benchmark, "opened", lambda args: (model, vocab, ears))
    monkeypatch.setattr(benchmark, "log_probabilities", likely)
    clip = str(speedrun / "question.wav")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"good": clip, "bad": clip}) + "\n")
    call(
        [
            "benchmark.py", "pairs", str(speedrun / "speech"), str(tmp_path / "pairs.jsonl"),
            "--device", "cpu", "--out", str(tmp_path / "x.json"),
        ],
        monkeypatch,
    )
    assert [prompt[:2] for prompt in read] == [[3, vocab.speech["speech"]]] * 2
    k, units = vocab.speech["k"], [i - vocab.speech["first_unit"] for i in read[0][2:]]
    shares = [0.5 if unit == n % k else 0.5 / (k - 1) for n, unit in enumerate(units, 1)]
    [[good, bad]] = json.loads((tmp_path / "x.json").read_text())["replies"]
    assert good == bad == pytest.approx(np.log(shares).mean())


def test_who_cannot_hear_is_told_before_any_model_is_asked(speedrun, tmp_path, monkeypatch):
    questions = [{"question": "q", "answer": "a", "split": "test"}]
    monkeypatch.setattr(evaluate, "read_questions", lambda path: (questions, questions))
    ears = {
        name: argparse.Namespace(lacks_words=lacks)
        for name, lacks in (("one", False), ("two", True))
    }
    vocab = Vocab(speedrun / "merged")
    monkeypatch.setattr(evaluate.listen, "load", lambda folder, *_: (folder, vocab, ears[folder]))
    monkeypatch.setattr(evaluate, "hear", lambda *_: pytest.fail("one has heard already"))
    with pytest.raises(ValueError, match="no one writes them down"):
        call(
            [
                "evaluate.py", "compare", "one", "two", "--questions", "q", "--device", "cpu",
                "--out", str(tmp_path / "c.json"),
            ],
            monkeypatch,
        )


def test_a_value_with_a_hyphen_can_be_named_and_a_speaker_without_a_name_is_one(tmp_path):
    clips = [
        {"style": {"accent": accent}, "speaker": speaker}
        for accent, speaker in (("non-native", None), ("native", "anna"))
    ]
    row = evaluate.named(["a non-native speaker", "a native speaker"], clips)
    assert row["accent"]["value"] == 1.0
    mixed = evaluate.named(["a native speaker"] * 2, clips)
    assert mixed["accent"]["value"] == 0.5, "None beside a name"
    row = evaluate.named(["a native speaker", "a non-native speaker"], clips)
    assert row["accent"]["value"] == 0.0


def test_pairs_want_a_model_that_hears(speedrun, tmp_path, monkeypatch):
    shutil.copytree(speedrun / "speech", tmp_path / "deaf")
    (tmp_path / "deaf/speech.json").unlink()
    (tmp_path / "p.jsonl").write_text(json.dumps({"good": "a.wav", "bad": "b.wav"}) + "\n")
    with pytest.raises(ValueError, match="does not hear units"):
        call(
            [
                "benchmark.py", "pairs", str(tmp_path / "deaf"), str(tmp_path / "p.jsonl"),
                "--device", "cpu", "--out", str(tmp_path / "o.json"),
            ],
            monkeypatch,
        )


def test_the_tables_sums_stand_as_near_to_signs_as_the_merged_one(speedrun, tmp_path, monkeypatch):
    merged = tmp_path / "merged"
    shutil.copytree(speedrun / "merged", merged)
    made = json.loads((merged / "merge.json").read_text())
    for wrong in ("x", -1, [0.5], math.nan):
        (merged / "merge.json").write_text(json.dumps(made | {"signs": wrong}))
        with pytest.raises(ValueError, match="got signs = .*, wanted a number from 0 on"):
            signs_of(merged)
    (merged / "merge.json").write_text(json.dumps(made | {"signs": 0.5}))

    def stop(base, instruct, speech, signs):
        raise ValueError(f"signs: {signs}")

    monkeypatch.setattr(evaluate, "Merge", stop)
    folders = ("base", "instruct", "speech")
    with pytest.raises(ValueError, match="signs: 0.5"):
        call(
            [
                "evaluate.py", "table", *(f"--{name}={speedrun / name}" for name in folders),
                "--merged", str(merged), "--questions", str(speedrun / "toy/questions.jsonl"),
                "--device", "cpu", "--out", str(tmp_path / "t.json"),
            ],
            monkeypatch,
        )


def test_a_table_of_a_sum_and_other_parents_is_refused(speedrun, tmp_path, monkeypatch):
    shutil.copytree(speedrun / "speech", tmp_path / "other")
    (tmp_path / "other/log.jsonl").write_text("{}")
    folders = {name: speedrun / name for name in ("base", "instruct", "merged")}
    with pytest.raises(ValueError, match="does not name .*other; give the three"):
        call(
            [
                "evaluate.py", "table", *(f"--{name}={path}" for name, path in folders.items()),
                f"--speech={tmp_path / 'other'}", "--device", "cpu",
                "--questions", str(speedrun / "toy/questions.jsonl"),
                "--out", str(tmp_path / "t.json"),
            ],
            monkeypatch,
        )


def test_the_teachers_page_shows_the_experiments_of_the_results():
    page = (ROOT / "TEACHING.md").read_text()
    start = json.loads((ROOT / "results/start.json").read_text())
    assert (
        evaluate.swept(json.loads((ROOT / "results/toy.json").read_text())["seeds"][0]["lam_sweep"])
        in page
    )
    assert evaluate.grid(start["rows"]) in page
    for run in json.loads((ROOT / "results/ablations.json").read_text())[:2]:
        assert evaluate.grid(run["rows"]) in page


def test_the_sentences_about_experiments_say_what_the_results_hold():
    readme, page = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "TEACHING.md")
    )
    start = json.loads((ROOT / "results/start.json").read_text())["rows"]
    cells = (
        ("merged_plain", "spoken_near"), ("merged_plain", "typed"), ("merged", "spoken_near"),
        ("merged", "typed"), ("from_instruct", "spoken_near"),
    )
    values = [f"{start[row][column]['value']:.2f}" for row, column in cells]
    assert (
        "Its sum answers {} of spoken questions and {} of typed ones, at lam 1.15; with teacher "
        "and filter {} and {}. But the *instruct* model, trained to hear with the same teacher "
        "and filter, answers {}."
    ).format(*values) in readme

    one, two, *more_seeds = json.loads((ROOT / "results/ablations.json").read_text())
    ahead = one["ahead"] | two["ahead"]
    left_out = {name.split("/")[1] for name in ahead if "plain" not in name}
    more = {name for name in left_out if ahead[f"ablate/{name}/merged"]["low"] > 0}
    names = "no_teacher", "no_filter", "rows_at_once", "chat_all_blocks", "chat_all_rows", "no_gaps"
    assert more == set(names) and left_out == more | {"all_rows"}
    values = [f"{ahead[f'ablate/{name}/merged']['value']:.2f}" for name in names]
    assert (
        "six differ by more than chance (`results/ablations.json` has the intervals): a teacher "
        "({}), a filter ({}), rows that learn first ({}), chats in the upper half ({}), chats "
        "that move no word's row ({}), and gaps ({})."
    ).format(*values) in page

    # On three seeds: whether speech may move the rows of words.
    same = [one, *more_seeds]
    assert [run["seed"] for run in same] == [0, 1, 2]
    fewer = [run["ahead"]["ablate/all_rows/merged"]["value"] for run in same]
    assert max(fewer) < 0.08, "the page says that it makes no difference"
    losses = [
        [f"{run['rows'][name]['text_loss']['value']:.2f}" for run in same]
        for name in ("ablate/all_rows/merged", "merged")
    ]
    assert (
        "answers {:.2f}, {:.2f} and {:.2f} fewer questions on three seeds; but plain sentences "
        "cost its sum "
        "{}, {} and {} nats a token, not {}, {} and {}"
    ).format(*fewer, *losses[0], *losses[1]) in page
    spoken = lambda name: two["rows"][name]["spoken_near"]["value"]
    assert spoken("ablate/plain/merged") == spoken("ablate/plain_teacher/merged") == 0
    whole = spoken("ablate/plain_teacher_upper/merged"), spoken("merged")
    assert "no word's row, {:.2f}; the rest, {:.2f}.".format(*whole) in page


def test_a_finding_claims_no_more_than_the_questions_compared_one_by_one_allow():
    row = lambda right, n: {
        "spoken_near": share([True] * right + [False] * (n - right)),
        "typed": share([True] * n),
    }
    ahead = {
        "b": {"value": 0.3, "n": 100, "low": 0.2, "high": 0.4, "differ": 30},
        "c": {"value": 0.05, "n": 100, "low": 0.0, "high": 0.1, "differ": 12},
        "d": {"value": 1.0, "n": 3, "low": 1.0, "high": 1.0, "differ": 3},
    }
    said = evaluate.finding(
        {"a": row(80, 100), "b": row(50, 100), "c": row(75, 100), "d": row(0, 3)}, ahead
    )
    assert said == (
        "Asked aloud, a answers 0.80 of 100 questions, b 0.50 (more than chance apart), "
        "c 0.75 (may be chance: the 95 % interval of their difference holds 0), d 0.00 "
        "(may be chance: they differ on 3 facts); typed, 1.00, 1.00, 1.00, 1.00."
    )


def test_two_models_are_compared_question_by_question_and_fact_by_fact(
    speedrun, tmp_path, monkeypatch
):
    """Of 40 facts with two questions each, one model answers 30 and the other 22 of the same:
    0.2 more, and no draw of facts says less than 0.
    """
    questions = [
        {"question": f"q {n} {style}", "fact": n, "answer": "yes", "split": "test"}
        for n in range(40)
        for style in "ab"
    ]
    said = {
        "one": ["yes" if q["fact"] < 30 else "no" for q in questions],
        "two": ["yes" if q["fact"] < 22 else "no" for q in questions],
    }
    cell = evaluate.share([True, False])
    monkeypatch.setattr(evaluate, "read_questions", lambda path: (questions, [questions[0]]))
    ears = argparse.Namespace(lacks_words=False)
    vocab = Vocab(speedrun / "merged")
    monkeypatch.setattr(evaluate.listen, "load", lambda folder, *_: (folder, vocab, ears))
    monkeypatch.setattr(evaluate, "hear", lambda *_: [])
    monkeypatch.setattr(evaluate, "better_prompt", lambda *_: "chat")
    monkeypatch.setattr(
        evaluate, "score",
        lambda model, *_: (
            dict.fromkeys(evaluate.COLUMNS) | {"spoken_near": cell, "typed": cell},
            said[model],
        ),
    )
    monkeypatch.setattr(evaluate.runs, "recipe", lambda *_: {})
    call(
        [
            "evaluate.py", "compare", "one", "two", "--questions", "q", "--device", "cpu",
            "--out", str(tmp_path / "c.json"),
        ],
        monkeypatch,
    )
    ahead = json.loads((tmp_path / "c.json").read_text())["ahead"]["two"]
    assert ahead["value"] == 0.2
    assert ahead["n"] == 80
    assert ahead["differ"] == 8
    # As wide as that of 40 questions; that of 80 is 0.11 to 0.29.
    assert 0.05 <= ahead["low"] <= 0.1
    assert 0.3 <= ahead["high"] <= 0.35


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_comparison_asks_a_split_in_the_prompt_that_each_model_does_better_with_on_dev(
    split, speedrun, tmp_path, monkeypatch
):
    splits = {
        name: [{"question": f"{name} {n}", "fact": n, "answer": "yes"} for n in range(2)]
        for name in ("test", "dev")
    }
    ears, asked = argparse.Namespace(lacks_words=False), []

    def better_prompt(model, vocab, questions):
        assert questions == splits["dev"]
        return f"prompt of {model}"

    def score(model, vocab, questions, spoken, prompt):
        asked.append((model, questions, spoken["near"], prompt))
        cell = evaluate.share([True, False])
        row = dict.fromkeys(evaluate.COLUMNS) | {"spoken_near": cell, "typed": cell}
        return row, ["yes", "no"]

    for name, stub in (("better_prompt", better_prompt), ("score", score)):
        monkeypatch.setattr(evaluate, name, stub)
    monkeypatch.setattr(evaluate, "read_questions", lambda path: tuple(splits.values()))
    vocab = Vocab(speedrun / "merged")
    monkeypatch.setattr(evaluate.listen, "load", lambda folder, *_: (folder, vocab, ears))
    monkeypatch.setattr(evaluate, "hear", lambda _, folder, questions, group: (group, questions))
    monkeypatch.setattr(evaluate.runs, "recipe", lambda *_: {})
    call(
        [
            "evaluate.py", "compare", "one", "two", "--questions", "q", "--device", "cpu",
            "--split", split, "--out", str(tmp_path / "c.json"),
        ],
        monkeypatch,
    )
    chosen = splits[split]
    assert asked == [
        (model, chosen, ("near", chosen), f"prompt of {model}") for model in ("one", "two")
    ]


def test_the_experiments_of_the_teachers_page_want_a_finished_run(
    speedrun, quick, tmp_path
):
    def run(*words):
        words = ["bash", str(ROOT / "experiments.sh"), *words]
        return subprocess.run(words, capture_output=True, text=True, env=first_on_path(quick))

    swept = run("lam", str(speedrun))
    nowhere = run("start", str(tmp_path))
    asked = run()
    assert swept.returncode == 0 and "(dev questions)" in swept.stdout, swept.stderr
    assert nowhere.returncode == 1
    assert "no finished run" in nowhere.stderr
    assert len(nowhere.stderr.splitlines()) == 1
    assert asked.returncode == 2 and "bash experiments.sh start" in asked.stdout


def test_hearing_is_learnt_from_the_base_and_from_instruct_with_and_without_a_teacher(
    asked, speedrun, monkeypatch
):
    _, lines = asked("start", speedrun)
    settings = {}
    for _, *words in (words for words in lines if words[0].endswith("pretrain.py")):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        settings[words[-1]] = pretrain.settled(pretrain.arguments(), 1)
    assert {
        name: (args.init, args.imitate, args.keep_text > 0) for name, args in settings.items()
    } == {
        "from_instruct": ("instruct", 7, True),
        "speech_plain": ("base", 0, False),
        "from_instruct_plain": ("instruct", 0, False),
    }, "speech is there already"
    [wanted] = [words for words in speedrun_commands("out") if words[-1] == "out/speech"]
    monkeypatch.setattr(sys, "argv", wanted)
    recipe = pretrain.settled(pretrain.arguments(), 1)
    assert {
        name
        for name, value in vars(settings["from_instruct"]).items()
        if value != getattr(recipe, name)
    } <= {"init", "out", "units", "text"}
    [summed] = [words for words in lines if words[0].endswith("merge.py")]
    assert " ".join(summed[1:]).endswith(
        "--base base --instruct instruct --speech speech_plain --out merged_plain"
    )
    assert (
        lines[-1][1:]
        == (
            "compare merged from_instruct merged_plain from_instruct_plain --questions "
            "toy/questions.jsonl --out start.json --overwrite"
        ).split()
    )


def test_the_ablation_reads_what_it_has_made_with_flags_that_exist(asked, speedrun, monkeypatch):
    _, lines = asked("ablate", speedrun)
    made = {
        "base", "instruct", "speech", "merged", "units", "toy/base.jsonl", "toy/chat.jsonl",
        "toy/tokenizer",
    }
    settings = {}
    for script, *words in lines[:-1]:
        read = {
            words[n + 1]
            for n, word in enumerate(words)
            if word
            in (
                "--init", "--base", "--instruct", "--speech", "--units", "--text", "--chat",
                "--tokenizer",
            )
        }
        assert read <= made, (words, read - made)
        made.add(words[-1])
        if script.endswith("pretrain.py"):
            monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
            settings[words[-1]] = pretrain.settled(pretrain.arguments(), 1)
    sums = [word for word in lines[-1] if word.endswith("merged")]
    assert len(sums) == 11 and set(sums) <= made and "--split dev" in " ".join(lines[-1])
    assert settings["ablate/no_teacher/speech"].imitate == 0
    assert settings["ablate/no_gaps/speech"].imitate == 7
    assert settings["ablate/no_gaps/base"].pace == 1
    assert settings["ablate/chat_all_rows/instruct"].embeddings == "all"
    assert settings["ablate/plain_teacher/speech"].keep_text == 0
    assert all(
        vars(settings["ablate/plain/speech"])[name] == value or name == "layers"
        for name, value in pretrain.PLAIN.items()
    )


@pytest.mark.parametrize(
    "answer, said, right",
    [("A", "A", False), ("A", "B", True), ("B", "A", True), ("A", "C", False)],
)
def test_choices_that_are_letters_are_told_from_the_letters_that_name_them(answer, said, right):
    assert (
        benchmark.meaning(said, {"choices": ["B", "A", "x"], "answer": answer}) == answer
    ) is right
    assert benchmark.meaning("b", {"choices": ["fox", "red"], "answer": "B"}) == "B"
    assert benchmark.meaning("b", {"choices": ["fox", "red"], "answer": "red"}) == "red"


def test_a_reply_contains_an_answer_as_whole_words():
    entries = [
        {"metric": "contains", "answer": answer} for answer in ("Paris", "a red fox", "man", "c++")
    ]
    said = ["It is paris.", "that was A RED FOX!", "a woman", "c++ is one"]
    scores = benchmark.scores_by_metric(entries, said)
    assert list(scores) == ["contains"] and scores["contains"]["value"] == 0.75


def test_an_answer_of_nothing_is_refused(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"text": "say nothing", "answer": " "}\n')
    with pytest.raises(ValueError, match="question 1: no answer"):
        benchmark.read_questions(tmp_path / "questions.jsonl")


def test_a_benchmark_without_rows_is_refused(tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="questions.jsonl: empty"):
        benchmark.read_questions(tmp_path / "questions.jsonl")


def test_a_result_that_its_picture_would_replace_is_refused_before_any_work(monkeypatch):
    with pytest.raises(ValueError, match="wanted a name that ends in .json"):
        call(["evaluate.py", "report", "gone.json", "--out", "x.png"], monkeypatch)


# --- a table of known answers ---


class Stub:
    """Stands for a model: it is known by its name, and by the lam it was merged at."""

    def __init__(self, name, lam=None):
        self.name, self.lam = name, lam


def knows(*key):
    """Whether a stub answers a question: a third of the time, always the same for the same
    model, lam, prompt, kind and question.
    """
    return hashlib.sha256(repr(key).encode()).digest()[0] % 3 == 0


def number(*key):
    return hashlib.sha256(repr(key).encode()).digest()[0] / 256


@pytest.fixture
def stubbed(speedrun, tmp_path, monkeypatch):
    """(questions by split, the table that stubs get)."""
    entries = [
        json.loads(line) for line in (speedrun / "toy/questions.jsonl").read_text().splitlines()
    ]
    of = {q["question"]: q for q in entries}
    noisy = {q["noisy"]: q for q in entries if q["noisy"] not in of}

    def kind_of(content):
        """(kind of turn, question) of what a stub is asked."""
        if isinstance(content, tuple):
            return content
        if "|" in content:
            return tuple(content.split("|"))
        return ("typed", content) if content in of else ("noisy", noisy[content]["question"])

    def answers(model, vocab, contents, prompt):
        return [
            of[q]["answer"] if knows(model.name, model.lam, prompt, kind, q) else "wrong"
            for kind, q in map(kind_of, contents)
        ]

    class Loaded:
        def __init__(self, folder):
            self.folder = Path(folder)

        def eval(self):
            return Stub(self.folder.name)

    class Loads:
        load = lambda folder, *rest: Loaded(folder)

    monkeypatch.setattr(evaluate, "LM", Loads)
    monkeypatch.setattr(evaluate, "model_at", lambda plan, config, lam, device: Stub("sum", lam))
    monkeypatch.setattr(
        evaluate, "with_new_rows",
        lambda model, speech: Stub(f"{model.name} with rows of {speech.name}"),
    )
    monkeypatch.setattr(
        evaluate, "hear",
        lambda ears, folder, questions, group: [(group, q["question"]) for q in questions],
    )
    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setattr(
        evaluate, "transcripts",
        lambda model, vocab, contents: [
            f"{group}|{q}" if model.name == "speech" else f"{model.name} {model.lam} {group}"
            for group, q in contents
        ],
    )
    monkeypatch.setattr(
        evaluate, "text_loss",
        lambda model, vocab, questions: {"value": number(model.name, model.lam, len(questions))},
    )
    call([*table_of(speedrun), "--out", str(tmp_path / "t.json")], monkeypatch)
    split = {name: [q for q in entries if q["split"] == name] for name in ("test", "dev")}
    return split, json.loads((tmp_path / "t.json").read_text())


def test_every_cell_is_the_answers_of_its_own_model_voice_lam_and_prompt(stubbed):
    split, table = stubbed
    test, dev = split["test"], split["dev"]
    names = {
        "base": ("base with rows of speech", None),
        "instruct": ("instruct", None),
        "instruct_rows": ("sum", 0.0),
        "speech": ("speech", None),
        "merged": ("merged", None),
    }

    def share_of(questions, *key):
        return round(sum(knows(*key, q["question"]) for q in questions) / len(questions), 4)

    prompts = {}
    for row, (name, lam) in names.items():
        by = {prompt: share_of(dev, name, lam, prompt, "typed") for prompt in ("chat", "page")}
        prompts[row] = "page" if by["page"] > by["chat"] else "chat"
    assert table["prompts"] == prompts
    unseen = [q for q in test if not q["seen"]]
    for row, (name, lam) in names.items():
        cells, prompt = table["rows"][row], prompts[row]
        assert cells["typed"]["value"] == share_of(test, name, lam, prompt, "typed")
        assert cells["typed_unseen"]["value"] == share_of(unseen, name, lam, prompt, "typed"), row
        assert cells["text_loss"]["value"] == number(name, lam, len(test))
        for group in ("heard", "near", "far") if row != "instruct" else ():
            assert cells[f"spoken_{group}"]["value"] == share_of(test, name, lam, prompt, group), (
                row,
                group,
            )
        if row != "instruct":
            assert cells["spoken_near_unseen"]["value"] == share_of(
                unseen, name, lam, prompt, "near"
            )
            said = [
                f"near|{q['question']}" if name == "speech" else f"{name} {lam} near" for q in test
            ]
            assert cells["wer_near"] == word_errors(said, test), row
    for group in ("heard", "near", "far"):
        assert table["rows"]["cascade"][f"spoken_{group}"]["value"] == share_of(
            test, "instruct", None, prompts["instruct"], group
        )
    assert table["rows"]["cascade"]["spoken_near_unseen"]["value"] == share_of(
        unseen, "instruct", None, prompts["instruct"], "near"
    )
    assert table["rows"]["cascade"]["wer_near"] == word_errors(
        [f"near|{q['question']}" for q in test], test
    )
    for row in table["lam_sweep"]:
        for column, kind in (("typed", "typed"), ("spoken_near", "near")):
            assert row[column] == share_of(dev, "sum", row["lam"], prompts["merged"], kind), row
        assert row["wer_near"] == word_errors([f"sum {row['lam']} near"] * len(dev), dev)["value"]


def test_a_misspelt_question_is_scored_by_the_answer_of_the_right_one(monkeypatch):
    asked = []

    def answers(model, vocab, contents, prompt):
        asked.append(contents)
        return ["a" if content == "n1" else "x" for content in contents]

    monkeypatch.setattr(evaluate, "answers", answers)
    monkeypatch.setattr(evaluate, "text_loss", lambda *_: None)
    entries = [
        {"question": "q1", "noisy": "n1", "answer": "a", "seen": True},
        {"question": "q2", "noisy": "n2", "answer": "b", "seen": False},
    ]
    row, _ = evaluate.score(None, None, entries, {}, "chat")
    assert asked == [["q1", "q2"], ["n1", "n2"]]
    assert row["typed_noisy"]["value"] == 0.5
    assert row["typed"]["value"] == 0


def test_a_bootstrap_interval_is_as_wide_as_chance():
    # Half of 100: 0.5 +- 0.098.
    cell = ratio([0, 1] * 50, [1] * 100)
    assert 0.38 < cell["low"] < 0.43 and 0.57 < cell["high"] < 0.62


def test_replies_come_from_text_rows_alone_and_only_those_that_stopped(monkeypatch, speedrun):
    vocab, given = evaluate.Vocab(speedrun / "merged"), []
    letter = {c: vocab.encode(c)[0] for c in "ab"}

    def generate(model, prompts, limit, stop, allowed):
        given.append((len(prompts), limit, stop, allowed))
        ids = {3: [letter["a"], vocab.eos], 1: [letter["b"], letter["b"]]}
        return iter(torch.tensor([ids[len(p)] for p in prompts]).T)

    monkeypatch.setattr(evaluate, "generate", generate)
    assert evaluate.replies(None, vocab, [[1, 2, 3], [1]]) == ["a", None]
    assert given == [(2, evaluate.LIMIT, vocab.stop, vocab.text_rows())]


def test_a_page_ends_with_its_line_also_where_a_full_stop_and_two_ends_are_one_token(
    monkeypatch, tmp_path
):
    shutil.copytree(shared("tokenizers/qwen2.5"), tmp_path / "v")
    (tmp_path / "v/config.json").write_text(json.dumps({"vocab_size": 152064}))
    vocab = evaluate.Vocab(tmp_path / "v")
    ids = vocab.encode(" paris.\n\nquestion: where")
    assert vocab.decode(ids[1:2]) == ".\n\n"
    monkeypatch.setattr(
        evaluate, "generate", lambda *_: iter(torch.tensor([[i] for i in ids]))
    )
    assert evaluate.replies(None, vocab, [[1]], page=True) == [" paris."]
    assert evaluate.replies(None, vocab, [[1]]) == [None], "a chat's reply goes on"


def test_the_loss_of_a_text_is_taken_over_text_rows_alone(speedrun):
    model = evaluate.LM.load(speedrun / "speech").eval()
    vocab = evaluate.Vocab(speedrun / "speech")
    text = "the capital of france is paris."
    ids = torch.tensor(vocab.text(text)[0])
    with torch.no_grad():
        logits = model(ids[None, :-1])[0][:, vocab.text_rows()].log_softmax(-1)
    place = {row: n for n, row in enumerate(vocab.text_rows())}
    wanted = -sum(logits[n, place[int(i)]].item() for n, i in enumerate(ids[1:])) / (len(ids) - 1)
    assert math.isclose(
        evaluate.text_loss(model, vocab, [{"question": "?", "text": text}])["value"], wanted,
        abs_tol=2e-3,
    )


def test_four_questions_about_a_fact_say_no_more_than_one():
    one = [{"question": f"q{n}", "answer": "a", "fact": str(n)} for n in range(20)]
    four = [q | {"question": q["question"] + style} for q in one for style in "wxyz"]
    said = ["a" if n % 2 else "b" for n in range(20)]
    few, many = exact(said, one), exact([text for text in said for _ in range(4)], four)
    assert few["value"] == many["value"] == 0.5
    assert (few["low"], few["high"]) == (many["low"], many["high"])
    assert (few["n"], many["n"]) == (20, 80)
    alone = exact(
        [text for text in said for _ in range(4)],
        [{name: q[name] for name in ("question", "answer")} for q in four],
    )
    assert alone["high"] - alone["low"] < 0.6 * (many["high"] - many["low"])
    assert exact(["a"] * 80, four)["low"] == share([True] * 20)["low"]
    assert exact([], []) is None


def test_an_interval_of_few_groups_is_wide():
    one, two = (evaluate.share_of([True] * 100, groups) for groups in ([0] * 100, [0, 1] * 50))
    assert one["low"] < two["low"] < 0.4 and one["n"] == two["n"] == 100
    alike = evaluate.share_of([True, False] * 4, [0] * 4 + [1] * 4)
    assert alike["low"] < 0.2 and alike["value"] == 0.5 and alike["high"] > 0.8


def test_word_errors_and_losses_of_a_fact_are_drawn_together_too(speedrun):
    """Asked four times, a fact counts once: value and interval are those of one question each."""
    texts = ["the capital of france is paris.", "anna eats.", "x y z.", "it is a cat."]
    one = [{"question": text, "text": text, "fact": str(n)} for n, text in enumerate(texts)]
    four = [q for q in one for _ in range(4)]
    heard = ["the capital of france is rome", "anna eats", "", "a cat"]
    model = evaluate.LM.load(speedrun / "speech").eval()
    vocab = evaluate.Vocab(speedrun / "speech")
    for few, many in (
        (word_errors(heard, one), word_errors([h for h in heard for _ in range(4)], four)),
        (evaluate.text_loss(model, vocab, one), evaluate.text_loss(model, vocab, four)),
    ):
        assert few["n"] == 4 and many == few | {"n": 16}
        assert few["low"] < few["value"] < few["high"]


def test_rows_about_the_same_fact_say_no_more_than_one_in_a_benchmark_too():
    entries = [{"answer": "a", "metric": "exact", "fact": str(n // 4)} for n in range(80)]
    said = ["a" if n // 4 % 2 else "b" for n in range(80)]
    alone = [{name: entry[name] for name in ("answer", "metric")} for entry in entries]
    many = benchmark.scores_by_metric(entries, said)["exact"]
    single = benchmark.scores_by_metric(alone, said)["exact"]
    assert many["value"] == single["value"] == 0.5
    assert many["n"] == 80
    assert single == share([text == "a" for text in said])
    assert single["high"] - single["low"] < 0.6 * (many["high"] - many["low"])

    # And of word errors.
    entries = [entry | {"metric": "wer"} for entry in entries]
    alone = [entry | {"fact": None} for entry in entries]
    many = benchmark.scores_by_metric(entries, said)["wer"]
    single = benchmark.scores_by_metric(alone, said)["wer"]
    assert many["value"] == single["value"] == 0.5
    assert single["high"] - single["low"] < 0.6 * (many["high"] - many["low"])


@pytest.mark.parametrize(
    "style, said",
    [
        ({"rate": "normal", "loudness": "normal"}, "'normal' is a value of"),
        ({"pitch": "high", "voice": "a high one"}, "'a high one' is a value of voice, and names"),
    ],
)
def test_values_that_one_word_names_are_refused(style, said):
    with pytest.raises(ValueError, match=said):
        evaluate.can_be_told_apart([{"style": style}], "clips.jsonl")
    told = {"rate": "at a normal rate", "loudness": "at a normal volume", "gender": "man"}
    evaluate.can_be_told_apart([{"style": told}, {"style": {"gender": "woman"}}], "clips.jsonl")


def test_a_question_that_no_reply_can_be_is_refused_and_so_is_another_mu(
    speedrun, tmp_path, monkeypatch
):
    words = [*table_of(speedrun), "--out", str(tmp_path / "t.json")]
    entries = (speedrun / "toy/questions.jsonl").read_text().splitlines()
    long = json.loads(entries[-1]) | {"answer": "w x y z " * 10}
    (tmp_path / "long.jsonl").write_text("\n".join([*entries[:-1], json.dumps(long)]) + "\n")
    with pytest.raises(ValueError, match="tokens long, and a reply or a transcript has 40"):
        call([*words, "--questions", str(tmp_path / "long.jsonl")], monkeypatch)

    shutil.copytree(speedrun / "merged", tmp_path / "merged")
    made = json.loads((tmp_path / "merged/merge.json").read_text())
    (tmp_path / "merged/merge.json").write_text(json.dumps(made | {"mu": 0.5}))
    with pytest.raises(ValueError, match="made with --mu 0.5"):
        call([*words, "--merged", str(tmp_path / "merged")], monkeypatch)


def test_word_errors_are_counted_without_the_full_stop_that_a_transcript_ends_with():
    entries = [{"answer": "the cat sat", "metric": "wer"}, {"answer": "it", "metric": "wer"}]
    cell = benchmark.scores_by_metric(entries, ["The cat sits.", None])["wer"]
    assert cell["value"] == 0.5
    assert cell["n"] == 2


@pytest.mark.parametrize("name", ["question", "answer"])
def test_a_question_without_a_word_or_an_answer_without_one_is_refused(name, speedrun, tmp_path):
    entry = json.loads((speedrun / "toy/questions.jsonl").read_text().splitlines()[0])
    (tmp_path / "q.jsonl").write_text(json.dumps(entry | {name: " "}) + "\n")
    with pytest.raises(ValueError, match="entry 1: wanted question, answer"):
        evaluate.read_questions(tmp_path / "q.jsonl")


def test_what_the_readme_says_of_open_weights_is_in_the_results():
    every = json.loads((ROOT / "results/desta.json").read_text())
    runs = [run for run in every if run["adapter"] == "desta"]
    desta = runs[0]  # on the same voices as the sum
    others = {run["adapter"]: run for run in every if run not in runs}
    sums = json.loads((ROOT / "results/manner-real.json").read_text())
    summed = sums[0]
    said = " ".join((ROOT / "README.md").read_text().split())

    def score_of(entries):
        """How many replies hold the answer to their question, which two voices may ask."""
        asked = [{**entry, "metric": "contains", "fact": entry["text"]} for entry in entries]
        return benchmark.scores_by_metric(asked, [entry["reply"] for entry in entries])["contains"]

    texts = {entry["text"] for entry in summed["spoken"]["said"]}

    def on_these(asked):
        """Of the questions that the sum was asked, how many are answered?"""
        entries = asked["said"]
        same = [entry for entry in entries if entry["text"].removesuffix(" Answer it.") in texts]
        assert {entry["text"].removesuffix(" Answer it.") for entry in same} == texts
        return f"{score_of(same)['value']:.2f}"

    for name, run, row, typed in (
        ("SpeechCombine, told the words", summed, "heard", summed["instruct_typed"]),
        ("DeSTA2", desta, "heard", desta["typed"]),
        ("DeSTA2, on right answers", others["task_sft"], "heard", desta["typed"]),
        ("instruct, told in words", desta, "read", None),
    ):
        cells = [run["rows"][row][trait] for trait in ("gender", "rate", "loudness")]
        values = " | ".join(f"{cell['value']:.2f}" for cell in cells)
        answered = f"{on_these(run['spoken'])} ({on_these(typed)}) |" if typed else "|"
        assert f"| {name} | {values} | {answered}" in said, name
    whole = f"{desta['spoken']['score']['value']:.2f}"
    assert f"Of all {2 * len(texts)} questions DeSTA2 answers {whole}." in said

    # Every score again, from the answers.
    for run in (*sums, *every):
        assert "/" + "work" not in json.dumps(run)
        for row, cells in run["rows"].items():
            replied = [answer[row] for answer in run["answers"]]
            assert cells == evaluate.named(replied, run["answers"])
            assert cells["gender"]["n"] == len(run["answers"])
        for asked in {"typed", "spoken"} & set(run):
            assert run[asked]["score"] == score_of(run[asked]["said"])
    for run in runs:
        assert all(cell["value"] < 0.1 for cell in run["rows"]["cascade"].values())

    # The table of the teacher's page, and the sentences below it.
    page = (ROOT / "TEACHING.md").read_text()
    traits = "gender", "accent", "rate", "loudness"

    def line(name, run, cells, asked=None):
        values = [cells.get(trait) for trait in traits]
        values.append(run[asked]["score"] if asked else None)
        shown = "".join(f"{format(c['value'], '.2f') if c else '-':>10}" for c in values)
        return f"{name:<22}{run['seed']:>5}{shown}\n"

    for run in runs:
        rows = run["rows"]
        assert line("heard", run, rows["heard"], "spoken") in page
        assert line("read", run, rows["read"], "typed") in page
        assert line("probe", run, run["probe"]) in page
    for name, run in [*others.items(), *(("merged", run) for run in sums)]:
        assert line(name, run, run["rows"]["heard"], "spoken") in page

    page = " ".join(page.split())
    assert {f"{run['typed']['score']['value']:.2f}" for run in runs} == {"0.75"}
    assert "(typed: 0.75;" in page and {run["lam"] for run in sums} == {0.75}
    replies = [entry["reply"] for entry in others["task_sft"]["spoken"]["said"]]
    described = [reply for reply in replies if "accent, speaking" in reply]
    assert f"to {len(described)} of {len(replies)} questions describes the speaker" in page
    written = [
        [f"{run['written'][trait]['value']:.2f}" for trait in traits[1:]]
        for run in (others["mismatched"], desta)
    ]
    assert (
        "It names accent, rate and loudness in {}, {} and {} of them (the model itself: {}, {} "
        "and {})"
    ).format(*written[0], *written[1]) in page

    # It answers: it does not say again what it heard.
    for run in runs:
        replies = [(row["heard"], row["text"]) for row in run["answers"]]
        for row in run["spoken"]["said"]:
            replies.append((row["reply"], row["text"].removesuffix(" Answer it.")))
        again = [evaluate.words_of(reply) == evaluate.words_of(text) for reply, text in replies]
        assert sum(again) <= 0.05 * len(again)
    assert f"lam {summed['lam']:g} (`results/manner-real.json`;" in said
    assert f"answers {len(texts)} questions in two voices (typed):" in said


def test_what_the_teachers_page_says_of_float32_is_in_the_results():
    seeds = json.loads((ROOT / "results/toy-float32.json").read_text())["seeds"]
    mean = lambda row, column: sum(seed["rows"][row][column]["value"] for seed in seeds) / len(
        seeds
    )
    typed = mean("instruct", "typed")
    kept = mean("merged", "typed")
    spoken = mean("merged", "spoken_near")
    assert all(seed["dtype"] == ["float32"] for seed in seeds)
    said = " ".join((ROOT / "TEACHING.md").read_text().split())
    assert (
        f"In float32 (`results/toy-float32.json`, three seeds): merged spoken {spoken:.2f}. "
        f"Divided by instruct's typed: spoken {spoken / typed:.2f}, typed {kept / typed:.2f}."
        in said
    )
