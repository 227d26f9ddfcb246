"""Shared by the tests: the folder of real files (skipped where absent), and one shrunken
speedrun that many tests look at.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

# Two tests run at a time, with one thread each, here and in the processes that they start. That
# does half as much work again as one test with two threads. Read by OpenMP when torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

import runs  # noqa: E402, F401, before torch: it sets how OpenMP waits
import torch  # noqa: E402

if not torch.cuda.is_available():
    # Read when fused.py defines its kernels: they run on the CPU, slowly and exactly.
    os.environ["TRITON_INTERPRET"] = "1"

import audio  # noqa: E402
import documents  # noqa: E402
from model import generate  # noqa: E402
from vocab import Vocab  # noqa: E402

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMALL = {  # flags that shrink a step of speedrun.sh to a second or two
    "toy.py world": "--hours 0.03 --documents 400 --dev 4 --test 8",
    "pretrain.py": "--steps 6 --batch 2 --device cpu",
    "hubert.py train": "--steps 3 --batch 2 --device cpu",
    "tokenize_audio.py fit": "--k 20 --device cpu",
    "tokenize_audio.py encode": "--device cpu",
    "evaluate.py table": "--device cpu",
    "chat.py": "--device cpu",
    "manner.py": "--lines 12 --documents 200 --dev 3 --test 6",
    "benchmark.py questions": "--device cpu",
    "benchmark.py lam": "--device cpu",
}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two processes, where pytest-xdist is there and neither -n nor --pdb says otherwise.

    The tests of a file stay together: they share what they made.
    """
    of_two = "PYTEST_XDIST_WORKER" in os.environ  # one of the two must not begin two more
    alone = of_two or config.option.usepdb
    if getattr(config.option, "numprocesses", 0) is None and not alone:
        config.option.numprocesses = 2
        config.option.dist = "loadfile"
        # Xdist would begin with files of many tests. Ours of few tests take longest.
        config.option.loadscopereorder = False


def shared(name):
    """A real file or folder of ../shared/data; the test is skipped, saying so, where it is
    absent.
    """
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent")
    return SHARED / name


def real(name):
    """A folder of real open weights, in $REAL_WEIGHTS or ../weights; the test is skipped,
    saying so, where it is absent.
    """
    folder = Path(os.environ.get("REAL_WEIGHTS", ROOT.parent / "weights")) / name
    if not folder.is_dir():
        pytest.skip(f"no real weights: {folder} is absent (set REAL_WEIGHTS to where they are)")
    return folder


def speedrun_commands(out, script="speedrun.sh"):
    """The commands of a speedrun as word lists, writing to `out`, at their real size."""
    text = (ROOT / script).read_text().replace("\\\n", "")
    lines = re.findall(r"^(?:step|python) (\w+\.py .*)$", text, re.M)
    return [
        shlex.split(line.replace("$out", str(out)).replace("$seed", "0").replace("$lam", "0.7"))
        for line in lines
    ]


def shrink(words):
    """A command of speedrun.sh made small: later flags win over earlier ones."""
    line = " ".join(words)
    extra = next((flags for start, flags in SMALL.items() if line.startswith(start)), "")
    extra += " --rows-first 0.25" if words[0] == "pretrain.py" and "--units" in words else ""
    return [{"nano": "micro"}.get(w, w) for w in words] + extra.split()


def call(words, monkeypatch):
    """Run a script's main() in this process, as `python words...` would."""
    monkeypatch.setattr(sys, "argv", list(words))
    import_module(words[0].removesuffix(".py")).main()


def six_tokens(model, starts, limit, *rest):
    """For evaluate.generate: models as small as these never end an answer, which takes long."""
    return generate(model, starts, min(limit, 6), *rest)


def first_on_path(folder):
    """The environment with a folder in front of all others on PATH."""
    return os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """A folder with a `python` that starts at once, see forked.py; on a Mac, whose libraries
    may not be forked, with the one that runs the tests.
    """
    folder = tmp_path_factory.mktemp("quick")

    def begin_with(*words):
        (folder / "python").write_text(f'#!/bin/bash\nexec {shlex.join(words)} "$@"\n')
        (folder / "python").chmod(0o755)

    if sys.platform == "darwin":
        begin_with(sys.executable)
        yield folder
        return

    # A socket's path has some hundred letters at most.
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        words = [sys.executable, str(ROOT / "tests/forked.py"), f"{short}/socket"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, text=True, **pipes) as server:
            assert server.stdout.readline() == "ready\n"
            begin_with(words[0], "-IS", *words[1:])
            yield folder


@pytest.fixture(scope="session")
def speedrun(tmp_path_factory):
    """The out folder of a whole shrunken speedrun."""
    out, patch = tmp_path_factory.mktemp("speedrun"), pytest.MonkeyPatch()
    patch.setattr("evaluate.generate", six_tokens)
    for words in speedrun_commands(out):
        # Chat.py ends with its status.
        try:
            call(shrink(words), patch)
        except SystemExit as end:
            assert not end.code, f"{words}: {end.code}"
    patch.undo()
    return out


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Training draws no picture of its loss: half of a run of a step or two. (`speedrun` does.)"""
    monkeypatch.setattr("pretrain.Log.draw", lambda log: None)


@pytest.fixture
def stream(speedrun):
    """Documents of the shrunken speedrun, by mix and seed."""
    vocab, units = Vocab(speedrun / "speech"), audio.Units(speedrun / "units")
    sources = {
        "text": documents.read_text(speedrun / "toy/base.jsonl"),
        "interleave": units,
        "transcribe": units,
        "chat": documents.read_chats(speedrun / "toy/chat.jsonl"),
    }
    return lambda mix, seed=0: documents.Documents(vocab, sources, mix, seed)


@pytest.fixture
def asked(tmp_path, quick):
    """What experiments.sh asks `python` for on a finished run: it writes that down, and makes
    a folder of what is named behind --out. Its trainings take hours.
    """
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f"""#!/bin/bash
[[ "$1" = -* ]] && exec {quick}/python "$@"
echo "$@" >> {tmp_path}/asked
[[ "$*" =~ --out\ ([^ ]+) ]] && mkdir -p "${{BASH_REMATCH[1]}}"; true
""")
    (tmp_path / "bin/python").chmod(0o755)

    def run(name, finished, inside=""):
        shutil.copytree(finished, tmp_path / "out" / inside)
        done = subprocess.run(
            ["bash", str(ROOT / "experiments.sh"), name, str(tmp_path / "out")],
            capture_output=True,
            text=True,
            check=True,
            env=first_on_path(tmp_path / "bin"),
        )
        return done.stdout, [line.split() for line in (tmp_path / "asked").read_text().splitlines()]

    return run
