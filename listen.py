"""Open any folder that can be talked to: its model, its tokens, and what hears for it.

in   a text model, one that hears units or prosody, or an adapter of desta.py
out  (model, vocabulary, ears); ears turn samples into what a turn may hold
see  tokenize_audio.py, prosody.py and adapter.py, whose ears these are
run  python listen.py out/merged out/question.wav      # the ids of a spoken turn
"""

import argparse
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch

import adapter
import audio
import prosody
import tokenize_audio
from model import LM, generate
from tokenize_audio import AudioTokenizer
from vocab import Vocab
from whisper import Whisper

WORDS = 256  # tokens of a transcript


def load(folder, device="cpu", hubert=None, dtype=None, transcriber=None):
    """(model, vocabulary, ears or None) of a folder.

    transcriber  the folder that writes down the words, for ears that lack them
    """
    if (Path(folder) / "desta.json").exists():
        model, vocab, ears = adapter.load(folder, device, dtype)
    else:
        model = LM.load(folder, device, dtype).eval()
        vocab = Vocab(folder)
        ears = None
        if vocab.speech and vocab.reads_prosody():
            ears = prosody.Ears(folder)
        elif vocab.speech:
            ears = AudioTokenizer(folder, device, hubert)

    # A flag that nothing reads is a mistake of who gave it.
    if transcriber and not (ears and ears.lacks_words):
        raise ValueError(
            f"--transcriber {transcriber}: no one has to write down the words for {folder}; "
            "leave the flag out"
        )
    if hubert and not transcriber and not isinstance(ears, AudioTokenizer):
        raise ValueError(f"--hubert {hubert}: {folder} hears no units; leave the flag out")
    if transcriber:
        ears.transcriber = writer(transcriber, device, hubert)
    return model, vocab, ears


def wants_words(folder, ears):
    """A ValueError if a folder's ears lack the words and no one writes them down."""
    if ears.lacks_words:
        raise ValueError(
            f"{folder}: hears how words are said, and no one writes them down; give --transcriber, "
            "a Whisper folder or a model of units, or the words: in a chat behind the path, in "
            '"quotes", in a question of benchmark.py as "text" and "words"'
        )


def can_open(paths, ears):
    """An error for the first file that cannot be opened, or is too long or short to be heard."""
    audio.can_be_heard([{"audio": str(path)} for path in paths], ears.hop, ears.most)


def hear(ears, samples, text, words=None):
    """What a turn may hold of samples.

    Ears that lack the words are told them, `text`; those of prosody also when each was
    said, where a manifest has `words`.
    """
    if not ears.lacks_words:
        return ears(samples)[0]
    told = (text, words) if isinstance(ears, prosody.Ears) else (text,)
    return ears(samples, *told)[0]


def writer(folder, device, hubert):
    """samples -> text, by a Whisper folder or a model that hears units."""
    if not (Path(folder) / "speech.json").exists():
        if hubert:
            raise ValueError(
                f"--hubert {hubert}: {folder} hears no units; leave the flag out"
            )
        whisper = Whisper(folder, device)
        return lambda samples: whisper.transcripts([samples])[0].strip()

    model, vocab, ears = load(folder, device, hubert)
    if ears.lacks_words:
        raise ValueError(
            f"{folder}: hears how words are said, not which; wanted a Whisper folder, or a "
            "model that hears units"
        )
    return lambda samples: written_down(model, vocab, ears(samples)[0])


def written_down(model, vocab, units):
    """The transcript of units, by the model that knows them."""
    prompt = torch.tensor(vocab.heard(units))
    steps = generate(model, [prompt], WORDS, vocab.stop, vocab.text_rows())
    return vocab.decode([int(ids[0]) for ids in steps]).strip().removesuffix(".")


def add_ears(parser):
    """The flags of every command that opens any folder that hears."""
    tokenize_audio.add_ears(parser)
    parser.add_argument(
        "--transcriber",
        help="for a model that hears how words are said, not which: who writes them down, "
        "a Whisper folder, or a speech model of units (a sum of units writes poorly)",
    )


def main():
    parser = argparse.ArgumentParser(
        description="Show a spoken turn as the model of a folder reads it."
    )
    parser.add_argument("folder", help="a folder that hears")
    parser.add_argument("audio", help="an audio file")
    add_ears(parser)
    args = parser.parse_args()
    _, vocab, ears = load(args.folder, args.device, args.hubert, None, args.transcriber)
    if not ears:
        raise ValueError(f"{args.folder}: cannot hear; wanted a model that does")
    wants_words(args.folder, ears)
    heard, _ = ears(audio.load(args.audio))
    print(vocab.spelled(vocab.turn([{"role": "user", "content": [heard]}])))


if __name__ == "__main__":
    runs.run(main)
