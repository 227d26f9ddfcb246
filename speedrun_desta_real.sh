#!/usr/bin/env bash
# DeSTA2 on open weights: a frozen instruct model learns to hear how something was said.
#   bash speedrun_desta_real.sh [WEIGHTS] [CLIPS] [OUT] [SEED]    after a stop, run it again
#
# WEIGHTS  folders of an instruct model and a Whisper. These are the smallest (0.6 GB):
#            hf download HuggingFaceTB/SmolLM2-135M-Instruct \
#               --local-dir weights/SmolLM2-135M-Instruct
#            hf download openai/whisper-tiny.en --local-dir weights/whisper-tiny.en
#          and others are named by LLM=Qwen2.5-0.5B-Instruct WHISPER=whisper-small
# CLIPS    a manifest with "audio", "text", "speaker", "seconds" and "style": {"gender": "woman",
#          "accent": "American", "rate": "fast", "loudness": "quiet"}
# A third of the speakers is kept for the test, for each of the seeds 0, 1 and 2 a different one.
# STEPS=600 of training, unless another number is given.
# QUESTIONS=questions.jsonl asks spoken questions, too: JSON lines {"audio", "text", "answer"}.
# ADAPTER names another way to train it, which gets a folder of its own, beside DeSTA2's:
#   ADAPTER=no_transcript   no words stand beside the vectors
#   ADAPTER=task_sft        the targets are the right answers to the task; the model wrote none
#   ADAPTER=mismatched      another model wrote the targets: WRITER=Qwen2.5-0.5B-Instruct
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
clips=${2:-clips.jsonl}
out=${3:-out/desta_real}
seed=${4:-0}
llm=$weights/${LLM:-SmolLM2-135M-Instruct}
whisper=$weights/${WHISPER:-whisper-tiny.en}
adapter=${ADAPTER:-desta}
writer=$llm
of=$out/$(basename "$llm")-$(basename "$whisper")-seed$seed     # what depends on all of them
flags=()
case $adapter in
  desta) ;;
  task_sft) of=$of-task_sft ;;
  no_transcript)
    of=$of-no_transcript
    flags=(--no-transcript) ;;
  mismatched)
    writer=$weights/${WRITER:-}
    if [ "$writer" = "$llm" ] || [ -z "${WRITER:-}" ]; then
      echo "WRITER=${WRITER:-}: wanted another model than $(basename "$llm")" >&2; exit 1
    fi
    of=$of-by-$WRITER ;;
  *) echo "ADAPTER=$adapter: wanted no_transcript, task_sft or mismatched" >&2; exit 1 ;;
esac

# Of three forms of a description and six prompts these make the smallest model say most of what it
# reads (gender 0.9, rate and loudness 0.8, accent 0.6), in a sentence that ends. By DeSTA2's own it
# says a tenth of rates and loudness, and runs on.
template='A {gender} with a {accent} accent, speaking {rate} and {loudness}, says: "{text}"'
prompt="Describe the speaker in one sentence."
# A second prompt, about the words: without it the adapter forgets that there are others. The clips
# say little that can be answered, so every second one gets a question as its transcript. That does
# no harm: an adapter without transcripts answered no question, so its vectors hold no words.
# Targets are written on a question alone; told who speaks, and how, the model answers two thirds as
# many. Of 119 questions the smallest model repeated 53, and an adapter would learn that. The other
# 66 are kept.
answer="Answer it."

for file in "$clips" ${QUESTIONS:+"$QUESTIONS"}; do
  [ -f "$file" ] || { echo "$file: no such file; wanted JSON lines" >&2; exit 1; }
done
for folder in "$llm" "$whisper" "$writer"; do
  if [ ! -f "$folder/config.json" ]; then
    echo "$folder: no such model folder; this script's head says what to download" >&2
    exit 1
  fi
done
for number in "$seed" "${STEPS:-600}"; do
  case $number in '' | *[!0-9]*) echo "SEED and STEPS are numbers; got $number" >&2; exit 1 ;; esac
done
[ "${STEPS:-600}" -gt 0 ] || { echo "STEPS=$STEPS: wanted at least 1" >&2; exit 1; }

