"""A second story of the toy world: not what was said, but how.

in   a seed
out  OUT/tokenizer, base.jsonl, chat.jsonl, speech/train.jsonl; dev.jsonl and test.jsonl, and both
     as the text that is said in them (dev_text.jsonl, test_text.jsonl); their audio
see  toy.py, whose facts and styles of answers these are; SpeechCombine's captions
run  python manner.py --seed 0 --out out/manner/world

Men and women speak, high or low, fast or slow; in a third of their sentences one word is
stressed. A *caption* says that in words: "a high fast woman stresses peru".

Captions stand in text, for the base; in chats about a line of text, for the instruct
model; and beside speech, for the speech model. No chat has speech in it, and no speech has
an answer beside it.
"""

import argparse
import random
import re
from typing import NamedTuple

import runs  # before torch, which voices needs: it sets how OpenMP waits
import audio
import toy
import voices
from vocab import SIGNS

# Of VOICES, by the letter behind "+": men are m1, m2, ..., women f1, f2, ...
GENDERS = {"man": "m", "woman": "f"}
PITCHES = {"low": (25, 40), "high": (60, 75)}  # eSpeak's 0 to 100
PACES = {"slow": (110, 130), "fast": (190, 215)}  # words a minute
UNSTRESSED = "the of is a in to and it".split()
STRESSED = 1 / 3  # of the lines

# What may be asked, as toy.py asks for facts: "what is the pitch of it".
RELATIONS = "gender", "pitch", "pace", "stress"
QUESTIONS = "what is the {r} of it", "name the {r} of it", "which {r} is the {r} of it"

CLUTTERED = 0.5  # of the lines in text: behind them signs that say nothing, or words among signs
CLUTTERED_ASKED = 0.8  # of other user turns, so that clutter does not promise a caption
UNDESCRIBED = 0.3  # of the chats about a line: it has no caption, and the answer is a guess


class Manner(NamedTuple):
    """How a line is said. stress: the number of its stressed word, or None."""

    gender: str
    pitch: str
    pace: str
    stress: int | None

    def caption(self, line):
        voice = f"a {self.pitch} {self.pace} {self.gender}"
        return voice if self.stress is None else f"{voice} stresses {self.answer('stress', line)}"

    def answer(self, relation, line):
        if relation == "stress":
            return line.split()[self.stress]
        return getattr(self, relation)

    def told(self, relation, line):
        return f"the {relation} of it is {self.answer(relation, line)}"

    def relations(self):
        """What may be asked about it."""
        return RELATIONS if self.stress is not None else RELATIONS[:-1]


def drawn_manner(line, rng):
    """A manner for a line. Small words, and words that come twice, are not stressed."""
    words = line.split()
    able = [n for n, w in enumerate(words) if words.count(w) == 1 and w not in UNSTRESSED]
    stress = rng.choice(able) if able and rng.random() < STRESSED else None
    traits = [rng.choice(list(names)) for names in (GENDERS, PITCHES, PACES)]
    return Manner(*traits, stress)


def drawn_line(world, rng):
    """Something to say: a story, a seen fact, or words in no order."""
    kind = rng.choices(["story", "fact", "words"], [4, 3, 3])[0]
    if kind == "fact":
        return world.state(rng.choice(world.seen), rng)
    return world.story(rng) if kind == "story" else world.words(rng)


def question(manner, line, rng, relation=None):
    """(relation, style, question, answer) about how a line was said."""
    relation = relation or rng.choice(manner.relations())
    style = rng.choice(list(toy.STYLES))
    asked = rng.choice(QUESTIONS).format(r=relation)
    asked = rng.choice(toy.STYLES[style]).format(q=asked)
    return relation, style, asked, reply(manner, line, relation, style)


def reply(manner, line, relation, style):
    """An answer in one of toy.py's styles."""
    answer = manner.answer(relation, line)
    return toy.in_style(style, f"{relation} of it", answer, manner.told(relation, line))


# --- text and chats -----------------------------------------------------------


def cluttered(line, rng):
    """A line followed by random signs, mostly between its words, said again.

    Tokens of speech will stand like this. Open models know markup of every kind; a model from
    nothing has to learn to read past it.
    """

    def signs(count):
        return "".join(rng.choice(SIGNS) for _ in range(count))

    count = rng.choice([1, 2, 4, 5, 5, 6])  # signs behind every word
    opened, closed = signs(rng.randint(1, 4)), signs(rng.randint(1, 2))
    if rng.random() < 0.3:
        return line + opened + signs(count * rng.randint(1, 6)) + closed
    words = " ".join(word + signs(count) for word in line.split())
    return line + opened + words + closed


