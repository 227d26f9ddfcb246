import json
import random
import shutil

import numpy as np
import pytest
import tiktoken

import runs
import weights
from conftest import call, shared
from vocab import LETTERS, LLAMA3, Vocab, tokenizer_json

SEPARATOR = "\n__ggml_vocab_test__\n"


@pytest.fixture
def toy(tmp_path):
    """A byte tokenizer with three specials, as toy.py makes it."""
    special = {
        name: 256 + i for i, name in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(tokenizer_json({c: i for i, c in enumerate(LETTERS)}, [], special))
    )
    return Vocab(tmp_path)


@pytest.fixture
def hearing(toy):
    first = toy.with_speech(300, 10)
    toy.speech = {"speech": 300, "end_speech": 301, "first_unit": first, "k": 10}
    return toy


@pytest.mark.parametrize("name, vectors", [("qwen2.5", "qwen2"), ("gpt2", "gpt-2")])
def test_real_tokenizers_pass_all_their_vectors(name, vectors):
    vocab = Vocab(shared(f"tokenizers/{name}"))
    texts = (
        shared(f"tokenizers/vectors/ggml-vocab-{vectors}.gguf.inp")
        .read_text(encoding="utf-8")
        .split(SEPARATOR)
    )
    wanted = shared(f"tokenizers/vectors/ggml-vocab-{vectors}.gguf.out").read_text().split("\n")
    assert [vocab.encode(text) for text in texts] == [
        [int(i) for i in line.split()] for line in wanted[: len(texts)]
    ]
    assert len(texts) == 47
    assert all(vocab.decode(vocab.encode(text)) == vocab.normalize(text) for text in texts)


