#!/usr/bin/env bash
# The paper's documents and loss, on the toy world: not what was said, but how. Transcripts beside
# the speech, tokens of prosody, captions, the plain loss. README says what is ours beyond them.
# 49 minutes on two cores of a Xeon in float32.
#   bash speedrun_manner.sh [SEED]     run again after a stop, it goes on at the step it was in
set -euo pipefail
cd "$(dirname "$0")"
seed=${1:-0}
out=out/manner; [ "$seed" = 0 ] || out=out/seed$seed/manner

step() {        # step SCRIPT FLAGS... --out RESULT: run a command unless its result is there
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# A world: lines with captions of how they are said, in text and read aloud.
step manner.py --seed $seed --out $out/world

# A base, and an instruct model from it, by the loss of the next token. What chats train is said in
# STAGES of pretrain.py: the upper half of the blocks, and of the embedding only their markers. At
# full depth the delta of instruct hides the stressed word from the sum. --pace 1: no position gaps.
step pretrain.py --size nano --tokenizer $out/world/tokenizer --text $out/world/base.jsonl \
  --plain --steps 1000 --seed $seed --out $out/base
step pretrain.py --init $out/base --chat $out/world/chat.jsonl --pace 1 --lr 1.2e-3 \
  --steps 800 --batch 8 --length 256 --seed $seed --out $out/instruct

# Of every spoken word its pitch, range, slope, length and loudness, each in one of 16 bins.
step prosody.py $out/world/speech/train.jsonl --out $out/prosody
step prosody.py $out/world/dev.jsonl --bins $out/prosody --out $out/dev
step prosody.py $out/world/test.jsonl --bins $out/prosody --out $out/test

# Hearing, from the base: (caption) text <speech> (another line) (caption); what is in brackets, in
# some documents. A fifth is text alone. The plain loss; 1,600 steps of 16 rows at a rate of 5e-4.
step pretrain.py --init $out/base --units $out/prosody --text $out/world/base.jsonl \
  --seed $seed --out $out/speech

# base + lam * (speech - base) + (instruct - base), at the lam that answers the dev questions best.
# lam 0 is instruct with the new rows alone. --signs puts new rows nearer to signs, which instruct
# has learnt to read past; among rows unlike any it knows, it loses facts.
step benchmark.py lam $out/dev/manifest.jsonl --base $out/base --instruct $out/instruct \
  --speech $out/speech --signs 0.5 --out $out/lam.json
lam=$(python -c "import json; print(json.load(open('$out/lam.json'))['lam'])")
step merge.py --base $out/base --instruct $out/instruct --speech $out/speech --lam $lam \
  --signs 0.5 --out $out/merged
step merge.py --base $out/base --instruct $out/instruct --speech $out/speech --lam 0 \
  --signs 0.5 --out $out/instruct_rows

# Unheard voices. "cascade" is instruct with a perfect transcript: the words, without the how.
step benchmark.py questions $out/merged $out/test/manifest.jsonl --out $out/merged.json
step benchmark.py questions $out/merged $out/world/test_text.jsonl --out $out/typed.json
step benchmark.py questions $out/instruct $out/world/test_text.jsonl --out $out/cascade.json
step benchmark.py questions $out/speech $out/test/manifest.jsonl --out $out/speech.json
step benchmark.py questions $out/instruct_rows $out/test/manifest.jsonl \
  --out $out/instruct_rows.json
cd $out
python "$OLDPWD/benchmark.py" show {merged,typed,cascade,speech,instruct_rows}.json
