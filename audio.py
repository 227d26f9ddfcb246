"""Samples in: any audio file -> mono float32 at 16 kHz; lists of files with their transcripts; MFCC features.

in   audio files, or a manifest / LibriSpeech / LJSpeech / plain folder     out  samples (N,), rows, frames (samples // 320, 39)
see  polyphase resampling: Smith, "Digital Audio Resampling" (2002); MFCC: Davis & Mermelstein (1980)
run  python audio.py question.wav                       # what a file holds, and the frames it gives

Three nouns: *samples* (16,000 a second), *frames* (50 a second), and *units* (tokenize_audio.py makes those).
"""
import argparse
import json
import math
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

import weights

SAMPLE_RATE = 16_000
HOP = 320                                               # samples per frame: the product of HuBERT's seven strides
FRAME_RATE = SAMPLE_RATE // HOP                         # 50 frames per second
WINDOW = 400                                            # samples one frame sees: 25 ms
PAD = (WINDOW - HOP) // 2                               # 40 samples on each side, so that frames = samples // HOP exactly
RATES = 1000, 1_000_000             # samples a second that a recording may have: others are damage, and cost hours or gigabytes to resample
SEEK = 30                                               # seconds before a stretch that are read with it: in Ogg's last page no place is found
AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf"}

# --- samples ---------------------------------------------------------------------------------------------------------------

