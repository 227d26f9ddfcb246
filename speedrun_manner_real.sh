#!/usr/bin/env bash
# SpeechCombine on open weights: the paper's documents (transcripts, tokens of prosody, captions)
# and LoRA. Captions, and words that stand twice, bear another share of the loss: see below.
#   bash speedrun_manner_real.sh [WEIGHTS] [CLIPS] [OUT] [SEED]    after a stop, run it again
#
# WEIGHTS  folders of a base and of an instruct model made from it. The smallest pair (0.6 GB):
#            hf download HuggingFaceTB/SmolLM2-135M --local-dir weights/SmolLM2-135M
#            hf download HuggingFaceTB/SmolLM2-135M-Instruct \
#               --local-dir weights/SmolLM2-135M-Instruct
#          and others are named by BASE=Qwen2.5-0.5B INSTRUCT=Qwen2.5-0.5B-Instruct. One instruct
#          model may be both: then the sum is instruct + lam * (speech - instruct).
# CLIPS    a manifest with "audio", "text", "speaker", "seconds" and "style": {"gender": "woman",
#          "rate": "fast", "loudness": "quiet"}
# A third of the speakers is kept for the test, for each of the seeds 0, 1 and 2 a different one. Of
# the others, two choose lam. STEPS=300 of hearing, unless another number is given.
# QUESTIONS=questions.jsonl asks spoken questions, too: JSON lines {"audio", "text", "answer"}. Half
# of them choose lam, half are the test. Lam is chosen by which replies hold the right word; in the
# test one that holds a second value, too, is wrong.
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
clips=${2:-clips.jsonl}
seed=${4:-0}
base=$weights/${BASE:-SmolLM2-135M}
instruct=$weights/${INSTRUCT:-SmolLM2-135M-Instruct}
out=${3:-out/manner_real}/$(basename "$base")-seed$seed

# What is asked about a clip. As written, for what the model says when it reads the same.
prompt="Describe the speaker in one sentence."
template='A {gender} speaks {rate} and {loudness}: "{text}"'

for file in "$clips" ${QUESTIONS:+"$QUESTIONS"}; do
  [ -f "$file" ] || { echo "$file: no such file; wanted JSON lines" >&2; exit 1; }
done
for folder in "$base" "$instruct"; do
  if [ ! -f "$folder/config.json" ]; then
    echo "$folder: no such model folder; this script's head says what to download" >&2
    exit 1
  fi
done
for number in "$seed" "${STEPS:-300}"; do
  case $number in '' | *[!0-9]*) echo "SEED and STEPS are numbers; got $number" >&2; exit 1 ;; esac
done

made="$base $instruct ${STEPS:-300} $(cat "$clips" ${QUESTIONS:+"$QUESTIONS"} | cksum)"
if [ -e "$out/MADE_OF" ] && [ "$(cat "$out/MADE_OF")" != "$made" ]; then
  echo "$out: made of other models, CLIPS, QUESTIONS or STEPS; remove it, or give another OUT" >&2
  exit 1
fi

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local result=${*: -1}
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# Captions of the clips; of two voices and of half the questions, the rows that choose lam.
mkdir -p "$out"
python - "$clips" "$out" "$seed" "$prompt" "${QUESTIONS:-}" <<'END'
import json, random, sys
from pathlib import Path

import audio
import targets

clips, out, seed, prompt, questions = sys.argv[1:]
adverbs = {
    "gender": {},
    "rate": {"slow": "slowly", "normal": "at a normal rate"},
    "loudness": {"quiet": "quietly", "normal": "at a normal volume", "loud": "loudly"},
}


