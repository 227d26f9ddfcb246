#!/usr/bin/env bash
# Two experiments for a class, on what speedrun.sh left in out/ (or in OUT); each ends with its table and a sentence.
#   bash experiments.sh lam   [OUT]     how much hearing to add to how much behaviour (at once: the sweep is in the run's table)
#   bash experiments.sh start [OUT]     hearing learnt by the instruct model itself, instead of by its base and added (a quarter of an hour on two cores)
set -euo pipefail
cd "$(dirname "$0")"
home=$PWD
out=${2:-out}
case ${1:-} in
  lam) python evaluate.py lam "$out/table.json" ;;
  # The same units, text, steps and seed as the speech model's; but what it starts from has been tuned on chats, and nothing is added afterwards.
  # Once as the speech model learns, by imitating what it starts from and leaving alone what text uses; once by the loss of the next token alone.
  start)
    seed=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['settings']['seed'])" "$out/speech/training.json")
    for plain in "" _plain; do
      flags=${plain:+--imitate 0 --keep-text 0}
      [ -e "$out/from_instruct$plain" ] || python pretrain.py --init "$out/instruct" --units "$out/units" --text "$out/toy/base.jsonl" $flags --seed $seed --out "$out/from_instruct$plain"
    done
    cd "$out" && python "$home/evaluate.py" compare merged from_instruct from_instruct_plain --questions toy/questions.jsonl --out start.json --overwrite ;;
  *) sed -n 2,4p experiments.sh; exit 2 ;;
esac
