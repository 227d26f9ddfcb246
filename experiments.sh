#!/usr/bin/env bash
# Six experiments for a class, each with its table at the end. TEACHING.md says how long each takes.
# On what speedrun.sh left in out/ (or in OUT):
#   bash experiments.sh lam    [OUT]   how much hearing to add to how much behaviour: it prints the
#                                      sweep of the run's table
#   bash experiments.sh start  [OUT]   hearing learnt by the instruct model itself, instead of by
#                                      its base and added
#   bash experiments.sh ablate [OUT]   the recipe without each of its ingredients, and the plain
#                                      recipe with some of them
# On what speedrun_manner.sh left in OUT/manner:
#   bash experiments.sh reuse  [OUT]   one hearing, many behaviours: two more instruct models are
#                                      added to the same speech model
#   bash experiments.sh paper  [OUT]   the paper's ablations: no captions, no words beside the
#                                      speech, hearing learnt by instruct itself
# On what speedrun_desta.sh left in OUT/desta:
#   bash experiments.sh desta  [OUT]   no words beside the vectors; answers alone, without the
#                                      caption that the model itself says first; and the adapter,
#                                      unchanged, in front of models that it was not trained with
# What was made is kept: after a stop, run it again.
set -euo pipefail
cd "$(dirname "$0")"
home=$PWD
out=${2:-out}
case ${1:-} in
  lam | start | ablate) script=speedrun.sh needs=table.json ;;
  reuse | paper) script=speedrun_manner.sh needs=manner/instruct_rows.json ;;
  desta) script=speedrun_desta.sh needs=desta/read.json ;;
  *) sed -n 2,19p experiments.sh; exit 2 ;;
esac
if [ ! -e "$out/$needs" ]; then
  echo "$out: no $needs, so no finished run; run bash $script first, or name its folder" >&2
  exit 1
fi

