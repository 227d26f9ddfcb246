r"""DeSTA2's targets: a frozen instruct model reads how a clip sounds, and answers a prompt.

in   a manifest with "text", "seconds" and "style"; an instruct model
out  targets.jsonl: each clip and prompt, with what the model answered
see  DeSTA2 (arXiv:2409.20007), DeSTA2.5-Audio (arXiv:2507.02768)
run  python desta.py write clips.jsonl --model weights/SmolLM2-135M-Instruct \
         --out targets.jsonl

No person writes an answer. An adapter must only make the model say, on hearing a clip, what it
would say on reading this.
"""

import json
import math
import re

import runs  # before torch: it sets how OpenMP waits
import torch

import audio
from model import LM, generate
from vocab import Vocab

# Around a description, and around what was heard.
OPEN, CLOSE = "<start_audio>", "<end_audio>\n\n"

# The question and the template of DeSTA2. A small model wants a plain sentence, and a question
# that it can answer.
QUESTION = "What can you hear from the audio?"
TEMPLATE = "[00:00-{end}] {text} ({style})"
LIMIT = 64  # tokens of a target; a longer one goes round in circles
BATCH = 32  # targets written at once


def described_clips(path):
    """The entries of a manifest, each found to have what a description is made of."""
    entries = audio.read_manifest(path)
    if not entries:
        raise ValueError(f"{path}: empty; wanted at least one clip")
    for number, entry in enumerate(entries, 1):
        style = entry.get("style")
        named = isinstance(style, dict) and style and {*style} == {*entries[0]["style"]}
        words = named and all(
            isinstance(value, str) and re.search(r"\w", value) for value in style.values()
        )
        seconds = entry.get("seconds")
        timed = isinstance(seconds, (int, float)) and 0 <= seconds < math.inf
        if not (words and timed and entry.get("text")):
            raise ValueError(
                f"{path}, entry {number}: wanted text, seconds, and a style of the same "
                "names in all entries, with words as values"
            )
    return entries


def description(entry, template):
    """A clip in words. The template names text, end, style, what the style has, a caption.

    [00:00-{end}] {text} ({style}) is [00:00-00:03] hello there (Gender: woman, Rate: fast)
    """
    seconds = math.ceil(entry["seconds"])
    style = [f"{name.capitalize()}: {value}" for name, value in entry["style"].items()]
    names = {
        "text": entry["text"],
        "end": f"{seconds // 60:02d}:{seconds % 60:02d}",
        "style": ", ".join(style),
    }
    if entry.get("caption"):
        names["caption"] = entry["caption"]
    try:
        text = template.format(**entry["style"] | names)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{entry['audio']}: --template {template!r} does not fit it ({error}); it has "
            f"{', '.join(entry['style'] | names)}"
        ) from None
    return OPEN + text + CLOSE


def turn_about(vocab, heard, question):
    """The ids of a turn about what was heard: numbers of vectors, or a description.

    Where nothing is asked, it stands alone, as a spoken question does.
    """
    content = [heard, f" {question}"] if question else [heard]
    return vocab.turn([{"role": "user", "content": content}])


def add_flags(add):
    """Flags of desta.py write alone."""
    add("manifest", help='JSON lines with "text", "style" and "seconds"')
    add(
        "--prompt",
        action="append",
        help=f'what to ask; again for more, "" asks nothing (default: {QUESTION})',
    )
    add("--template", default=TEMPLATE, help="of a description (default: %(default)s)")


def write(args):
    """Every clip and prompt, with what the model answers on reading the description."""
    entries = described_clips(args.manifest)
    told = [description(entry, args.template) for entry in entries]
    model = LM.load(args.model, args.device, torch.float32).eval()
    vocab = Vocab(args.model)
    questions = args.prompt or [QUESTION]
    asked = [
        (entry | {"prompt": question}, text)
        for entry, text in zip(entries, told)
        for question in questions
    ]

    def work(part):
        turns = [turn_about(vocab, text, entry["prompt"]) for entry, text in part]
        prompts = [torch.tensor(turn) for turn in turns]
        steps = list(generate(model, prompts, LIMIT, vocab.stop, vocab.text_rows()))
        texts = []
        for ids in torch.stack(steps).T.tolist():                   # (B, steps)
            end = next((n for n, i in enumerate(ids) if i in vocab.stop), None)
            texts.append(None if end is None else vocab.decode(ids[:end]).strip())
        return texts

    settings = runs.recipe([args.manifest, args.model])["inputs"]
    settings |= {"prompt": json.dumps(args.prompt), "template": args.template}
    texts = runs.in_pieces(
        args.out, settings, asked, work, BATCH, "writing targets", "target"
    )
    kept = [entry | {"target": text} for (entry, _), text in zip(asked, texts) if text]
    if not kept:
        runs.pieces_of(args.out).unlink(missing_ok=True)
        raise ValueError(
            f"{args.model}: none of its {len(asked)} replies can be a target: they are empty, or "
            f"do not end within {LIMIT} tokens; try another --prompt or --template"
        )
    lines = "".join(json.dumps(entry) + "\n" for entry in kept)
    runs.finish_pieces(args.out, lines, args.overwrite)
    print(
        f"{args.out}: {len(kept)} targets of {len(asked)}; the others were empty, or did "
        f"not end within {LIMIT} tokens"
    )


def read(path):
    """The entries of a file of targets, checked."""
    entries = audio.read_manifest(path)
    if not entries:
        raise ValueError(f"{path}: empty; wanted at least one target")
    for number, entry in enumerate(entries, 1):
        for name in ("audio", "text", "prompt", "target"):
            if not isinstance(entry.get(name), str) or not (entry[name] or name == "prompt"):
                raise ValueError(
                    f"{path}, entry {number}: got {name} = {str(entry.get(name))[:40]}, wanted "
                    "text; make it with desta.py write"
                )
    return entries
