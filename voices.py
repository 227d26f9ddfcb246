"""Voices of the toy world: eSpeak NG reads text to samples, and says when each word begins.

in   text, the name of a voice      out  samples (N,) at 16 kHz, word times; bytes of a sound file
see  eSpeak NG's speak_lib.h, called through the package espeakng-loader
run  python voices.py "what is the capital of france" --voice en-us+f3 --out hello.wav
"""

import argparse
import ctypes
import html
import io
from pathlib import Path

import espeakng_loader
import numpy as np
import runs  # before torch, which audio needs: it sets how OpenMP waits
import soundfile

import audio

VOICES = {
    # They read the training speech.
    "heard": ["en-us+m1", "en-us+f1", "en-us+m3", "en-us+f4", "en+m2", "en+f2"],
    # New variants of those accents.
    "near": ["en-us+m2", "en-us+f3", "en+m4", "en+f5"],
    # New accents in new variants.
    "far": ["en-gb-scotland+m5", "en-029+m6", "en-gb-scotland+f3", "en-029+f4"],
}
GAP = 6  # pause between words in 10 ms: a careful speaker's, for a listener who learns
SCALE = 32768  # of a 16-bit sample

# Constants of speak_lib.h.
SYNCHRONOUS, UTF8, SSML, AT_CHARACTER, WORD = 2, 1, 16, 1, 1
STAY = 0x8000  # without it, missing data would end this process
RATE, PITCH, WORDGAP = 1, 3, 7
STRESS = '<prosody pitch="{pitch}" rate="65%" volume="+6dB">', "</prosody>"  # around a word
HIGHER = 25  # on eSpeak's scale of pitch: a stressed word


class Event(ctypes.Structure):
    """espeak_EVENT. Of a word: where it begins, in characters (from 1) and in ms. Type 0 ends."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class Speaker:
    """eSpeak NG, reading text to samples with the time of every word."""

    def __init__(self):
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.data = Path(espeakng_loader.get_data_path())
        self.rate = self.lib.espeak_Initialize(SYNCHRONOUS, 0, str(self.data).encode(), STAY)
        if self.rate <= 0:
            raise OSError(
                f"eSpeak NG did not start with its data in {self.data}; reinstall "
                "espeakng-loader"
            )
        self.sound, self.events = [], []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(Event)
        )
        self.callback = kind(self.receive)  # kept: C holds no reference to it
        self.lib.espeak_SetSynthCallback(self.callback)

    def receive(self, wave, count, events):
        """Called by eSpeak with each piece of sound, and with what begins in it."""
        if wave and count > 0:
            piece = np.frombuffer(ctypes.string_at(wave, 2 * count), dtype=np.int16)
            self.sound.append(piece)
        i = 0
        while events[i].type:
            if events[i].type == WORD:
                begin = events[i].audio_position / 1000
                self.events.append((events[i].text_position - 1, begin))
            i += 1
        return 0

    def say(self, text, voice, rate=160, pitch=50, stress=None):
        """(samples at 16 kHz, words [[word, start, end] in seconds]).

        rate in words a minute, pitch 0 to 100; stress: the number of the word that is
        said higher and longer than the others. A wrong voice name keeps the last voice, and
        a wrong +variant the plain one, without a word: both are checked.
        """
        variant = voice.partition("+")[2]
        known = not variant or (self.data / "voices" / "!v" / variant).exists()
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0 or not known:
            raise ValueError(
                f"eSpeak NG has no voice {voice!r}; try heard, near, far, or a name "
                "like en-us+f3"
            )
        self.lib.espeak_SetParameter(RATE, rate, 0)
        self.lib.espeak_SetParameter(PITCH, pitch, 0)
        self.lib.espeak_SetParameter(WORDGAP, GAP, 0)

        # Breath and flutter are noise; the clock would seed it.
        self.lib.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self.sound, self.events = [], []
        marked, words = with_stress(text, stress, min(99, pitch + HIGHER))
        data = marked.encode()
        kind = UTF8 if stress is None else UTF8 | SSML
        failed = self.lib.espeak_Synth(
            data, len(data) + 1, 0, AT_CHARACTER, 0, kind, None, None
        )
        if failed or not self.sound:
            raise OSError(f"eSpeak NG could not read {text!r}")
        samples = np.concatenate(self.sound).astype(np.float32) / SCALE
        words = self.word_times(words, len(marked), len(samples) / self.rate)
        return audio.resample(samples, self.rate), words

    def word_times(self, words, end, seconds):
        """[[word, start, end]] of words [(place in the text, word)]: each from its own event on.

        Words that eSpeak runs together share their time by letters.
        """
        begins = [0.0, *(begin for _, begin in self.events), seconds]
        letters = [0, *(letter for letter, _ in self.events), end + 1]
        starts = [float(np.interp(at, letters, begins)) for at, _ in words] + [seconds]
        return [
            [word, round(start, 3), round(end, 3)]
            for (_, word), start, end in zip(words, starts, starts[1:])
        ]


def with_stress(text, stress, pitch):
    """(the text with marks around its stressed word, words [(place there, word)])."""
    marked = text
    parts = text.split()
    opened, closed = STRESS[0].format(pitch=pitch), STRESS[1]
    if stress is not None:
        parts = [html.escape(word) for word in parts]
        tagged = [opened + part + closed if n == stress else part for n, part in enumerate(parts)]
        marked = " ".join(tagged)

    words = []
    at = 0
    for number, (word, part) in enumerate(zip(text.split(), parts)):
        at = marked.index(part, at + len(opened) if number == stress else at)
        words.append((at, word))
        at += len(part) + (len(closed) if number == stress else 0)
    return marked, words


def encoded(samples, form):
    """The bytes of a 16-bit sound file, form "FLAC" or "WAV"."""
    file = io.BytesIO()
    soundfile.write(file, samples, audio.SAMPLE_RATE, format=form, subtype="PCM_16")
    return file.getvalue()


def say(text, voice, out, overwrite=False):
    """Speak a line into a sound file. voice: an eSpeak name, or heard, near (unheard) or far."""
    if not text.strip():
        raise ValueError("nothing to say: the text is empty")
    form = Path(out).suffix.lstrip(".").upper()
    if form not in ("WAV", "FLAC"):
        raise ValueError(f"{out}: wanted a name that ends in .wav or .flac")
    group = VOICES.get({"unheard": "near"}.get(voice, voice))
    samples, _ = Speaker().say(text, group[0] if group else voice)
    runs.write_file(out, encoded(samples, form), overwrite)
    print(f"{out}: {len(samples) / audio.SAMPLE_RATE:.2f} s")


def add_flags(parser):
    """The arguments of `say`."""
    add = parser.add_argument
    add("text", help="what to say")
    add(
        "--voice",
        default="heard",
        help="heard, unheard, far, or an eSpeak voice like en-us+f3 (default heard)",
    )
    add("--out", required=True, help="a .wav or .flac file to write")
    add("--overwrite", action="store_true", help="replace an existing file")


def main():
    parser = argparse.ArgumentParser(description="Speak a line to a file.")
    add_flags(parser)
    args = parser.parse_args()
    say(args.text, args.voice, args.out, args.overwrite)


if __name__ == "__main__":
    runs.run(main)
