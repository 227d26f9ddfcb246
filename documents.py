"""What is trained on: text, chats, units beside text; mixed by weight and packed into rows of ids.

in   texts, chats, a units folder of tokenize_audio.py, or one of prosody.py
out  batches: ids, their targets, where each document begins, how it reads in writing
see  Spirit LM (arXiv:2402.05755) for interleaved documents; first fit, longest first (Johnson 1973)
run  python documents.py out/speech --units out/units --text out/toy/base.jsonl
     # some documents as literal tokens, and how full the rows get
"""

import argparse
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch

from audio import Units, between
from prosody import Prosody, is_prosody
from vocab import Document, Vocab

# Transcripts are of single words for this share of a run; then the longest grows by 20
# words a run.
ALONE, GROWTH = 0.1, 20
ROLES = "system", "user", "assistant", "tool"  # another role could spell a chat's markers
HELD_OUT = 100  # one document in a hundred is for validation only
# One draw in [0, 1) places the caption of a spoken line: up to BEFORE above the line, up to
# BEHIND last, else nowhere. From ENDS on the document ends like a turn of a chat, without a
# caption, so that the model still predicts that end.
BEFORE, BEHIND, ENDS = 0.3, 0.6, 0.8
BETWEEN = 0.5  # of all lines have another line behind the speech, before any caption
WAITING = 1.3  # batches' worth of documents to choose from: more choice, fuller rows


# --- sources ------------------------------------------------------------------


def read_text(path):
    """Texts of a JSON-lines file of {"text"}, or of a .txt with one document a line."""
    if Path(path).suffix != ".txt":
        return [field(entry, "text", path) for entry in runs.read_lines(path)]
    return [line for line in runs.utf8(path).split("\n") if line.strip()]


def read_chats(path):
    """Conversations, lists of {"role", "content"}, of a JSON-lines file of {"messages"}."""
    chats = [field(entry, "messages", path, list) for entry in runs.read_lines(path)]
    for messages in chats:
        if not messages:
            raise ValueError(
                f"{path}: got a conversation of no messages, wanted one or more"
            )
        for message in messages:
            if isinstance(message, dict) and message.get("role") not in ROLES:
                raise ValueError(
                    f"{path}: got the role {str(message.get('role'))[:40]!r}, "
                    f"wanted {', '.join(ROLES)}"
                )
            keys = ("role", "content")
            if not isinstance(message, dict) or not all(
                isinstance(message.get(key), str) for key in keys
            ):
                raise ValueError(
                    f"{path}: got the message {str(message)[:60]}, "
                    'wanted {"role": "...", "content": "..."}'
                )
    if not any(message["role"] == "assistant" for chat in chats for message in chat):
        raise ValueError(f"{path}: no message of an assistant, so there is no reply to learn")
    return chats


def field(entry, name, path, kind=str):
    """entry[name]; a ValueError if it is absent or of another type."""
    if not isinstance(entry.get(name), kind):
        raise ValueError(
            f"{path}: got {name} = {str(entry.get(name))[:60]} in an entry with "
            f"{', '.join(entry)}; wanted a {kind.__name__} there"
        )
    return entry[name]


def read_corpus(folder):
    """{layout: speech to train on}, of a folder of units, or of prosody beside transcripts."""
    if not folder:
        return {}
    if is_prosody(folder):
        return {"captioned": Prosody(folder)}
    return dict.fromkeys(("interleave", "transcribe"), Units(folder))


# --- documents of speech and text ---------------------------------------------


def text_of(entry):
    """What is said in a clip: its text, or else its words."""
    return entry.get("text") or " ".join(word for word, _, _ in entry.get("words") or [])


def spoken(corpus, i, a, b):
    """Words a to b of entry i as they were said: [(word, its units)].

    A word has the space before it, unless it is the entry's first. Aligners leave pauses
    between words, and every turn has them. So a word here reaches to the middle of the
    pause on either side, the first one from the beginning of the clip and the last to its
    end: the words of an entry have all its units.
    """
    words = corpus.entries[i]["words"]
    units, durations = corpus[i]
    middles = [(before[2] + after[1]) / 2 for before, after in zip(words, words[1:])]
    middles = itertools.accumulate(middles, max)  # a word may lie inside of another
    edges = [-math.inf, *middles, math.inf]

    said = []
    for n in range(a, b):
        word = " " * (n > 0) + words[n][0]
        rate = corpus.meta["frame_rate"]
        said.append((word, between(units, durations, edges[n], edges[n + 1], rate)))
    return said