seed() { python -c "import json
print(json.load(open('speech/training.json'))['settings']['seed'])"; }

# Train, or merge, unless it is there already. The last word is --out's.
train() { [ -e "${*: -1}" ] || python "$home/pretrain.py" --seed "$seed" "$@"; }
strengths() { python -c "import json; made = json.load(open('lam.json'))
print('--lam', made['lam'], '--signs', made.get('signs', 0))"; }
merge() { [ -e "${*: -1}" ] || python "$home/merge.py" --lam 1.15 "$@"; }

# variant NAME STAGES FLAGS...: the sum with these flags in some stages (base, chat, speech) and
# with the recipe's own in the others, which are trained again only if what they start from has
# changed.
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

# behave NAME WORDS: the chats of the world of manner.py, and its test questions (as prosody, and as
# sound), with WORDS behind every reply.
behave() {
  [ -e "reuse/$1" ] || python - "$@" <<'PY'
import json, os, sys
name, words = sys.argv[1:]
os.makedirs(f"reuse/{name}.partial", exist_ok=True)
made = {"chat": "world/chat", "test": "test/manifest", "spoken": "world/test"}
for file, source in made.items():
    source += ".jsonl"
    with open(source) as lines, open(f"reuse/{name}.partial/{file}.jsonl", "w") as out:
        for entry in map(json.loads, lines):
            for message in entry.get("messages", []):
                if message["role"] == "assistant":
                    message["content"] += words
            if file == "test":
                keys = "said", "instruction", "group", "metric", "fact", "answer"
                entry = {key: entry[key] for key in keys if key in entry}
            if file == "spoken":
                entry["audio"] = os.path.abspath(f"world/{entry['audio']}")
            if "answer" in entry:
                entry["answer"] += words
            out.write(json.dumps(entry) + "\n")
os.rename(f"reuse/{name}.partial", f"reuse/{name}")
PY
}

# tuned NAME WORDS: the instruct model of these chats, tuned as speedrun_manner.sh tunes its own.
tuned() {
  behave "$@"
  train --init base --pace 1 --lr 1.2e-3 --steps 800 --batch 8 --length 256 \
    --chat "reuse/$1/chat.jsonl" --out "reuse/$1/instruct"
}

# without WHAT FOLDER: a copy of a folder of prosody.py, without the captions, or with their speech
# without its words.
without() {
  [ -e "paper/$1/$2" ] || python - "$@" <<'PY'
import json, os, shutil, sys
what, folder = sys.argv[1:]
made = f"paper/{what}/{folder}"
shutil.copytree(folder, f"{made}.partial", dirs_exist_ok=True)
with open(f"{folder}/manifest.jsonl") as lines, open(f"{made}.partial/manifest.jsonl", "w") as out:
    for entry in map(json.loads, lines):
        if what == "captions":
            entry.pop("caption", None)
        else:
            entry["said"] = [["", numbers] for _, numbers in entry["said"]]
        out.write(json.dumps(entry) + "\n")
os.rename(f"{made}.partial", made)
PY
}

# adapter TARGETS OUT FLAGS...: one of DeSTA2, trained as speedrun_desta.sh trains it.
adapter() {
  [ -e "$2" ] ||
    python "$home/desta.py" train "$1" --model ../manner/instruct --states states --queries 16 \
      --steps 800 --batch 16 --lr 1e-3 --seed "$seed" "${@:3}" --out "$2"
}

# plug MODEL OUT: the adapter of speedrun_desta.sh, unchanged, in front of another model.
plug() {
  [ -e "$2" ] || python - "$home" "$@" <<'PY'
import json, os, shutil, sys
from pathlib import Path
home, model, out = sys.argv[1:]
sys.path.insert(0, home)
import runs
shutil.copytree("adapter", f"{out}.partial", dirs_exist_ok=True)
made = json.loads(Path("adapter/desta.json").read_text())
made["model"] = str(Path(model).resolve())
made["sha256"]["model"] = runs.fingerprint(model)
Path(f"{out}.partial/desta.json").write_text(json.dumps(made, indent=1))
os.rename(f"{out}.partial", out)
PY
}

# ask MODEL TEST OUT: what a model answers to some questions, unless that is known.
ask() { [ -e "$3" ] || python "$home/benchmark.py" questions "$1" "$2" --out "$3"; }

case $1 in
  lam) python evaluate.py lam "$out/table.json" ;;

  # Two by two: hearing learnt from the base and added, or from the instruct model with nothing
  # added afterwards; as the speech model learns it (by imitating what it starts from, and leaving
  # alone what text uses), or by the loss of the next token alone. The same units, text, steps and
  # seed.
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
    python "$home/evaluate.py" compare merged from_instruct merged_plain from_instruct_plain \
      --questions toy/questions.jsonl --out start.json --overwrite ;;

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
    python "$home/evaluate.py" compare merged ablate/*/merged --split dev \
      --questions toy/questions.jsonl --out ablations.json --overwrite ;;

  # Two more behaviours, learnt from text alone, are added to hearing that is there already. And
  # both at once, half of each: so what they share, to answer at all, keeps its full strength.
  reuse)
    cd "$out/manner"
    seed=$(seed)
    add=(--base base $(strengths))
    tuned thanks " thank you"
    tuned over " over"
    for name in thanks over; do
      merge "${add[@]}" --instruct reuse/$name/instruct --speech speech --out reuse/$name/merged
      ask reuse/$name/merged reuse/$name/test.jsonl reuse/$name.json
    done
    merge "${add[@]}" --mu 0.5 --instruct reuse/thanks/instruct --speech speech --out reuse/half
    merge --base base --lam 1 --mu 0.5 --instruct reuse/over/instruct --speech reuse/half \
      --out reuse/both
    for name in thanks over; do ask reuse/both reuse/$name/test.jsonl reuse/both_$name.json; done
    python "$home/benchmark.py" show merged.json reuse/{thanks,over,both_thanks,both_over}.json \
      --out reuse.json --overwrite
    python -c "import json
seconds = json.load(open('speech/training.json'))['seconds']
print('Hearing took %.0f minutes to learn, once.' % (seconds / 60))" ;;

  # Captions dropped, or the words that stand beside the speech; and hearing learnt by the instruct
  # model, with nothing added.
  paper)
    cd "$out/manner"
    seed=$(seed)
    add=$(strengths)
    for what in captions text; do
      for folder in prosody test; do without $what $folder; done
      train --init base --units paper/$what/prosody --text world/base.jsonl --out paper/$what/speech
      merge --base base --instruct instruct --speech paper/$what/speech $add \
        --out paper/$what/merged
      ask paper/$what/merged paper/$what/test/manifest.jsonl paper/no_$what.json
    done
    train --init instruct --units prosody --text world/base.jsonl --out paper/from_instruct
    ask paper/from_instruct test/manifest.jsonl paper/from_instruct.json
    python "$home/benchmark.py" show merged.json paper/no_*.json paper/from_instruct.json \
      --out paper.json --overwrite ;;

  # The transcript dropped; or the caption in front of every answer, which the model itself says.
  # And the adapter in front of the sum, and of an instruct model that says "thank you" behind every
  # reply.
  desta)
    cd "$out/manner"
    seed=$(seed)
    tuned thanks " thank you"
    cd ../desta
    [ -e answers.jsonl ] || python - targets.jsonl answers.jsonl <<'PY'
import json, os, sys
with open(sys.argv[1]) as targets, open(f"{sys.argv[2]}.partial", "w") as out:
    for entry in map(json.loads, targets):
        entry["target"] = entry["target"].removeprefix(f"{entry['caption']}. ")
        out.write(json.dumps(entry) + "\n")
os.rename(f"{sys.argv[2]}.partial", sys.argv[2])
PY
    adapter targets.jsonl no_transcript --no-transcript
    adapter answers.jsonl answers
    plug ../manner/merged in_sum
    plug ../manner/reuse/thanks/instruct in_thanks
    for model in no_transcript answers in_sum; do
      ask $model ../manner/world/test.jsonl $model.json
    done
    ask in_thanks ../manner/reuse/thanks/spoken.jsonl in_thanks.json
    python "$home/benchmark.py" show {heard,no_transcript,answers,in_sum,in_thanks,read}.json ;;
esac
