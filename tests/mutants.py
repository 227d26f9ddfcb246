"""Mistakes planted one at a time, each with the tests that should notice: can the tests fail?

in   tests/mutants.txt
out  a line a mistake: caught, or alive
run  python tests/mutants.py    # all, two at a time, 10 to 40 s each
     # --sample 8: some of them; --only WORD: those of files whose name holds it

A mistake is a piece of a file and what it is replaced by, in a copy of the repository. ALIVE lists
those that no test notices, with the reason.
"""

import argparse
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALIVE = {}  # a piece that is planted: why no test notices

# The tests of one training step with a flag and without it.
STEP = (
    "tests/test_pretrain.py -k 'flag or rows_go_first or beside_imitation or reader or covariance "
    "or rate_warms or pace or stepped or thinks or difference or filtered'"
)


def planted():
    """The mistakes of mutants.txt: (file, what stands there, what is planted, tests)."""
    mistakes = []
    for block in (ROOT / "tests/mutants.txt").read_text().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("== "):
            file, tests = lines[0].removeprefix("== ").split(": ")
        elif not lines[0].startswith("#"):
            old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
            mistakes.append((file, old, new, tests.replace("STEP", STEP)))
    return mistakes


def caught(copy, file, old, new, tests):
    """The name of the first test that fails with `old` replaced by `new` in a file of a copy of
    the repository, or None; an error if it is not there once.
    """
    path = copy / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
    path.write_text(text.replace(old, new))
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    try:
        done = subprocess.run(
            [sys.executable, *words, *shlex.split(tests)], cwd=copy, capture_output=True, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    finally:
        path.write_text(text)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    if done.returncode == 0:
        return None
    name = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.M)
    return name[1] if name else "?"


def copied(folder):
    """A copy of the repository in a folder, with the real files beside it where there are any."""
    left_out = shutil.ignore_patterns(".git", "out", ".venv", ".weights", "__pycache__")
    shutil.copytree(ROOT, folder / "repository", ignore=left_out)
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "repository"


def main():
    parser = argparse.ArgumentParser(
        description="Plant mistakes, one at a time, and see whether the tests notice."
    )
    parser.add_argument("--sample", type=int, help="only so many, drawn at random (seed 0)")
    parser.add_argument("--only", default="", help="only those of files whose name holds this")
    args = parser.parse_args()
    chosen = [mistake for mistake in planted() if args.only in mistake[0]]
    if not chosen:
        parser.error(f"--only {args.only}: no file of mutants.txt has this in its name")
    chosen = random.Random(0).sample(chosen, args.sample) if args.sample else chosen

    # Two copies, each with one mistake and one thread at a time.
    alive = 0
    free = queue.Queue()
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        for folder in (one, other):
            free.put(copied(Path(folder)))

        def plant(mistake):
            copy = free.get()
            try:
                return mistake, caught(copy, *mistake)
            finally:
                free.put(copy)

        with ThreadPoolExecutor(2) as pool:
            for (file, old, new, _), by in pool.map(plant, chosen):
                said = f"caught by {by}:" if by else "ALIVE"
                print(f"{said} {file}: {old[:60]!r} -> {new[:40]!r}", flush=True)
                alive += not by and old not in ALIVE
    print(f"{len(chosen) - alive} of {len(chosen)} caught or explained")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
