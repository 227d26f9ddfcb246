#!/usr/bin/env bash
# DeSTA2 on open weights: a frozen instruct model learns to hear how something was said.
#   bash speedrun_desta_real.sh [WEIGHTS] [CLIPS] [OUT] [SEED]    after a stop, run it again
#
# WEIGHTS  folders of an instruct model and a Whisper. These are the smallest (0.6 GB):
#            hf download HuggingFaceTB/SmolLM2-135M-Instruct \
#               --local-dir weights/SmolLM2-135M-Instruct
#            hf download openai/whisper-tiny.en --local-dir weights/whisper-tiny.en
#          and others are named by LLM=Qwen2.5-0.5B-Instruct WHISPER=whisper-small
# CLIPS    a manifest with "text", "speaker", "seconds" and "style": {"gender": "woman", "accent":
#          "American", "rate": "fast", "loudness": "quiet"}
# A third of the speakers is kept for the test: another third for the seeds 0, 1 and 2.
# STEPS=600 of training, unless another number is given.
# QUESTIONS=questions.jsonl asks spoken questions, too: JSON lines {"audio", "text", "answer"}.
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
clips=${2:-clips.jsonl}
out=${3:-out/desta_real}
seed=${4:-0}
llm=$weights/${LLM:-SmolLM2-135M-Instruct}
whisper=$weights/${WHISPER:-whisper-tiny.en}
of=$out/$(basename "$llm")-$(basename "$whisper")-seed$seed     # what depends on all of them

# Of three forms of a description and six prompts these make the smallest model say most of what it
# reads: 0.9 of each attribute, in a sentence that ends. By DeSTA2's own it says 0.2 and runs on.
template='A {gender} with a {accent} accent, speaking {rate} and {loudness}, says: "{text}"'
prompt="Describe the speaker in one sentence."
# A second prompt, about the words: without it the adapter forgets that there are others.
answer="Answer it."

[ -f "$clips" ] || { echo "$clips: no such file; wanted CLIPS, a manifest" >&2; exit 1; }

same() {        # same FILE WORDS...: note what an output is made of; stop if it was something else
  if [ -e "$1" ] && [ "$(cat "$1")" != "${*:2}" ]; then
    echo "$(dirname "$1"): made with another $(basename "$1"); remove it, or give another OUT" >&2
    exit 1
  fi
  echo "${*:2}" > "$1"
}

step() {        # step SCRIPT FLAGS...: run a command unless what follows its --out is there already
  local result=${*: -1}
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# The corpus with adverbs, as the template wants; and the voices of the test, which are in no
# target.
mkdir -p "$of"
same "$out/CLIPS" "$(cksum < "$clips")"
same "$of/STEPS" "${STEPS:-600}"
python - "$clips" "$out" "$of" "$seed" <<'END'
import json, sys
from pathlib import Path

clips, out, of, seed = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
adverbs = {
    "rate": {"slow": "slowly", "normal": "at a normal rate"},
    "loudness": {"quiet": "quietly", "normal": "at a normal volume", "loud": "loudly"},
}
rows = [json.loads(line) for line in open(clips)]
for number, row in enumerate(rows, 1):
    if not all(row.get(name) for name in ("audio", "speaker", "style")):
        sys.exit(f"{clips}, row {number}: wanted audio, speaker and style")
    row["audio"] = str((clips.parent / row["audio"]).resolve())
    for name, value in row["style"].items():
        row["style"][name] = adverbs.get(name, {}).get(value, value)
unheard = set(sorted({row["speaker"] for row in rows})[seed % 3 :: 3])
test = [row for row in rows if row["speaker"] in unheard]
for path, lines in ((out / "clips.jsonl", rows), (of / "test.jsonl", test)):
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
END

# What the model says of descriptions, and what the encoder makes of the sound: once for all seeds.
targets=$out/targets-$(basename "$llm").jsonl
states=$out/states-$(basename "$whisper")
step desta.py write "$out/clips.jsonl" --model "$llm" --template "$template" \
  --prompt "$prompt" --prompt "$answer" --out "$targets"
step desta.py encode "$out/clips.jsonl" --encoder "$whisper" --out "$states"

# The adapter. Targets of the test's voices are left out.
python - "$targets" "$of/test.jsonl" > "$of/train.jsonl" <<'END'
import json, sys

unheard = {json.loads(line)["speaker"] for line in open(sys.argv[2])}
for line in open(sys.argv[1]):
    if json.loads(line)["speaker"] not in unheard:
        print(line, end="")
END
step desta.py train "$of/train.jsonl" --model "$llm" --states "$states" --queries 16 \
  --steps ${STEPS:-600} --seed "$seed" --out "$of/desta"

# What it says of unheard voices; what it says on reading about them, and of their transcripts.
step evaluate.py manner "$of/desta" --clips "$of/test.jsonl" --template "$template" \
  --prompt "$prompt" --out "$of/manner.json"

# Spoken questions, beside the same ones typed.
if [ -n "${QUESTIONS:-}" ]; then
  same "$of/QUESTIONS" "$(cksum < "$QUESTIONS")"
  python - "$QUESTIONS" "$out" "$answer" <<'END'
import json, sys
from pathlib import Path

questions, out, answer = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
rows = [json.loads(line) for line in open(questions)]
made = {"typed": [], "heard": []}
for row in rows:
    wanted = {"answer": row["answer"], "metric": "contains"}
    made["typed"].append(wanted | {"text": f"{row['text']} {answer}"})
    sound = str((questions.parent / row["audio"]).resolve())
    made["heard"].append(wanted | {"audio": sound, "instruction": answer})
for name, lines in made.items():
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
END
  step benchmark.py rows "$llm" "$out/typed.jsonl" --out "$of/typed.json"
  step benchmark.py rows "$of/desta" "$out/heard.jsonl" --out "$of/heard.json"
fi

# All of it in one file, with every answer.
python - "$of" "$seed" "$(basename "$llm")" "$(basename "$whisper")" <<'END'
import json, platform, sys
from pathlib import Path

import torch

of, (seed, llm, whisper) = Path(sys.argv[1]), sys.argv[2:]
read = lambda name: json.loads((of / name).read_text())
made = {"seed": int(seed), "model": llm, "encoder": whisper}
made["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
made["targets"] = len((of / "train.jsonl").read_text().splitlines())
made |= {name: read("manner.json")[name] for name in ("rows", "answers")}
for name, file in (("typed", "typed.json"), ("spoken", "heard.json")):
    if (of / file).exists():
        made[name] = {"score": read(file)["contains"], "said": read(file)["rows"]}
        print(f"questions {name}: {made[name]['score']['value']:.2f}")
(of / "desta.json").write_text(json.dumps(made, indent=1) + "\n")
END
