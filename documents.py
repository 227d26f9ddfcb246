"""What is trained on: documents of text, chats, units and text, mixed from their sources by weight and packed into rows.

in   texts, chats, a units folder of tokenize_audio.py       out  batches: ids, targets, where each document begins, how it reads in writing
see  Spirit LM (arXiv:2402.05755) for interleaved documents; packing by first fit, the longest first (Johnson 1973)
run  python documents.py out/speech --units out/units --text out/toy/base.jsonl      # some of them as literal tokens, and how full the rows get
"""
import argparse
import math
from pathlib import Path

import numpy as np
import torch

import weights
from audio import Units, between
from vocab import Document, Vocab

ALONE, GROWTH = 0.1, 20             # transcripts: single words for this share of the run; then the longest grows by 20 words a run
ROLES = "system", "user", "assistant", "tool"      # others could spell a chat's markers
HELD_OUT = 100                      # one document in a hundred is for validation only
WAITING = 1.3                       # documents are chosen from among so many rows' worth: more choice, fuller rows


# --- sources ---------------------------------------------------------------------------------------------------------------

def read_text(path):
    """Texts of a JSON-lines file of {"text"}, or of a .txt with one document a line."""
    if Path(path).suffix == ".txt":
        try:
            return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    return [field(row, "text", path) for row in weights.read_lines(path)]


def read_chats(path):
    """Conversations, lists of {"role", "content"}, of a JSON-lines file of {"messages"}."""
    chats = [field(row, "messages", path, list) for row in weights.read_lines(path)]
    for messages in chats:
        for message in messages:
            if isinstance(message, dict) and message.get("role") not in ROLES:
                raise ValueError(f"{path}: got the role {str(message.get('role'))[:40]!r}, wanted {', '.join(ROLES)}")
            if not isinstance(message, dict) or not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise ValueError(f'{path}: got the message {str(message)[:60]}, wanted {{"role": "...", "content": "..."}}')
    return chats


def field(row, name, path, kind=str):
    if not isinstance(row.get(name), kind):
        raise ValueError(f"{path}: got {name} = {str(row.get(name))[:60]} in a row with {', '.join(row)}; wanted a {kind.__name__} there")
    return row[name]


# --- documents of speech and text -----------------------------------------------------------------------------------------

def spoken(corpus, i, a, b):
    """Words a to b of row i as they were said: [(word, with the space before it unless it is first, its units)].

    Aligners leave pauses between words. They are heard in every turn, so a word here reaches to the middle of the pause on either side,
    the first one from the beginning of the clip and the last to its end: the words of a row have all its units.
    """
    words, (units, durations) = corpus.rows[i]["words"], corpus[i]
    middles = [(before[2] + after[1]) / 2 for before, after in zip(words, words[1:])]
    edges = [-math.inf, *middles, math.inf]
    return [(" " * (n > 0) + words[n][0], between(units, durations, edges[n], edges[n + 1], corpus.meta["frame_rate"])) for n in range(a, b)]


def interleaved(vocab, corpus, i, rng, texts=()):
    """Row i, spoken and written by turns; without word times, row i spoken and the next one written. Half of the time one of `texts`
    follows, below or right behind, and a third of the time one stands above: what is written beside speech, of any kind, has to be read
    as if the speech were text."""
    row, parts, a = corpus.rows[i], [], 0
    draw = lambda share: [texts[int(rng.integers(len(texts)))]] if texts and rng.random() < share else []
    above, below = draw(1 / 3), draw(1 / 2)
    if not row.get("words"):
        following = corpus.rows[i + 1].get("text") if i + 1 < len(corpus.rows) else None
        parts = [[(row.get("text", ""), np.asarray(corpus[i][0]))]] + ([" " + following] if following else [])
    aloud = rng.random() < 0.5
    while a < len(row.get("words") or []):
        b = int(rng.integers(a, len(row["words"]))) + 1                     # any length that is left
        parts.append(spoken(corpus, i, a, b) if aloud else " " * (a > 0) + " ".join(w for w, _, _ in row["words"][a:b]))
        a, aloud = b, not aloud
    ends = (".\n\n", "\n", "." if isinstance(parts[-1], str) else "")     # two written texts would grow together
    return vocab.interleave([text + ("\n\n", "\n")[int(rng.integers(2))] for text in above] + parts + [ends[int(rng.integers(3))] + text for text in below])