same() {        # same FILE WORDS...: stop if an output was made of something else
  if [ -e "$1" ] && [ "$(cat "$1")" != "${*:2}" ]; then
    echo "$(dirname "$1"): made with another $(basename "$1"); remove it, or give another OUT" >&2
    exit 1
  fi
}

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local result=${*: -1}
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# The corpus with adverbs, as the template wants; and the voices of the test, which are in no
# target.
mkdir -p "$of"
of_weights=$(cd "$weights" && pwd)
of_clips=$(cksum < "$clips")
of_questions=$(cksum < "${QUESTIONS:-/dev/null}")
same "$out/WEIGHTS" "$of_weights"
same "$out/CLIPS" "$of_clips"
same "$of/STEPS" "${STEPS:-600}"
[ -z "${QUESTIONS:-}" ] || same "$of/QUESTIONS" "$of_questions"
python - "$clips" "$out" "$of" "$seed" "$answer" "${QUESTIONS:-}" <<'END'
import json, sys
from pathlib import Path

import audio
import targets
from whisper_model import SECONDS

ASKED = """
What is two plus three? What is eight divided by two? What is a baby dog called? What is a baby
cat called? What is a baby cow called? What is a baby sheep called? What sound does a dog make?
What sound does a cat make? What sound does a duck make? Who invented the telephone? Who was the
first president of the United States? Who was the first person to walk on the moon? Who is the
author of War and Peace? What is the plural of mouse? What is the plural of child? What is the
plural of foot? What is the past tense of go? What is the past tense of run? What is the largest
animal in the sea? What is the highest mountain in the world? What is the longest river in
Africa? Which season comes before autumn? Which letter comes after B? Which letter comes before
Z? Which number comes after nine? Which number comes before twenty? What is paper made from?
What is glass made from? Where does the sun rise? Where does the sun set? What do you call a
person who teaches? What do you call a person who cooks in a restaurant? What do you call a
person who writes books? What do you call the place where books are kept? What do you call the
place where planes land? What tells us the time? Which shape has three sides? Which shape has no
corners? What is the chemical symbol for gold? What is the chemical symbol for water? In which
country is the Eiffel Tower? In which country are the pyramids? In which country is the Great
Wall? In which city is Big Ben? In which city is the Statue of Liberty? Which sport is played
with a racket? Which sport is played at Wimbledon? Which instrument has six strings? What is the
center of our solar system? Which organ do we think with? Which part of the body do we see with?
Which part of the body do we hear with? What do we use our nose for? What do doctors do? What
does a baker make? What does a camera do? Which is heavier, iron or wood? Which is faster, a car
or a bicycle? Which is colder, ice or steam? What do you say when you meet someone? What do you
say when you leave? What is the name of our galaxy? What is the currency of Japan? What is the
currency of the United States? Which ocean is between Europe and America? Which vegetable makes
you cry when you cut it?
"""

clips, out, of, seed, answer, questions = sys.argv[1:]
out, of = Path(out), Path(of)
adverbs = {
    "rate": {"slow": "slowly", "normal": "at a normal rate"},
    "loudness": {"quiet": "quietly", "normal": "at a normal volume", "loud": "loudly"},
}
try:
    entries = targets.described_clips(clips)
    asked = audio.read_manifest(questions) if questions else []
    audio.can_be_heard(entries + asked, audio.HOP, SECONDS)
except (ValueError, OSError) as error:
    sys.exit(str(error))
for number, entry in enumerate(entries, 1):
    if not isinstance(entry.get("speaker"), str):
        sys.exit(f"{clips}, entry {number}: wanted a speaker")
    for name, value in entry["style"].items():
        entry["style"][name] = adverbs.get(name, {}).get(value, value)
unheard = set(sorted({entry["speaker"] for entry in entries})[int(seed) % 3 :: 3])
test = [entry for entry in entries if entry["speaker"] in unheard]
if not 0 < len(test) < len(entries):
    sys.exit(f"{clips}: wanted at least three speakers")
made = {out / "clips.jsonl": entries, of / "test.jsonl": test}

# Every second clip again, with a question to learn from in place of its words.
learnt = [f"{question.strip()}?" for question in " ".join(ASKED.split()).split("?") if question]
made[out / "asked.jsonl"] = [
    entry | {"text": learnt[n % len(learnt)]} for n, entry in enumerate(entries[::2])
]

# Questions, spoken and typed.
typed, heard = [], []
for number, entry in enumerate(asked, 1):
    if audio.letters(str(entry.get("text"))) in map(audio.letters, learnt):
        sys.exit(f"{questions}, entry {number}: the adapter learns from it; take it out")
    told = [entry.get(key) for key in ("text", "answer")]
    if not all(isinstance(text, str) and text.strip() for text in told):
        sys.exit(f"{questions}, entry {number}: wanted audio, text and answer")
    wanted = {"answer": entry["answer"], "metric": "contains", "fact": entry["text"]}
    typed.append(wanted | {"text": f"{entry['text']} {answer}"})
    heard.append(wanted | {"audio": entry["audio"], "instruction": answer})
