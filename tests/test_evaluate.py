import json
import math

import pytest

import evaluate
from conftest import ROOT, call
from evaluate import COLUMNS, LAMS, ROWS, exact, normal, ratio, share, word_errors


def test_wilsons_interval_by_hand():
    cell = share([True] * 8 + [False] * 2)                                   # p = 0.8, n = 10: 0.490 to 0.943
    assert cell["value"] == 0.8 and math.isclose(cell["low"], 0.490, abs_tol=1e-3) and math.isclose(cell["high"], 0.943, abs_tol=1e-3)
    assert share([False] * 5)["low"] == 0 and share([]) is None


def test_an_answer_counts_only_whole_and_only_if_the_model_stopped():
    questions = [{"answer": "Paris"}] * 4
    said = {"chat": [" paris ", "paris.", "paris paris", None], "page": [None] * 4}
    assert exact(said, questions) | {"low": 0, "high": 0} == {"value": 0.25, "n": 4, "low": 0, "high": 0, "prompt": "chat"}
    assert normal(None) == ""


def test_the_better_of_two_prompts_is_reported_by_name():
    assert exact({"chat": ["a", "b"], "page": ["a", "a"]}, [{"answer": "a"}] * 2)["prompt"] == "page"


def test_word_error_rate_by_hand():
    cell = word_errors(["the cat sat", ""], [{"question": "the cat sits"}, {"question": "down"}])
    assert cell["value"] == 0.5 and cell["n"] == 2                            # 2 wrong of 4 words


def test_a_ratio_is_of_sums_and_its_interval_holds_it():
    cell = ratio([1, 2, 3], [2, 2, 2])
    assert cell["value"] == 1.0 and cell["low"] <= 1.0 <= cell["high"]


def test_the_table_has_every_row_and_column_and_null_where_meaningless(speedrun):
    table = json.loads((speedrun / "table.json").read_text())
    assert list(table["rows"]) == ROWS and all(list(row) == COLUMNS for row in table["rows"].values())
    null = {(name, column) for name, row in table["rows"].items() for column, cell in row.items() if cell is None}
    spoken = {c for c in COLUMNS if c.startswith(("spoken", "wer"))}
    assert null == {("instruct", c) for c in spoken} | {("cascade", c) for c in COLUMNS if c not in spoken}
    test = [q for q in map(json.loads, (speedrun / "toy/questions.jsonl").read_text().splitlines()) if q["split"] == "test"]
    assert table["rows"]["merged"]["spoken_near"]["n"] == len(test) and [row["lam"] for row in table["lam_sweep"]] == LAMS
    assert table["rows"]["merged"]["spoken_near_unseen"]["n"] == sum(not q["seen"] for q in test)
    assert (speedrun / "table.png").read_bytes().startswith(b"\x89PNG")


def test_the_lam_sweep_never_sees_a_test_question(speedrun, tmp_path, monkeypatch):
    asked, real = [], evaluate.answers

    def spy(model, vocab, contents, bar=None):
        asked.append([c for c in contents if isinstance(c, str)])
        return real(model, vocab, contents, bar)
    monkeypatch.setattr(evaluate, "answers", spy)
    words = [w for name in ("base", "instruct", "speech", "merged") for w in (f"--{name}", str(speedrun / name))]
    call(["evaluate.py", "table", *words, "--questions", str(speedrun / "toy/questions.jsonl"), "--device", "cpu", "--out", str(tmp_path / "t.json")], monkeypatch)
    rows = [json.loads(line) for line in (speedrun / "toy/questions.jsonl").read_text().splitlines()]
    dev = {q["question"] for q in rows if q["split"] == "dev"}
    sweep = asked[-2 * len(LAMS):]
    assert all(set(texts) <= dev for texts in sweep) and sum(bool(texts) for texts in sweep) == len(LAMS)
    first, second = json.loads((speedrun / "table.json").read_text()), json.loads((tmp_path / "t.json").read_text())
    assert first["rows"] == second["rows"] and first["lam_sweep"] == second["lam_sweep"], "the same models give the same table"


def test_a_report_joins_seeds_and_refuses_what_is_no_table(speedrun, tmp_path, monkeypatch, capsys):
    tables = [str(speedrun / "table.json")] * 2
    call(["evaluate.py", "report", *tables, "--out", str(tmp_path / "toy.json")], monkeypatch)
    made = json.loads((tmp_path / "toy.json").read_text())
    assert len(made["seeds"]) == 2 and {"seed", "rows", "lam_sweep", "rel", "seconds"} <= made["seeds"][0].keys() and "| merged |" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        call(["evaluate.py", "report", *tables, "--out", str(tmp_path / "toy.json")], monkeypatch)
    for row, cell in (("instruct", "typed"), ("merged", "spoken_near")):
        table = json.loads((speedrun / "table.json").read_text())
        table["rows"][row][cell] = None
        (tmp_path / "less.json").write_text(json.dumps(table))
        with pytest.raises(ValueError, match="less.json: a cell of its rows is missing"):
            call(["evaluate.py", "report", str(tmp_path / "less.json"), "--out", str(tmp_path / "x.json")], monkeypatch)
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(ValueError, match="has no 'seed'"):
        call(["evaluate.py", "report", str(tmp_path / "toy.json"), "--out", str(tmp_path / "x.json")], monkeypatch)


def test_the_readmes_table_is_the_one_in_results():
    made = json.loads((ROOT / "results/toy.json").read_text())
    assert evaluate.markdown(made["seeds"]) in (ROOT / "README.md").read_text()
