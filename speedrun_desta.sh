#!/usr/bin/env bash
# DeSTA2 on the toy world: the instruct model of speedrun_manner.sh stays as it is, and learns,
# through the HuBERT of speedrun.sh, to hear how a line was said. Run those two first.
# 18 minutes with one thread beside another process, on a Xeon in float32.
#   bash speedrun_desta.sh [SEED]      run again after a stop, it goes on at the step it was in
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0}
out=out; [ "$seed" = 0 ] || out=out/seed$seed
world=$out/manner/world
instruct=$out/manner/instruct
to=$out/desta

for made in "$out/hubert" "$instruct" "$out/manner/cascade.json"; do
  [ -e "$made" ] || {
    echo "$made: not there; run speedrun.sh and speedrun_manner.sh first" >&2
    exit 1
  }
done

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# Lines read aloud.
mkdir -p $to
python - $world/speech/train.jsonl $to/lines.jsonl <<'END'
import json, sys
from itertools import islice
from pathlib import Path

with open(sys.argv[1]) as lines, open(sys.argv[2], "w") as out:
    for entry in map(json.loads, islice(lines, 2000)):
        entry["audio"] = str((Path(sys.argv[1]).parent / entry["audio"]).resolve())
        out.write(json.dumps(entry) + "\n")
END

# The instruct model reads each with its caption, and answers about it.
step desta.py write $to/lines.jsonl --model $instruct --template $'{caption}\n{text}' \
  --prompt "what is the gender of it in a note" --prompt "in a sentence name the pitch of it" \
  --prompt "which pace is the pace of it and say it twice" \
  --prompt "what is the stress of it in a note" --out $to/captioned.jsonl

# And it answers where no caption is wanted: another question behind half of the lines, and these
# lines alone, as a spoken question stands. Without the first the adapter learns that every question
# wants a caption; without the second it disturbs what a line says.
head -n 1000 $to/lines.jsonl > $to/half.jsonl
step desta.py write $to/half.jsonl --model $instruct --template '{text}' \
  --prompt "what is the capital of france in a note" --prompt "" --out $to/others.jsonl

# Of a line without stress it names any word: no target.
python - $to/captioned.jsonl $to/others.jsonl > $to/targets.jsonl <<'END'
import json, sys

for path in sys.argv[1:]:
    for line in open(path):
        entry = json.loads(line)
        if "stress" not in entry["prompt"] or "stresses" in entry["caption"]:
            print(line, end="")
END

# What the HuBERT makes of the sound, once.
step desta.py encode $to/lines.jsonl --encoder $out/hubert --out $to/states

# The adapter: on hearing a line, with its words, the model is to say what it said on reading it.
step desta.py train $to/targets.jsonl --model $instruct --states $to/states --queries 16 \
  --steps 800 --batch 16 --lr 1e-3 --seed $seed --out $to/adapter

# Unheard voices, the words told. "read": the caption stands there, as in the chats of instruct, so
# it is what instruct names when it is told. Beside them the cascade, and what addition made of the
# same instruct model.
python - $world/test.jsonl $to/described.jsonl <<'END'
import json, sys

with open(sys.argv[1]) as lines, open(sys.argv[2], "w") as out:
    for entry in map(json.loads, lines):
        if entry["group"] == "fact":
            continue  # of a question with a caption the model repeats the caption
        kept = {name: entry[name] for name in ("instruction", "answer", "metric", "group")}
        out.write(json.dumps(kept | {"text": f"{entry['caption']}\n{entry['text']}"}) + "\n")
END
step benchmark.py questions $to/adapter $world/test.jsonl --out $to/heard.json
step benchmark.py questions $instruct $to/described.jsonl --out $to/read.json
cd $to
python "$OLDPWD/benchmark.py" show {heard,read}.json ../manner/{cascade,merged}.json
