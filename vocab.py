"""What the model reads: tokens of text, markers and units, and the layout of documents and turns.

in   an open model's own tokenizer files (byte-level BPE), of config.json how many rows
     there are, and speech.json where the model hears
out  ids (rows of the LM) and, for training, which of them bear loss
see  tiktoken; ChatML and Llama-3 chat formats; Spirit LM (arXiv:2402.05755) for interleaving
run  python vocab.py show out/speech    # every layout as literal tokens, ids and loss positions

layout       how it reads                                              what bears loss
interleave   text <|speech|> units <|/speech|> text goes on <eos>      text; units with --unit-loss
transcribe   <|speech|> units <|/speech|> transcript: text. <eos>      behind the cue, and <eos>
text         text <eos>                                                all
chat         <|im_start|>user\\n...<|im_end|>\\n                       replies and their end
             <|im_start|>assistant\\n...<|im_end|>\\n
spoken turn  <|im_start|>user\\n<|speech|> units <|/speech|><|im_end|>\\n<|im_start|>assistant\\n
captioned    caption\\n text <|speech|> word numbers... <|/speech|>      text and words; numbers
             \\n another text \\n caption. <eos>                         with --unit-loss
page         question: ...\\nanswer:         a plain prompt, for a model that never chatted

A spoken turn of prosody has its transcript in front. What follows `<|/speech|>` is open:
text goes on, or the cue " transcript:" asks for a transcript.
"""

import argparse
import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import tiktoken

BEGIN = "<|begin_of_text|>"
SPEECH, END_SPEECH = "<|speech|>", "<|/speech|>"
BLANKS = 500_000  # in a row: tiktoken's regular expressions stop at twice as many
SPOKEN = "speech", "end_speech", "first_unit", "k"  # of speech.json
SIGNS = "#$%&*+<=>@^_|~"  # of markup: text models learn to read past them
CUE = " transcript:"
DOCUMENT_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>"]

# How the families cut text into words, as regular expressions.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+" r"|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)  # Qwen's, digits by threes
# GPT-2's, digits one by one.
SMOLLM2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
SAMPLE = "it's 2024, THE capital\tof\n\n  Ünï\u00a0日本語 is 3.5%: <🎧> e\u0301_½\r\n "


class Template(NamedTuple):
    """A family's chat format: what stands around role and content, and what ends a reply."""

    before: str
    after_role: str
    after_content: str
    end: str


CHATS = {
    "chatml": Template("<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>"),
    "llama3": Template(
        "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"
    ),
}


