import html
import random
import subprocess
import sys

import pytest

import audio
import runs
import toy
import vocab
import voices
from conftest import ROOT, call


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_world_is_as_big_as_its_docstring_says(seed):
    world, rng = toy.World(seed), random.Random(seed)
    entities = {entity for _, entity, _, _ in world.facts}
    unseen = [fact for fact in world.facts if not fact[3]]
    assert len(entities) == 48
    assert len(toy.FACTS) >= 4
    assert len(unseen) == len(world.facts) // 3
    hidden = {(fact[1], fact[2]) for fact in unseen if fact[0] == "capital"}
    assert {
        (answer, entity) for relation, entity, answer, _ in unseen if relation == "country"
    } == hidden, "a capital hides both ways"
    words = {
        w.strip(".:")
        for _ in range(4000)
        for text in [toy.sentence(world, rng)]
        for w in text.split()
    }
    assert 100 <= len(words) <= 300


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_questions_are_many_varied_and_split_by_fact(seed):
    world = toy.World(seed)
    entries = toy.questions(world, random.Random(seed), 60, 240)
    test, dev = ([r for r in entries if r["split"] == split] for split in ("test", "dev"))
    assert len(test) == 240 and len(dev) == 60 and len({r["answer"] for r in test}) >= 40
    assert sum(not r["seen"] for r in test) >= 0.3 * len(test)
    assert {r["kind"] for r in test} == set(toy.STYLES)
    fact = lambda r: (r["relation"], r["text"].rstrip(".")) and next(
        (f[0], f[1])
        for f in world.facts
        if f[0] == r["relation"]
        and any(q.format(c=f[1]) + " " in r["question"] + " " for q in toy.QUESTIONS[f[0]])
    )
    assert not {fact(r) for r in test} & {fact(r) for r in dev}
    assert sum(r["noisy"] != r["question"] for r in entries) > 0.8 * len(entries)
    with pytest.raises(ValueError, match="60 \\+ 1000 questions on facts: wanted 36 of dev"):
        toy.questions(world, random.Random(seed), 60, 1000)


def test_continuing_a_question_and_answer_page_never_scores():
    """Pages answer in a wording of the fact ("in france the capital is paris") that is no
    style's right answer.
    """
    for relation, entity, answer, _ in toy.World(0).facts:
        said = toy.FACTS[relation][2].format(c=entity, a=answer)
        assert said not in {
            toy.styled(style, relation, entity, answer).rstrip(".") for style in toy.STYLES
        }


def test_a_fifth_of_the_text_stands_between_tags_that_are_no_chat_markers():
    world, rng = toy.World(0), random.Random(0)
    documents = [toy.base_document(world, rng) for _ in range(2000)]
    tagged = [text for text in documents if not text[0].isalpha()]
    assert 0.15 < len(tagged) / len(documents) < 0.25
    assert all(not text.rstrip("\n")[-1].isalnum() and "\n" in text for text in tagged)
    assert not any(
        marker in text
        for text in documents
        for marker in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )


