"""Kill commands that can go on (COMMANDS), at random moments; they must end with the same bytes.

in   nothing
out  a line a command; exit status 1 if any output differs
run  python tests/kill.py    # 100 kills; --kills 10 is one of each

A command is started, killed after a time drawn from the length of a whole run, and started
again, until it ends by itself. What it has written must be what an undisturbed run wrote, but
for what tells times: recipe.json, training.json, rates in a log.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load

ROOT = Path(__file__).parent.parent
TIMES = "tokens_per_second", "seconds"
WORLD = "toy.py world --hours 0.2 --documents 400 --dev 4 --test 40 --out {w}/toy"
MADE = [  # what the commands below start from
    "pretrain.py --size micro --tokenizer {w}/toy/tokenizer --text {w}/toy/base.jsonl "
    "--steps 30 --batch 2 --device cpu --out {w}/base",
    "tokenize_audio.py fit --manifest {w}/toy/speech/train.jsonl --features mfcc --k 20 "
    "--device cpu --out {w}/codebook",
    "tokenize_audio.py encode --manifest {w}/toy/speech/train.jsonl --codebook "
    "{w}/codebook --device cpu --out {w}/units",
    "pretrain.py --init {w}/base --units {w}/units --text {w}/toy/base.jsonl --steps 30 "
    "--batch 2 --device cpu --out {w}/speech",
    "pretrain.py --init {w}/base --chat {w}/toy/chat.jsonl --steps 30 --batch 2 --device "
    "cpu --out {w}/instruct",
    "merge.py --base {w}/base --instruct {w}/instruct --speech {w}/speech --out {w}/merged",
    # One that ends its replies, so that there are targets.
    "pretrain.py --init {w}/base --chat {w}/replies.jsonl --plain --steps 120 --batch 4 "
    "--device cpu --out {w}/short",
    "hubert.py train --units {w}/units --steps 30 --batch 2 --device cpu --out {w}/hubert",
    "desta.py encode {w}/toy/speech/train.jsonl --encoder {w}/hubert --device cpu --out "
    "{w}/states",
]
COMMANDS = {
    "base": (
        "pretrain.py --size micro --tokenizer {w}/toy/tokenizer --text {w}/toy/base.jsonl "
        "--steps 700 --batch 2 --device cpu --out {out}"
    ),
    "speech": (
        "pretrain.py --init {w}/base --units {w}/units --text {w}/toy/base.jsonl --steps "
        "450 --batch 2 --device cpu --out {out}"
    ),
    "hubert": "hubert.py train --units {w}/units --steps 150 --batch 2 --device cpu --out {out}",
    "encode": (
        "tokenize_audio.py encode --manifest {w}/toy/speech/train.jsonl --codebook "
        "{w}/codebook --device cpu --out {out}"
    ),
    "prosody": "prosody.py {w}/toy/speech/train.jsonl --out {out}",
    "merge": "merge.py --base {w}/base --instruct {w}/instruct --speech {w}/speech --out {out}",
    "questions": "benchmark.py questions {w}/merged {w}/asked.jsonl --device cpu --out {out}.json",
    "targets": "desta.py write {w}/clips.jsonl --model {w}/short --device cpu --out {out}.jsonl",
    "states": (
        "desta.py encode {w}/toy/speech/train.jsonl --encoder {w}/hubert --device cpu --out {out}"
    ),
    "adapter": (
        "desta.py train {w}/targets.jsonl --model {w}/instruct --states {w}/states --queries 4 "
        "--steps 250 --batch 4 --device cpu --out {out}"
    ),
}


def start(line, **names):
    words = line.format(**names).split()
    return subprocess.Popen(
        [sys.executable, ROOT / words[0], *words[1:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def whole(line, **names):
    """Run a command to its end; the seconds it took."""
    began = time.perf_counter()
    process = start(line, **names)
    error = process.communicate()[1].decode()
    assert process.returncode == 0, f"{line}: {error[-2000:]}"
    return time.perf_counter() - began


def written(path):
    """{file: bytes} of what a command wrote, without what tells times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = {}
    for file in files:
        if not file.is_file() or file.name in ("recipe.json", "training.json", "loss.png"):
            continue
        data = file.read_bytes()
        if file.name == "log.jsonl":
            lines = map(json.loads, data.splitlines())
            data = json.dumps(
                [{name: line[name] for name in line if name not in TIMES} for line in lines]
            ).encode()
        if file.suffix == ".json" and not path.is_dir():
            data = json.dumps(
                {name: value for name, value in json.loads(data).items() if name != "made"}
            ).encode()
        found[file.name if file == path else str(file.relative_to(path))] = data
    return found


