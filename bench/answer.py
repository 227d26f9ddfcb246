"""How long from the shell prompt to the first answer of the toy model? A whole process of
chat.py, imports and all, on one spoken question.

in   the folder of a speedrun (out/)
out  a row of results/bench-cpu.json: chat/first answer
run  python bench/answer.py    # after speedrun.sh; half a minute

The peer is no program but the goal: four seconds.
"""

import argparse
import sys
from pathlib import Path

from bench import ROOT, median, process, record

GOAL = 4.0


def main():
    parser = argparse.ArgumentParser(description="Time chat.py from start to end on one question.")
    parser.add_argument(
        "--out", default=ROOT / "out", type=Path, help="folder of a speedrun (default out)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    command = [
        sys.executable, str(ROOT / "chat.py"), str(args.out / "merged"),
        str(args.out / "question.wav"),
    ]
    seconds = median(process(command)[0] for _ in range(args.rounds))
    record("cpu", "chat/first answer", "s, whole process", seconds, GOAL, "the goal", better="less")


if __name__ == "__main__":
    main()
