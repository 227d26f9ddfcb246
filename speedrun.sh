#!/usr/bin/env bash
# From nothing to an answer to a spoken question: the whole recipe, in order, on a small world made from a seed.
#   bash speedrun.sh [SEED]          two cores and 8 GiB will do; run again after a stop, it goes on at the step it was in
# Every command writes its result (--out) beside and renames it when done: what is there is whole, and its step is skipped.
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0}
out=out; [ "$seed" = 0 ] || out=out/seed$seed

step() {        # step SCRIPT FLAGS...: run a command unless what follows its --out is there already
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# A world: its text, chats and questions, and three hours of plain sentences read aloud by six voices.
step toy.py world --seed $seed --out $out/toy
# The two open models of the recipe, in miniature: a base that has read the world's text, and what chats make of it.
step pretrain.py --size nano --tokenizer $out/toy/tokenizer --text $out/toy/base.jsonl --seed $seed --out $out/base
step pretrain.py --init $out/base --chat $out/toy/chat.jsonl --seed $seed --out $out/instruct
# Speech to units, twice: MFCC units teach a small HuBERT, whose middle layer gives the units the model will hear.
step tokenize_audio.py fit --manifest $out/toy/speech/train.jsonl --features mfcc --k 100 --seed $seed --out $out/codebook_mfcc
step tokenize_audio.py encode --manifest $out/toy/speech/train.jsonl --codebook $out/codebook_mfcc --out $out/units_mfcc
step hubert.py train --units $out/units_mfcc --seed $seed --out $out/hubert
step tokenize_audio.py fit --manifest $out/toy/speech/train.jsonl --hubert $out/hubert --layer 4 --k 100 --seed $seed --out $out/codebook
step tokenize_audio.py encode --manifest $out/toy/speech/train.jsonl --codebook $out/codebook --out $out/units
# Hearing: continue pre-training the *base* on units and text. No chat, no question with its answer.
step pretrain.py --init $out/base --units $out/units --text $out/toy/base.jsonl --seed $seed --out $out/speech
# The idea: base + lam * (speech - base) + (instruct - base). This lam was chosen once, on seed 0's dev questions.
step merge.py --base $out/base --instruct $out/instruct --speech $out/speech --lam 1.15 --out $out/merged
# What it can do, beside what it was made from; then ask it something, out loud.
step evaluate.py table --base $out/base --instruct $out/instruct --speech $out/speech --merged $out/merged --questions $out/toy/questions.jsonl --out $out/table.json
step toy.py say "what is the capital of france" --voice unheard --out $out/question.wav
python evaluate.py show $out/table.json
python chat.py $out/merged $out/question.wav