if questions:
    made |= {of / "typed.jsonl": typed, of / "heard.jsonl": heard}
for path, lines in made.items():
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
END
echo "$of_weights" > "$out/WEIGHTS"
echo "$of_clips" > "$out/CLIPS"
echo "${STEPS:-600}" > "$of/STEPS"
[ -z "${QUESTIONS:-}" ] || echo "$of_questions" > "$of/QUESTIONS"
of_prompts=$(echo "$template $prompt $answer" | cat - "$out/asked.jsonl" | cksum)
same "$out/PROMPTS" "$of_prompts"
echo "$of_prompts" > "$out/PROMPTS"

# What the model says of descriptions, and what the encoder makes of the sound: once for all seeds.
asked=asked
[ "$adapter" != no_transcript ] || asked=clips  # no one could hear a question that is not there
targets=$out/described-$(basename "$writer").jsonl
answers=$out/$asked-answered-$(basename "$writer").jsonl
states=$out/states-$(basename "$whisper")
step desta.py write "$out/clips.jsonl" --model "$writer" --template "$template" \
  --prompt "$prompt" --out "$targets"
step desta.py write "$out/$asked.jsonl" --model "$writer" --template "{text}" \
  --prompt "$answer" --out "$answers"
step desta.py encode "$out/clips.jsonl" --encoder "$whisper" --out "$states"

# The adapter. Targets of the test's voices are left out. A task is one prompt, with right answers.
task=
if [ "$adapter" = task_sft ]; then task="${template%%, says*}."; fi
python - "$of/test.jsonl" "$task" "$targets" "$answers" > "$of/train.jsonl" <<'END'
import json, sys

test, task, *targets = sys.argv[1:]
unheard = {json.loads(line)["speaker"] for line in open(test)}
for path in targets[:1] if task else targets:
    for entry in map(json.loads, open(path)):
        if task:
            entry["target"] = task.format(**entry["style"])
        if entry["speaker"] not in unheard:
            print(json.dumps(entry))
END
step desta.py train "$of/train.jsonl" --model "$llm" --states "$states" --queries 16 \
  --steps ${STEPS:-600} --seed "$seed" ${flags[@]+"${flags[@]}"} --out "$of/desta"

# What it says of unheard voices; what it says on reading about them, and of their transcripts.
step evaluate.py manner "$of/desta" --clips "$of/test.jsonl" --template "$template" \
  --prompt "$prompt" --out "$of/manner.json"

# What the encoder alone knows after the same voices: a linear probe of its states.
step evaluate.py probe "$states" --learnt "$of/train.jsonl" --clips "$of/test.jsonl" \
  --out "$of/probe.json"

# Spoken questions, beside the same ones typed.
if [ -n "${QUESTIONS:-}" ]; then
  step benchmark.py questions "$llm" "$of/typed.jsonl" --out "$of/typed.json"
  step benchmark.py questions "$of/desta" "$of/heard.jsonl" --out "$of/heard.json"
fi

# All of it in one file, with every answer, and what the targets name of the voices.
python - "$of" "$seed" "$(basename "$llm")" "$(basename "$whisper")" "$adapter" \
  "$(basename "$writer")" "$prompt" <<'END'
import json, platform, sys
from pathlib import Path

import evaluate
import torch

of, (seed, llm, whisper, way, writer, prompt) = Path(sys.argv[1]), sys.argv[2:]
read = lambda name: json.loads((of / name).read_text())
made = {"seed": int(seed), "model": llm, "encoder": whisper, "adapter": way, "writer": writer}
made["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
targets = [json.loads(line) for line in (of / "train.jsonl").read_text().splitlines()]
described = [entry for entry in targets if entry["prompt"] == prompt]
made["targets"] = len(targets)
made["written"] = evaluate.named([entry["target"] for entry in described], described)
made |= {name: read("manner.json")[name] for name in ("rows", "answers")}
made["probe"] = read("probe.json")["probe"]
for name, file in (("typed", "typed.json"), ("spoken", "heard.json")):
    if (of / file).exists():
        asked = map(json.loads, (of / "typed.jsonl").read_text().splitlines())
        said = [
            {"text": entry["text"], "answer": entry["answer"], "reply": reply}
            for entry, reply in zip(asked, read(file)["replies"])
        ]
        made[name] = {"score": read(file)["contains"], "said": said}
        print(f"questions {name}: {made[name]['score']['value']:.2f}")
(of / "report.json").write_text(json.dumps(made, indent=1) + "\n")
END