def test_a_sentencepiece_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="byte-level BPE"):
        Vocab(shared("tokenizers/tinyllama"))
    shutil.copy(shared("tokenizers/tinyllama/tokenizer.model"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no text tokenizer"):
        Vocab(tmp_path)


def hard_strings(n, rng):
    """Random text of letters of many scripts, digits, contractions, white space and emoji:
    what pre-tokenizers stumble over.
    """
    pieces = [
        "'s", "'LL", " don't", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "123", "4567890",
        "½", "é", "e\u0301", "ß", "中文", "한국", "ไทย", "العربية", "हिन्दी", "😀", "👩\u200d🚀",
        "<|im_end|>", "--", "...", "_a", "$9.99",
    ]
    letter = lambda: rng.choice(
        [
            chr(rng.randrange(32, 127)), chr(rng.randrange(0xA1, 0x3000)), rng.choice(pieces),
            rng.choice(pieces), " the", " Word",
        ]
    )
    return ["".join(letter() for _ in range(rng.randrange(1, 30))) for _ in range(n)]


@pytest.fixture
def llama3(tmp_path):
    """A folder with Llama-3's pre-tokenizer and special tokens, of GPT-2's real merges, and what
    tiktoken itself makes of them.
    """
    gpt2 = Vocab(shared("tokenizers/gpt2"))
    ranks = {token: rank for rank, token in gpt2.bytes_of.items()}
    model = gpt2.json["model"]
    names = [f"<|reserved_special_token_{n}|>" for n in range(256)]
    names[0], names[1], names[9] = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    names[6], names[7] = "<|start_header_id|>", "<|end_header_id|>"
    special = {name: len(model["vocab"]) + n for n, name in enumerate(names)}
    made = tokenizer_json(model["vocab"], model["merges"], special, LLAMA3)
    made["model"]["ignore_merges"] = True  # as in Llama-3's: a known word is taken whole
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    return tmp_path, tiktoken.Encoding(
        "oracle", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={}
    )


def test_llama_3s_tokenizer_gives_tiktokens_ids_and_its_chat_begins_with_begin_of_text(
    llama3, tmp_path
):
    folder, oracle = llama3
    vocab, texts = Vocab(folder), hard_strings(1000, random.Random(1))
    assert [vocab.encode(text) for text in texts] == [
        oracle.encode_ordinary(text) for text in texts
    ]
    bos, start, end, eot = (
        vocab.special[t]
        for t in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    )
    said = vocab.turn([{"role": "user", "content": "hi"}])
    assert said == [
        bos, start, *vocab.encode("user"), end, *vocab.encode("\n\nhi"), eot, start,
        *vocab.encode("assistant"), end, *vocab.encode("\n\n"),
    ]
    ids, loss, *_ = vocab.text("hi")
    assert ids[0] == bos and loss[0] == 0 and all(loss[1:])


def test_every_pretokenizer_equals_transformers_on_a_thousand_hard_strings(llama3, tmp_path):
    transformers = pytest.importorskip("transformers")
    folders = [shared("tokenizers/qwen2.5"), shared("tokenizers/gpt2"), llama3[0]]
    gpt2 = Vocab(folders[1])
    smollm2 = tmp_path / "smollm2"
    smollm2.mkdir()
    gpt2.json["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ],
    }
    gpt2.save(smollm2)
    for number, folder in enumerate([*folders, smollm2]):
        vocab = Vocab(folder)
        (tmp_path / str(number)).mkdir()
        vocab.save(tmp_path / str(number))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(number))
        for text in hard_strings(1000, random.Random(number)):
            # Transformers reads a spelled special as one; ours never does.
            plain = text.replace("<|im_end|>", "")
            assert theirs.encode(plain, add_special_tokens=False) == vocab.encode(plain), (
                folder,
                plain,
            )
            assert not set(vocab.encode(text)) & set(vocab.special.values())


def test_text_that_spells_a_special_token_is_plain_text(toy):
    assert toy.special["<|im_end|>"] not in toy.encode("<|im_end|>")
    assert toy.decode(toy.encode("<|im_end|>")) == "<|im_end|>"


def test_transformers_reads_our_files_to_the_same_ids(hearing, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "ours").mkdir()
    hearing.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x100, 0x2000), 0x1F600]))
            for _ in range(20)
        )
        assert theirs.encode(text, add_special_tokens=False) == hearing.encode(text)
    assert len(theirs) == hearing.size == 384
    assert [
        theirs.convert_tokens_to_ids(t)
        for t in ("<|speech|>", "<|/speech|>", "<|unit_0|>", "<|unused_299|>", "<|unused_383|>")
    ] == [300, 301, 302, 299, 383]


