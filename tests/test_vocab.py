import json
import random

import numpy as np
import pytest

import weights
from conftest import shared
from vocab import LETTERS, Vocab, tokenizer_json

SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture
def toy(tmp_path):
    """A byte tokenizer with three specials, as toy.py makes it."""
    special = {name: 256 + i for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_json({c: i for i, c in enumerate(LETTERS)}, [], special)))
    return Vocab(tmp_path)


@pytest.fixture
def hearing(toy):
    first = toy.with_speech(300, 10)
    toy.speech = {"speech": 300, "end_speech": 301, "first_unit": first, "k": 10}
    return toy


@pytest.mark.parametrize("name, vectors", [("qwen2.5", "qwen2"), ("gpt2", "gpt-2")])
def test_real_tokenizers_pass_all_their_vectors(name, vectors):
    vocab = Vocab(shared(f"tokenizers/{name}"))
    texts = shared(f"tokenizers/vectors/ggml-vocab-{vectors}.gguf.inp").read_text(encoding="utf-8").split(SEPARATOR)
    wanted = shared(f"tokenizers/vectors/ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    assert [vocab.encode(text) for text in texts] == [[int(i) for i in line.split()] for line in wanted[:len(texts)]]
    assert len(texts) == 47 and all(vocab.decode(vocab.encode(text)) == vocab.normalize(text) for text in texts)


def test_a_sentencepiece_tokenizer_is_refused():
    with pytest.raises(ValueError, match="byte-level BPE"):
        Vocab(shared("tokenizers/tinyllama"))


def test_text_that_spells_a_special_token_is_plain_text(toy):
    assert toy.special["<|im_end|>"] not in toy.encode("<|im_end|>") and toy.decode(toy.encode("<|im_end|>")) == "<|im_end|>"


def test_transformers_reads_our_files_to_the_same_ids(hearing, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "ours").mkdir()
    hearing.save(tmp_path / "ours")
    theirs, rng = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours"), random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x100, 0x2000), 0x1F600])) for _ in range(20))
        assert theirs.encode(text, add_special_tokens=False) == hearing.encode(text)
    assert len(theirs) == hearing.size == 384
    assert [theirs.convert_tokens_to_ids(t) for t in ("<|speech|>", "<|/speech|>", "<|unit_0|>", "<|unused_299|>", "<|unused_383|>")] == [300, 301, 302, 299, 383]


def test_the_hole_of_a_padded_vocabulary_is_filled_so_that_row_number_is_token_id(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = Vocab(shared("tokenizers/qwen2.5"))
    hole = vocab.size
    assert hole < 151936 and vocab.with_speech(151936, 500) == 151938
    (tmp_path / "q").mkdir()
    vocab.save(tmp_path / "q")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "q")
    assert len(theirs) == vocab.size == 152448
    assert theirs.convert_tokens_to_ids([f"<|unused_{hole}|>", "<|speech|>", "<|unit_499|>"]) == [hole, 151936, 152437]
    assert theirs.encode("Hello 2024 wörld") == vocab.encode("Hello 2024 wörld")


def test_layouts_are_literally_what_the_docstring_says(hearing):
    v, units = hearing, np.array([3, 1])
    h, i, b = v.encode("h")[0], v.encode("i")[0], v.special
    assert v.text("hi")[:2] == ([h, i, v.eos], [1, 1, 1])
    assert v.interleave(["h", [("i", units)], "i"]) == ([h, 300, 305, 303, 301, i, v.eos], [1, 0, 1, 1, 0, 1, 1], [h, i, i, v.eos], [0, 3, 5, 6])
    cue = v.encode(" transcript:")
    assert v.transcribe([("hi", units)])[:2] == ([300, 305, 303, 301, *cue, *v.encode(" hi"), v.eos], [0] * (4 + len(cue)) + [1] * 4)
    user, ends = [b["<|im_start|>"], *v.encode("user\n")], [b["<|im_end|>"], *v.encode("\n")]
    opened = [b["<|im_start|>"], *v.encode("assistant\n")]
    assert v.turn([{"role": "user", "content": units}]) == [*user, 300, 305, 303, 301, *ends, *opened]
    ids, loss, *_ = v.chat([{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}])
    assert ids == [*user, h, *ends, *opened, i, *ends] and [ids[n] for n, bears in enumerate(loss) if bears] == [i, b["<|im_end|>"]]


def test_the_layout_equals_the_jinja_of_qwen2_5():
    transformers = pytest.importorskip("transformers")
    folder = shared("tokenizers/qwen2.5")
    template = weights.read_json(folder / "tokenizer_config.json")["chat_template"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <|im_end|>?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "So?"}]
    messages[1]["content"] = "Hi?"
    text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    ours = Vocab(folder)
    assert ours.turn(messages) == ours.literal(text)


def test_a_unit_of_another_codebook_and_a_deaf_model_are_refused(hearing, toy):
    with pytest.raises(ValueError, match="unit 12 is outside this model's codebook of 10"):
        hearing.span([12])
    toy.speech = None
    with pytest.raises(ValueError, match="cannot hear"):
        toy.span([1])
