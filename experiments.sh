#!/usr/bin/env bash
# Three experiments for a class, on what speedrun.sh left in out/ (or in OUT); each ends with its
# table and a sentence. Minutes are of two cores.
#   bash experiments.sh lam    [OUT]   how much hearing to add to how much behaviour (at once: the
#                                      sweep is in the run's table)
#   bash experiments.sh start  [OUT]   hearing learnt by the instruct model itself, instead of by
#                                      its base and added (25 minutes)
#   bash experiments.sh ablate [OUT]   the recipe without each of its ingredients, and the plain
#                                      recipe with some of them (70 minutes)
# What was made is kept: after a stop, run it again.
set -euo pipefail
cd "$(dirname "$0")"
home=$PWD
out=${2:-out}
if [ $# -gt 0 ] && [ ! -e "$out/table.json" ]; then
  echo "$out: no table.json, so no finished speedrun; run bash speedrun.sh first, or name its folder" >&2
  exit 1
fi

seed() { python -c "import json, sys; print(json.load(open(sys.argv[1]))['settings']['seed'])" speech/training.json; }

# Train, or merge, unless it is there already. The last word is --out's. FLAGS are for a quick look:
# FLAGS="--steps 100" bash experiments.sh ablate
train() { [ -e "${*: -1}" ] || python "$home/pretrain.py" --seed "$seed" ${FLAGS:-} "$@"; }
merge() { [ -e "${*: -1}" ] || python "$home/merge.py" --lam 1.15 "$@"; }

# variant NAME STAGES FLAGS...: the sum with these flags in some stages (base, chat, speech) and with
# the recipe's own in the others, which are trained again only if what they start from has changed.
variant() {
  local name=$1 stages=$2 base=${base:-base} instruct=${instruct:-instruct} speech=${speech:-speech}
  shift 2
  of() { case $stages in *$1*) echo "${flags[*]}" ;; esac; }
  local flags=("$@") to=ablate/$name
  case $stages in *base*)
    train --size nano --tokenizer toy/tokenizer --text toy/base.jsonl $(of base) --out "$to/base"
    base=$to/base ;;
  esac
  case $stages in *base* | *chat*)
    train --init "$base" --chat toy/chat.jsonl $(of chat) --out "$to/instruct"
    instruct=$to/instruct ;;
  esac
  case $stages in *base* | *speech*)
    train --init "$base" --units units --text toy/base.jsonl $(of speech) --out "$to/speech"
    speech=$to/speech ;;
  esac
  merge --base "$base" --instruct "$instruct" --speech "$speech" --out "$to/merged"
}

case ${1:-} in
  lam) python evaluate.py lam "$out/table.json" ;;

  # Two by two: hearing learnt from the base and added, or from the instruct model with nothing added
  # afterwards; as the speech model learns it (by imitating what it starts from, and leaving alone
  # what text uses), or by the loss of the next token alone. The same units, text, steps and seed.
  start)
    cd "$out"
    seed=$(seed)
    for plain in "" _plain; do
      flags=${plain:+--imitate 0 --keep-text 0}
      for start in base instruct; do
        hears=$([ $start = base ] && echo speech || echo from_instruct)$plain
        train --init $start --units units --text toy/base.jsonl $flags --out $hears
      done
      merge --base base --instruct instruct --speech speech$plain --out merged$plain
    done
    python "$home/evaluate.py" compare merged from_instruct merged_plain from_instruct_plain --questions toy/questions.jsonl --out start.json --overwrite ;;

  # What is each ingredient worth? On dev questions, as what is seen here chooses the recipe.
  ablate)
    cd "$out"
    seed=$(seed)
    # One left out. (Without a teacher, interleaved documents bear a loss instead.)
    variant no_teacher speech --imitate 0
    variant no_filter speech --keep-text 0
    variant rows_at_once speech --rows-first 0
    variant all_rows speech --embeddings all
    variant chat_all_blocks chat --layers 0:1
    variant chat_all_rows chat --embeddings all
    variant no_gaps base,chat --pace 1
    # From the plain recipe on: a teacher, and then behaviour in the upper half that moves no word.
    variant plain base,chat,speech --plain
    base=ablate/plain/base instruct=ablate/plain/instruct
    variant plain_teacher speech --rows-first 0 --embeddings all --keep-text 0
    speech=ablate/plain_teacher/speech
    variant plain_teacher_upper chat --pace 1
    python "$home/evaluate.py" compare merged ablate/*/merged --split dev --questions toy/questions.jsonl --out ablations.json --overwrite ;;
  *) sed -n 2,10p experiments.sh; exit 2 ;;
esac