def interleaved(vocab, corpus, i, rng, texts=()):
    """Entry i, spoken and written by turns. Without word times: i spoken, i + 1 written.

    Half of the time one of `texts` follows, below or right behind; a third of the time
    one stands above. Text of any kind beside speech has to be read as if the speech were
    text.
    """
    entry = corpus.entries[i]
    above = some(texts, 1 / 3, rng)
    below = some(texts, 1 / 2, rng)

    parts = []
    if entry.get("words"):
        # Turns of any length that is left.
        a = 0
        aloud = rng.random() < 0.5
        while a < len(entry["words"]):
            b = int(rng.integers(a, len(entry["words"]))) + 1
            if aloud:
                parts.append(spoken(corpus, i, a, b))
            else:
                parts.append(
                    " " * (a > 0) + " ".join(word for word, _, _ in entry["words"][a:b])
                )
            a = b
            aloud = not aloud
    else:
        parts.append([(entry.get("text", ""), np.asarray(corpus[i][0]))])
        following = corpus.entries[i + 1].get("text") if i + 1 < len(corpus.entries) else None
        if following:
            parts.append(" " + following)

    # Written text gets a full stop before the next text; speech may be followed directly.
    ends = (".\n\n", "\n", "." if isinstance(parts[-1], str) else "")
    over = [text + ("\n\n", "\n")[int(rng.integers(2))] for text in above]
    under = [ends[int(rng.integers(3))] + text for text in below]
    document = vocab.interleave(over + parts + under)
    return document if entry.get("words") else unread(document)


def unread(document):
    """A document that no teacher reads: where its words are in the speech is not known."""
    return document._replace(read=[], place=[])


