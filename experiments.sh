#!/usr/bin/env bash
# Two experiments for a class, on what speedrun.sh left in out/ (or in OUT); each ends with its table and a sentence.
#   bash experiments.sh lam   [OUT]     how much hearing to add to how much behaviour (at once: the sweep is in the run's table)
#   bash experiments.sh start [OUT]     hearing learnt by the instruct model itself, instead of by its base and added (25 minutes on two cores)
set -euo pipefail
cd "$(dirname "$0")"
home=$PWD
out=${2:-out}
if [ $# -gt 0 ] && [ ! -e "$out/table.json" ]; then echo "$out: no table.json, so no finished speedrun; run bash speedrun.sh first, or name its folder" >&2; exit 1; fi
case ${1:-} in
  lam) python evaluate.py lam "$out/table.json" ;;
  # Two by two: hearing learnt from the base and added, or from the instruct model with nothing added afterwards; as the speech model learns it (by imitating what it starts
  # from, and leaving alone what text uses), or by the loss of the next token alone. The same units, text, steps and seed.
  start)
    seed=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['settings']['seed'])" "$out/speech/training.json")
    cd "$out"
    for plain in "" _plain; do
      flags=${plain:+--imitate 0 --keep-text 0}
      for start in base instruct; do
        hears=$([ $start = base ] && echo speech || echo from_instruct)$plain
        [ -e $hears ] || python "$home/pretrain.py" --init $start --units units --text toy/base.jsonl $flags --seed $seed --out $hears
      done
      [ -e merged$plain ] || python "$home/merge.py" --base base --instruct instruct --speech speech$plain --lam 1.15 --out merged$plain
    done
    python "$home/evaluate.py" compare merged from_instruct merged_plain from_instruct_plain --questions toy/questions.jsonl --out start.json --overwrite ;;
  *) sed -n 2,4p experiments.sh; exit 2 ;;
esac
