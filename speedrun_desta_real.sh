#!/usr/bin/env bash
# DeSTA2 on open weights: a frozen instruct model learns to hear how something was said.
#   bash speedrun_desta_real.sh [WEIGHTS] [CLIPS] [OUT] [SEED]      run again after a stop, it goes on
#
# WEIGHTS  a folder with an instruct model and a Whisper; here the smallest (0.6 GB), or any larger pair:
#            hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir weights/SmolLM2-135M-Instruct
#            hf download openai/whisper-tiny.en              --local-dir weights/whisper-tiny.en
#            LLM=Qwen2.5-0.5B-Instruct WHISPER=whisper-small bash speedrun_desta_real.sh
# CLIPS    a manifest with "text", "speaker", "seconds" and "style": {"gender": "woman", "rate": "fast", ...}
#
# A third of the speakers is kept for the test, another third for every seed.
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
clips=${2:-clips.jsonl}
out=${3:-out/desta_real}
seed=${4:-0}
llm=$weights/${LLM:-SmolLM2-135M-Instruct}
whisper=$weights/${WHISPER:-whisper-tiny.en}
prompt="Describe the speaker."

step() {        # step SCRIPT FLAGS...: run a command unless what follows its --out is there already
  local result=${*: -1}
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# What the model says of descriptions, and what the encoder makes of the sound: once for all seeds.
step desta.py write "$clips" --model "$llm" --prompt "$prompt" --prompt "What can you hear from the audio?" --out "$out/targets.jsonl"
step desta.py encode "$clips" --encoder "$whisper" --out "$out/states"

# The voices of the test are in no target that is trained on.
of=$out/seed$seed
mkdir -p "$of"
python - "$clips" "$out/targets.jsonl" "$of" "$seed" <<'END'
import json, os, sys
clips, targets, out, seed = sys.argv[1:]
rows, written = ([json.loads(line) for line in open(path)] for path in (clips, targets))
unheard = set(sorted({row["speaker"] for row in rows})[int(seed)::3])
test = [row | {"audio": os.path.abspath(os.path.join(os.path.dirname(clips), row["audio"]))} for row in rows if row["speaker"] in unheard]
train = [row for row in written if row["speaker"] not in unheard]
for name, lines in (("test", test), ("train", train)):
    open(f"{out}/{name}.jsonl", "w").writelines(json.dumps(row) + "\n" for row in lines)
END
step desta.py train "$of/train.jsonl" --model "$llm" --states "$out/states" --queries 16 --steps 400 --seed "$seed" --out "$of/desta"

# What it says of unheard voices; the ceiling, on reading their descriptions; a cascade, on their transcripts.
step desta.py rows "$of/test.jsonl" --prompt "$prompt" --out "$of/rows"
step benchmark.py rows "$of/desta" "$of/rows/heard.jsonl" --out "$of/heard.json"
step benchmark.py rows "$llm" "$of/rows/read.jsonl" --out "$of/read.json"
step benchmark.py rows "$llm" "$of/rows/cascade.jsonl" --out "$of/cascade.json"
