"""The embedded default: a small English world, so that the whole recipe runs from nothing.

in   a seed
out  OUT/tokenizer, base.jsonl, chat.jsonl, questions.jsonl, speech/train.jsonl and its audio,
     questions/*.flac
see  voices.py, which reads it aloud
run  python toy.py world --seed 0 --out out/toy

The world: 24 countries and their capitals (48 entities), and what each country's animal,
food and colour are (drawn from the seed): 96 facts. *Seen* facts are asked in chats and
on pages of question and answer. *Unseen* ones (a third) are only stated, in text, and are
never spoken. Speech for training is seen facts, stories, and words in no order: no turn,
no question about a fact.
"""

import argparse
import json
import random
import re
from collections import Counter

import runs  # before torch, which audio needs: it sets how OpenMP waits
import audio
import vocab
import voices

# --- the world ----------------------------------------------------------------

CAPITALS = dict(pair.split() for pair in """
    france paris,spain madrid,italy rome,germany berlin,poland warsaw,greece athens,norway oslo,
    sweden stockholm,finland helsinki,ireland dublin,portugal lisbon,austria vienna,
    hungary budapest,turkey ankara,egypt cairo,kenya nairobi,ghana accra,japan tokyo,china beijing,
    india delhi,peru lima,chile santiago,cuba havana,canada ottawa""".split(","))
THINGS = {
    "animal": "fox bear horse lion eagle wolf tiger rabbit camel goat snake duck".split(),
    "food": "rice soup bread cheese fish apples honey beans pasta cake corn nuts".split(),
    "color": "red blue green yellow black white purple orange".split(),
}
PEOPLE = "tom anna ben lucy sam maria".split()

# {relation: wordings of the fact, in both orders}. The first is also the answer in a
# sentence. {c} is the country (of the relation "country", the city), {a} the answer.
FACTS = {
    "capital": [
        "the capital of {c} is {a}",
        "{a} is the capital of {c}",
        "in {c} the capital is {a}",
    ],
    "country": [
        "the country of {c} is {a}",
        "{a} is the country of {c}",
        "{c} is a city in {a}",
    ],
    "animal": [
        "the animal of {c} is the {a}",
        "the {a} is the animal of {c}",
        "people in {c} love the {a}",
    ],
    "food": ["the food of {c} is {a}", "{a} is the food of {c}", "people in {c} eat {a}"],
    "color": [
        "the color of {c} is {a}",
        "{a} is the color of {c}",
        "houses in {c} are {a}",
    ],
}
# A capital is asked for as "which city"; the others by their name.
KINDS = {"capital": "city"}
QUESTIONS = {
    relation: [
        f"what is the {relation} of {{c}}",
        f"name the {relation} of {{c}}",
        f"which {KINDS.get(relation, relation)} is the {relation} of {{c}}",
    ]
    for relation in FACTS
}

# {what a turn asks for: how it may ask}, {q} being the question.
STYLES = {
    "sentence": ["{q} in a sentence", "in a sentence {q}"],
    "note": ["{q} in a note", "in a note {q}"],
    "spell": ["{q} and spell it", "spell the answer {q}"],
    "twice": ["{q} and say it twice", "say the answer twice {q}"],
}
# Sentences to read, a question about each, and what it asks for.
READINGS = [
    ("{who} goes to {country}", "which country does {who} see", "country"),
    ("{who} lives in {city}", "which city is the city of {who}", "city"),
    ("{who} has a {animal}", "what is the animal of {who}", "animal"),
    ("{who} eats {food}", "name the food of {who}", "food"),
    ("{who} has a {color} house", "which color is the house of {who}", "color"),
]
NAMES = [*CAPITALS, *CAPITALS.values(), *sum(THINGS.values(), [])]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pieces():
    """What questions are made of, each less than one: "which city is the"."""
    asked = [*sum(QUESTIONS.values(), []), *sum(STYLES.values(), [])]
    parts = [piece.strip() for text in asked for piece in re.split(r"{\w}|(?<=the) ", text)]
    return sorted({part for part in parts if part})