def below(rng):
    """What stands between a line and what belongs to it."""
    return rng.choice(["\n", " "])


def written(line, rng, share=CLUTTERED):
    """A line as it stands in text, for this share of lines with clutter behind it."""
    return cluttered(line, rng) if rng.random() < share else line


def described(line, caption, rng):
    """A line of text, and a caption above or below it."""
    line = written(line, rng)
    return rng.choice([f"{caption}\n{line}", f"{line}\n{caption}"])


def captioned_text(world, rng):
    """A described line, and perhaps what follows from its caption: for the base."""
    line = drawn_line(world, rng)
    manner = drawn_manner(line, rng)
    caption = manner.caption(line)
    page = described(line, caption, rng)
    if rng.random() < 0.35:
        return f"{page}."

    # A reply says a caption first and answers from it. So the base is asked for several words
    # of a caption: asked for one only, it had not learnt to look them up in as many steps.
    relations = list(manner.relations())
    rng.shuffle(relations)
    if rng.random() < 0.3:
        told = [manner.told(relation, line) for relation in relations]
        return f"{page}\n{caption}. {'. '.join(told)}."
    for relation in relations[: rng.randint(1, 3)]:
        asked = rng.choice(QUESTIONS).format(r=relation)
        answer = reply(manner, line, relation, rng.choice(list(toy.STYLES)))
        page += f"\nquestion: {asked}\nanswer: {caption}. {answer}"
    return page


def base_document(world, rng):
    """A document of the base corpus: a described line, or a page, perhaps below clutter."""
    kind = rng.random()
    if kind < 0.4:
        return captioned_text(world, rng)
    if kind < 0.5:
        fact = world.state(rng.choice(world.facts), rng)
        return f"{cluttered(fact, rng)}\n{toy.plain_document(world, rng)}"
    return toy.base_document(world, rng)


def chat(world, rng):
    """A conversation: one of toy.py's, or a question about a described line."""
    if rng.random() < 0.6:
        messages = toy.chat(world, rng)
        for message in messages:
            if message["role"] == "user":
                message["content"] = written(message["content"], rng, CLUTTERED_ASKED)
        return messages

    # The reply begins with the caption. So behind speech, where none stands to be copied,
    # the speech model's own goes before the answer.
    line = drawn_line(world, rng)
    manner = drawn_manner(line, rng)
    caption = manner.caption(line)
    page = described(line, caption, rng)
    if rng.random() < UNDESCRIBED:
        page = written(line, rng)
    _, _, asked, answer = question(manner, line, rng)
    return [
        {"role": "user", "content": below(rng).join(rng.choice([(page, asked), (asked, page)]))},
        {"role": "assistant", "content": f"{caption}. {answer}"},
    ]


# --- speech -------------------------------------------------------------------


class Reader:
    """Reads lines aloud in a manner, into files."""

    def __init__(self, seed):
        self.speaker = voices.Speaker()
        self.rng = random.Random(f"manner voices {seed}")

    def read(self, path, line, manner, group):
        """Write a .flac; the line's entry of a manifest, without its path."""
        mark = "+" + GENDERS[manner.gender]
        voice = self.rng.choice([v for v in voices.VOICES[group] if mark in v])
        rate = self.rng.randint(*PACES[manner.pace])
        pitch = self.rng.randint(*PITCHES[manner.pitch])
        samples, words = self.speaker.say(line, voice, rate, pitch, manner.stress)
        path.write_bytes(voices.encoded(samples, "FLAC"))
        style = manner._asdict()
        return {
            "text": line,
            "speaker": voice,
            "seconds": round(len(samples) / audio.SAMPLE_RATE, 3),
            "words": words,
            "style": {name: value for name, value in style.items() if name != "stress"},
            "caption": manner.caption(line),
        }


def write_speech(world, rng, reader, count, out):
    """Lines read aloud by the voices of training."""
    (out / "audio").mkdir(parents=True)
    entries = []
    for number in runs.Bar(range(count), desc="training speech", unit="line"):
        line = drawn_line(world, rng)
        name = f"audio/{number:05d}.flac"
        entry = reader.read(out / name, line, drawn_manner(line, rng), "heard")
        entries.append({"audio": name} | entry)
    toy.write_lines(out / "train.jsonl", entries)
    return entries