def load(path, begin=0, end=None):
    """Samples of an audio file, or those from begin to end: mono, 16 kHz, float32, (N,). A part is what the whole holds there, read without
    the rest. OSError or ValueError says in one line why a file cannot be heard."""
    path = Path(path)
    with opened(path) as file:
        up, down = ratio(file.samplerate, SAMPLE_RATE)
        reach = math.ceil(48 / cut_off(up, down))                          # samples that the filters see on either side
        first = max(0, begin // up - -(-(reach + SEEK * file.samplerate) // down))     # in periods of the filters, `down` samples in and `up` out
        if begin * down >= file.frames * up > 0:
            raise ValueError(f"{path}: ends after {file.frames / file.samplerate:.1f} s, before the stretch that is wanted")
        try:
            if first:
                file.seek(first * down)
            samples = file.read(-1 if end is None else max(0, -(-end * down // up) + reach - first * down), dtype="float32", always_2d=True)     # (N, channels)
        except (soundfile.LibsndfileError, RuntimeError, ValueError, MemoryError):     # the last two: a header that promises more than memory holds
            raise unreadable(path) from None
        if len(samples) == 0:
            raise ValueError(f"{path}: no samples in it" + (f" from {begin / SAMPLE_RATE:.1f} s on, though its header promises {file.frames / file.samplerate:.1f} s" if begin else ""))
        if not np.isfinite(samples).all():
            raise ValueError(f"{path}: holds NaN or infinite samples")
        return resample(samples.mean(axis=1), file.samplerate)[begin - first * up:end and end - first * up]


def opened(path):
    """A soundfile.SoundFile, or the one line that says why not."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, wanted an audio file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty, 0 bytes")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, RuntimeError, TypeError):           # TypeError: a name in .raw promises no form
        path.open("rb").close()                                            # no permission is an OSError of its own
        raise unreadable(path) from None
    if not RATES[0] <= file.samplerate <= RATES[1]:
        file.close()
        raise ValueError(f"{path}: its header says {file.samplerate} samples a second, wanted {RATES[0]} to {RATES[1]}; it is damaged")
    return file


def unreadable(path):
    return ValueError(f"{path}: not audio that soundfile reads; convert it first: ffmpeg -i {path.name} -ar 16000 -ac 1 {path.stem}.wav")


class Recording:
    """A file as if it were its samples: len() and slices [a:b], each read when it is asked for. Hours of sound in the memory of a stretch."""

    def __init__(self, path):
        self.path = Path(path)
        with opened(self.path) as file:
            up, down = ratio(file.samplerate, SAMPLE_RATE)
            self.length = -(-file.frames * up // down)
        if self.length > 1000 * 3600 * SAMPLE_RATE:
            raise ValueError(f"{path}: its header promises {self.length / SAMPLE_RATE / 3600:.0f} hours, more than any recording; it is damaged")

    def __len__(self):
        return self.length

    def __getitem__(self, part):
        if part == slice(None):
            return load(self.path)
        begin, end, _ = part.indices(self.length)
        samples = load(self.path, begin, end)
        if len(samples) < end - begin:
            raise ValueError(f"{self.path}: ends after {(begin + len(samples)) / SAMPLE_RATE:.1f} s, though its header promises {self.length / SAMPLE_RATE:.1f} s")
        return samples


def ratio(rate, to):
    """(up, down), the reduced ratio of two rates."""
    common = math.gcd(rate, to)
    return to // common, rate // common


def cut_off(up, down):
    """Of the input's Nyquist: what both rates can carry, less the filter's skirt."""
    return 0.95 * min(1, up / down)


def resample(samples, rate, to=SAMPLE_RATE):
    """Band-limited change of rate: each output sample is the input convolved with a Kaiser-windowed sinc centred on its own time.

    Output n lies at input time n * rate / to; with the ratio reduced to down / up there are only `up` different fractions
    of a sample, hence `up` filters (phases), and all outputs of one phase are one strided convolution.
    """
    if rate == to:
        return samples
    up, down = ratio(rate, to)
    cut = cut_off(up, down)
    reach = math.ceil(48 / cut)                         # 48 zero crossings on either side
    x = torch.from_numpy(np.pad(np.ascontiguousarray(samples, dtype=np.float32), (reach, reach + down)))
    length = -(-len(samples) * up // down)
    if up <= 1000:                                                         # every usual rate
        y = F.conv1d(x[None, None], filter_table(up, down, reach, cut), stride=down)                         # (1, up, blocks)
        return y[0].T.reshape(-1)[:length].numpy()
    out = []                                                               # an odd rate has too many phases for a table: each output its own
    for n in range(0, length, 4096):
        time = np.arange(n, min(n + 4096, length)) * down / up
        whole = time.astype(np.int64)
        out.append((x.numpy()[whole[:, None] + np.arange(2 * reach + 1)] * phases(time - whole, 2 * reach + 1, reach, cut)).sum(1))
    return np.concatenate(out)


def phases(times, taps, reach, cut):
    """Windowed-sinc filters (len(times), taps) that read the input at `times`, counted from tap `reach`."""
    t = np.arange(taps) - reach - times[:, None]
    window = np.i0(8.6 * np.sqrt(np.clip(1 - (t / reach) ** 2, 0, None))) / np.i0(8.6) * (abs(t) <= reach)
    return (cut * np.sinc(cut * t) * window).astype(np.float32)


@lru_cache
def filter_table(up, down, reach, cut):
    """All filters of a ratio, (up, 1, taps): computed once for a corpus."""
    return torch.from_numpy(phases(np.arange(up) * down / up, 2 * reach + down, reach, cut))[:, None]


# --- lists of audio --------------------------------------------------------------------------------------------------------

def read_manifest(path):
    """Rows {"audio": absolute path, "text"?, "speaker"?, "seconds"?, "words"?} of a .jsonl manifest (paths in it are relative
    to it), a LibriSpeech or LJSpeech folder, or any folder of audio files. Sorted, except a manifest, which keeps its order."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such manifest or folder")
    if path.is_file():
        rows = weights.read_lines(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get("audio"), str):
                raise ValueError(f"{path}, row {number}: got no \"audio\", wanted a path relative to the manifest")
            if not isinstance(row.get("text", ""), str):
                raise ValueError(f"{path}, row {number}: got text = {str(row['text'])[:40]}, wanted a string, or no text")
            for word in row.get("words") or []:
                if not (isinstance(word, list) and [type(part) in (int, float) for part in word] == [False, True, True] and isinstance(word[0], str)):
                    raise ValueError(f'{path}, row {number}: got {str(word)[:40]} among "words", wanted ["the", start, end] in seconds')
        return [row | {"audio": str((path.parent / row["audio"]).resolve())} for row in rows]
    texts = {}
    inside = files_under(path)
    for file in [f for f in inside if f.name.endswith(".trans.txt")]:      # LibriSpeech: "84-121123-0000 GO DO YOU HEAR"
        for line in filter(None, file.read_text(encoding="utf-8").split("\n")):
            name, _, text = line.partition(" ")
            texts[name] = text.lower()
    if (path / "metadata.csv").exists():                                   # LJSpeech: "LJ001-0001|as written|as read"
        for line in filter(None, (path / "metadata.csv").read_text(encoding="utf-8").split("\n")):
            name, *text = line.split("|")
            texts[name] = (text or [""])[-1]
    files = [f for f in inside if f.suffix.lower() in AUDIO]
    if not files:
        raise ValueError(f"{path}: no audio files in it; wanted {' '.join(sorted(AUDIO))}")
    return [{"audio": str(f.resolve())} | ({"text": texts[f.stem]} if f.stem in texts else {}) for f in files]


def files_under(folder):
    """All files of a folder, sorted, those of linked folders too; a ValueError for a link that leads back to where it stands."""
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):
        for name in folders:
            inner = Path(here, name)
            if inner.is_symlink() and Path(here).resolve().is_relative_to(inner.resolve()):
                raise ValueError(f"{inner}: a link to a folder that it is in; remove it")
        files += [Path(here, name) for name in names]
    return sorted(files)


class Units:
    """A units folder of tokenize_audio.py: `rows` is its manifest, `corpus[i]` the (units, durations in frames) of row i,
    `meta` how they were made. Nothing is read into memory but the manifest."""

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(f"{folder}: not a units folder (no meta.json); make one with tokenize_audio.py encode")
        self.meta, self.rows = weights.read_json(folder / "meta.json", ["features", "k", "frame_rate", "codebook_sha256"]), read_manifest(folder / "manifest.jsonl")
        self.offsets = np.load(folder / "index.npy")
        self.units, self.durations = (mapped(folder / name) for name in ("units.bin", "durations.bin"))
        if len(self.offsets) != len(self.rows) + 1 or self.offsets[-1] != len(self.units) or len(self.units) != len(self.durations):
            raise ValueError(f"{folder}: index, units and manifest disagree; encode again with --overwrite")

    def __getitem__(self, i):
        a, b = self.offsets[i], self.offsets[i + 1]
        return self.units[a:b], self.durations[a:b]


def mapped(path):
    """The uint16 numbers of a file, read as they are needed. An empty file cannot be mapped."""
    return np.memmap(path, dtype=np.uint16, mode="r") if path.stat().st_size else np.zeros(0, np.uint16)


def between(units, durations, begin, end, rate):
    """The units of a stretch of time, in seconds: every run that has at least half of itself inside."""
    middle = (np.cumsum(durations) - durations / 2) / rate
    return units[(middle >= begin) & (middle < end)]


# --- MFCC ------------------------------------------------------------------------------------------------------------------

MELS, CEPSTRA = 40, 13


@lru_cache
def mel_filters():
    """Triangles (WINDOW // 2 + 1, MELS), evenly spaced on the mel scale from 0 to 8 kHz."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), MELS + 2)
    hertz = 700 * (10 ** (mel / 2595) - 1)
    at = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)[:, None]
    rise, fall = (at - hertz[:-2]) / np.diff(hertz)[:-1], (hertz[2:] - at) / np.diff(hertz)[1:]
    return np.clip(np.minimum(rise, fall), 0, None)


def mfcc(samples):
    """39 features a frame, (samples // HOP, 39) float32: 13 cepstra, their slopes and the slopes' slopes, each with zero
    mean and unit variance over the clip (which takes the speaker's and the microphone's colour out)."""
    frames = len(samples) // HOP
    if frames == 0:
        return np.zeros((0, 3 * CEPSTRA), dtype=np.float32)
    padded = np.pad(samples, (PAD, PAD + WINDOW))
    x = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[: frames * HOP : HOP] * np.hanning(WINDOW)   # (frames, WINDOW)
    power = abs(np.fft.rfft(x)) ** 2                                                                          # (frames, WINDOW // 2 + 1)
    loud = np.log(power @ mel_filters() + 1e-6)                                                               # (frames, MELS)
    cosines = np.cos(np.pi / MELS * np.outer(np.arange(MELS) + 0.5, np.arange(CEPSTRA)))                      # DCT-II
    cepstra = loud @ cosines                                                                                  # (frames, CEPSTRA)
    slope = lambda y: (np.roll(y, -1, 0) - np.roll(y, 1, 0) + 2 * (np.roll(y, -2, 0) - np.roll(y, 2, 0))) / 10
    wide = np.pad(cepstra, ((4, 4), (0, 0)), mode="edge")                  # so that the slopes at the ends do not wrap around
    features = np.concatenate([wide, slope(wide), slope(slope(wide))], axis=1)[4:-4]
    return ((features - features.mean(0)) / (features.std(0) + 1e-3)).astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description="Say what audio files hold.")
    parser.add_argument("audio", nargs="+", help="audio files")
    for path in parser.parse_args().audio:
        samples = load(path)
        print(json.dumps({"audio": path, "seconds": round(len(samples) / SAMPLE_RATE, 3), "frames": len(mfcc(samples)),
                          "loudest": round(float(abs(samples).max()), 3)}))


if __name__ == "__main__":
    weights.run(main)