def test_the_same_seed_makes_the_same_world_and_another_seed_another():
    assert toy.World(0).facts == toy.World(0).facts != toy.World(1).facts
    said = [toy.base_document(toy.World(0), random.Random(0)) for _ in range(2)]
    assert said[0] == said[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_word_of_the_world_and_every_letter_is_one_token(seed, tmp_path, monkeypatch):
    call(
        [
            "toy.py", "world", "--seed", str(seed), "--hours", "0.001", "--documents", "10",
            "--dev", "2", "--test", "2", "--out", str(tmp_path / "w"),
        ],
        monkeypatch,
    )
    tokens = vocab.Vocab(tmp_path / "w/tokenizer")
    world = toy.World(seed)
    rng = random.Random(seed)
    words = {w for _ in range(2000) for w in toy.sentence(world, rng).replace(".", "").split()} | {
        w for fact in world.facts for w in world.ask(fact, rng).split()
    }
    assert all(
        len(tokens.encode(" " + word)) == 1 for word in [*words, *"abcdefghijklmnopqrstuvwxyz"]
    )
    assert len(tokens.encode(vocab.CUE)) == 2
    assert tokens.encode("What Is The Capital") == tokens.encode("what is the capital")


def test_misspelling_changes_about_as_many_letters_as_asked():
    from evaluate import edit_distance

    text = "the capital of france is paris " * 20
    slips = edit_distance(text, toy.misspell(text, random.Random(0), 0.1)) / len(text)
    assert 0.05 < slips < 0.2 and toy.misspell(text, random.Random(0), 0.0) == text


@pytest.fixture(scope="module")
def speaker():
    return voices.Speaker()


def test_every_voice_exists_and_groups_do_not_overlap(speaker):
    names = [name for group in voices.VOICES.values() for name in group]
    assert len(voices.VOICES["heard"]) >= 6 and len(names) == len(set(names))
    accents = lambda group: {name.partition("+")[0] for name in voices.VOICES[group]}
    assert accents("near") <= accents("heard") and not accents("far") & accents("heard")
    spoken = {name: tuple(speaker.say("hello", name)[0][:4000]) for name in names}
    assert len(set(spoken.values())) == len(names), "no name silently keeps the last voice"


@pytest.mark.parametrize("name", ["xx-none", "en-us+zz"])
def test_a_wrong_voice_or_variant_is_refused(speaker, name):
    with pytest.raises(ValueError, match="has no voice"):
        speaker.say("hello", name)


def test_words_have_their_times_in_order_and_to_the_end(speaker):
    samples, words = speaker.say("the capital of france is paris. in one word", "en-us+f3")
    assert [w for w, _, _ in words] == "the capital of france is paris. in one word".split()
    assert words[0][1] == 0
    assert all(a <= b for _, a, b in words)
    assert all(x[2] == y[1] for x, y in zip(words, words[1:]))
    assert abs(words[-1][2] - len(samples) / audio.SAMPLE_RATE) < 0.01


def test_a_world_made_again_is_the_same_to_the_byte(quick, tmp_path):
    """In a process of its own: eSpeak's noise goes on from clip to clip within one. And the two
    hash words differently.
    """
    for python, name in ((sys.executable, "a"), (quick / "python", "b")):
        subprocess.run(
            [
                python, ROOT / "toy.py", "world", "--hours", "0.01",
                "--documents", "20", "--dev", "2", "--test", "2", "--out", tmp_path / name,
            ],
            check=True,
            capture_output=True,
        )
    assert runs.fingerprint(tmp_path / "a") == runs.fingerprint(tmp_path / "b")


def test_say_writes_a_file_that_can_be_heard_and_refuses_to_replace_it(tmp_path, monkeypatch):
    words = ["toy.py", "say", "hello", "--voice", "unheard", "--out", str(tmp_path / "q.wav")]
    call(words, monkeypatch)
    assert len(audio.load(tmp_path / "q.wav")) > 4000
    with pytest.raises(FileExistsError):
        call(words, monkeypatch)
    call(["toy.py", "say", "hello", "--out", str(tmp_path / "q.flac")], monkeypatch)
    assert len(audio.load(tmp_path / "q.flac")) > 4000


def test_words_in_no_order_never_make_a_question_of_the_world():
    import random

    world, rng = toy.World(0), random.Random(0)
    # Short ones, that would come by chance.
    world.asked = ["what is", "which city"]
    assert not any(question in world.words(rng) for _ in range(2000) for question in world.asked)


@pytest.mark.parametrize(
    "text, stress",
    [
        ("the rate of the pitch", 1),
        ("prosody <b> & {x} rate", 2),
        ("rate rate rate", 2),
        ("one two", None),
    ],
)
def test_words_are_placed_in_a_text_with_marks_around_one_of_them(text, stress):
    marked, words = voices.with_stress(text, stress, 60)
    assert [word for _, word in words] == text.split()
    assert [at for at, _ in words] == sorted({at for at, _ in words})
    assert all(
        marked[at:].startswith(html.escape(word) if stress is not None else word)
        for at, word in words
    )
    before = [marked[:at].endswith(">") for at, _ in words]
    assert before == [n == stress for n in range(len(words))]
    assert (stress is None) == (marked == text)
