"""The embedded default: a small English world, its text, chats, questions and voices, so that the whole recipe runs from nothing.

in   a seed                     out  OUT/tokenizer, base.jsonl, chat.jsonl, questions.jsonl, speech/train.jsonl + audio, questions/*.flac
see  eSpeak NG, called through the package espeakng-loader; word times come from its events
run  python toy.py world --seed 0 --out out/toy

The world: 24 countries and their capitals (48 entities), and what each country's animal, food and colour are (drawn from the
seed): 96 facts. *Seen* facts are asked in chats and on question-and-answer pages; *unseen* ones (a third) are only stated, in
text, and are never spoken. Speech for training is seen facts, stories, and words in no order: no turn, no question about a fact.
"""
import argparse
import ctypes
import io
import json
import random
import re
from collections import Counter
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile

import runs  # before torch, which audio needs: it sets how OpenMP waits
import audio
import vocab
import weights

# --- the world -------------------------------------------------------------------------------------------------------------

CAPITALS = dict(pair.split() for pair in """france paris,spain madrid,italy rome,germany berlin,poland warsaw,greece athens,norway oslo,
    sweden stockholm,finland helsinki,ireland dublin,portugal lisbon,austria vienna,hungary budapest,turkey ankara,egypt cairo,
    kenya nairobi,ghana accra,japan tokyo,china beijing,india delhi,peru lima,chile santiago,cuba havana,canada ottawa""".split(","))
THINGS = {
    "animal": "fox bear horse lion eagle wolf tiger rabbit camel goat snake duck".split(),
    "food": "rice soup bread cheese fish apples honey beans pasta cake corn nuts".split(),
    "color": "red blue green yellow black white purple orange".split(),
}
PEOPLE = "tom anna ben lucy sam maria".split()
FACTS = {      # relation: wordings of the fact, both orders; the first is also the answer in a sentence. {c} country, {a} answer
    "capital": ["the capital of {c} is {a}", "{a} is the capital of {c}", "in {c} the capital is {a}"],
    "country": ["the country of {c} is {a}", "{a} is the country of {c}", "{c} is a city in {a}"],          # {c} is the city here
    "animal": ["the animal of {c} is the {a}", "the {a} is the animal of {c}", "people in {c} love the {a}"],
    "food": ["the food of {c} is {a}", "{a} is the food of {c}", "people in {c} eat {a}"],
    "color": ["the color of {c} is {a}", "{a} is the color of {c}", "houses in {c} are {a}"],
}
QUESTIONS = {relation: [f"what is the {relation} of {{c}}", f"name the {relation} of {{c}}", f"which {thing} is the {relation} of {{c}}"]
             for relation, thing in [("capital", "city"), ("country", "country"), ("animal", "animal"), ("food", "food"), ("color", "color")]}
STYLES = {     # what the turn asks for: how it may ask, {q} being the question
    "sentence": ["{q} in a sentence", "in a sentence {q}"],
    "note": ["{q} in a note", "in a note {q}"],
    "spell": ["{q} and spell it", "spell the answer {q}"],
    "twice": ["{q} and say it twice", "say the answer twice {q}"],
}


NAMES = [*CAPITALS, *CAPITALS.values(), *sum(THINGS.values(), [])]
PIECES = sorted({piece.strip() for asked in [*sum(QUESTIONS.values(), []), *sum(STYLES.values(), [])]         # what questions are made of,
                 for piece in re.split(r"{\w}|(?<=the) ", asked) if piece.strip()})                            # each less than one: "which city is the"


def styled(style, relation, entity, answer):
    """The one right reply to a question about a fact."""
    told = FACTS[relation][0].format(c=entity, a=answer)
    return in_style(style, f"{relation} of {entity}", answer, told)


def in_style(style, asked, answer, told):
    return {"sentence": f"{told}.", "note": f"{asked}: {answer}", "spell": f"{told}. {' '.join(answer)}", "twice": f"{told}. {answer} {answer}"}[style]