def write_questions(world, rng, reader, counts, out):
    """Questions about how lines were said by unheard voices, and spoken questions of toy.py.

    A third of the former ask for the stressed word.
    """
    (out / "questions").mkdir()
    plan = []  # (split, line, manner, what `question` returns)
    for split, count in counts.items():
        for number in range(count):
            relation = "stress" if number % 3 == 0 else None
            line = drawn_line(world, rng)
            manner = drawn_manner(line, rng)
            while relation and manner.stress is None:
                line = drawn_line(world, rng)
                manner = drawn_manner(line, rng)
            asked = question(manner, line, rng, relation or rng.choice(RELATIONS[:-1]))
            plan.append((split, line, manner, asked))
    facts = [max(1, counts[split] // 2) for split in ("dev", "test")]
    asked_facts = toy.questions(world, rng, *facts)
    for entry in asked_facts:
        manner = drawn_manner(entry["question"], rng)._replace(stress=None)
        asked = "fact", entry["kind"], "", entry["answer"]  # the line itself is the question
        plan.append((entry["split"], entry["question"], manner, asked))

    about = {entry["question"]: entry["fact"] for entry in asked_facts}
    made = []
    for number, (split, line, manner, asked) in enumerate(runs.Bar(plan, unit="question")):
        name = f"questions/{number:04d}.flac"
        entry = reader.read(out / name, line, manner, "near")
        relation, kind, instruction, answer = asked
        entry |= {"instruction": instruction, "answer": answer, "kind": kind}
        entry["group"] = relation if relation in ("fact", "stress") else "manner"
        entry["metric"] = "exact" if relation == "fact" else "ends"
        if relation == "fact":
            entry["fact"] = about[line]
        made.append((split, {"audio": name} | entry))

    # Each as sound, and as the text that a perfect ear would write down: without the how.
    names = "text", "instruction", "answer", "group", "metric", "fact"
    for split in counts:
        entries = [entry for part, entry in made if part == split]
        texts = [{name: entry[name] for name in names if name in entry} for entry in entries]
        toy.write_lines(out / f"{split}.jsonl", entries)
        toy.write_lines(out / f"{split}_text.jsonl", texts)
    return made


# --- the command --------------------------------------------------------------


def word_counts(world, rng):
    """{piece: how often}, of toy.py's world and of this one's words."""
    counts = toy.word_counts(world, rng)
    for _ in range(4000):
        counts.update(re.findall(" ?[a-z]+", captioned_text(world, rng)))
    return counts


def write_world(args):
    """All of it, as a folder."""
    world = toy.World(args.seed)
    reader = Reader(args.seed)
    rng = {
        name: random.Random(f"manner {name} {args.seed}")
        for name in ("tokenizer", "base", "chat", "speech", "questions")
    }
    with runs.new_folder(args.out, overwrite=args.overwrite) as out:
        toy.write_tokenizer(word_counts(world, rng["tokenizer"]), out / "tokenizer")
        texts = (base_document(world, rng["base"]) for _ in range(args.documents))
        toy.write_lines(out / "base.jsonl", ({"text": text} for text in texts))
        chats = (chat(world, rng["chat"]) for _ in range(args.documents))
        toy.write_lines(out / "chat.jsonl", ({"messages": messages} for messages in chats))
        clips = write_speech(world, rng["speech"], reader, args.lines, out / "speech")
        counts = {"dev": args.dev, "test": args.test}
        asked = write_questions(world, rng["questions"], reader, counts, out)
    hours = sum(clip["seconds"] for clip in clips) / 3600
    print(
        f"{args.out}: {args.documents} documents and chats, {len(clips)} lines ({hours:.1f} h), "
        f"{len(asked)} questions"
    )


def main():
    parser = argparse.ArgumentParser(
        description="The toy world again, with captions of how its lines are said."
    )
    add = parser.add_argument
    add("--seed", type=runs.seed, default=0, help="facts, lines and voices (default 0)")
    add("--out", required=True, help="folder to write")
    add("--lines", type=runs.count, default=6000, help="lines of training speech (default 6000)")
    add("--documents", type=runs.count, default=40_000, help="and chats (default 40000)")
    add(
        "--dev",
        type=runs.count,
        default=120,
        help="questions on how lines are said, to choose settings on (default 120); half as many "
        "spoken ones on facts are added",
    )
    add("--test", type=runs.count, default=240, help="the same, to report on (default 240)")
    add("--overwrite", action="store_true", help="replace an existing world")
    write_world(parser.parse_args())


if __name__ == "__main__":
    runs.run(main)
