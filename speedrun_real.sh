#!/usr/bin/env bash
# The real recipe: Qwen2.5-0.5B and its instruct twin, HuBERT base, the 100 clean hours of LibriSpeech, one GPU.
#   bash speedrun_real.sh [WEIGHTS] [SPEECH] [OUT]        run again after a stop, it goes on at the step it was in
# NOT RUN TO ITS END HERE: what is tested is every command below, on folders of these shapes cut in depth and a few utterances. Read the figures as a plan.
# First, once (9 GB):
#   hf download Qwen/Qwen2.5-0.5B          --local-dir weights/base         1.0 GB
#   hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir weights/instruct     1.0 GB
#   hf download facebook/hubert-base-ls960 --local-dir weights/hubert       0.4 GB
#   LibriSpeech's train-clean-100 from openslr.org/12, unpacked to LibriSpeech/ (6.3 GB); or a folder or manifest of your own, with transcripts
# SmolLM2-135M and its instruct twin (0.3 GB each) are the small choice: the same commands, weights in the same places.
# Disk: units 4 bytes each, some tens of MB; speech and merged 2 GB each (float32), a checkpoint 5 GB.
# Time: on two CPU cores encoding runs at 14 times real time (measured), 7 hours; nothing here has been timed on a GPU.
# Expect transcripts, and an instruct model that still chats. Do not expect the toy's spoken answers: LibriSpeech has no word times, and without them no word can be matched
# with how it reads (--imitate 0). A manifest with "words" from a forced aligner has them: then leave --imitate and --mix as they are.
set -euo pipefail
cd "$(dirname "$0")"
weights=${1:-weights}
speech=${2:-LibriSpeech}
out=${3:-out/real}

step() {        # step SCRIPT FLAGS...: run a command unless what follows its --out is there already
  local words="$*"
  local result=${words##*--out }
  if [ -e "$result" ]; then echo "== $result is there"; else echo "== python $*"; python "$@"; fi
}

# Speech to units: 500 clusters of HuBERT's ninth layer, the runs collapsed.
step tokenize_audio.py fit --manifest $speech --hubert $weights/hubert --layer 9 --k 500 --frames 500000 --minibatch 10000 --out $out/codebook
step tokenize_audio.py encode --manifest $speech --codebook $out/codebook --out $out/units
# Text that shows which inputs text uses, and that keeps the base a base: here the transcripts alone; any text of your own is better.
[ -e $out/text.txt ] || python -c "import json, sys; [print(json.loads(line)['text']) for line in open(sys.argv[1])]" $out/units/manifest.jsonl > $out/text.txt
# Hearing, from the *base*: a tenth of the toy's rate and less; rows long enough for any utterance. 2,000 steps of 65,536 ids: 130 M, some 20 passes over the hundred hours.
step pretrain.py --init $weights/base --units $out/units --text $out/text.txt --mix interleave=0.5,transcribe=0.3,text=0.2 --imitate 0 --lr 1e-4 --steps 2000 --rows 8 --length 2048 --accumulate 4 --recompute --out $out/speech
# The paper's lam.
step merge.py --base $weights/base --instruct $weights/instruct --speech $out/speech --lam 0.85 --out $out/merged
python chat.py $out/merged
