"""Promises about the repository itself: who imports whom, that flags do something, that the
README is true.
"""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter

import pytest

import messages
import mutants
from conftest import ROOT, call, speedrun_commands

ARROWS = {  # module -> what it imports; the design draws the same picture
    "runs": set(),
    "fused": set(),
    "muon": set(),
    "weights": {"runs"},
    "vocab": {"runs"},
    "audio": {"runs"},
    "align": {"fused"},
    "model": {"runs", "weights", "fused"},
    "hubert": {"runs", "weights", "audio"},
    "voices": {"runs", "audio"},
    "tokenize_audio": {"runs", "weights", "audio", "hubert"},
    "documents": {"runs", "vocab", "audio", "prosody"},
    "merge": {"runs", "weights", "vocab"},
    "pretrain": {
        "runs", "weights", "fused", "muon", "model", "vocab", "documents", "align", "prosody",
    },
    "prosody": {"runs", "audio", "vocab"},
    "whisper_model": {"runs", "audio"},
    "whisper": {"runs", "weights", "vocab", "audio", "whisper_model"},
    "encoder": {"runs", "audio", "hubert", "whisper", "whisper_model"},
    "targets": {"runs", "model", "vocab", "audio"},
    "adapter": {
        "runs", "weights", "model", "vocab", "audio", "encoder", "targets", "whisper",
        "whisper_model",
    },
    "desta": {"runs", "weights", "fused", "audio", "encoder", "adapter", "targets", "whisper"},
    "listen": {
        "runs", "model", "vocab", "audio", "tokenize_audio", "whisper", "prosody", "adapter",
    },
    "chat": {"runs", "model", "audio", "adapter", "listen", "vocab"},
    "evaluate": {
        "runs", "model", "vocab", "audio", "tokenize_audio", "merge", "adapter", "encoder",
        "listen", "prosody", "targets",
    },
    "benchmark": {
        "runs", "audio", "tokenize_audio", "evaluate", "listen", "merge", "model", "prosody",
        "vocab",
    },
    "toy": {"runs", "vocab", "audio", "voices"},
    "manner": {"runs", "vocab", "audio", "voices", "toy"},
}
SOURCES = sorted(ROOT.glob("*.py"))
LIBRARIES = "fused", "align", "whisper_model", "encoder", "adapter", "targets"  # no command
PAGES = "README.md", "TEACHING.md", "FORMATS.md", "MESSAGES.md", "bench/README.md"


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_flow_one_way():
    assert {path.stem for path in SOURCES} == set(ARROWS)
    for path in SOURCES:
        assert set(imports(path)) & set(ARROWS) == ARROWS[path.stem], path.name


def test_only_the_listed_packages_are_needed():
    """And triton, which comes with torch where there is a GPU, and sounddevice for who wants
    to speak to the chat.
    """
    listed = {"triton", "sounddevice"} | {
        line.split("#")[0].strip().split("==")[0].split(">=")[0].replace("-", "_")
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line.strip()
    }
    for path in SOURCES:
        assert set(imports(path)) - set(ARROWS) - set(sys.stdlib_module_names) <= listed, path.name


def tokens_of_lines(text):
    """{line: how many words and signs of Python stand in it}, docstrings and comments apart."""
    passed = {
        tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in passed
        and not (token.type == tokenize.STRING and token.start[0] != token.end[0])
    ]
    return Counter(lines)


def test_no_line_of_code_is_wider_than_100_columns():
    others = [*ROOT.glob("*.sh"), *ROOT.glob("tests/*.py"), *ROOT.glob("bench/*.py")]
    for path in [ROOT / ".ci/run", *SOURCES, *others]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number}"


def test_a_line_holds_one_idea_and_a_function_fits_on_a_screen():
    words, lines = 0, 0
    for path in SOURCES:
        text = path.read_text()
        widths = [len(line) for line in text.splitlines() if line.strip()]
        assert sum(width > 92 for width in widths) <= 0.05 * len(widths), path.name
        counts = tokens_of_lines(text)
        words, lines = words + sum(counts.values()), lines + len(counts)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
    assert words <= 9.5 * lines, words / lines


def test_every_flag_does_something():
    for path in SOURCES:
        text = path.read_text()
        names = [
            n
            for call in re.findall(r"\badd(?:_argument|_)?\(f?\"([^\"]+)\"", text)
            for n in [call.removeprefix("--").replace("-", "_")]
            if "{" not in n
        ]
        # Their flags are read by the commands that add them.
        for name in names if path.stem not in ("runs", "voices") else ():
            assert (
                re.search(rf"\bargs\.{name}\b|parse_args\(\)\.{name}\b", text) or name == "action"
            ), f"{path.name}: --{name}"