def killed(line, seconds, most, rng, **names):
    """How often a command was killed, at most `most` times, before it ended by itself."""
    kills = 0
    while True:
        process = start(line, **names)
        try:
            error = process.communicate(
                timeout=rng.uniform(0, 1.1 * seconds) if kills < most else None
            )[1].decode()
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        # The kill came behind the last rename.
        done = kills and "exists; pass --overwrite" in error
        assert done or process.returncode == 0, f"{line}, after {kills} kills: {error[-2000:]}"
        return kills


def same_bytes(name, line, kills, rng, work):
    """Does a command that is killed so often end with the bytes of a whole run? Prints the
    verdict.
    """
    ending = line.partition("{out}")[2]

    def made(run):
        """What stands in the output of a run, its name left out."""
        found = written(Path(f"{work / run}{ending}"))
        return {key.replace(run, name): data for key, data in found.items()}

    seconds = whole(line, w=work, out=work / f"{name}-straight")
    wanted = made(f"{name}-straight")
    assert any(wanted.values()), f"{name}: an empty output is always the same"
    done, runs, differs = 0, 0, []
    while done < kills:
        run = f"{name}-{runs}"
        done += killed(line, seconds, kills - done, rng, w=work, out=work / run)
        runs += 1
        if made(run) != wanted:
            differs.append(run)
    verdict = f"DIFFERENT in {len(differs)}" if differs else "the same bytes"
    print(f"{name}: {done} kills in {runs} runs of {seconds:.1f} s, {verdict}", flush=True)

    # Is it the kills? If an undisturbed run differs, too, the machine does not repeat itself.
    if differs:
        whole(line, w=work, out=work / f"{name}-again")
        again = "the same bytes again" if made(f"{name}-again") == wanted else "it differs, too"
        print(
            f"  {differs[0]}: {apart(made(differs[0]), wanted)}; without a kill, {again}",
            flush=True,
        )
    return not differs


def apart(got, wanted):
    """Which files differ, and how far the furthest weight lies from where it should."""
    files = [file for file in got.keys() | wanted.keys() if got.get(file) != wanted.get(file)]
    named = ", ".join(sorted(files))
    if "model.safetensors" not in files or got.keys() != wanted.keys():
        return named
    ours, theirs = load(got["model.safetensors"]), load(wanted["model.safetensors"])
    furthest = max((ours[key] - theirs[key]).abs().max().item() for key in theirs)
    return f"{named}, weights up to {furthest:.1g}"


def prepare(work):
    """Questions, clips with descriptions, targets and chats, for the commands that want them."""
    speech = (work / "toy/speech/train.jsonl").read_text().splitlines()
    clips = [json.loads(line) | {"style": {"gender": "man"}} for line in speech]
    for clip in clips:
        clip["audio"] = str(work / "toy/speech" / clip["audio"])
    made = {
        "asked": [{"text": f"say {n} twice", "answer": "x"} for n in range(500)],
        "clips": clips,
        "targets": [clip | {"prompt": "who says it", "target": "a man"} for clip in clips],
        "replies": [
            {
                "messages": [
                    {"role": "user", "content": clip["text"]},
                    {"role": "assistant", "content": "a man"},
                ]
            }
            for clip in clips
        ],
    }
    for name, entries in made.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (work / f"{name}.jsonl").write_text(lines)


def main():
    parser = argparse.ArgumentParser(
        description="Kill commands at random moments; the end must be the same."
    )
    parser.add_argument("--kills", type=int, default=100, help="in all (default 100)")
    parser.add_argument("--only", choices=COMMANDS, help="all of them at this command")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error(f"--kills {args.kills}: wanted at least 1")
    commands = {args.only: COMMANDS[args.only]} if args.only else COMMANDS
    rng, each = random.Random(0), -(-args.kills // len(commands))
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        whole(WORLD, w=work)
        prepare(work)
        for line in MADE:
            whole(line, w=work)
        same = [same_bytes(name, line, each, rng, work) for name, line in commands.items()]
    sys.exit(not all(same))


if __name__ == "__main__":
    main()
