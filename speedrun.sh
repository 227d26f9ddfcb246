#!/usr/bin/env bash
# From nothing to an answer to a spoken question: the whole recipe, in order, on a small world.
#   bash speedrun.sh [SEED]          run again after a stop, it goes on at the step it was in
# Every command writes its result (--out) beside and renames it when done: what is there is whole,
# and its step is skipped. Two cores and 8 GiB will do.
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0}
out=out; [ "$seed" = 0 ] || out=out/seed$seed

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# A world: its text, chats and questions, and three hours of sentences read aloud by six voices.
step toy.py world --seed $seed --out $out/toy

# A base, from nothing: 700 steps on text. Half of the documents have gaps between positions, as
# words of speech stand further apart than words of text.
step pretrain.py --size nano --tokenizer $out/toy/tokenizer --text $out/toy/base.jsonl \
  --seed $seed --out $out/base

# An instruct model, from that base: 600 steps on chats, with gaps too. Only the upper half of the
# blocks learns, and of the embedding only the chat's markers.
step pretrain.py --init $out/base --chat $out/toy/chat.jsonl --seed $seed --out $out/instruct

# Speech to units, twice, as HuBERT does: MFCC units teach a small HuBERT to predict what it cannot
# hear, and the clusters of its fourth layer are the units that the model will hear.
step tokenize_audio.py fit --manifest $out/toy/speech/train.jsonl --features mfcc --k 100 \
  --seed $seed --out $out/codebook_mfcc
step tokenize_audio.py encode --manifest $out/toy/speech/train.jsonl \
  --codebook $out/codebook_mfcc --out $out/units_mfcc
step hubert.py train --units $out/units_mfcc --seed $seed --out $out/hubert
step tokenize_audio.py fit --manifest $out/toy/speech/train.jsonl --hubert $out/hubert \
  --layer 4 --k 100 --seed $seed --out $out/codebook
step tokenize_audio.py encode --manifest $out/toy/speech/train.jsonl --codebook $out/codebook \
  --out $out/units

# Hearing, from the *base*: 1,000 steps on transcripts (two thirds) and on speech and text by turns.
# No chat, and no spoken question with its answer; written ones may stand beside speech. The base,
# frozen, is the teacher (weight 7). Changes that text would feel are filtered out (strength 0.01).
# The first twentieth of the steps trains the new rows alone, which learn ten times as fast; no
# other row, no norm and no output changes.
step pretrain.py --init $out/base --units $out/units --text $out/toy/base.jsonl --seed $seed \
  --out $out/speech

# The idea: base + lam * (speech - base) + (instruct - base). This lam was chosen once, on seed 0's
# dev questions.
step merge.py --base $out/base --instruct $out/instruct --speech $out/speech --lam 1.15 \
  --out $out/merged

# What it can do, beside what it was made from; then ask it something, out loud.
step evaluate.py table --base $out/base --instruct $out/instruct --speech $out/speech \
  --merged $out/merged --questions $out/toy/questions.jsonl --out $out/table.json
step toy.py say "what is the capital of france" --voice unheard --out $out/question.wav
python evaluate.py show $out/table.json
python chat.py $out/merged $out/question.wav
