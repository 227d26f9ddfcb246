"""What the model reads: text tokens, marker and unit tokens, and the literal layout of every document and turn.

in   an open model's own tokenizer files (byte-level BPE), speech.json where the model hears
out  ids (rows of the LM) and, for training, which of them bear loss
see  tiktoken; ChatML and Llama-3 chat formats; Spirit LM (arXiv:2402.05755) for interleaving
run  python vocab.py show out/speech               # every layout as literal tokens, ids and loss positions

    interleave   text <|speech|> units <|/speech|> text goes on ... <eos>          may bear loss: text and units, never the switches and the end
    transcribe   <|speech|> units <|/speech|> transcript: text. <eos>              loss: the text behind the cue
    text         text <eos>                                                        loss: all
    chat         <|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n...<|im_end|>\\n    loss: replies and their end
    spoken turn  <|im_start|>user\\n<|speech|> units <|/speech|><|im_end|>\\n<|im_start|>assistant\\n
    page         question: ...\\nanswer:                                            a plain prompt, for a model that never chatted

`<|/speech|>` alone promises nothing: text may go on, or the cue " transcript:" may ask for a transcript.
"""
import argparse
import base64
import functools
import json
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

import weights

BEGIN = "<|begin_of_text|>"
SPEECH, END_SPEECH = "<|speech|>", "<|/speech|>"
CUE = " transcript:"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)                       # Qwen's, digits by threes
SMOLLM2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"    # GPT-2's, digits one by one

CHATS = {      # family: (token that gives it away, before a role, after it, after the content, token that ends a reply)
    "chatml": ("<|im_start|>", "<|im_start|>", "\n", "<|im_end|>\n", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|eot_id|>"),
}
LLAMA3_SPECIAL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "<|eot_id|>"}     # of 256
DOCUMENT_ENDS = ["<|endoftext|>", "<|end_of_text|>", "</s>"]


def byte_letters():
    """GPT-2's printable stand-in for each of the 256 bytes: itself if printable Latin-1, else the next free letter from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


SAMPLE = "it's 2024, THE capital\tof\n\n  Ünï\u00a0日本語 is 3.5%: <🎧> e\u0301_½\r\n "      # what a pattern of one's own must keep
NO_ID = -1                          # of a byte that a vocabulary lacks
LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def tokenizer_json(vocab, merges, special, pattern=GPT2, normalizer=None):
    """A Hugging Face tokenizer.json of a byte-level BPE: vocab {token: id}, merges [(left, right)], special {token: id}."""
    split = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
             {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": normalizer,
            "added_tokens": [added_token(token, i) for token, i in special.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": split}, "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": merges}}


def added_token(token, i):
    return {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def read_tokenizer(folder):
    """tokenizer.json of a folder, or one put together from vocab.json + merges.txt, with its tokenizer_config.json (or {})."""
    folder = Path(folder)
    config = weights.read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if (folder / "tokenizer.json").exists():
        return weights.read_json(folder / "tokenizer.json"), config
    if (folder / "tokenizer.model").exists():
        return read_tiktoken(folder / "tokenizer.model", config), config
    if not ((folder / "vocab.json").exists() and (folder / "merges.txt").exists()):
        raise FileNotFoundError(f"{folder}: no text tokenizer; wanted tokenizer.json, vocab.json with merges.txt, or Llama-3's tokenizer.model")
    vocab = weights.read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    special = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    special |= {token: vocab[token] for token in DOCUMENT_ENDS if token in vocab}                              # GPT-2 lists it as a word
    qwen = config.get("tokenizer_class", "").startswith("Qwen2")
    made = tokenizer_json(vocab, merges, special, QWEN2 if qwen else GPT2, {"type": "NFC"} if qwen else None)
    for token in made["added_tokens"]:
        token["special"] = config.get("added_tokens_decoder", {}).get(str(token["id"]), {}).get("special", True)
    return made, config


def read_tiktoken(path, config):
    """Llama-3's tokenizer.model, lines of "base64-of-the-token rank", as a tokenizer.json."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in path.read_bytes().splitlines() if line)}
    except ValueError:                                                     # sentencepiece keeps a protobuf under the same name
        raise ValueError(f"{path}: a sentencepiece tokenizer is not supported; wanted byte-level BPE, lines of base64 and rank") from None
    merges = []                                                            # of each token: the two earlier ones that it is made of
    for token, rank in ranks.items():
        pairs = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in ranks and token[n:] in ranks]
        merges += [(rank, ranks[left], ranks[right], left, right) for left, right in pairs]
    spelled = lambda token: "".join(LETTERS[byte] for byte in token)
    special = {t["content"]: int(i) for i, t in config.get("added_tokens_decoder", {}).items()}
    special = special or {LLAMA3_SPECIAL.get(n, f"<|reserved_special_token_{n}|>"): len(ranks) + n for n in range(256)}
    made = tokenizer_json({spelled(token): rank for token, rank in ranks.items()}, [[spelled(left), spelled(right)] for *_, left, right in sorted(merges)], special, LLAMA3)
    made["model"]["ignore_merges"] = True                                  # tiktoken takes a known word whole, however it merges
    return made


