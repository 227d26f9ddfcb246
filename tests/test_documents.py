import json

import numpy as np
import pytest

import align
import toy
from conftest import call
from documents import (
    Documents,
    GROWTH,
    HELD_OUT,
    cut,
    interleaved,
    pack,
    read_chats,
    spoken,
    text_of,
    transcribed,
)
from vocab import Document


def test_packing_by_hand():
    # 7 and 8 are how the written 5 sounds, known at 8.
    spoken = Document([6, 7, 8, 9], [1] * 4, [6, 5], [0, 2])
    short = Document([4, 5], [0, 1])
    batch, left = pack(
        [(Document([1, 2, 3], [1, 1, 1]), 0), (short, 1), (spoken, 0)], rows=1, length=8, filler=0
    )
    assert batch["ids"].tolist() == [[6, 7, 8, 9, 1, 2, 3, 0]] and left == [(short, 1)]
    assert batch["read"].tolist() == [[6, 5]]
    assert batch["read_start"].tolist() == [[0, 0]]
    assert batch["place"].tolist() == [[0, 2]]
    assert batch["start"].tolist() == [[0, 0, 0, 0, 4, 4, 4, 7]]
    assert align.taught(batch).tolist() == [
        [True] * 4 + [False] * 4
    ], "only what was spoken is read in writing too"
    pieces, _ = pack([(part, 0) for part in cut(spoken, 3)], rows=1, length=8, filler=0)
    assert not align.taught(pieces).any(), "what was cut is not, and keeps a loss of its own"
    assert batch["target"].tolist() == [[7, 8, 9, 0, 2, 3, 0, 0]]
    assert batch["loss"].tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    asked = Document([1, 2, 3, 4], [0, 0, 1, 0])
    batch, left = pack([(asked, 0)], rows=1, length=4, filler=0)
    assert not left
    assert batch["loss"].tolist() == [
        [0, 1, 0, 0]
    ], "what just fits is packed; a target bears the loss of its own id"


@pytest.mark.parametrize(
    "mix", [{"text": 1}, {"chat": 1}, {"interleave": 0.35, "transcribe": 0.65}]
)
def test_rows_are_over_97_percent_full_and_nothing_is_lost(stream, mix):
    documents, again, total = stream(mix), stream(mix), 0
    for _ in range(5):
        total += documents.batch(8, 256)["ids"].numel()
    lengths = sum(len(again.next()[0].ids) for _ in range(sum(documents.drawn.values())))
    packed = lengths - sum(len(document.ids) for document, _ in documents.pending)
    assert 0.97 < packed / total <= 1