def byte_letters():
    """GPT-2's printable letter for each of the 256 bytes.

    A byte that is printable Latin-1 stands for itself, any other is the next letter from
    256 on.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}
NO_ID = -1  # of a byte that a vocabulary lacks


# --- tokenizer files ----------------------------------------------------------


def tokenizer_json(vocab, merges, special, pattern=GPT2, normalizer=None):
    """A Hugging Face tokenizer.json of a byte-level BPE.

    vocab {token: id}, merges [(left, right)], special {token: id}
    """
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0",
        "normalizer": normalizer,
        "added_tokens": [added_token(token, i) for token, i in special.items()],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, letters | {"use_regex": False}],
        },
        "decoder": letters | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def added_token(token, i):
    return {
        "id": i,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def train_bpe(counts):
    """Merges of a byte-level BPE, [(left, right)], until every piece of {piece: count} is a token.

    The most frequent pair of neighbours is made one, again and again.
    """
    words = {
        tuple(LETTERS[byte] for byte in piece.encode()): n for piece, n in counts.items()
    }
    merges = []
    while True:
        pairs = {}
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
        if not pairs:
            return merges
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        words = {merged(word, best): n for word, n in words.items()}


def merged(word, pair):
    """The tokens of `word` with every neighbouring `pair` made one."""
    out = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] += token
        else:
            out.append(token)
    return tuple(out)


def read_tokenizer(folder):
    """(tokenizer.json, tokenizer_config.json or {}) of a folder, the first from older files."""
    folder = Path(folder)
    config = {}
    if (folder / "tokenizer_config.json").exists():
        config = runs.read_json(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").exists():  # where newer folders keep it
        config.setdefault("chat_template", runs.utf8(folder / "chat_template.jinja"))
    if (folder / "tokenizer.json").exists():
        return runs.read_json(folder / "tokenizer.json"), config
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise FileNotFoundError(
            f"{folder}: no text tokenizer; wanted tokenizer.json, or vocab.json with merges.txt"
        )

    # GPT-2's vocab.json lists the end-of-document token among ordinary ones.
    vocab = runs.read_json(folder / "vocab.json")
    lines = runs.utf8(folder / "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = config.get("added_tokens_decoder", {})
    special = {token["content"]: int(i) for i, token in added.items()}
    special |= {token: vocab[token] for token in DOCUMENT_ENDS if token in vocab}

    qwen = config.get("tokenizer_class", "").startswith("Qwen2")
    pattern, normalizer = (QWEN2, {"type": "NFC"}) if qwen else (GPT2, None)
    made = tokenizer_json(vocab, merges, special, pattern, normalizer)
    for token in made["added_tokens"]:
        token["special"] = added.get(str(token["id"]), {}).get("special", True)
    return made, config


def pattern_of(json_, folder):
    """The pre-tokenizer's regular expression; a ValueError for one that is unknown."""
    pre = json_.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    first = steps[0]
    if (
        kinds == ["ByteLevel"]
        and first.get("use_regex", True)
        and not first.get("add_prefix_space")
    ):
        return GPT2

    isolated = first.get("behavior", "Isolated") == "Isolated" and not first.get("invert")
    if (
        kinds == ["Split", "ByteLevel"]
        and not steps[1].get("use_regex", True)
        and isolated
        and "Regex" in (first.get("pattern") or {})
    ):
        return first["pattern"]["Regex"]
    if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits"):
        return SMOLLM2
    raise ValueError(
        f"{folder}: pre-tokenizer {kinds} is not supported; wanted the byte-level BPE "
        "of GPT-2, Llama-3, Qwen or SmolLM2"
    )


# --- the vocabulary -----------------------------------------------------------


class Document(NamedTuple):
    """A training document. Of one that is partly spoken, also how it reads in writing.

    ids    the capital of <|speech|> u17 u3 u9 <|/speech|> is paris
    loss   how much a token counts in the loss, most often 1; 0 where it bears none
    read   the capital of france is paris
    place  0 1 2 6 8 9: of each id of `read`, where in `ids` the same is said (a spoken word: at its
           last unit)
    """

    ids: list
    loss: list
    read: list = ()
    place: list = ()


class Said(list):
    """A stretch of speech as its words, each with numbers that say how it was spoken.

    [("", [3, 24, 40]), ("anna", [56, 72, 88, 104, 120]), (" likes", [50, ...]), ...]: see
    prosody.py; the first is the speaker.
    """

    @classmethod
    def read(cls, pairs, where):
        """One of JSON; a ValueError that begins with `where` if it has another form."""
        try:
            said = cls((word, list(numbers)) for word, numbers in pairs)
            numbers = [number for _, numbers in said for number in numbers]
            whole = all(type(number) is int and abs(number) < 1 << 31 for number in numbers)
            if whole and all(isinstance(word, str) for word, _ in said):
                return said
        except (TypeError, ValueError):
            pass
        raise ValueError(
            f"{where}: got said = {str(pairs)[:40]}, wanted [[word, [number, ...]], ...]; make "
            "it with prosody.py"
        )

    def text(self):
        return "".join(word for word, _ in self)

    def words(self):
        """How many words were said."""
        return sum(bool(word) for word, _ in self)


def longest_blank(text):
    """How many blanks stand in a row, if they may be too many."""
    return max(map(len, re.findall(r"\s+", text)), default=0) if len(text) > BLANKS else 0


