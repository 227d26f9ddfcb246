#!/usr/bin/env bash
# The real recipe: an open base model, its instruct twin, and hours of speech with transcripts.
#   bash speedrun_real.sh [WEIGHTS] [SPEECH] [OUT]    after a stop, run it again
#
# The plan, for one GPU (10 GB to download, once; it has not been run at this size):
#   hf download Qwen/Qwen2.5-0.5B          --local-dir weights/base         1.0 GB
#   hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir weights/instruct     1.0 GB
#   hf download facebook/hubert-base-ls960 --local-dir weights/hubert       0.4 GB
#   hf download openai/whisper-base        --local-dir weights/whisper      0.3 GB
#   LibriSpeech's train-clean-100 from openslr.org/12, unpacked to LibriSpeech/ (6.3 GB); or a
#   folder or manifest of your own, with transcripts
# Without weights/hubert a small HuBERT is trained on SPEECH first, and holds it in memory (0.23 GB
# an hour). Without weights/whisper there are no word times: no word can be matched with how it
# reads, so hearing is learnt by the plain loss.
#
# A trial of the whole path: 10 minutes and 6.9 GB of memory on two cores, for 47 minutes of speech.
# Any folder of these families will do:
#   BASE=weights/SmolLM2-135M-Instruct INSTRUCT=weights/SmolLM2-135M-Instruct \
#     WHISPER=weights/whisper-tiny.en STEPS=20 BATCH=1 ACCUMULATE=1 \
#     bash speedrun_real.sh weights clips.jsonl out/trial
#
# Expect transcripts (with word times, of stretches of at most 19 words), and an instruct model that
# still chats. Do not expect the toy's spoken answers.
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
speech=${2:-LibriSpeech}
out=${3:-out/real}
base=${BASE:-$weights/base}
instruct=${INSTRUCT:-$weights/instruct}
whisper=${WHISPER:-$weights/whisper}
hubert=$weights/hubert
layer=9
for folder in "$base" "$instruct" "$speech" ${WHISPER:+"$WHISPER"}; do
  if [ ! -e "$folder" ]; then
    echo "$folder: no such folder; this script's head says what to download" >&2
    exit 1
  fi
done
# What OUT is made of: the clips, by a list of the files or the manifest's content; and which of the
# two that may be left out are there.
list() {
  if [ -d "$speech" ]; then find -L "$speech" -type f | LC_ALL=C sort; else cat "$speech"; fi
}
made="$base $instruct $speech $(list | cksum) ${STEPS:-2000} ${BATCH:-8} ${ACCUMULATE:-4}"
for folder in "$whisper" "$hubert"; do
  if [ -e "$folder" ]; then made="$made $folder"; else made="$made no-$(basename "$folder")"; fi
done
if [ -e "$out/MADE_OF" ] && [ "$(cat "$out/MADE_OF")" != "$made" ]; then
  echo "$out: made of $(cat "$out/MADE_OF"), not of $made; remove it, or give another OUT" >&2
  exit 1
fi
mkdir -p "$out"
echo "$made" > "$out/MADE_OF"

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# When each word was said: what interleaving by words and the teacher need.
hearing="--mix interleave=0.5,transcribe=0.3,text=0.2 --imitate 0"
if [ -e "$whisper" ]; then
  step whisper.py words "$speech" --whisper "$whisper" --out "$out/words.jsonl"
  speech=$out/words.jsonl
  hearing="--mix interleave=0.35,transcribe=0.45,text=0.2"
fi

# No HuBERT at hand: a small one learns from this speech alone, as in speedrun.sh.
if [ ! -e "$hubert" ]; then
  step tokenize_audio.py fit --manifest "$speech" --features mfcc --k 100 --out "$out/codebook_mfcc"
  step tokenize_audio.py encode --manifest "$speech" --codebook "$out/codebook_mfcc" \
    --out "$out/units_mfcc"
  step hubert.py train --units "$out/units_mfcc" --out "$out/hubert"
  hubert=$out/hubert layer=4
fi

# Speech to units: 500 clusters of a middle layer, the runs collapsed.
step tokenize_audio.py fit --manifest "$speech" --hubert "$hubert" --layer $layer --k 500 \
  --frames 500000 --minibatch 10000 --out "$out/codebook"
step tokenize_audio.py encode --manifest "$speech" --codebook "$out/codebook" --out "$out/units"

# Text that shows which inputs text uses, and that keeps the base a base: here the transcripts
# alone; any text of your own is better.
if [ ! -e "$out/text.txt" ]; then
  python -c "import json, sys; entries = map(json.loads, open(sys.argv[1])); \
[print(entry['text']) for entry in entries if entry.get('text')]" \
    "$out/units/manifest.jsonl" > "$out/text.partial"
  mv "$out/text.partial" "$out/text.txt"
fi

# Hearing, from the *base*: a tenth of the toy's rate and less; rows long enough for any utterance.
# 2,000 steps of 65,536 ids are 130 M, some 20 passes over a hundred hours.
step pretrain.py --init "$base" --units "$out/units" --text "$out/text.txt" $hearing --lr 1e-4 \
  --steps ${STEPS:-2000} --batch ${BATCH:-8} --length 2048 --accumulate ${ACCUMULATE:-4} \
  --recompute --out "$out/speech"

# The paper's lam.
step merge.py --base "$base" --instruct "$instruct" --speech "$out/speech" --lam 0.85 \
  --out "$out/merged"
python chat.py "$out/merged"