def test_the_stream_repeats_by_seed_passes_over_everything_and_never_trains_on_held_out_rows(
    stream,
):
    a, b = stream({"text": 1}), stream({"text": 1})
    first = [a.next()[0].ids for _ in range(a.count("text") - a.count("text") // HELD_OUT)]
    other = stream({"text": 1}, seed=1)
    assert [b.next()[0].ids for _ in range(20)] == first[:20]
    assert [other.next()[0].ids for _ in range(20)] != first[:20]
    held = [tuple(document.ids) for document, _ in a.held_out()["text"]]
    everything = {tuple(a.vocab.text(text)[0]) for text in a.sources["text"]}
    assert held and {tuple(ids) for ids in first} | set(held) == everything


def test_interleaved_documents_speak_and_write_by_turns_and_read_as_the_whole_row(stream):
    documents = stream({"interleave": 1})
    vocab, corpus, turns = documents.vocab, documents.sources["interleave"], set()
    for i in range(20):
        ids, loss, read, place = interleaved(vocab, corpus, i, np.random.default_rng(i))
        assert vocab.decode(read) == corpus.entries[i]["text"]
        assert read[-1] == vocab.eos, "written, the document is the row"
        switches = [
            n
            for n, token in enumerate(ids)
            if token in (vocab.speech["speech"], vocab.speech["end_speech"])
        ]
        assert [ids[n] for n in switches] == [
            vocab.speech["speech"],
            vocab.speech["end_speech"],
        ] * (len(switches) // 2)
        assert not any(loss[n] for n in switches)
        assert sum(loss) == len(ids) - len(switches) - 1
        assert len(place) == len(read)
        assert all(
            ids[at] == token or ids[at] >= vocab.speech["end_speech"]
            for token, at in zip(read, place)
        ), "text is where it is"
        assert list(place) == sorted(place)
        assert len(set(place)) >= 0.8 * len(
            place
        ), "each has its own place, but words too short for a unit"
        turns.add(len(switches) // 2)
    assert {1, 2} <= turns


def test_speech_without_word_times_is_read_by_no_teacher(stream):
    """Where its words stand among the units is not known, so a teacher would teach it wrong
    places.
    """
    documents = stream({"interleave": 1, "transcribe": 1})
    vocab, corpus = documents.vocab, documents.sources["interleave"]
    entry = corpus.entries[3]
    words = entry.pop("words")
    blind = interleaved(vocab, corpus, 3, np.random.default_rng(0)), transcribed(
        vocab, corpus, 3, np.random.default_rng(0)
    )
    entry["words"] = words
    seeing = interleaved(vocab, corpus, 3, np.random.default_rng(0)), transcribed(
        vocab, corpus, 3, np.random.default_rng(0)
    )
    assert all(
        document.ids and not len(document.read) and not len(document.place) for document in blind
    )
    assert all(len(document.read) == len(document.place) > 1 for document in seeing)


def test_base_text_stands_above_and_below_speech_and_grows_into_no_word(stream):
    documents = stream({"interleave": 1})
    vocab, corpus = documents.vocab, documents.sources["interleave"]
    forms = set()
    for i in range(120):
        n = i % len(corpus.entries)
        ids, _, read, _ = interleaved(vocab, corpus, n, np.random.default_rng(i), ["zig zag."])
        above, _, below = vocab.decode(read[:-1]).partition(corpus.entries[n]["text"])
        right_behind = (
            ".zig zag."
            if not below or ids[-2 - len(vocab.encode(below))] != vocab.speech["end_speech"]
            else "zig zag."
        )
        assert above in ("", "zig zag.\n", "zig zag.\n\n")
        assert below in ("", ".\n\nzig zag.", "\nzig zag.", right_behind)
        forms.add((above != "", below != ""))
    assert len(forms) == 4


# --- the audit: what speech training and instruct training may hold ---


def test_no_document_holds_both_a_chat_marker_and_a_unit(stream):
    documents = stream({"interleave": 1, "transcribe": 1, "text": 1, "chat": 1})
    vocab, kinds = documents.vocab, {"spoken": 0, "chat": 0}
    markers = {vocab.special["<|im_start|>"], vocab.special["<|im_end|>"]}
    for _ in range(400):
        ids = documents.next()[0].ids
        spoken, chat = max(ids) >= vocab.speech["speech"], bool(markers & set(ids))
        kinds["spoken"] += spoken
        kinds["chat"] += chat
        assert not (spoken and chat)
    assert min(kinds.values()) > 50, "the audit saw both kinds"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_speech_asks_no_question_about_a_fact_and_speaks_no_unseen_fact(seed):
    import random

    world, rng = toy.World(seed), random.Random(seed)
    speech = [toy.sentence(world, rng) for _ in range(3000)]
    asked = {
        wording.format(c=entity)
        for relation, entity, _, _ in world.facts
        for wording in toy.QUESTIONS[relation]
    }
    unseen = {
        wording.format(c=entity, a=answer)
        for relation, entity, answer, seen in world.facts
        if not seen
        for wording in toy.FACTS[relation]
    }
    for text in speech:
        assert not any(q in text for q in asked)
        assert "question:" not in text
        assert not set(text.split(". ")) & unseen
    words = {w for text in speech for w in text.replace(".", "").split()}
    assert {"what", "which", "name", "spell", "twice", "sentence", "note"} <= words
    assert set(toy.CAPITALS) | set(toy.CAPITALS.values()) <= words


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_chat_and_no_page_asks_about_an_unseen_fact(seed):
    import random

    world, rng = toy.World(seed), random.Random(seed)
    asked = [
        wording.format(c=entity)
        for relation, entity, _, seen in world.facts
        if not seen
        for wording in toy.QUESTIONS[relation]
    ]
    for _ in range(3000):
        said = (
            " | ".join(
                [toy.base_document(world, rng), *(m["content"] for m in toy.chat(world, rng))]
            ).replace("\n", " ")
            + " "
        )
        assert not any(q + " " in said for q in asked)


def test_transcripts_begin_with_single_words_and_grow(stream):
    documents = stream({"transcribe": 1})
    vocab, corpus = documents.vocab, documents.sources["transcribe"]
    longest = {}
    for progress in (0.0, 0.1, 0.2, 1.0):
        count = len(corpus.entries)
        said = [
            transcribed(vocab, corpus, i % count, np.random.default_rng(i), progress).ids
            for i in range(200)
        ]
        longest[progress] = max(
            len(vocab.decode(ids).partition("transcript:")[2].split()) for ids in said
        )
    assert longest[0.0] == longest[0.1] == 1
    assert 1 < longest[0.2] <= 3
    assert 10 < longest[1.0] <= 1 + 0.9 * GROWTH


def test_what_would_be_trained_on_can_be_looked_at(speedrun, monkeypatch, capsys):
    call(
        [
            "documents.py", str(speedrun / "speech"), "--units", str(speedrun / "units"),
            "--text", str(speedrun / "toy/base.jsonl"),
        ],
        monkeypatch,
    )
    said = capsys.readouterr().out
    assert all(f"{name}\n    " in said for name in ("text", "interleave", "transcribe"))
    assert "<|/speech|>" in said
    assert "64 rows of 256 ids are 9" in said
    with pytest.raises(ValueError, match="cannot hear"):
        call(
            ["documents.py", str(speedrun / "base"), "--units", str(speedrun / "units")],
            monkeypatch,
        )
    with pytest.raises(ValueError, match="nothing to show"):
        call(["documents.py", str(speedrun / "base")], monkeypatch)


def test_chats_without_a_reply_are_told(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "c.jsonl").write_text(json.dumps(chat) + "\n")
    with pytest.raises(ValueError, match="no message of an assistant"):
        read_chats(tmp_path / "c.jsonl")


def test_words_that_lie_inside_of_others_share_their_units():
    class Corpus:
        entries = [{"words": [["a", 0.0, 0.5], ["b", 0.1, 0.2], ["c", 0.3, 0.4]]}]
        meta = {"frame_rate": 50}

        def __getitem__(self, i):
            return np.arange(40), np.full(40, 1)

    shared = [units.tolist() for _, units in spoken(Corpus(), 0, 0, 3)]
    assert sum(shared, []) == list(range(40)), "each unit once"


def test_what_is_said_in_a_clip_is_its_text_or_else_its_words():
    assert text_of({"text": "hi", "words": [["ho", 0, 1]]}) == "hi"
    assert text_of({"words": [["a", 0, 1], ["b", 1, 2]]}) == "a b"
    assert text_of({"audio": "x.wav"}) == ""


def test_the_units_of_pauses_between_words_stay_in_the_documents():
    class Corpus:
        entries = [{"text": "a b c", "words": [["a", 0.1, 0.2], ["b", 0.3, 0.4], ["c", 0.6, 0.7]]}]
        meta = {"frame_rate": 50}

        def __getitem__(self, i):
            return np.arange(40), np.full(40, 1)  # 0.8 s, a frame a unit

    whole = spoken(Corpus(), 0, 0, 3)
    assert np.concatenate([units for _, units in whole]).tolist() == list(
        range(40)
    ), "the words of an entry have all its units"
    assert [word for word, _ in whole] == ["a", " b", " c"]
    assert [units.tolist() for _, units in spoken(Corpus(), 0, 1, 2)] == [
        list(range(12, 25))
    ], "half of the pause on either side"


def test_a_role_that_could_spell_markers_is_refused(tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        '{"messages": [{"role": "user<|im_end|>", "content": "x"}]}\n'
    )
    with pytest.raises(ValueError, match="got the role 'user<|im_end|>'"):
        read_chats(tmp_path / "chat.jsonl")


def test_an_empty_conversation_is_refused_as_a_stream_of_them_would_never_fill_a_row(tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="no messages"):
        read_chats(tmp_path / "chat.jsonl")


def test_held_out_text_never_stands_beside_speech(stream):
    documents = stream({"interleave": 1})
    texts = documents.sources["text"]
    assert documents.below == texts[len(texts) // HELD_OUT :]
    assert len(documents.below) < len(texts)


def test_of_two_streams_each_has_its_own_documents_and_together_they_have_all(stream):
    whole = stream({"text": 1})
    vocab, texts = whole.vocab, whole.sources
    halves = [Documents(vocab, texts, {"text": 1}, 0, part, 2) for part in (0, 1)]
    count = whole.count("text") - whole.count("text") // HELD_OUT
    drawn = [tuple(half.next()[0].ids) for half in halves for _ in range(count // 2)]
    one = [tuple(whole.next()[0].ids) for _ in range(count // 2 * 2)]
    assert sorted(drawn) == sorted(one)


def test_a_word_of_several_ids_has_them_on_its_last_units(stream):
    documents = stream({"interleave": 1})
    vocab = documents.vocab
    written = vocab.encode("qzx")
    document = vocab.interleave([[("qzx", np.array([1, 2, 3, 4, 5])), (" of", np.array([6]))]])
    assert len(written) == 3
    assert document.place == [
        3, 4, 5, 6, 8,
    ], "the marker stands at 0, units from 1 on; the end is at 8"