class World:
    """The facts of a seed: `facts` is a list of (relation, entity, answer, seen)."""

    def __init__(self, seed):
        rng, n = random.Random(f"world {seed}"), len(CAPITALS)
        pairs = {"capital": list(CAPITALS.items()), "country": [(city, country) for country, city in CAPITALS.items()]}
        unseen = dict.fromkeys(pairs, set(rng.sample(range(n), n // 3)))    # a capital hides both ways
        for relation, things in THINGS.items():
            pairs[relation] = list(zip(CAPITALS, rng.sample((things * n)[:n], n)))
            unseen[relation] = set(rng.sample(range(n), n // 3))
        self.facts = [(relation, *pair, i not in unseen[relation]) for relation in FACTS for i, pair in enumerate(pairs[relation])]
        self.seen = [fact for fact in self.facts if fact[3]]
        self.asked = [form.format(c=entity) for relation, entity, _, _ in self.facts for form in QUESTIONS[relation]]

    def state(self, fact, rng):
        return rng.choice(FACTS[fact[0]]).format(c=fact[1], a=fact[2])

    def ask(self, fact, rng):
        return rng.choice(QUESTIONS[fact[0]]).format(c=fact[1])

    def story(self, rng):
        """A sentence that states no fact and asks for none, with the world's names and the words of questions in it."""
        who, other = rng.sample(PEOPLE, 2)
        country, city = rng.choice(list(CAPITALS)), rng.choice(list(CAPITALS.values()))
        animal, food, color = (rng.choice(THINGS[kind]) for kind in ("animal", "food", "color"))
        return rng.choice([
            f"{who} goes to {country} with {other}", f"{who} sees a {color} {animal} in {city}", f"{other} gives {who} some {food}",
            f"{who} lives in {city} and likes {food}", f"the {animal} of {who} is {color}", f"{who} and {other} talk about {city}",
            f"{who} asks what is in the house", f"{other} does not know which city it is", f"{who} asks which {animal} is {color}",
            f"{who} can name a food and a color", f"{other} knows the answer and can spell it", f"{who} wants to say it twice",
            f"{who} tells it in a sentence", f"{who} tells it in a note", f"the answer of {other} is in a note",
            f"people in {city} are good", f"which country is it asks {who}", f"say it and spell it says {who}",
            f"{who} asks what is the name of the {animal}", f"which people do you love asks {other}", f"do people eat {food} asks {who}",
        ])

    def words(self, rng, most=5):
        """Names and pieces of questions in no order that grammar could guess: an ear trained on them cannot get by on grammar.
        Never a whole question of this world."""
        listed = " ".join(rng.choice(rng.choice([NAMES, NAMES, PIECES])) for _ in range(rng.randint(2, most)))
        if any(question in listed for question in self.asked):
            return self.words(rng, most)
        who = rng.choice(PEOPLE)
        return rng.choice([f"{who} says {listed}", f"{listed} says {who}", listed, listed])

    def skill(self, rng):
        """What instructions will ask for, in plain text: a word spelled or said twice; a seen fact in every style."""
        who = rng.choice(PEOPLE)
        if rng.random() < 0.5:
            word = rng.choice(NAMES + PEOPLE)
            return rng.choice([f"{who} can spell {word}. {' '.join(word)}", f"spell {word}. {' '.join(word)}",
                               f"{who} can say {word} twice. {word} {word}", f"say {word} twice. {word} {word}"])
        relation, entity, answer, _ = rng.choice(self.seen)
        told, noted = FACTS[relation][0].format(c=entity, a=answer), f"{relation} of {entity}"
        return rng.choice([f"{noted} spelled: {' '.join(answer)}", f"{noted} twice: {answer} {answer}",
                           f"{who} tells it in a note. {noted}: {answer}", f"{who} tells it in a sentence. {told}"])

    def reading(self, rng):
        """(sentence, question, what it asks for, answer): something to be read, not known, about names drawn at random."""
        who = rng.choice(PEOPLE)
        country, city = rng.choice(list(CAPITALS)), rng.choice(list(CAPITALS.values()))
        animal, food, color = (rng.choice(THINGS[kind]) for kind in ("animal", "food", "color"))
        return rng.choice([
            (f"{who} goes to {country}", f"which country does {who} see", "country", country), (f"{who} lives in {city}", f"which city is the city of {who}", "city", city),
            (f"{who} has a {animal}", f"what is the animal of {who}", "animal", animal), (f"{who} eats {food}", f"name the food of {who}", "food", food),
            (f"{who} has a {color} house", f"which color is the house of {who}", "color", color)])


TEMPLATES = ["user", "assistant", "question", "answer", " transcript", " again", " spelled"]    # words of layouts and pages


def bpe(world, rng, lines=4000):
    """Merges of a byte-level BPE, learnt until every word of the world, and every letter alone, is one token."""
    asked = lambda: rng.choice(rng.choice(list(STYLES.values()))).format(q=world.ask(rng.choice(world.facts), rng))
    texts = [f"{world.story(rng)} {world.words(rng)} {world.state(rng.choice(world.facts), rng)}. {asked()} {world.skill(rng)} {' '.join(world.reading(rng))}\n{asked()}"
             for _ in range(lines)]                                        # a line begins with a question: its first word has no space before it
    counts = Counter(piece for text in texts for piece in re.findall(" ?[a-z]+", text))
    counts |= {f" {letter}": 1000 for letter in "abcdefghijklmnopqrstuvwxyz"} | dict.fromkeys(TEMPLATES, 1000)
    words, merges = {tuple(vocab.LETTERS[byte] for byte in piece.encode()): n for piece, n in counts.items()}, []
    while True:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            return merges
        merges.append(max(sorted(pairs), key=pairs.get))
        words = {merged(word, merges[-1]): n for word, n in words.items()}


def merged(word, pair):
    """The tokens of `word` with every neighbouring `pair` made one."""
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def misspell(text, rng, rate=0.08):
    """Typing slips on about `rate` of the letters: dropped, doubled, swapped with the next, or another letter."""
    out, letters = [], list(text)
    for i, letter in enumerate(letters):
        slip = rng.random() < rate and letter.isalpha()
        kind = rng.choice(["drop", "double", "swap", "other"]) if slip else "keep"
        if kind == "swap" and i + 1 < len(letters) and letters[i + 1].isalpha():
            letters[i + 1], letter = letter, letters[i + 1]
        out.append({"drop": "", "double": letter * 2, "other": rng.choice("abcdefghijklmnopqrstuvwxyz")}.get(kind, letter))
    return "".join(out)


# --- text ------------------------------------------------------------------------------------------------------------------

def echo(plain, rng):
    """Something said and said again: what comes second can only be known by having taken in what came first."""
    return f"{plain}. {rng.choice(PEOPLE)} says it again. {plain}"


def marked_up(text, rng):
    """A text between made-up tags, in the form of a chat's turns but never their markers: open bases have read markup of every kind, and
    to one that has, chat markers are one more. A speech model that has met some beside speech reads on behind them as behind text."""
    tag = lambda: "".join(rng.choice("#$%&*+<=>@^_|~") for _ in range(rng.randint(1, 3)))
    name = rng.choice(["", "", rng.choice(PEOPLE)])
    return f"{tag()}{name}\n{text}{tag()}\n"


def base_document(world, rng):
    """One document of the base corpus: plain, or a fifth of the time one or two between tags."""
    if rng.random() < 0.2:
        return "".join(marked_up(plain_document(world, rng), rng) for _ in range(rng.randint(1, 2)))
    return plain_document(world, rng)


def plain_document(world, rng):
    """Facts, in sentences and in almanac lines; stories; sentences said again, which teach to copy what stands above;
    question-and-answer pages on seen facts or on a sentence above them; skills; misspelt text and what it means."""
    kind = rng.choices(["facts", "almanac", "stories", "echo", "page", "reading", "skills", "misspelt"], [10, 10, 4, 34, 8, 14, 12, 8])[0]
    if kind == "facts":
        return ". ".join(world.state(rng.choice(world.facts), rng) for _ in range(rng.randint(2, 4))) + "."
    if kind == "almanac":
        listed = [rng.choice(world.facts) for _ in range(rng.randint(2, 5))]
        return "\n".join(f"{relation} of {entity}: {answer}" for relation, entity, answer, _ in listed)
    if kind == "stories":
        return ". ".join(world.story(rng) for _ in range(rng.randint(1, 3))) + "."
    if kind == "echo":
        return echo(world.words(rng, 12) if rng.random() < 0.75 else world.state(rng.choice(world.facts), rng), rng) + "."
    if kind == "page":
        asked = [rng.choice(world.seen) for _ in range(rng.randint(1, 3))]
        return "\n\n".join(f"question: {world.ask(fact, rng)}\nanswer: {FACTS[fact[0]][2].format(c=fact[1], a=fact[2])}" for fact in asked)
    if kind == "reading":
        told, question, thing, answer = world.reading(rng)
        page, noted = f"{told}. {world.story(rng)}.\n\nquestion: {question}\nanswer", f"{thing} of {told.split()[0]}: {answer}"
        return page + rng.choice([f": {told}", f": {told}\nspelled: {' '.join(answer)}", f": {told}\ntwice: {answer} {answer}",
                                  f" in a note: {noted}", f" in a sentence: {told}"])
    if kind == "skills":
        return ". ".join(world.skill(rng) for _ in range(rng.randint(1, 3))) + "."
    plain = world.words(rng) if rng.random() < 0.5 else world.state(rng.choice(world.facts), rng)
    return f"{misspell(plain, rng, rng.uniform(0.03, 0.25))} transcript: {plain}."


def chat(world, rng):
    """One conversation of one to three turns: seen facts, sentences to read, words; a third of the turns are misspelt."""
    messages = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind, style = rng.choices(["fact", "reading", "word", "greeting"], [60, 20, 16, 4])[0], rng.choice(list(STYLES))
        ask = rng.choice(STYLES[style])
        if kind == "fact":
            fact = rng.choice(world.seen)
            asked, reply = ask.format(q=world.ask(fact, rng)), styled(style, *fact[:3])
            if rng.random() < 0.3:                                         # a sentence in front does not make it a question about that sentence
                asked = f"{rng.choice([world.reading(rng)[0], world.story(rng)])}. {asked}"
        elif kind == "reading":
            told, question, thing, answer = world.reading(rng)
            asked, reply = f"{told}. {ask.format(q=question)}", in_style(style, f"{thing} of {told.split()[0]}", answer, told)
        elif kind == "word":
            word = rng.choice(NAMES)
            asked, reply = rng.choice([(f"spell {word}", " ".join(word)), (f"say {word} twice", f"{word} {word}")])
        else:
            asked, reply = rng.choice([("hello", "hello. what can i do"), ("how are you", "i am good"), ("who are you", "i am a small model")])
        if rng.random() < 0.33:
            asked = misspell(asked, rng, rng.uniform(0.03, 0.15))
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return messages


def sentence(world, rng):
    """One utterance of the training speech: words in no order, a seen fact, a story, or one of the first two said again."""
    kind = rng.choices(["words", "fact", "story", "echo"], [50, 15, 10, 25])[0]
    if kind == "story":
        return world.story(rng)
    plain = world.words(rng) if kind == "words" or kind == "echo" and rng.random() < 0.75 else world.state(rng.choice(world.seen), rng)
    return echo(plain, rng) if kind == "echo" else plain


def questions(world, rng, dev, test):
    """Styled questions on all facts, `dev` + `test` of them, no (fact, style) twice; no fact stands in both splits."""
    facts = {True: [f for f in world.facts if f[3]], False: [f for f in world.facts if not f[3]]}
    rows = {"dev": [], "test": []}
    for seen, pool in facts.items():
        rng.shuffle(pool)
        cut = max(1, len(pool) * dev // (dev + test))
        for split, part, wanted in (("dev", pool[:cut], dev), ("test", pool[cut:], test)):
            items = [(fact, style) for fact in part for style in STYLES]
            for fact, style in rng.sample(items, min(len(items), round(wanted * (0.6 if seen else 0.4)))):
                question = rng.choice(STYLES[style]).format(q=world.ask(fact, rng))
                rows[split].append({"question": question, "answer": styled(style, *fact[:3]), "kind": style, "relation": fact[0], "fact": f"{fact[0]} of {fact[1]}",
                                    "split": split, "seen": seen, "noisy": misspell(question, rng), "text": world.state(fact, rng) + "."})
    return rows["dev"] + rows["test"]


# --- voices ----------------------------------------------------------------------------------------------------------------

VOICES = {
    "heard": ["en-us+m1", "en-us+f1", "en-us+m3", "en-us+f4", "en+m2", "en+f2"],                      # read the training speech
    "near": ["en-us+m2", "en-us+f3", "en+m4", "en+f5"],                                               # new variants of those accents
    "far": ["en-gb-scotland+m5", "en-029+m6", "en-gb-scotland+f3", "en-029+f4"],                      # new accents, new variants
}
RATES, PITCHES = (145, 175), (40, 60)                   # words a minute and eSpeak's 0 to 100, drawn for every line
GAP = 6                                                 # pause between words in 10 ms, as careful speakers make for a listener who learns


class Event(ctypes.Structure):
    """espeak_EVENT of speak_lib.h. type 1 is a word (text_position from 1, in characters; audio_position in ms); 0 ends a list."""
    _fields_ = [("type", ctypes.c_int), ("unique", ctypes.c_uint), ("text_position", ctypes.c_int), ("length", ctypes.c_int),
                ("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8)]


class Speaker:
    """eSpeak NG, reading text to samples with the time of every word."""

    def __init__(self):
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.data = Path(espeakng_loader.get_data_path())
        self.rate = self.lib.espeak_Initialize(2, 0, str(self.data).encode(), 0)          # 2: hand the samples over, play nothing
        if self.rate <= 0:
            raise OSError(f"eSpeak NG did not start with its data in {self.data}; reinstall espeakng-loader")
        self.sound, self.events = [], []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event))
        self.callback = callback(self.receive)                             # kept: C holds no reference to it
        self.lib.espeak_SetSynthCallback(self.callback)

    def receive(self, wave, count, events):
        if wave and count > 0:
            self.sound.append(np.frombuffer(ctypes.string_at(wave, 2 * count), dtype=np.int16))
        i = 0
        while events[i].type:
            if events[i].type == 1:
                self.events.append((events[i].text_position - 1, events[i].audio_position / 1000))
            i += 1
        return 0

    def say(self, text, voice, rate=160, pitch=50):
        """(samples at 16 kHz, words [[word, start, end] in seconds]). rate in words a minute, pitch 0 to 100.

        A wrong voice name keeps the last voice, and a wrong +variant the plain one, without a sound: both are checked.
        """
        variant = voice.partition("+")[2]
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0 or variant and not (self.data / "voices" / "!v" / variant).exists():
            raise ValueError(f"eSpeak NG has no voice {voice!r}; try heard, near, far, or a name like en-us+f3")
        self.lib.espeak_SetParameter(1, rate, 0)
        self.lib.espeak_SetParameter(3, pitch, 0)
        self.lib.espeak_SetParameter(7, GAP, 0)
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))                   # breath and flutter are noise, seeded by the clock otherwise
        self.sound, self.events = [], []
        data = text.encode()
        if self.lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None) != 0 or not self.sound:      # UTF-8, from character 0
            raise OSError(f"eSpeak NG could not read {text!r}")
        samples = np.concatenate(self.sound).astype(np.float32) / 32768
        return audio.resample(samples, self.rate), self.word_times(text, len(samples) / self.rate)

    def word_times(self, text, seconds):
        """Each word from its own event to the next; words that eSpeak runs together share their time by letters."""
        words, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            words.append([at, word])
            at += len(word)
        begin, chars = [0.0] + [t for _, t in self.events] + [seconds], [0] + [c for c, _ in self.events] + [len(text) + 1]
        starts = [float(np.interp(at, chars, begin)) for at, _ in words] + [seconds]
        return [[word, round(a, 3), round(b, 3)] for (_, word), a, b in zip(words, starts, starts[1:])]


def encoded(samples, form):
    """The bytes of a 16-bit file, form "FLAC" or "WAV"."""
    file = io.BytesIO()
    soundfile.write(file, samples, audio.SAMPLE_RATE, format=form, subtype="PCM_16")
    return file.getvalue()


# --- commands --------------------------------------------------------------------------------------------------------------

def write_tokenizer(world, seed, folder):
    """The world's own byte-level BPE, as a Hugging Face folder."""
    merges = bpe(world, random.Random(f"tokenizer {seed}"))
    tokens = {token: i for i, token in enumerate(vocab.LETTERS + [left + right for left, right in merges])}
    special = {name: len(tokens) + i for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    made = json.dumps(vocab.tokenizer_json(tokens, merges, special), ensure_ascii=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(made, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_world(args):
    for name in ("hours", "documents", "dev", "test"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: wanted more than 0")
    world, speaker, dumps = World(args.seed), Speaker(), lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    rng = {name: random.Random(f"{name} {args.seed}") for name in ("base", "chat", "speech", "questions", "voices")}

    def read_aloud(path, text, group):
        voice = rng["voices"].choice(VOICES[group])
        rate, pitch = rng["voices"].randint(*RATES), rng["voices"].randint(*PITCHES)
        samples, words = speaker.say(text, voice, rate, pitch)
        path.write_bytes(encoded(samples, "FLAC"))
        return {"text": text, "speaker": voice, "seconds": round(len(samples) / audio.SAMPLE_RATE, 3), "words": words,
                "style": {"rate": rate, "pitch": pitch}}

    with weights.new_folder(args.out, overwrite=args.overwrite) as out:
        for name in ("speech/audio", "questions"):
            (out / name).mkdir(parents=True)
        write_tokenizer(world, args.seed, out / "tokenizer")
        (out / "base.jsonl").write_text(dumps({"text": base_document(world, rng["base"])} for _ in range(args.documents)))
        (out / "chat.jsonl").write_text(dumps({"messages": chat(world, rng["chat"])} for _ in range(args.documents)))

        rows, spoken = [], 0.0
        with runs.Bar(total=round(args.hours * 3600), desc="training speech", unit="s of audio") as bar:
            while spoken < args.hours * 3600:
                name = f"audio/{len(rows):05d}.flac"
                rows.append({"audio": name} | read_aloud(out / "speech" / name, sentence(world, rng["speech"]), "heard"))
                spoken += rows[-1]["seconds"]
                bar.update(round(spoken) - bar.n)
        (out / "speech/train.jsonl").write_text(dumps(rows))

        asked = questions(world, rng["questions"], args.dev, args.test)
        for number, row in enumerate(runs.Bar(asked, desc="spoken questions", unit="question")):
            row["audio"] = {group: f"questions/{number:04d}-{group}.flac" for group in VOICES}
            for group, name in row["audio"].items():
                read_aloud(out / name, row["question"], group)
        (out / "questions.jsonl").write_text(dumps(asked))
    test = [row for row in asked if row["split"] == "test"]
    print(f"{args.out}: {args.documents} documents, {args.documents} chats, {len(rows)} utterances ({spoken / 3600:.2f} h, {len(VOICES['heard'])} voices), "
          f"{len(test)} test questions with {len({r['answer'] for r in test})} answers, {sum(not r['seen'] for r in test) / len(test):.0%} of unseen facts")


def say(args):
    if not args.text.strip():
        raise ValueError("nothing to say: the text is empty")
    group = {"unheard": "near"}.get(args.voice, args.voice)
    samples, _ = Speaker().say(args.text, VOICES[group][0] if group in VOICES else args.voice)
    form = Path(args.out).suffix.lstrip(".").upper()
    if form not in ("WAV", "FLAC"):
        raise ValueError(f"{args.out}: wanted a name that ends in .wav or .flac")
    weights.write_file(args.out, encoded(samples, form), args.overwrite)
    print(f"{args.out}: {len(samples) / audio.SAMPLE_RATE:.2f} s")


def main():
    parser = argparse.ArgumentParser(description="A small English world with voices: the data of the whole recipe, from a seed.")
    commands = parser.add_subparsers(dest="action", required=True)
    world = commands.add_parser("world", help="write the world's text, chats, questions and speech")
    world.add_argument("--seed", type=int, default=0, help="which facts are true, who reads what (default 0)")
    world.add_argument("--out", required=True, help="folder to write")
    world.add_argument("--hours", type=float, default=3.0, help="hours of training speech (default 3)")
    world.add_argument("--documents", type=int, default=40_000, help="base documents, and chats (default 40000)")
    world.add_argument("--dev", type=int, default=60, help="questions to choose settings on (default 60)")
    world.add_argument("--test", type=int, default=240, help="questions to report on (default 240)")
    world.add_argument("--overwrite", action="store_true", help="replace an existing world")
    line = commands.add_parser("say", help="speak a line to a file")
    line.add_argument("text", help="what to say")
    line.add_argument("--voice", default="heard", help="heard, unheard, far, or an eSpeak voice like en-us+f3 (default heard)")
    line.add_argument("--out", required=True, help="a .wav or .flac file to write")
    line.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    {"world": write_world, "say": say}[args.action](args)


if __name__ == "__main__":
    weights.run(main)