def write(name, entries):
    (Path(out) / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


try:
    entries = targets.described_clips(clips)
    asked_aloud = audio.read_manifest(questions) if questions else []
    audio.lengths(entries + asked_aloud)  # all of them can be opened
except (ValueError, OSError) as error:
    sys.exit(str(error))
for number, entry in enumerate(entries, 1):
    if not isinstance(entry.get("speaker"), str) or not {*adverbs} <= {*entry["style"]}:
        sys.exit(f"{clips}, entry {number}: wanted a speaker, and a style of {', '.join(adverbs)}")
    style = entry["style"]
    entry["style"] = {
        name: words.get(style[name], style[name]) for name, words in adverbs.items()
    }
    entry["caption"] = "A {gender} speaks {rate} and {loudness}".format(**entry["style"])
for number, entry in enumerate(asked_aloud, 1):
    told = [entry.get(key) for key in ("text", "answer")]
    if not all(isinstance(text, str) and text.strip() for text in told):
        sys.exit(f"{questions}, entry {number}: wanted audio, text and answer")
speakers = sorted({entry["speaker"] for entry in entries})
test = speakers[int(seed) % 3 :: 3]
if len(speakers) < 5:
    sys.exit(f"{clips}: {len(speakers)} speakers, wanted 5 or more: some test, two choose lam")
rng = random.Random(seed)
dev = rng.sample([speaker for speaker in speakers if speaker not in test], 2)
write("test", [entry for entry in entries if entry["speaker"] in test])
write("train", [entry for entry in entries if entry["speaker"] not in [*test, *dev]])

asked = []
for speaker in dev:
    for entry in [entry for entry in entries if entry["speaker"] == speaker][:8]:
        asked += [
            entry | {"instruction": prompt, "answer": value, "group": name, "metric": "contains"}
            for name, value in entry["style"].items()
        ]
if questions:
    spoken = [
        entry | {"instruction": "Answer it.", "metric": "contains", "fact": entry["text"]}
        for entry in asked_aloud
    ]
    texts = sorted({entry["text"] for entry in spoken})
    chosen = rng.sample(texts, len(texts) // 2)
    once = {entry["text"]: entry for entry in spoken if entry["text"] in chosen}
    asked += [entry | {"group": "question"} for entry in once.values()]
    spoken = [entry for entry in spoken if entry["text"] not in chosen]
    write("spoken", spoken)
    names = "text", "instruction", "answer", "metric"
    typed = {entry["text"]: {name: entry[name] for name in names} for entry in spoken}
    write("typed", list(typed.values()))
write("dev", asked)
END
echo "$made" > "$out/MADE_OF"

step prosody.py "$out/train.jsonl" --out "$out/prosody"
for part in dev ${QUESTIONS:+spoken}; do
  step prosody.py "$out/$part.jsonl" --bins "$out/prosody" --out "$out/$part"
done

# Text that the base itself wrote: with it in the mix, hearing leaves the base's text as it was.
[ -e "$out/text.jsonl" ] || python - "$base" "$out/text.jsonl" <<'END'
import json, os, sys

import runs
import torch

from model import LM, generate
from vocab import Vocab

folder, out = sys.argv[1:]
model, vocab = LM.load(folder, dtype=torch.float32).eval(), Vocab(folder)
start = torch.tensor(vocab.begin or [vocab.eos])
texts = []
for seed in runs.Bar(range(10), desc="writing text", unit="batch"):
    words = {"temperature": 1.0, "top_p": 0.9, "seed": seed}
    allowed = sorted({*vocab.text_rows(), *vocab.stop})
    steps = list(generate(model, [start] * 32, 64, vocab.stop, allowed, **words))
    for ids in torch.stack(steps).T.tolist():
        end = next((n for n, i in enumerate(ids) if i in vocab.stop), len(ids))
        texts.append(vocab.decode(ids[:end]).strip())
with open(f"{out}.partial", "w") as file:
    file.writelines(json.dumps({"text": text}) + "\n" for text in texts if text)
os.rename(f"{out}.partial", out)
END

# Hearing: the documents of speedrun_manner.sh. A caption behind speech is a tenth of their text,
# and all that speech can tell: with a few hundred clips it has to count more. The words inside the
# speech count nothing: copying them teaches to read past the numbers between them.
step pretrain.py --init "$base" --units "$out/prosody" --text "$out/text.jsonl" \
  --mix captioned=0.7,text=0.3 --lora 16 --lr 1e-3 --caption-loss 24 --echo-loss 0 \
  --batch 8 --length 160 --steps ${STEPS:-300} --seed $seed --out "$out/speech"

# The sum, at the lam that does best on the voices and questions that are kept for it.
step benchmark.py lam "$out/dev/manifest.jsonl" --base "$base" --instruct "$instruct" \
  --speech "$out/speech" --out "$out/lam.json"
lam=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['lam'])" "$out/lam.json")
step merge.py --base "$base" --instruct "$instruct" --speech "$out/speech" --lam $lam \
  --out "$out/merged"

# What it says of unheard voices; what it says on reading about them, and of their transcripts.
step evaluate.py manner "$out/merged" --clips "$out/test.jsonl" --template "$template" \
  --prompt "$prompt" --out "$out/manner.json"
if [ -n "${QUESTIONS:-}" ]; then
  step benchmark.py questions "$out/merged" "$out/spoken/manifest.jsonl" --out "$out/spoken.json"
  step benchmark.py questions "$out/merged" "$out/typed.jsonl" --out "$out/typed.json"
  step benchmark.py questions "$instruct" "$out/typed.jsonl" --out "$out/instruct_typed.json"
fi

# All of it in one file, with every answer.
python - "$out" "$seed" "$(basename "$base")" "$(basename "$instruct")" <<'END'
import json, sys
from pathlib import Path

out, (seed, base, instruct) = Path(sys.argv[1]), sys.argv[2:]
read = lambda name: json.loads((out / f"{name}.json").read_text())
trained = read("speech/training")
made = {"seed": int(seed), "base": base, "instruct": instruct, "lam": read("lam")["lam"]}
made |= {"dev": read("lam")["scores"], "minutes": round(trained["seconds"] / 60, 1)}
made["dtype"] = trained["settings"]["dtype"]
made |= {name: read("manner")[name] for name in ("rows", "answers")}
for name, file in (("spoken", "spoken"), ("typed", "typed"), ("instruct_typed", "typed")):
    if (out / f"{name}.json").exists():
        asked = map(json.loads, (out / f"{file}.jsonl").read_text().splitlines())
        said = [
            {"text": entry["text"], "answer": entry["answer"], "reply": reply}
            for entry, reply in zip(asked, read(name)["replies"])
        ]
        made[name] = {"score": read(name)["contains"], "said": said}
        print(f"questions {name}: {made[name]['score']['value']:.2f}")
(out / "manner-real.json").write_text(json.dumps(made, indent=1) + "\n")
END