def transcribed(vocab, corpus, i, rng, progress=1.0):
    """Row i and its transcript. Where word times are known, a stretch of it: one word to begin with, longer ones as the run goes on.
    Which units make which word is learnt soonest from words alone; then where in an utterance the reader stands."""
    row = corpus.rows[i]
    if not row.get("words"):
        return vocab.transcribe([(field(row, "text", "the units' manifest"), np.asarray(corpus[i][0]))])
    n = int(rng.integers(1, min(1 + int(max(0, progress - ALONE) * GROWTH), len(row["words"])) + 1))      # its length, then where it begins:
    a = int(rng.integers(len(row["words"]) - n + 1)) if rng.random() < 0.5 else 0                         # half of the time at the start
    return vocab.transcribe(spoken(corpus, i, a, a + n))


# --- the stream ------------------------------------------------------------------------------------------------------------

class Documents:
    """An endless, repeatable stream of training documents, mixed from sources by weight.

    Every source is read in shuffled passes. `drawn` (how many documents came from each) and `pending` are all its state.
    """

    def __init__(self, vocab, sources, mix, seed):
        self.vocab, self.sources, self.seed = vocab, sources, seed
        self.names, odds = list(mix), np.array(list(mix.values()), dtype=float)
        self.odds, self.progress = odds / odds.sum(), 1.0                   # progress: the share of the run that is done; the loop sets it
        self.drawn, self.pending, self.orders = dict.fromkeys(self.names, 0), [], {}
        texts = sources.get("text") or []
        self.below = texts[len(texts) // HELD_OUT:]                         # what may stand below speech

    def make(self, name, i, rng):
        source = self.sources[name]
        if name == "text":
            return self.vocab.text(source[i])
        if name == "chat":
            return self.vocab.chat(source[i])
        if name == "interleave":
            return interleaved(self.vocab, source, i, rng, self.below)
        return transcribed(self.vocab, source, i, rng, self.progress)

    def count(self, name):
        return len(self.sources[name].rows if isinstance(self.sources[name], Units) else self.sources[name])

    def next(self):
        """(the next training document, its layout's number); validation rows never come."""
        rng = np.random.default_rng([self.seed, sum(self.drawn.values())])
        kind = int(rng.choice(len(self.names), p=self.odds))
        name, n = self.names[kind], self.count(self.names[kind])
        train = n - n // HELD_OUT
        passes, at = divmod(self.drawn[name], train)
        if self.orders.get(name, (None,))[0] != passes:
            self.orders[name] = passes, np.random.default_rng([self.seed, kind, passes]).permutation(train)
        i = int(self.orders[name][1][at]) + n // HELD_OUT
        self.drawn[name] += 1
        return self.make(name, i, rng), kind

    def held_out(self, most=60):
        """The validation documents of each layout: the first of every source, always the same."""
        return {name: [(self.make(name, i, np.random.default_rng(i)), kind) for i in range(min(most, self.count(name) // HELD_OUT))]
                for kind, name in enumerate(self.names)}

    def batch(self, rows, length):
        """The next packed batch. Documents longer than a row are cut into rows; what does not fit waits for the next batch."""
        waiting = sum(len(document.ids) for document, _ in self.pending)
        while waiting < WAITING * rows * length:
            document, kind = self.next()
            self.pending += [(part, kind) for part in cut(document, length)]
            waiting += len(document.ids)
        packed, self.pending = pack(self.pending, rows, length, self.vocab.eos)
        return packed


def cut(document, length):
    """A document in pieces of at most `length` ids. What a piece would read as in writing is not known."""
    if len(document.ids) <= length:
        return [document]
    return [Document(document.ids[a:a + length], document.loss[a:a + length]) for a in range(0, len(document.ids), length)]


def pack(documents, rows, length, filler):
    """First-fit-decreasing: (batch, documents that did not fit). A batch is tensors (rows, length):

    ids, target (the next id of the same document), loss (0 or 1 of that target), start (where the document begins), kind; and of the
    same documents had they been written, packed in the same rows: read, read_start and place (rows, at most length): where in its row
    of `ids` each has been said, or -1.
    """
    bins, left = [[] for _ in range(rows)], []
    room = [length] * rows
    for document, kind in sorted(documents, key=lambda d: -len(d[0].ids)):
        row = next((r for r in range(rows) if room[r] >= len(document.ids)), None)
        if row is None:
            left.append((document, kind))
        else:
            bins[row].append((document, kind))
            room[row] -= len(document.ids)
    reads = max(sum(len(document.read) for document, _ in bin) for bin in bins)
    batch = {name: np.zeros((rows, length), dtype=np.int64) for name in ("ids", "target", "loss", "start", "kind")}
    batch |= {"place": np.full((rows, reads), -1), "read": np.full((rows, reads), filler), "read_start": np.tile(np.arange(reads), (rows, 1))}
    batch["ids"][:], batch["start"][:] = filler, np.arange(length)         # a filler sees only itself
    for r, documents in enumerate(bins):
        a = c = 0
        for (ids, loss, read, place), kind in documents:
            b, d = a + len(ids), c + len(read)
            batch["ids"][r, a:b], batch["start"][r, a:b], batch["kind"][r, a:b] = ids, a, kind
            batch["target"][r, a:b - 1], batch["loss"][r, a:b - 1] = ids[1:], loss[1:]
            if read:
                batch["read"][r, c:d], batch["read_start"][r, c:d], batch["place"][r, c:d] = read, c, a + np.array(place)
            a, c = b, d
    return {name: torch.from_numpy(array) for name, array in batch.items()}, left


def main():
    parser = argparse.ArgumentParser(description="Show what a model would be trained on.")
    parser.add_argument("folder", help="a model folder: its tokens, and its units if it hears")
    parser.add_argument("--text", help='JSON lines {"text"}, or a .txt with one document a line')
    parser.add_argument("--chat", help='JSON lines {"messages": [{"role", "content"}]}')
    parser.add_argument("--units", help="a folder of tokenize_audio.py encode")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row (default 256)")
    args = parser.parse_args()
    vocab, units = Vocab(args.folder), args.units and Units(args.units)
    if units and not vocab.speech:
        raise ValueError(f"{args.folder} cannot hear (no speech.json), so units are no tokens of it; give a speech or merged model")
    if units and vocab.speech["codebook_sha256"] != units.meta["codebook_sha256"]:
        raise ValueError(f"{args.units} was encoded with another codebook than {args.folder} learnt")
    if args.length < 2:
        raise ValueError(f"--length {args.length}: wanted at least 2")
    sources = {"text": args.text and read_text(args.text), "chat": args.chat and read_chats(args.chat), "interleave": units, "transcribe": units}
    mix = {name: 1.0 for name, source in sources.items() if source}
    if not mix:
        raise ValueError("nothing to show: give --text, --chat or --units")
    documents = Documents(vocab, sources, mix, seed=0)
    for name in mix:
        document = Documents(vocab, sources, {name: 1.0}, seed=0).next()[0]
        print(f"{name}\n    {vocab.spelled(document.ids, document.loss)}\n")
    batch = documents.batch(64, args.length)
    empty = (batch["ids"] == vocab.eos) & (batch["start"] == torch.arange(args.length))
    print(f"in equal shares, 64 rows of {args.length} ids are {1 - empty.float().mean():.1%} full, with {int((batch['start'] == torch.arange(args.length)).sum() - empty.sum())} documents")


if __name__ == "__main__":
    weights.run(main)
