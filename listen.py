"""Open any folder that can be talked to: its model, its tokens, and what hears for it.

in   a text model, one that hears units or prosody, or an adapter of desta.py
out  (model, vocabulary, ears); ears turn samples into what a turn may hold
see  tokenize_audio.py, prosody.py and desta.py, whose ears these are
run  python listen.py out/merged out/question.wav      # the ids of a spoken turn
"""

import argparse
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch

import audio
import desta
import prosody
from model import LM, generate
from tokenize_audio import AudioTokenizer, add_ears
from vocab import Vocab
from whisper import Whisper

WORDS = 256  # tokens of a transcript


def load(folder, device="cpu", hubert=None, dtype=None):
    """(model, vocabulary, ears or None) of a folder."""
    if (Path(folder) / "desta.json").exists():
        return desta.load(folder, device, dtype)
    model, vocab = LM.load(folder, device, dtype).eval(), Vocab(folder)
    if not vocab.speech:
        return model, vocab, None
    if vocab.reads_prosody():
        made = vocab.speech["features"].get("transcriber")
        return model, vocab, prosody.Ears(folder, made and writer(made, folder, device))
    return model, vocab, AudioTokenizer(folder, device, hubert)


def writer(made, folder, device):
    """samples -> text, by the transcriber {"path", "sha256"} that a model of prosody names."""
    path = Path(made["path"])
    runs.still(path, made["sha256"], "transcriber", folder)
    if not (path / "speech.json").exists():
        whisper = Whisper(path, device)
        return lambda samples: whisper.transcripts([samples])[0].strip()

    model, vocab, ears = load(path, device)
    if vocab.reads_prosody():
        raise ValueError(
            f"{path}: hears how words are said, not which; wanted a Whisper folder, or a model "
            "that hears units"
        )
    return lambda samples: written_down(model, vocab, ears(samples)[0])


def written_down(model, vocab, units):
    """The transcript of units, by the model that knows them."""
    prompt = torch.tensor(vocab.heard(units))
    steps = generate(model, [prompt], WORDS, vocab.stop, vocab.text_rows())
    return vocab.decode([int(ids[0]) for ids in steps]).strip().removesuffix(".")


def main():
    parser = argparse.ArgumentParser(
        description="Show a spoken turn as the model of a folder reads it."
    )
    parser.add_argument("folder", help="a folder that hears")
    parser.add_argument("audio", help="an audio file")
    add_ears(parser)
    args = parser.parse_args()
    _, vocab, ears = load(args.folder, args.device, args.hubert)
    if not ears:
        raise ValueError(f"{args.folder}: cannot hear; wanted a model that does")
    heard, _ = ears(audio.load(args.audio))
    print(vocab.spelled(vocab.turn([{"role": "user", "content": [heard]}])))


if __name__ == "__main__":
    runs.run(main)