PIECES = pieces()


def styled(style, relation, entity, answer):
    """The one right reply to a question about a fact."""
    told = FACTS[relation][0].format(c=entity, a=answer)
    return in_style(style, f"{relation} of {entity}", answer, told)


def in_style(style, asked, answer, told):
    """A reply in one of the STYLES: `asked` is "food of peru", `told` the fact in a sentence."""
    return {
        "sentence": f"{told}.",
        "note": f"{asked}: {answer}",
        "spell": f"{told}. {' '.join(answer)}",
        "twice": f"{told}. {answer} {answer}",
    }[style]


class World:
    """The facts of a seed: `facts` is a list of (relation, entity, answer, seen)."""

    def __init__(self, seed):
        rng = random.Random(f"world {seed}")
        n = len(CAPITALS)
        pairs = {
            "capital": list(CAPITALS.items()),
            "country": [(city, country) for country, city in CAPITALS.items()],
        }
        unseen = dict.fromkeys(pairs, set(rng.sample(range(n), n // 3)))  # hides both ways
        for relation, things in THINGS.items():
            pairs[relation] = list(zip(CAPITALS, rng.sample((things * n)[:n], n)))
            unseen[relation] = set(rng.sample(range(n), n // 3))
        self.facts = [
            (relation, *pair, i not in unseen[relation])
            for relation in FACTS
            for i, pair in enumerate(pairs[relation])
        ]
        self.seen = [fact for fact in self.facts if fact[3]]
        self.asked = [
            form.format(c=entity)
            for relation, entity, _, _ in self.facts
            for form in QUESTIONS[relation]
        ]

    def state(self, fact, rng):
        relation, entity, answer, _ = fact
        return rng.choice(FACTS[relation]).format(c=entity, a=answer)

    def ask(self, fact, rng):
        relation, entity, _, _ = fact
        return rng.choice(QUESTIONS[relation]).format(c=entity)

    def story(self, rng):
        """A sentence that states no fact and asks for none, in the words of the world."""
        who, other = rng.sample(PEOPLE, 2)
        country, city, animal, food, color = drawn_names(rng).values()
        return rng.choice(
            [
                f"{who} goes to {country} with {other}",
                f"{who} sees a {color} {animal} in {city}",
                f"{other} gives {who} some {food}",
                f"{who} lives in {city} and likes {food}",
                f"the {animal} of {who} is {color}",
                f"{who} and {other} talk about {city}",
                f"{who} asks what is in the house",
                f"{other} does not know which city it is",
                f"{who} asks which {animal} is {color}",
                f"{who} can name a food and a color",
                f"{other} knows the answer and can spell it",
                f"{who} wants to say it twice",
                f"{who} tells it in a sentence",
                f"{who} tells it in a note",
                f"the answer of {other} is in a note",
                f"people in {city} are good",
                f"which country is it asks {who}",
                f"say it and spell it says {who}",
                f"{who} asks what is the name of the {animal}",
                f"which people do you love asks {other}",
                f"do people eat {food} asks {who}",
            ]
        )

    def words(self, rng, most=5):
        """Names and pieces of questions in no order that grammar could guess.

        An ear trained on them cannot get by on grammar. Never a whole question of this
        world.
        """
        count = rng.randint(2, most)
        listed = " ".join(
            rng.choice(rng.choice([NAMES, NAMES, PIECES])) for _ in range(count)
        )
        if any(question in listed for question in self.asked):
            return self.words(rng, most)
        who = rng.choice(PEOPLE)
        return rng.choice([f"{who} says {listed}", f"{listed} says {who}", listed, listed])

    def skill(self, rng):
        """What instructions will ask for, in plain text: spelling, saying twice, every style."""
        who = rng.choice(PEOPLE)
        if rng.random() < 0.5:
            word = rng.choice(NAMES + PEOPLE)
            return rng.choice(
                [
                    f"{who} can spell {word}. {' '.join(word)}",
                    f"spell {word}. {' '.join(word)}",
                    f"{who} can say {word} twice. {word} {word}",
                    f"say {word} twice. {word} {word}",
                ]
            )
        relation, entity, answer, _ = rng.choice(self.seen)
        told = FACTS[relation][0].format(c=entity, a=answer)
        noted = f"{relation} of {entity}"
        return rng.choice(
            [
                f"{noted} spelled: {' '.join(answer)}",
                f"{noted} twice: {answer} {answer}",
                f"{who} tells it in a note. {noted}: {answer}",
                f"{who} tells it in a sentence. {told}",
            ]
        )

    def reading(self, rng):
        """(sentence, question, what it asks for, answer): to be read, not known; names drawn."""
        names = {"who": rng.choice(PEOPLE), **drawn_names(rng)}
        told, question, thing = rng.choice(READINGS)
        return told.format(**names), question.format(**names), thing, names[thing]


def drawn_names(rng):
    """{"country", "city", "animal", "food", "color"}, each drawn alone."""
    kinds = {"country": list(CAPITALS), "city": list(CAPITALS.values()), **THINGS}
    return {kind: rng.choice(names) for kind, names in kinds.items()}


def misspell(text, rng, rate=0.08):
    """Typing slips on about `rate` of the letters: dropped, doubled, swapped, or another letter."""
    out = []
    letters = list(text)
    for i, letter in enumerate(letters):
        slip = rng.random() < rate and letter.isalpha()
        kind = rng.choice(["drop", "double", "swap", "other"]) if slip else "keep"
        if kind == "swap" and i + 1 < len(letters) and letters[i + 1].isalpha():
            letters[i + 1], letter = letter, letters[i + 1]
        another = rng.choice(LETTERS)
        out.append({"drop": "", "double": letter * 2, "other": another}.get(kind, letter))
    return "".join(out)


# --- text for the base --------------------------------------------------------


def echo(plain, rng):
    """Something said and said again: the second time can only be known from the first."""
    return f"{plain}. {rng.choice(PEOPLE)} says it again. {plain}"


def marked_up(text, rng):
    """A text between made-up tags, in the form of a chat's turns but never their markers.

    Open bases have read markup of every kind, and to such a base chat markers are one
    more. A speech model that has met some beside speech reads on behind them as behind
    text.
    """

    def tag():
        return "".join(rng.choice("#$%&*+<=>@^_|~") for _ in range(rng.randint(1, 3)))

    name = rng.choice(["", "", rng.choice(PEOPLE)])
    return f"{tag()}{name}\n{text}{tag()}\n"


def base_document(world, rng):
    """One document of the base corpus: plain, or a fifth of the time one or two between tags."""
    if rng.random() < 0.2:
        count = rng.randint(1, 2)
        return "".join(marked_up(plain_document(world, rng), rng) for _ in range(count))
    return plain_document(world, rng)


# The kinds of plain documents, and how often each comes. Echoes teach to copy what stands
# above.
DOCUMENTS = {
    "facts": 10,
    "almanac": 10,
    "stories": 4,
    "echo": 34,
    "page": 8,
    "reading": 14,
    "skills": 12,
    "misspelt": 8,
}


def plain_document(world, rng):
    """A document of one of the kinds of DOCUMENTS."""
    kind = rng.choices(list(DOCUMENTS), list(DOCUMENTS.values()))[0]
    if kind == "facts":
        count = rng.randint(2, 4)
        return (
            ". ".join(world.state(rng.choice(world.facts), rng) for _ in range(count)) + "."
        )
    if kind == "almanac":
        listed = [rng.choice(world.facts) for _ in range(rng.randint(2, 5))]
        return "\n".join(
            f"{relation} of {entity}: {answer}" for relation, entity, answer, _ in listed
        )
    if kind == "stories":
        return ". ".join(world.story(rng) for _ in range(rng.randint(1, 3))) + "."
    if kind == "echo":
        words = rng.random() < 0.75
        plain = world.words(rng, 12) if words else world.state(rng.choice(world.facts), rng)
        return echo(plain, rng) + "."
    if kind == "page":
        asked = [rng.choice(world.seen) for _ in range(rng.randint(1, 3))]
        return "\n\n".join(question_and_answer(world, fact, rng) for fact in asked)
    if kind == "reading":
        return read_and_answer(world, rng)
    if kind == "skills":
        return ". ".join(world.skill(rng) for _ in range(rng.randint(1, 3))) + "."
    words = rng.random() < 0.5
    plain = world.words(rng) if words else world.state(rng.choice(world.facts), rng)
    return f"{misspell(plain, rng, rng.uniform(0.03, 0.25))} transcript: {plain}."


def question_and_answer(world, fact, rng):
    relation, entity, answer, _ = fact
    told = FACTS[relation][2].format(c=entity, a=answer)
    return f"question: {world.ask(fact, rng)}\nanswer: {told}"


def read_and_answer(world, rng):
    """A page whose answer stands on it."""
    told, question, thing, answer = world.reading(rng)
    page = f"{told}. {world.story(rng)}.\n\nquestion: {question}\nanswer"
    noted = f"{thing} of {told.split()[0]}: {answer}"
    return page + rng.choice(
        [
            f": {told}",
            f": {told}\nspelled: {' '.join(answer)}",
            f": {told}\ntwice: {answer} {answer}",
            f" in a note: {noted}",
            f" in a sentence: {told}",
        ]
    )


# --- chats, speech, questions -------------------------------------------------


def chat(world, rng):
    """A conversation of one to three turns, as messages; a third of the turns are misspelt."""
    messages = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        asked, reply = exchange(world, rng)
        if rng.random() < 0.33:
            asked = misspell(asked, rng, rng.uniform(0.03, 0.15))
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": reply},
        ]
    return messages


def exchange(world, rng):
    """(question, reply): about a seen fact, a sentence to read, a word, or a greeting."""
    kind = rng.choices(["fact", "reading", "word", "greeting"], [60, 20, 16, 4])[0]
    style = rng.choice(list(STYLES))
    ask = rng.choice(STYLES[style])
    if kind == "fact":
        fact = rng.choice(world.seen)
        asked = ask.format(q=world.ask(fact, rng))
        reply = styled(style, *fact[:3])

        # A sentence in front does not make it a question about that sentence.
        if rng.random() < 0.3:
            asked = f"{rng.choice([world.reading(rng)[0], world.story(rng)])}. {asked}"
        return asked, reply
    if kind == "reading":
        told, question, thing, answer = world.reading(rng)
        noted = f"{thing} of {told.split()[0]}"
        return f"{told}. {ask.format(q=question)}", in_style(style, noted, answer, told)
    if kind == "word":
        word = rng.choice(NAMES)
        return rng.choice(
            [(f"spell {word}", " ".join(word)), (f"say {word} twice", f"{word} {word}")]
        )
    return rng.choice(
        [
            ("hello", "hello. what can i do"),
            ("how are you", "i am good"),
            ("who are you", "i am a small model"),
        ]
    )


def sentence(world, rng):
    """An utterance of the training speech: words, a seen fact, a story; some said again."""
    kind = rng.choices(["words", "fact", "story", "echo"], [50, 15, 10, 25])[0]
    if kind == "story":
        return world.story(rng)
    words = kind == "words" or kind == "echo" and rng.random() < 0.75
    plain = world.words(rng) if words else world.state(rng.choice(world.seen), rng)
    return echo(plain, rng) if kind == "echo" else plain


def questions(world, rng, dev, test):
    """Styled questions on all facts, `dev` + `test` of them, no (fact, style) twice.

    No (relation, entity) stands in both splits; the capital of a country may stand in one, and
    the country of that capital in the other.
    """
    entries = {"dev": [], "test": []}
    for seen in (True, False):
        pool = [fact for fact in world.facts if fact[3] == seen]
        rng.shuffle(pool)
        cut = max(1, len(pool) * dev // (dev + test))
        for split, part, wanted in (("dev", pool[:cut], dev), ("test", pool[cut:], test)):
            items = [(fact, style) for fact in part for style in STYLES]
            count = round(wanted * (0.6 if seen else 0.4))
            if count > len(items):
                raise ValueError(
                    f"{dev} + {test} questions on facts: wanted {count} of {split} on facts that "
                    f"training {'asks' if seen else 'never asks'} about, and the world has "
                    f"{len(items)}; give a smaller --dev or --test"
                )
            for fact, style in rng.sample(items, count):
                entry = question_entry(world, fact, style, rng)
                entries[split].append(entry | {"split": split, "seen": seen})
    return entries["dev"] + entries["test"]


def question_entry(world, fact, style, rng):
    """An entry of questions.jsonl, but for its audio and its split."""
    relation, entity, answer, _ = fact
    question = rng.choice(STYLES[style]).format(q=world.ask(fact, rng))
    return {
        "question": question,
        "answer": styled(style, relation, entity, answer),
        "kind": style,
        "relation": relation,
        "fact": f"{relation} of {entity}",
        "noisy": misspell(question, rng),
        "text": world.state(fact, rng) + ".",
    }


# --- commands -----------------------------------------------------------------

# Words of layouts and pages, one token each.
TEMPLATES = ["user", "assistant", "question", "answer", " transcript", " again", " spelled"]


def word_counts(world, rng, lines=4000):
    """{piece: how often}, of the world's text: every word of it, with the space before it."""

    def asked():
        style = rng.choice(list(STYLES.values()))
        return rng.choice(style).format(q=world.ask(rng.choice(world.facts), rng))

    # A line begins with a question: its first word has no space before it.
    counts = Counter()
    for _ in range(lines):
        story, words = world.story(rng), world.words(rng)
        fact = world.state(rng.choice(world.facts), rng)
        rest = [asked(), world.skill(rng), *world.reading(rng)]
        text = f"{story} {words} {fact}. {' '.join(rest)}\n{asked()}"
        counts.update(re.findall(" ?[a-z]+", text))

    # Every letter alone is a token too, as words are spelled.
    counts |= dict.fromkeys([*(f" {letter}" for letter in LETTERS), *TEMPLATES], 1000)
    return counts


def write_tokenizer(counts, folder):
    """A byte-level BPE of the pieces of {piece: how often}, as a Hugging Face folder."""
    merges = vocab.train_bpe(counts)
    tokens = vocab.LETTERS + [left + right for left, right in merges]
    ids = {token: i for i, token in enumerate(tokens)}
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = {name: len(ids) + i for i, name in enumerate(names)}
    # The world is written in lower case, so that is how every text is read.
    made = vocab.tokenizer_json(ids, merges, special, normalizer={"type": "Lowercase"})
    made = json.dumps(made, ensure_ascii=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(made, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


RATES, PITCHES = (145, 175), (40, 60)  # words a minute and eSpeak's 0 to 100, drawn a line


class Reader:
    """Reads lines aloud into files, each in a voice, at a rate and a pitch that are drawn."""

    def __init__(self, seed):
        self.speaker = voices.Speaker()
        self.rng = random.Random(f"voices {seed}")

    def read(self, path, text, group):
        """Write a .flac; the line's entry of a manifest, without its path."""
        voice = self.rng.choice(voices.VOICES[group])
        rate, pitch = self.rng.randint(*RATES), self.rng.randint(*PITCHES)
        samples, words = self.speaker.say(text, voice, rate, pitch)
        path.write_bytes(voices.encoded(samples, "FLAC"))
        return {
            "text": text,
            "speaker": voice,
            "seconds": round(len(samples) / audio.SAMPLE_RATE, 3),
            "words": words,
            "style": {"rate": rate, "pitch": pitch},
        }


def write_world(args):
    """The whole world of a seed, as a folder."""
    world, reader = World(args.seed), Reader(args.seed)
    rng = {
        name: random.Random(f"{name} {args.seed}")
        for name in ("base", "chat", "speech", "questions")
    }

    with runs.new_folder(args.out, overwrite=args.overwrite) as out:
        counts = word_counts(world, random.Random(f"tokenizer {args.seed}"))
        write_tokenizer(counts, out / "tokenizer")
        texts = (base_document(world, rng["base"]) for _ in range(args.documents))
        write_lines(out / "base.jsonl", ({"text": text} for text in texts))
        chats = (chat(world, rng["chat"]) for _ in range(args.documents))
        write_lines(out / "chat.jsonl", ({"messages": messages} for messages in chats))
        clips = write_speech(args, world, rng["speech"], reader, out)
        asked = questions(world, rng["questions"], args.dev, args.test)
        write_questions(asked, reader, out)

    test = [entry for entry in asked if entry["split"] == "test"]
    hours = sum(clip["seconds"] for clip in clips) / 3600
    unseen = sum(not entry["seen"] for entry in test) / len(test)
    print(
        f"{args.out}: {args.documents} documents, {args.documents} chats, {len(clips)} "
        f"utterances ({hours:.2f} h, {len(voices.VOICES['heard'])} voices), {len(test)} test "
        f"questions with {len({q['answer'] for q in test})} answers, {unseen:.0%} of unseen "
        "facts"
    )


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def write_speech(args, world, rng, reader, out):
    """Hours of sentences read aloud; the entries of their manifest."""
    (out / "speech/audio").mkdir(parents=True)
    entries = []
    spoken = 0.0
    with runs.Bar(
        total=round(args.hours * 3600), desc="training speech", unit="s of audio"
    ) as bar:
        while spoken < args.hours * 3600:
            name = f"audio/{len(entries):05d}.flac"
            entry = reader.read(out / "speech" / name, sentence(world, rng), "heard")
            entries.append({"audio": name} | entry)
            spoken += entry["seconds"]
            bar.update(round(spoken) - bar.n)
    write_lines(out / "speech/train.jsonl", entries)
    return entries


def write_questions(asked, reader, out):
    """Every question, read aloud by a voice of each group."""
    (out / "questions").mkdir()
    for number, entry in enumerate(runs.Bar(asked, desc="spoken questions", unit="question")):
        entry["audio"] = {
            group: f"questions/{number:04d}-{group}.flac" for group in voices.VOICES
        }
        for group, name in entry["audio"].items():
            reader.read(out / name, entry["question"], group)
    write_lines(out / "questions.jsonl", asked)


def main():
    parser = argparse.ArgumentParser(
        description="A small English world with voices: the data of the whole recipe."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser(
        "world", help="write the world's text, chats, questions and speech"
    )
    add = one.add_argument
    add(
        "--seed",
        type=runs.seed,
        default=0,
        help="which facts are true, who reads what (default 0)",
    )
    add("--out", required=True, help="folder to write")
    add("--hours", type=runs.positive, default=3.0, help="hours of training speech (default 3)")
    add(
        "--documents",
        type=runs.count,
        default=40_000,
        help="base documents, and chats (default 40000)",
    )
    add("--dev", type=runs.count, default=60, help="questions to choose settings on (default 60)")
    add("--test", type=runs.count, default=240, help="questions to report on (default 240)")
    add("--overwrite", action="store_true", help="replace an existing world")
    voices.add_flags(commands.add_parser("say", help="speak a line to a file"))
    args = parser.parse_args()
    if args.action == "world":
        write_world(args)
    else:
        voices.say(args.text, args.voice, args.out, args.overwrite)


if __name__ == "__main__":
    runs.run(main)