def pattern_of(json_, folder):
    """The pre-tokenizer's regular expression, as tiktoken wants it; ValueError for one that is none of the known shapes."""
    pre = json_.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT2
    isolated = steps[0].get("behavior", "Isolated") == "Isolated" and not steps[0].get("invert")
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True) and isolated and "Regex" in (steps[0].get("pattern") or {}):
        return steps[0]["pattern"]["Regex"]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return SMOLLM2
    raise ValueError(f"{folder}: pre-tokenizer {kinds} is not supported; wanted the byte-level BPE of GPT-2, Llama-3, Qwen or SmolLM2")


class Document(NamedTuple):
    """The ids of a training document, and 1 where a token bears loss, else 0. Of a spoken one also `read`, the ids of the same
    document had it been written, and `place`: for each of them where in `ids` the same has been said."""
    ids: list
    loss: list
    read: list = ()
    place: list = ()


class Vocab:
    """The tokens of a model folder. Text is encoded as plain text even where it spells a special token."""

    def __init__(self, folder):
        self.json, self.config = read_tokenizer(folder)
        bpe = self.json.get("model", {})
        if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or "merges" not in bpe or LETTERS[ord(" ")] not in bpe.get("vocab", {}):
            raise ValueError(f"{folder}: a {bpe.get('type')} tokenizer that is not byte-level BPE (sentencepiece?) is not supported")
        normalizer = (self.json.get("normalizer") or {}).get("type")
        if normalizer not in (None, "NFC"):
            raise ValueError(f"{folder}: text normalizer {normalizer} is not supported; wanted none or NFC")
        self.normalize = (lambda text: unicodedata.normalize("NFC", text)) if normalizer else (lambda text: text)
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
        tokens = list(dict.fromkeys(LETTERS + [left + right for left, right in pairs]))      # in the order of merging: tiktoken's ranks
        lost = [token for token in tokens[len(LETTERS):] if token not in bpe["vocab"]]
        if lost:
            raise ValueError(f"{folder}: its merges make {lost[0]!r}, which its vocabulary lacks; the file is damaged")

        # A vocabulary may lack bytes that its training text never had (SmolLM2's lacks 21, six of them control characters).
        # `tokenizers` leaves such a byte out of a text, and so do we: its rank has no id. (Signs on both sides of it it then merges,
        # as tokens of one word; here they stay apart.)
        self.id_of_rank = np.array([bpe["vocab"].get(token, NO_ID) for token in tokens])
        self.bytes_of = {int(i): bytes(BYTES[letter] for letter in token) for token, i in zip(tokens, self.id_of_rank) if i != NO_ID}
        self.name, self.pattern = Path(folder).name, pattern_of(self.json, folder)
        self.special = {t["content"]: t["id"] for t in self.json.get("added_tokens", [])}

        # Tokens that were added and are not special (Qwen3's <think>) are text: they are read as one id, and a reply may hold them.
        self.added = {t["content"]: t["id"] for t in self.json.get("added_tokens", []) if not t.get("special", True)}
        self.bytes_of |= {i: token.encode() for token, i in self.added.items()}
        self.size = max([*self.bytes_of, *self.special.values()]) + 1
        self.family = next((name for name, chat in CHATS.items() if chat[0] in self.special), None)
        self.eos = next((self.special[t] for t in DOCUMENT_ENDS if t in self.special), None)
        if self.eos is None:
            raise ValueError(f"{folder}: no end-of-document token; wanted one of {', '.join(DOCUMENT_ENDS)}")
        self.begin = [self.special[BEGIN]] if BEGIN in self.special else []     # Llama-3 begins every document and conversation with it
        self.stop = [self.eos] + ([self.special[CHATS[self.family][4]]] if self.family else [])
        if self.pattern not in (GPT2, QWEN2, LLAMA3, SMOLLM2) and self.decode(self.encode(SAMPLE)) != self.normalize(SAMPLE):
            raise ValueError(f"{folder}: its pre-tokenizer's pattern {self.pattern[:60]!r} loses text; wanted one that matches all of it")
        file = Path(folder) / "speech.json"
        self.speech = weights.read_json(file, ["speech", "end_speech", "first_unit", "k"]) if file.exists() else None   # what the model hears, if it does

    # --- tokens ---

    @functools.cached_property
    def tiktoken(self):
        ranks = {self.bytes_of[i]: rank for rank, i in enumerate(self.id_of_rank.tolist()) if i != NO_ID}
        ranks |= {bytes([byte]): byte for byte in range(256)}              # also those without an id: tiktoken wants all bytes
        return tiktoken.Encoding(self.name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text):
        parts = re.split("(" + "|".join(map(re.escape, self.added)) + ")", text) if self.added else [text]
        ids = []
        for part in parts:
            found = [self.added[part]] if part in self.added else self.id_of_rank[self.tiktoken.encode_ordinary(self.normalize(part))]
            ids += [int(i) for i in found if i != NO_ID]
        return ids

    def decode(self, ids):
        """The text of ids; specials and units say nothing."""
        return b"".join(self.bytes_of.get(int(i), b"") for i in ids).decode("utf-8", errors="replace")

    def text_rows(self):
        """Ids a written reply may use: text, and what ends it."""
        return sorted(self.bytes_of) + self.stop

    def with_speech(self, first, k):
        """Add `<|speech|>`, `<|/speech|>` and k units as tokens from row `first` on; every row up to the next multiple of
        128, and any hole before `first` (open checkpoints pad their embedding), becomes an `<|unused_N|>` entry, so that
        row number = token id in every reader. Returns the row of unit 0."""
        total = -(-(first + 2 + k) // 128) * 128
        names = {first: SPEECH, first + 1: END_SPEECH} | {first + 2 + u: f"<|unit_{u}|>" for u in range(k)}
        for i in range(self.size, total):
            token = names.get(i, f"<|unused_{i}|>")
            self.special[token] = i
            self.json["added_tokens"].append(added_token(token, i))
        self.size = total
        return first + 2

    def save(self, folder):
        config = {name: value for name, value in self.config.items() if name != "added_tokens_decoder"}      # tokenizer.json has them all
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        (Path(folder) / "tokenizer.json").write_text(json.dumps(self.json, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        if self.speech:
            (Path(folder) / "speech.json").write_text(json.dumps(self.speech, indent=1) + "\n")

    # --- layouts: lists of ids, and for training documents 1 where a token bears loss, else 0 ---

    def span(self, units):
        """`<|speech|>` units `<|/speech|>`; ValueError if this model does not hear, or knows fewer units."""
        if not self.speech:
            raise ValueError("this model cannot hear: its folder has no speech.json (merge a speech model into it)")
        units = np.asarray(units, dtype=np.int64)
        if units.size and units.max() >= self.speech["k"]:
            raise ValueError(f"unit {units.max()} is outside this model's codebook of {self.speech['k']}; encode with the codebook in its folder")
        return [self.speech["speech"], *(self.speech["first_unit"] + units).tolist(), self.speech["end_speech"]]

    def content(self, parts):
        """Ids of what a turn or a question says: text, units (an array), or a list of both."""
        parts = [parts] if isinstance(parts, (str, np.ndarray)) else parts
        return [i for part in parts for i in (self.encode(part) if isinstance(part, str) else self.span(part))]

    def text(self, text):
        ids = self.begin + self.encode(text) + [self.eos]
        return Document(ids, [0] * len(self.begin) + [1] * (len(ids) - len(self.begin)))

    def interleave(self, parts):
        """parts: text, and what is spoken as a list of (text, units), word by word if word times are known. The switches bear no loss:
        which modality comes next is held by the decoder. Nor does the end: what is said stops anywhere, and replies should not."""
        ids, read, place = list(self.begin), list(self.begin), list(range(len(self.begin)))
        for part in [*parts, None]:
            if part is None or isinstance(part, str):
                written = [self.eos] if part is None else self.encode(part)
                place += range(len(ids), len(ids) + len(written))
                ids, read = ids + written, read + written
            else:
                start, *inside, end = self.span(np.concatenate([units for _, units in part]))
                first = last = len(ids) + 1
                for text, units in part:
                    written, first, last = self.encode(text), last, last + len(units)
                    place += [max(first, last - n) for n in range(len(written), 0, -1)]           # a word is known at its last unit
                    read = read + written
                ids = ids + [start, *inside, end]
        silent = (self.speech["speech"], self.speech["end_speech"], self.eos, *self.begin)
        return Document(ids, [int(i not in silent) for i in ids], read, place)

    def transcribe(self, spoken):
        """spoken: a list of (text, units), as above; then the cue and the text, with a full stop as text has it where it ends: learnt to end
        without one, replies would too."""
        said = " " + "".join(text for text, _ in spoken).strip().removesuffix(".") + "."
        document = self.interleave([spoken, CUE, said])
        silent = len(document.ids) - len(self.encode(said)) - 1
        return document._replace(loss=[int(n >= silent) for n in range(len(document.ids))])

    def chat(self, messages):
        """Messages [{"role", "content"}] in the family's template; loss on each reply and its end."""
        _, before, after, close, end = self.markers()
        ids, loss = list(self.begin), [0] * len(self.begin)
        for message in messages:
            head = self.literal(before + message["role"] + after)
            body, tail = self.content(message["content"]), self.literal(close)
            bears = int(message["role"] == "assistant")
            ids += head + body + tail
            loss += [0] * len(head) + [bears] * len(body) + [bears * int(i == self.special[end]) for i in tail]
        return Document(ids, loss)

    def turn(self, messages):
        """The prompt for the next reply: the conversation so far and an open assistant turn."""
        _, before, after, _, _ = self.markers()
        return self.chat(messages)[0] + self.literal(before + "assistant" + after)

    def spelled(self, ids, loss=None):
        """Ids as a human reads them: 'token':id, and a * where a token bears loss."""
        name = {i: token for token, i in self.special.items()}
        return " ".join(f"{name.get(i) or repr(self.bytes_of[i].decode('utf-8', 'replace'))}:{i}{'*' if loss and loss[n] else ''}" for n, i in enumerate(ids))

    def page(self, question):
        """A plain question-and-answer page up to the answer: the prompt for a model that never chatted."""
        return self.begin + self.encode("question: ") + self.content(question) + self.encode("\nanswer:")

    def heard(self, units):
        """The prompt that asks for a transcript."""
        return self.begin + self.span(units) + self.encode(CUE)

    def markers(self):
        if not self.family:
            raise ValueError(f"this tokenizer has no chat markers; wanted those of {' or '.join(CHATS)}")
        return CHATS[self.family]

    def literal(self, template):
        """Ids of a template string, in which special tokens are meant: "<|im_end|>\\n"."""
        ids = []
        while template:
            token = next((t for t in self.special if template.startswith(t)), None) if template[0] == "<" else None
            if token:
                ids.append(self.special[token])
            else:
                token = template[0] + template[1:].partition("<")[0]
                ids += self.encode(token)
            template = template[len(token):]
        return ids


def show(vocab):
    """Every layout on a small example: a token, its id, and a * where it bears loss."""
    line = lambda title, ids, loss=None: print(f"{title}\n    {vocab.spelled(ids, loss)}\n")
    print("token:id, * where it bears loss\n")
    line("text", *vocab.text("hi there")[:2])
    if vocab.family:
        line("chat", *vocab.chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}])[:2])
    line("page", vocab.page("hi"))
    if vocab.speech:
        units = np.array([3, 1, 4])
        line("interleave", *vocab.interleave(["hi", [(" hi", units)], " there"])[:2])
        line("transcribe", *vocab.transcribe([("hi", units)])[:2])
        if vocab.family:
            line("spoken turn", vocab.turn([{"role": "user", "content": units}]))


def main():
    parser = argparse.ArgumentParser(description="Show how a model's documents and turns look, token by token.")
    parser.add_argument("action", choices=["show"])
    parser.add_argument("folder", help="a model folder (speech.json in it adds the spoken layouts)")
    show(Vocab(parser.parse_args().folder))


if __name__ == "__main__":
    weights.run(main)