class Vocab:
    """The tokens of a model folder. Text is encoded as text even where it spells a special token.

    size     rows that the tokenizer knows         special  {token: id}
    family   of CHATS, or None                     eos      the id that ends a document
    stop     ids that end a reply                  speech   speech.json, or None
    """

    def __init__(self, folder):
        self.name = Path(folder).name
        self.json, self.config = read_tokenizer(folder)
        try:
            self._read_bpe(folder)
            self.pattern = pattern_of(self.json, folder)
            self._read_special(folder)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{folder}: its tokenizer.json has not the form of one ({error}); "
                "the file is damaged"
            ) from None
        known = self.pattern in (GPT2, QWEN2, LLAMA3, SMOLLM2)
        if not known and self.decode(self.encode(SAMPLE)) != self.normalize(SAMPLE):
            raise ValueError(
                f"{folder}: its pre-tokenizer's pattern {self.pattern[:60]!r} loses "
                "text; wanted one that matches all of it"
            )
        file = Path(folder) / "config.json"  # of a model; a tokenizer alone may have none
        rows = runs.read_json(file).get("vocab_size") if file.exists() else None
        if isinstance(rows, int) and rows < self.size:
            raise ValueError(
                f"{folder}: the tokenizer knows {self.size} tokens, the embedding has "
                f"{rows} rows"
            )
        file = Path(folder) / "speech.json"
        self.speech = None
        if file.exists():
            self.speech = runs.read_json(file, SPOKEN)
            if not all(isinstance(self.speech[name], int) for name in SPOKEN):
                raise ValueError(f"{file}: wanted whole numbers as {', '.join(SPOKEN)}")

    def _read_bpe(self, folder):
        """id_of_rank: tiktoken's ranks (merging order) to ids; bytes_of: of each id its bytes."""
        bpe = self.json.get("model") or {}
        byte_level = (
            bpe.get("type") == "BPE"
            and not bpe.get("byte_fallback")
            and "merges" in bpe
            and LETTERS[ord(" ")] in bpe.get("vocab", {})
        )
        if not byte_level:
            raise ValueError(
                f"{folder}: a {bpe.get('type')} tokenizer that is not byte-level BPE "
                "(sentencepiece?) is not supported"
            )
        self.normalizer = (self.json.get("normalizer") or {}).get("type")
        if self.normalizer not in (None, "NFC", "Lowercase"):
            raise ValueError(
                f"{folder}: text normalizer {self.normalizer} is not supported; "
                "wanted none, NFC or Lowercase"
            )

        pairs = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]
        ]
        merged = [left + right for left, right in pairs]
        tokens = list(dict.fromkeys(LETTERS + merged))
        lost = [token for token in tokens[len(LETTERS) :] if token not in bpe["vocab"]]
        if lost:
            raise ValueError(
                f"{folder}: its merges make {lost[0]!r}, which its vocabulary lacks; "
                "the file is damaged"
            )

        # A vocabulary may lack bytes that its training text never had (SmolLM2's lacks
        # 21). `tokenizers` leaves such a byte out of a text, and so do we: its rank has
        # no id. (Signs on both sides of it are then merged there, as tokens of one word;
        # here they stay apart.)
        self.id_of_rank = np.array([bpe["vocab"].get(token, NO_ID) for token in tokens])
        self.bytes_of = {
            int(i): bytes(BYTES[letter] for letter in token)
            for token, i in zip(tokens, self.id_of_rank)
            if i != NO_ID
        }

    def _read_special(self, folder):
        """Special tokens, and what follows from them: chat family, document end, size."""
        added = self.json.get("added_tokens", [])
        self.special = {token["content"]: token["id"] for token in added}

        # An added token that is not special (Qwen3's <think>) is text: it is read as one
        # id, and a reply may hold it.
        self.added = {
            token["content"]: token["id"]
            for token in added
            if not token.get("special", True)
        }
        self.bytes_of |= {i: token.encode() for token, i in self.added.items()}
        self.size = max([*self.bytes_of, *self.special.values()]) + 1

        families = [name for name, chat in CHATS.items() if chat.before in self.special]
        self.family = families[0] if families else None
        ends = [self.special[token] for token in DOCUMENT_ENDS if token in self.special]
        if not ends:
            raise ValueError(
                f"{folder}: no end-of-document token; wanted one of "
                f"{', '.join(DOCUMENT_ENDS)}"
            )
        self.eos = ends[0]
        self.stop = [self.eos]
        if self.family:
            self.stop.append(self.special[CHATS[self.family].end])

        # Llama-3 begins every document and conversation with a token of its own.
        self.begin = [self.special[BEGIN]] if BEGIN in self.special else []

    # --- tokens ---

    @functools.cached_property
    def tiktoken(self):
        ranks = {
            self.bytes_of[i]: rank
            for rank, i in enumerate(self.id_of_rank.tolist())
            if i != NO_ID
        }
        ranks |= {bytes([byte]): byte for byte in range(256)}  # tiktoken wants all bytes
        return tiktoken.Encoding(
            self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def normalize(self, text):
        if self.normalizer == "Lowercase":  # letter by letter, as tokenizers does
            return "".join(letter.lower() for letter in text)
        return unicodedata.normalize("NFC", text) if self.normalizer else text

    def encode(self, text):
        """Ids of a text."""
        return self.ids_of(text, self.added)

    def literal(self, template):
        """Ids of a template string, in which special tokens are meant: "<|im_end|>\\n"."""
        meant = {token: i for token, i in self.special.items() if token in template}
        return self.ids_of(template, meant)

    def ids_of(self, text, tokens):
        """Ids of a text in which `tokens`, {token: id}, stand for themselves."""
        parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
        ids = []
        for part in parts:
            if part in tokens:
                ids.append(tokens[part])
            elif longest_blank(part) > BLANKS:
                raise ValueError(
                    f"a text with over {BLANKS:,} blanks in a row; take them out"
                )
            else:
                ranks = self.tiktoken.encode_ordinary(self.normalize(part))
                ids += [i for i in self.id_of_rank[ranks].tolist() if i != NO_ID]
        return ids

    def decode(self, ids):
        """The text of ids; specials and units decode to nothing."""
        raw = b"".join(self.bytes_of.get(int(i), b"") for i in ids)
        return raw.decode("utf-8", errors="replace")

    def text_rows(self):
        """Ids that a reply may hold: text, and what ends it."""
        return sorted({*self.bytes_of, *self.stop})

    def with_speech(self, first, k, names=None):
        """Add `<|speech|>`, `<|/speech|>` and k units as tokens from row `first` on.

        names  of the units, if not unit_0, unit_1, ...

        Every row up to the next multiple of 128, and any hole before `first` (open
        checkpoints pad their embedding), becomes an `<|unused_N|>` entry: so row number =
        token id in every reader. Returns the row of unit 0.
        """
        total = -(-(first + 2 + k) // 128) * 128
        tokens = {first: SPEECH, first + 1: END_SPEECH}
        names = names or [f"unit_{unit}" for unit in range(k)]
        tokens |= {first + 2 + unit: f"<|{name}|>" for unit, name in enumerate(names)}
        for i in range(self.size, total):
            token = tokens.get(i, f"<|unused_{i}|>")
            self.special[token] = i
            self.json["added_tokens"].append(added_token(token, i))
        self.size = total
        return first + 2

    def save(self, folder):
        """Write the tokenizer's files, and speech.json where the model hears."""
        # Tokenizer.json has them all.
        config = {
            name: value
            for name, value in self.config.items()
            if name != "added_tokens_decoder"
        }
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(
            json.dumps(self.json, ensure_ascii=False), encoding="utf-8"
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        if self.speech:
            (folder / "speech.json").write_text(json.dumps(self.speech, indent=1) + "\n")

    # --- what layouts are made of ---

    def span(self, units):
        """`<|speech|>` units `<|/speech|>`; ValueError if this model does not know the units.

        Of a `Said`: its text, and between the markers every word with its units.
        """
        if not self.speech:
            raise ValueError(
                "this model cannot hear: its folder has no speech.json (merge a "
                "speech model into it)"
            )
        if isinstance(units, Said) != self.reads_prosody():
            raise ValueError(
                "a model of units was given words with their prosody, or the other way round; "
                "give a model that was trained on such speech"
            )
        if isinstance(units, Said):
            ids = self.encode(units.text()) + [self.speech["speech"]]
            for word, numbers in units:
                ids += self.encode(word) + self.rows_of(numbers)
            return [*ids, self.speech["end_speech"]]
        return [self.speech["speech"], *self.rows_of(units), self.speech["end_speech"]]

    def reads_prosody(self):
        """Does its speech come with words and prosody, and not as units?"""
        return (self.speech.get("features") or {}).get("kind") == "prosody"

    def rows_of(self, units):
        """The ids of units."""
        units = np.asarray(units, dtype=np.int64)
        k = self.speech["k"]
        unknown = units[(units < 0) | (units >= k)]
        if len(unknown):
            raise ValueError(
                f"unit {unknown[0]} is outside this model's codebook of {k}; encode with the "
                "codebook in its folder"
            )
        return (self.speech["first_unit"] + units).tolist()

    def content(self, parts):
        """Ids of what a turn or a question says: text, units (an array), or a list of both."""
        ids = []
        for part in [parts] if isinstance(parts, (str, np.ndarray, Said)) else parts:
            ids += self.encode(part) if isinstance(part, str) else self.span(part)
        return ids

    def template(self):
        """The chat format of this tokenizer's family."""
        if not self.family:
            raise ValueError(
                "this tokenizer has no chat markers; wanted those of "
                f"{' or '.join(CHATS)}"
            )
        return CHATS[self.family]

    # --- layouts: training documents, then prompts ---

    def text(self, text):
        ids = self.begin + self.encode(text) + [self.eos]
        loss = [0] * len(self.begin) + [1] * (len(ids) - len(self.begin))
        return Document(ids, loss)

    def interleave(self, parts):
        """parts: text, and what is spoken as a list of (text, units), one for each word.

        (Or one for all of them, where word times are not known.) Switches bear no loss:
        decoding holds which modality comes next. Nor does the end: speech is cut off
        anywhere, which would teach replies to stop anywhere.
        """
        ids, read = list(self.begin), list(self.begin)
        place = list(range(len(self.begin)))
        for part in parts:
            if isinstance(part, str):
                written = self.encode(part)
                place += range(len(ids), len(ids) + len(written))
                ids += written
                read += written
                continue

            # A word is known at its last unit, so its ids stand on its last units, in order;
            # if it has fewer units than ids, the first ids share its first unit.
            first = last = len(ids) + 1
            for text, units in part:
                written = self.encode(text)
                first, last = last, last + len(units)
                place += [max(first, last - n) for n in range(len(written), 0, -1)]
                read += written
            ids += self.span(np.concatenate([units for _, units in part]))

        place.append(len(ids))
        ids.append(self.eos)
        read.append(self.eos)
        return Document(ids, self.content_loss(ids), read, place)

    def transcribe(self, spoken):
        """spoken: a list of (text, units), as above; then the cue, and the text.

        It ends with a full stop, as text does: learnt without one, replies would end
        without.
        """
        transcript = " " + "".join(text for text, _ in spoken).strip()
        transcript += "." * (transcript[-1] not in ".?!")
        document = self.interleave([spoken, CUE, transcript])
        n = len(document.ids)
        first = n - len(self.encode(transcript)) - 1
        return document._replace(loss=[int(at >= first) for at in range(n)])

    def captioned(self, before, said, other, after, ends=False, caption_loss=1, echo_loss=1):
        """A caption, text and speech, a caption. Text and words bear loss, numbers if wanted.

        before, after  captions, or ""
        other          another text, right behind the speech, or ""
        ends           append the end of a turn, so that the model still predicts it
        caption_loss   how much a token of `after` counts in the loss: speech alone tells it
        echo_loss      how much a word inside the speech counts: it repeats the text before it
        The document's end bears no loss: here a caption may stand last, in a reply more follows.
        """
        ids = self.begin + self.encode(before) + self.span(said) + self.encode(other)
        first = len(ids)
        ids += self.encode(after)
        last = len(ids)
        if ends:
            ids.append(self.special[self.template().end])
        ids.append(self.eos)

        loss = self.content_loss(ids)
        loss[first:last] = [caption_loss * bears for bears in loss[first:last]]
        a, b = (ids.index(self.speech[name]) for name in ("speech", "end_speech"))
        for n in range(a, b):
            loss[n] *= 1 if ids[n] >= self.speech["first_unit"] else echo_loss
        return Document(ids, loss)

    def content_loss(self, ids):
        """1 for each id that bears loss; 0 for speech markers, and a document's own ends."""
        no_loss = {self.speech["speech"], self.speech["end_speech"], self.eos, *self.begin}
        return [int(i not in no_loss) for i in ids]

    def chat(self, messages):
        """Messages [{"role", "content"}] in the family's template.

        Loss is on replies and their end.
        """
        template = self.template()
        end = self.special[template.end]
        ids, loss = list(self.begin), [0] * len(self.begin)
        for message in messages:
            head = self.literal(template.before + message["role"] + template.after_role)
            body = self.content(message["content"])
            tail = self.literal(template.after_content)
            reply = int(message["role"] == "assistant")
            ids += head + body + tail
            loss += (
                [0] * len(head)
                + [reply] * len(body)
                + [reply * int(i == end) for i in tail]
            )
        return Document(ids, loss)

    def turn(self, messages):
        """The prompt for the next reply: the conversation, and an open assistant turn."""
        template = self.template()
        opened = self.literal(template.before + "assistant" + template.after_role)
        return self.chat(messages).ids + opened

    def page(self, question):
        """A page of question and answer, up to the answer: for a model that never chatted."""
        asked = self.encode("question: ") + self.content(question)
        return self.begin + asked + self.encode("\nanswer:")

    def heard(self, units):
        """The prompt that asks for a transcript."""
        return self.begin + self.span(units) + self.encode(CUE)

    def spelled(self, ids, loss=None):
        """Ids as a human reads them: 'token':id, and a * where a token may bear loss."""
        names = {i: token for token, i in self.special.items()}
        words = []
        for n, i in enumerate(ids):
            name = names.get(i) or repr(self.bytes_of[i].decode("utf-8", "replace"))
            words.append(f"{name}:{i}" + "*" * bool(loss and loss[n]))
        return " ".join(words)


def print_documents(vocab):
    """Every layout on a small example: a token, its id, and a * where it may bear loss."""

    def line(title, ids, loss=None):
        print(f"{title}\n    {vocab.spelled(ids, loss)}\n")

    print("token:id, * where it may bear loss\n")
    line("text", *vocab.text("hi there")[:2])
    if vocab.family:
        question = {"role": "user", "content": "hi"}
        line("chat", *vocab.chat([question, {"role": "assistant", "content": "yes"}])[:2])
    line("page", vocab.page("hi"))
    said = Said([("", [3, 24, 40]), ("hi", [56, 72, 88, 104, 120])])
    if vocab.speech and vocab.reads_prosody():
        line("captioned", *vocab.captioned("a high fast woman\n", said, "", "")[:2])
        if vocab.family:
            line("spoken turn", vocab.turn([{"role": "user", "content": said}]))
    elif vocab.speech:
        units = np.array([3, 1, 4])
        line("interleave", *vocab.interleave(["hi", [(" hi", units)], " there"])[:2])
        line("transcribe", *vocab.transcribe([("hi", units)])[:2])
        if vocab.family:
            line("spoken turn", vocab.turn([{"role": "user", "content": units}]))


def main():
    parser = argparse.ArgumentParser(
        description="Show how a model's documents and turns look, token by token."
    )
    parser.add_argument("action", choices=["show"])
    parser.add_argument(
        "folder", help="a model folder (speech.json in it adds spoken layouts)"
    )
    print_documents(Vocab(parser.parse_args().folder))


if __name__ == "__main__":
    runs.run(main)
