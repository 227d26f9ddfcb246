#!/usr/bin/env bash
# Two experiments for a class, on what speedrun.sh left in out/ (or in OUT); each ends with its table and a sentence.
#   bash experiments.sh lam   [OUT]     how much hearing to add to how much behaviour (at once: the sweep is in the run's table)
#   bash experiments.sh start [OUT]     hearing learnt by the instruct model itself, instead of by its base and added (ten minutes on two cores)
set -euo pipefail
cd "$(dirname "$0")"
out=${2:-out}
case ${1:-} in
  lam) python evaluate.py lam $out/table.json ;;
  # The same units, text, steps and seed as the speech model's; but what it starts from has been tuned on chats, and nothing is added afterwards.
  start)
    [ -e $out/speech_from_instruct ] || python pretrain.py --init $out/instruct --units $out/units --text $out/toy/base.jsonl --out $out/speech_from_instruct
    python evaluate.py compare $out/merged $out/speech_from_instruct --questions $out/toy/questions.jsonl --out $out/start.json --overwrite ;;
  *) sed -n 2,4p "$0"; exit 2 ;;
esac