def test_every_file_opens_with_what_it_is_what_goes_in_and_out_and_a_command():
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc
        assert re.search(r"^in +", doc, re.M)
        assert re.search(r"\bout  ", doc)
        assert re.search(r"^run +python ", doc, re.M), path.name


def test_importing_does_nothing(tmp_path):
    names = ", ".join(path.stem for path in SOURCES)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {names}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [path.name for path in SOURCES if path.stem not in LIBRARIES]
)
def test_help_reads_well(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call([name, "--help"], monkeypatch)
    told = capsys.readouterr().out
    assert not end.value.code
    assert told.startswith(f"usage: {name}")
    assert len(told.splitlines()) > 4


def test_the_speedrun_is_the_designs_commands_in_order():
    said = [
        " ".join(words[:2]) if words[1][0] != "-" else words[0]
        for words in speedrun_commands("out")
    ]
    wanted = [
        "toy.py world", "pretrain.py", "pretrain.py", "tokenize_audio.py fit",
        "tokenize_audio.py encode", "hubert.py train", "tokenize_audio.py fit",
        "tokenize_audio.py encode", "pretrain.py", "merge.py", "evaluate.py table",
        "toy.py say", "evaluate.py show", "chat.py out/merged",
    ]
    assert said == wanted


def test_the_files_and_commands_of_the_pages_exist():
    text = "".join((ROOT / name).read_text() for name in PAGES)
    for name in set(
        re.findall(r"[\w/]+\.(?:py|sh|md)\b|[\w/]*requirements\.txt|results/[\w.-]+", text)
    ):
        assert (ROOT / name).exists(), name
    commands = (
        re.findall(r"^(?:\$ )?python ([\w/]+\.py)(.*)$", text, re.M)
        + re.findall(r"`python\s+([\w/]+\.py)([^`]*)`", text)
        + re.findall(r"`(\w+\.py) (--[^`]*)`", text)
    )
    assert len(commands) > 25
    for script, rest in commands:
        source = "".join((ROOT / name).read_text() for name in (script, "runs.py", "voices.py"))
        for flag in re.findall(r"--([\w-]+)", rest.split("#")[0]):
            assert f'"--{flag}"' in source or "--{name}" in source, f"{script} --{flag}"


def test_the_readme_is_short_shows_before_it_tells_and_names_every_file():
    text = (ROOT / "README.md").read_text()
    words = [word for word in text.split() if re.search(r"\w", word)]  # a table's bars are none
    assert len(words) <= 1700 and len(text[: text.index("![")].split()) < 60
    assert all(re.search(rf"^.*\b{path.name}\b", text, re.M) for path in SOURCES)


@pytest.mark.parametrize("word", ["/work" + "/", "/tmp" + "/", "TO" + "DO", "FIX" + "ME"])
def test_no_machine_path_and_no_loose_end_is_left_in_the_code(word):
    for path in [*SOURCES, *ROOT.glob("*.sh"), *ROOT.glob("*.md"), *(ROOT / "bench").glob("*.py")]:
        assert word not in path.read_text(), path.name


def test_the_benchmarks_page_holds_the_results_and_the_plan(quick):
    page = (ROOT / "bench/README.md").read_text()
    for script in ("bench.py", "plan.py"):
        said = subprocess.run(
            [quick / "python", ROOT / "bench" / script], capture_output=True, text=True, check=True
        ).stdout
        assert said.strip() in page


def test_every_benchmark_says_how_it_is_run():
    for path in (ROOT / "bench").glob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc
        assert path.stem == "bench" or f"run  python bench/{path.name}" in doc, path.name


def test_the_page_of_messages_holds_those_of_the_code_each_with_its_cause():
    text = messages.PAGE.read_text()
    assert messages.page(text) == text, "run python tests/messages.py"
    assert not re.search(r"^\| `.*` \| *\|$", text, re.M), "a message without its cause"

    # A message that is new comes in, and one that no code says goes.
    row = re.search(r"^\| `(nothing to say.*?)` \|.*\n", text, re.M)
    changed = messages.page(text.replace(row[0], "| `nobody says this` | Nor that. |\n"))
    assert f"| `{row[1]}` |  |" in changed and "nobody says" not in changed


def test_every_planted_mistake_replaces_what_stands_once_in_its_file():
    for file, old, new, _ in mutants.planted():
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {old!r}"
        assert old != new