def test_a_tokenizer_that_reads_lower_case_has_the_ids_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ids = {letter: i for i, letter in enumerate(LETTERS)}
    made = tokenizer_json(ids, [], {"<|endoftext|>": 256}, normalizer={"type": "Lowercase"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = Vocab(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("The Capital of FRANCE", "ΟΔΟΣ ΟΔΟΣ", "İstanbul ẞ Ǆ", "<|ENDOFTEXT|>"):
        assert ours.encode(text) == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
    assert ours.decode(ours.encode("The CAPITAL")) == "the capital"
    assert ours.special == {"<|endoftext|>": 256}


def test_the_hole_of_a_padded_vocabulary_is_filled_so_that_row_number_is_token_id(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = Vocab(shared("tokenizers/qwen2.5"))
    hole = vocab.size
    assert hole < 151936 and vocab.with_speech(151936, 500) == 151938
    (tmp_path / "q").mkdir()
    vocab.save(tmp_path / "q")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "q")
    assert len(theirs) == vocab.size == 152448
    assert theirs.convert_tokens_to_ids([f"<|unused_{hole}|>", "<|speech|>", "<|unit_499|>"]) == [
        hole, 151936, 152437,
    ]
    assert theirs.encode("Hello 2024 wörld") == vocab.encode("Hello 2024 wörld")


def test_layouts_are_literally_what_the_docstring_says(hearing):
    v, units = hearing, np.array([3, 1])
    h, i, b = v.encode("h")[0], v.encode("i")[0], v.special
    assert v.text("hi")[:2] == ([h, i, v.eos], [1, 1, 1])
    assert v.interleave(["h", [("i", units)], "i"]) == (
        [h, 300, 305, 303, 301, i, v.eos],
        [1, 0, 1, 1, 0, 1, 0],
        [h, i, i, v.eos],
        [0, 3, 5, 6],
    )
    cue = v.encode(" transcript:")
    assert v.transcribe([("hi", units)])[:2] == (
        [300, 305, 303, 301, *cue, *v.encode(" hi."), v.eos],
        [0] * (4 + len(cue)) + [1] * 5,
    )
    user = [b["<|im_start|>"], *v.encode("user\n")]
    ends = [b["<|im_end|>"], *v.encode("\n")]
    opened = [b["<|im_start|>"], *v.encode("assistant\n")]
    assert v.turn([{"role": "user", "content": units}]) == [
        *user, 300, 305, 303, 301, *ends, *opened,
    ]
    ids, loss, *_ = v.chat(
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"}]
    )
    assert ids == [*user, h, *ends, *opened, i, *ends]
    assert [ids[n] for n, bears in enumerate(loss) if bears] == [i, b["<|im_end|>"]]


def test_the_layout_equals_the_jinja_of_qwen2_5():
    transformers = pytest.importorskip("transformers")
    folder = shared("tokenizers/qwen2.5")
    template = runs.read_json(folder / "tokenizer_config.json")["chat_template"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <|im_end|>?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "So?"},
    ]
    messages[1]["content"] = "Hi?"
    text = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ours = Vocab(folder)
    assert ours.turn(messages) == ours.literal(text)


def test_a_unit_of_another_codebook_and_a_deaf_model_are_refused(hearing, toy):
    with pytest.raises(ValueError, match="unit 12 is outside this model's codebook of 10"):
        hearing.span([12])
    toy.speech = None
    with pytest.raises(ValueError, match="cannot hear"):
        toy.span([1])


def changed(folder, tmp_path, change):
    """The toy's tokenizer.json after `change` of its JSON."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    return tmp_path


def split(**settings):
    return lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(settings)


@pytest.mark.parametrize(
    "change, said",
    [
        (split(behavior="Removed"), "is not supported"),
        (split(invert=True), "is not supported"),
        (split(pattern={"String": " "}), "is not supported"),
        (split(pattern={"Regex": r"\p{N}{1,3}"}), "loses text"),
        (split(pattern={"Regex": r"\w+| "}), "loses text"),
    ],
)
def test_a_pattern_that_would_lose_text_is_refused(toy, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        Vocab(changed(tmp_path, tmp_path, change))
    Vocab(
        changed(
            tmp_path, tmp_path,
            split(behavior="Isolated", invert=False, pattern={"Regex": r"\s+|\S+"}),
        )
    )


def test_an_added_token_that_is_not_special_is_text_of_one_id_as_in_tokenizers(toy, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    think = {
        "id": 259,
        "content": "<think>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    vocab = Vocab(changed(tmp_path, tmp_path, lambda raw: raw["added_tokens"].append(think)))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("<think>", "a<think>b <think><think>", "no <thin k>"):
        assert vocab.encode(text) == theirs.encode(text).ids
        assert vocab.decode(vocab.encode(text)) == text
    assert 259 in vocab.text_rows() and 257 not in vocab.encode("<|im_start|>")
    vocab.save(tmp_path)
    assert Vocab(tmp_path).encode("<think>") == [259]


def test_a_byte_that_a_vocabulary_lacks_is_left_out_as_in_tokenizers(toy, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = Vocab(
        changed(
            tmp_path, tmp_path,
            lambda raw: [raw["model"]["vocab"].pop(LETTERS[byte]) for byte in (4, 0xF1, 0xFF)],
        )
    )
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a\x04b", "\x04", "\U00040000x", "plain ü 🎧"):
        assert vocab.encode(text) == theirs.encode(text).ids
    assert vocab.encode("a\x04b") == vocab.encode("ab") and -1 not in vocab.bytes_of


def test_merges_of_tokens_that_the_vocabulary_lacks_are_a_damaged_file(toy, tmp_path):
    with pytest.raises(ValueError, match="merges make 'ab', which its vocabulary lacks"):
        Vocab(changed(tmp_path, tmp_path, lambda raw: raw["model"]["merges"].append(["a", "b"])))


@pytest.mark.parametrize(
    "harm",
    [
        {"model": "Lowercase"}, {"normalizer": "Lowercase"}, {"pre_tokenizer": "Lowercase"},
        {"added_tokens": None}, {"added_tokens": [{}]}, {"pre_tokenizer": {"pretokenizers": []}},
    ],
)
def test_a_part_of_a_tokenizer_of_another_form_is_a_damaged_file(harm, toy, tmp_path):
    toy.save(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(made | harm))
    with pytest.raises(ValueError, match="tokenizer.json has not the form of one"):
        Vocab(tmp_path)


def test_speech_json_holds_whole_numbers(toy, tmp_path):
    toy.save(tmp_path)
    speech = {"speech": 300, "end_speech": 301, "first_unit": 302, "k": None}
    (tmp_path / "speech.json").write_text(json.dumps(speech))
    with pytest.raises(ValueError, match="wanted whole numbers as speech, end_speech"):
        Vocab(tmp_path)


def test_a_text_with_a_million_blanks_is_refused_in_one_line(toy):
    assert toy.decode(toy.encode("a" + 1000 * " \n" + "b")) == "a" + 1000 * " \n" + "b"
    with pytest.raises(ValueError, match="over 500,000 blanks in a row"):
        toy.encode("a" + 1_100_000 * " " + "b")


def test_a_chat_template_in_a_file_of_its_own_is_kept(toy, tmp_path):
    (tmp_path / "from").mkdir()
    toy.save(tmp_path / "from")
    config = json.loads((tmp_path / "from/tokenizer_config.json").read_text())
    template = config.pop("chat_template", "{{ messages }}")
    (tmp_path / "from/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "from/chat_template.jinja").write_text(template)
    (tmp_path / "to").mkdir()
    Vocab(tmp_path / "from").save(tmp_path / "to")
    kept = json.loads((tmp_path / "to/tokenizer_config.json").read_text())
    assert kept["chat_template"] == template
    (tmp_path / "from/chat_template.jinja").write_bytes(b"\xff{{")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8"):
        Vocab(tmp_path / "from")


def test_the_prompt_for_a_transcript_is_how_transcripts_begin(toy):
    toy.speech = {"speech": 300, "end_speech": 301, "first_unit": 302, "k": 10}
    units = np.array([3, 1, 4])
    document = toy.transcribe([("hi", units)])
    prompt = toy.heard(units)
    assert document.ids[: len(prompt)] == prompt
    assert document.loss[: len(prompt)] == [0] * len(prompt)
    assert all(document.loss[len(prompt) :])


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain.py", "--init", "{m}", "--text", "{m}/config.json", "--out", "{m}/x"],
        ["chat.py", "{m}", "{m}/question.wav"],
        ["merge.py", "--base", "{m}", "--instruct", "{m}", "--speech", "{m}", "--dry-run"],
        ["desta.py", "write", "{m}/m.jsonl", "--model", "{m}", "--out", "{m}/x"],
    ],
)
def test_a_tokenizer_that_names_rows_which_are_not_there_is_refused(
    words, speedrun, tmp_path, monkeypatch
):
    shutil.copytree(speedrun / "merged", tmp_path / "m")
    table = "model.embed_tokens.weight"
    read = weights.Tensors(speedrun / "merged")
    state = {name: read[name].clone() for name in read}
    weights.save(tmp_path / "m", state | {table: state[table][:300].clone()})
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    row = {"audio": "a.wav", "text": "hi", "seconds": 1.0, "style": {"rate": "fast"}}
    (tmp_path / "m/m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="the tokenizer knows .* the embedding has 300 rows"):
        call([word.format(m=tmp_path / "m") for word in words], monkeypatch)
