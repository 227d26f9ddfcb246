"""Promises about the repository itself: who imports whom, that flags do something, that the README is true."""
import ast
import re
import subprocess
import sys

import pytest

from conftest import ROOT, speedrun_commands

ARROWS = {     # module -> what it may import; design and README draw the same picture
    "weights": set(), "runs": set(), "fused": set(), "muon": set(), "model": {"weights", "fused"}, "vocab": {"weights"}, "audio": {"weights"},
    "hubert": {"weights", "runs", "audio"}, "tokenize_audio": {"weights", "runs", "audio", "hubert"}, "merge": {"weights", "runs", "vocab"},
    "documents": {"weights", "vocab", "audio"}, "pretrain": {"weights", "runs", "fused", "muon", "model", "vocab", "audio", "documents"},
    "chat": {"weights", "runs", "model", "vocab", "audio", "tokenize_audio"},
    "evaluate": {"weights", "runs", "model", "vocab", "audio", "tokenize_audio", "merge"}, "toy": {"weights", "runs", "vocab", "audio"},
}
LINES = {"weights": 410, "runs": 160, "muon": 120, "fused": 350, "model": 430, "vocab": 360, "audio": 290, "hubert": 400, "tokenize_audio": 510, "documents": 230, "pretrain": 535,
         "merge": 250, "chat": 260, "evaluate": 557, "toy": 460}
SOURCES = sorted(ROOT.glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_flow_one_way():
    assert {path.stem for path in SOURCES} == set(ARROWS)
    for path in SOURCES:
        assert set(imports(path)) & set(ARROWS) <= ARROWS[path.stem], path.name


def test_only_the_listed_packages_are_needed():
    """And triton, which comes with torch where there is a GPU, and sounddevice for who wants to speak to the chat."""
    listed = {"triton", "sounddevice"} | {line.split("#")[0].strip().split("==")[0].split(">=")[0].replace("-", "_") for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()}
    for path in SOURCES:
        assert set(imports(path)) - set(ARROWS) - set(sys.stdlib_module_names) <= listed, path.name


def test_files_stay_short_enough_to_read_in_one_sitting():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= LINES[path.stem], path.name


def test_every_flag_does_something():
    for path in SOURCES:
        text = path.read_text()
        names = [n for call in re.findall(r"add_argument\(f?\"([^\"]+)\"", text) for n in [call.removeprefix("--").replace("-", "_")] if "{" not in n]
        for name in names if path.stem != "runs" else ():                  # its flags are read by the commands that add them
            assert re.search(rf"\bargs\.{name}\b|parse_args\(\)\.{name}\b", text) or name == "action", f"{path.name}: --{name}"


def test_every_file_opens_with_what_it_is_what_goes_in_and_out_and_a_command():
    for path in SOURCES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and re.search(r"^in +", doc, re.M) and re.search(r"\bout  ", doc) and re.search(r"^run +python ", doc, re.M), path.name


def test_importing_does_nothing_and_help_reads_well():
    for path in SOURCES:
        if path.stem == "fused":                                             # the one file without a command
            continue
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {path.name}") and len(done.stdout.splitlines()) > 4, done.stderr


def test_the_speedrun_is_the_designs_commands_in_order():
    said = [" ".join(words[:2]) if words[1][0] != "-" else words[0] for words in speedrun_commands("out")]
    wanted = ["toy.py world", "pretrain.py", "pretrain.py", "tokenize_audio.py fit", "tokenize_audio.py encode", "hubert.py train", "tokenize_audio.py fit",
              "tokenize_audio.py encode", "pretrain.py", "merge.py", "evaluate.py table", "toy.py say", "evaluate.py show", "chat.py out/merged"]
    assert said == wanted


def test_the_files_and_commands_of_both_pages_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "TEACHING.md").read_text()
    for name in set(re.findall(r"[\w/]+\.(?:py|sh|md)\b|[\w/]*requirements\.txt|results/[\w.-]+", text)):
        assert (ROOT / name).exists(), name
    commands = re.findall(r"^(?:\$ )?python ([\w/]+\.py)(.*)$", text, re.M) + re.findall(r"`python ([\w/]+\.py)([^`]*)`", text) + re.findall(r"`(\w+\.py) (--[^`]*)`", text)
    assert len(commands) > 30
    for script, rest in commands:
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--([\w-]+)", rest.split("#")[0]):
            assert f'"--{flag}"' in source or "--{name}" in source, f"{script} --{flag}"


def test_the_readme_counts_the_lines_right():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", text, re.M)
    assert {name for name, _ in rows} == {path.name for path in SOURCES}
    for name, count in rows:
        real = len((ROOT / name).read_text().splitlines())
        assert abs(int(count) - real) <= 0.1 * real, f"{name}: README says {count}, it has {real}"


@pytest.mark.parametrize("word", ["/work" + "/", "/tmp" + "/", "TO" + "DO", "FIX" + "ME"])
def test_no_machine_path_and_no_loose_end_is_left_in_the_code(word):
    for path in [*SOURCES, *ROOT.glob("*.sh"), *ROOT.glob("*.md"), *(ROOT / "bench").glob("*.py")]:
        assert word not in path.read_text(), path.name


def test_the_readmes_benchmarks_and_plan_are_those_of_the_results():
    for script in ("bench.py", "plan.py"):
        said = subprocess.run([sys.executable, ROOT / "bench" / script], capture_output=True, text=True, check=True).stdout
        assert said.strip() in (ROOT / "README.md").read_text()


def test_every_benchmark_says_how_it_is_run():
    for path in (ROOT / "bench").glob("*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and (path.stem == "bench" or f"run  python bench/{path.name}" in doc), path.name


def error_messages(path):
    """The messages for people in a file, as (line, pieces between what is filled in)."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "error" else None
        if isinstance(call, ast.Call) and call.args:
            parts = [call.args[0]] if isinstance(call.args[0], ast.Constant) else getattr(call.args[0], "values", [])
            pieces = [part.value for part in parts if isinstance(part, ast.Constant)]
            if pieces:
                yield call.lineno, pieces


def test_every_error_message_has_its_cause_on_the_teachers_page():
    rows = [line for line in (ROOT / "TEACHING.md").read_text().splitlines() if line.startswith("| `")]
    told = lambda pieces: any(re.match(r"\| `[^`]*?" + r"[^`]*?".join(re.escape(piece.strip()) for piece in pieces), row) for row in rows)      # all of it, in one row
    lacking = [f"{path.name}:{line}: {' ... '.join(pieces)}" for path in SOURCES for line, pieces in error_messages(path) if not told(pieces)]
    assert not lacking, "\n".join(lacking)