def captioned(vocab, corpus, i, rng, caption_loss=1, echo_loss=1):
    """Entry i with its text: (caption) text <|speech|>...<|/speech|> (another text) (caption).

    What is in brackets stands in some documents. The caption says in words how the text was
    said. Behind speech another text may come first: if only captions followed speech, the
    model would write one there whatever it is asked.
    """
    caption = corpus.entries[i].get("caption")
    draw = rng.random()
    above = f"{caption}\n" if caption and draw < BEFORE else ""
    count = len(corpus.entries)
    other = corpus.entries[int(rng.integers(count // HELD_OUT, count))].get("text", "")
    follows = f"\n{other}" if rng.random() < BETWEEN and other else ""
    below = f"\n{caption}." if caption and BEFORE <= draw < BEHIND else ""
    return vocab.captioned(
        above, corpus[i], follows, below, draw > ENDS, caption_loss, echo_loss
    )


def some(texts, share, rng):
    """One of the texts for this share of calls, else none; a list."""
    if not texts or rng.random() >= share:
        return []
    return [texts[int(rng.integers(len(texts)))]]


def transcribed(vocab, corpus, i, rng, progress=1.0):
    """Entry i and its transcript.

    Where word times are known, a stretch of it: one word to begin with, longer ones as the
    run goes on, up to 19 at its end. Which units make which word is learnt soonest from
    words alone; then where in an utterance the model reads.
    """
    entry = corpus.entries[i]
    if not entry.get("words"):
        text = field(entry, "text", "the units' manifest")
        return unread(vocab.transcribe([(text, np.asarray(corpus[i][0]))]))

    # Its length, then where it begins: half of the time at the start.
    longest = min(1 + int(max(0, progress - ALONE) * GROWTH), len(entry["words"]))
    n = int(rng.integers(1, longest + 1))
    a = int(rng.integers(len(entry["words"]) - n + 1)) if rng.random() < 0.5 else 0
    return vocab.transcribe(spoken(corpus, i, a, a + n))


# --- the stream ---------------------------------------------------------------


class Documents:
    """An endless, repeatable stream of training documents, mixed from sources by weight.

    sources  {layout: texts, chats or units}; layouts as in pretrain.py's LAYOUTS
    mix      {layout: weight}
    Every source is read in shuffled passes. Of `parts` such streams each has its own documents.
    """

    def __init__(
        self, vocab, sources, mix, seed, part=0, parts=1, caption_loss=1, echo_loss=1
    ):
        self.vocab, self.sources, self.seed = vocab, sources, seed
        self.part, self.parts = part, parts
        self.caption_loss = caption_loss  # of a caption's token behind speech; others count 1
        self.echo_loss = echo_loss  # of a word's token inside the speech
        self.names = list(mix)
        weights = np.array(list(mix.values()), dtype=float)
        self.odds = weights / weights.sum()
        self.progress = 1.0  # the share of the run that is done
        self.drawn = dict.fromkeys(self.names, 0)  # documents that came from each source
        self.pending = []  # drawn, and not yet in a batch
        self.orders = {}  # layout: (pass, its permutation)
        texts = sources.get("text") or []
        self.below = texts[len(texts) // HELD_OUT :]  # what may stand beside speech

    def state(self):
        """All that `restore` needs to go on behind the last batch."""
        waiting = [(tuple(document), kind) for document, kind in self.pending]
        return {"drawn": dict(self.drawn), "pending": waiting}

    def restore(self, state):
        self.drawn = dict(state["drawn"])
        self.pending = [(Document(*document), kind) for document, kind in state["pending"]]

    def make(self, name, i, rng):
        """Document i of a layout."""
        source = self.sources[name]
        if name == "text":
            return self.vocab.text(source[i])
        if name == "chat":
            return self.vocab.chat(source[i])
        if name == "interleave":
            return interleaved(self.vocab, source, i, rng, self.below)
        if name == "captioned":
            return captioned(self.vocab, source, i, rng, self.caption_loss, self.echo_loss)
        return transcribed(self.vocab, source, i, rng, self.progress)

    def count(self, name):
        source = self.sources[name]
        return len(getattr(source, "entries", source))

    def next(self):
        """(the next training document, its layout's number); validation documents never come."""
        nth = sum(self.drawn.values()) * self.parts + self.part
        rng = np.random.default_rng([self.seed, nth])
        kind = int(rng.choice(len(self.names), p=self.odds))
        name = self.names[kind]

        # Which one: the next of this pass through the source. Streams take documents by
        # turns, and every pass has its own order.
        n = self.count(name)
        held_out = n // HELD_OUT
        passes, at = divmod(self.drawn[name] * self.parts + self.part, n - held_out)
        if self.orders.get(name, (None,))[0] != passes:
            order = np.random.default_rng([self.seed, kind, passes]).permutation(
                n - held_out
            )
            self.orders[name] = passes, order
        i = int(self.orders[name][1][at]) + held_out
        self.drawn[name] += 1
        return self.make(name, i, rng), kind

    def held_out(self, most=60):
        """{layout: its validation documents}: the first of every source, always the same."""
        documents = {}
        for kind, name in enumerate(self.names):
            few = range(min(most, self.count(name) // HELD_OUT))
            documents[name] = [
                (self.make(name, i, np.random.default_rng(i)), kind) for i in few
            ]
        return documents

    def batch(self, rows, length):
        """The next packed batch. A document longer than a row is cut; what does not fit waits."""
        waiting = sum(len(document.ids) for document, _ in self.pending)
        while waiting < WAITING * rows * length:
            document, kind = self.next()
            self.pending += [(part, kind) for part in cut(document, length)]
            waiting += len(document.ids)
        packed, self.pending = pack(self.pending, rows, length, self.vocab.eos)
        return packed


def batches_ahead(streams, rows, length, first, steps):
    """Yield (batch, its stream's state behind it), one of every stream for every step from `first`.

    A thread makes the next batch while the loop trains on this one.
    """

    def made():
        for step in range(first, steps + 1):
            for documents in streams:
                documents.progress = step / steps
                yield documents.batch(rows, length), documents.state()

    source = made()
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(next, source, None)
        while (batch := ready.result()) is not None:
            ready = pool.submit(next, source, None)
            yield batch


# --- packing ------------------------------------------------------------------


def cut(document, length):
    """A document in pieces of at most `length` ids. How a piece reads in writing is not known."""
    ids, loss = document.ids, document.loss
    if len(ids) <= length:
        return [document]
    return [
        Document(ids[a : a + length], loss[a : a + length])
        for a in range(0, len(ids), length)
    ]


def pack(documents, rows, length, filler):
    """First fit, the longest first: (batch, documents that did not fit).

    A batch is tensors (rows, length):
        ids, kind    the documents one behind the other; the number of their layout
        target       the next id of the same document; `loss` is how much it counts
        start        where in the row its document begins: attention sees nothing before,
                     positions count from there
    and of the same documents had they been written, (rows, R) with R at most length:
        read         their ids; `read_start` is where each document begins
        place        where in its row of `ids` each of these has been said, or -1
    """
    bins = [[] for _ in range(rows)]
    left = []
    room = [length] * rows
    for document, kind in sorted(documents, key=lambda d: -len(d[0].ids)):
        row = next((r for r in range(rows) if room[r] >= len(document.ids)), None)
        if row is None:
            left.append((document, kind))
        else:
            bins[row].append((document, kind))
            room[row] -= len(document.ids)

    # A filler is a document of its own: nothing sees it, and it sees only itself.
    R = max(sum(len(document.read) for document, _ in bin) for bin in bins)
    batch = {name: np.zeros((rows, length), dtype=np.int64) for name in ("target", "kind")}
    batch["loss"] = np.zeros((rows, length), dtype=np.float32)
    batch["ids"] = np.full((rows, length), filler)
    batch["start"] = np.tile(np.arange(length), (rows, 1))
    batch["read"] = np.full((rows, R), filler)
    batch["read_start"] = np.tile(np.arange(R), (rows, 1))
    batch["place"] = np.full((rows, R), -1)

    for r, members in enumerate(bins):
        a = c = 0
        for (ids, loss, read, place), kind in members:
            b, d = a + len(ids), c + len(read)
            batch["ids"][r, a:b] = ids
            batch["start"][r, a:b] = a
            batch["kind"][r, a:b] = kind
            batch["target"][r, a : b - 1] = ids[1:]
            batch["loss"][r, a : b - 1] = loss[1:]
            if read:
                batch["read"][r, c:d] = read
                batch["read_start"][r, c:d] = c
                batch["place"][r, c:d] = a + np.array(place)
            a, c = b, d
    return {name: torch.from_numpy(array) for name, array in batch.items()}, left


def main():
    parser = argparse.ArgumentParser(description="Show what a model would be trained on.")
    parser.add_argument(
        "folder", help="a model folder: its tokens, and its units if it hears"
    )
    parser.add_argument(
        "--text", help='JSON lines {"text"}, or a .txt with one document a line'
    )
    parser.add_argument("--chat", help='JSON lines {"messages": [{"role", "content"}]}')
    parser.add_argument(
        "--units", help="a folder of tokenize_audio.py encode, or of prosody.py"
    )
    parser.add_argument(
        "--length", type=runs.number(int, 2), default=256, help="tokens in a row (default 256)"
    )
    args = parser.parse_args()

    vocab, spoken = Vocab(args.folder), read_corpus(args.units)
    if spoken and not vocab.speech:
        raise ValueError(
            f"{args.folder} cannot hear (no speech.json), so units are no tokens of "
            "it; give a speech or merged model"
        )
    for corpus in spoken.values():
        if vocab.speech["codebook_sha256"] != corpus.meta["codebook_sha256"]:
            raise ValueError(
                f"{args.units} was encoded with another codebook than {args.folder} learnt"
            )
    sources = {
        "text": args.text and read_text(args.text),
        "chat": args.chat and read_chats(args.chat),
        **spoken,
    }
    mix = {name: 1.0 for name, source in sources.items() if source}
    if not mix:
        raise ValueError("nothing to show: give --text, --chat or --units")

    for name in mix:
        document, _ = Documents(vocab, sources, {name: 1.0}, seed=0).next()
        print(f"{name}\n    {vocab.spelled(document.ids, document.loss)}\n")

    batch = Documents(vocab, sources, mix, seed=0).batch(64, args.length)
    begins = batch["start"] == torch.arange(args.length)
    empty = begins & (batch["ids"] == vocab.eos)
    print(
        f"in equal shares, 64 rows of {args.length} ids are {1 - empty.float().mean():.1%} full, "
        f"with {int(begins.sum() - empty.sum())} documents"
    )


if __name__ == "__main__":
    runs.run(main)
