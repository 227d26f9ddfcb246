"""Samples in: any audio file -> mono float32 at 16 kHz; lists of audio; MFCC features.

in   audio files, or a manifest, or a LibriSpeech, LJSpeech or plain folder of them
out  samples (N,), entries of a manifest, frames (samples // 320, 39)
see  polyphase resampling: Smith, "Digital Audio Resampling" (2002); MFCC: Davis & Mermelstein
     (1980)
run  python audio.py out/question.wav   # what a file holds, and the frames it gives

Three nouns: *samples* (16,000 a second), *frames* (50 a second), and *units*
(tokenize_audio.py makes those; a folder of them is read here, as training documents and
HuBERT's training both do).
"""

import argparse
import hashlib
import json
import math
import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import soundfile
import torch
import torch.nn.functional as F

SAMPLE_RATE = 16_000
HOP = 320  # samples per frame: the product of HuBERT's seven strides
FRAME_RATE = SAMPLE_RATE // HOP  # 50 frames a second
WINDOW = 400  # samples one frame sees: 25 ms
PAD = (WINDOW - HOP) // 2  # on each side, so that frames = samples // HOP exactly
CROSSINGS = 48  # of zero, on either side of a resampling filter
PHASES = 512  # filters an odd rate is interpolated between: -110 dB of error
SEEK = 30  # seconds read before a stretch: Ogg's last page has no places
LOUDEST = 1e6  # sound lies between -1 and 1: a sample beyond this is damage
STREAMED = 0x7FFF0000  # bytes: a header that promises as many was written before the sound
SHORT = 0.95  # of what a header promises: a file with less has lost its end
RATES = 1000, 1_000_000  # samples a second of a recording: another rate is damage
HOURS = 1000  # of the longest recording: more is damage
AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".w64", ".caf"}
UNREAD = {".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr"}  # audio that soundfile does not read


# --- samples ------------------------------------------------------------------


def load(path, begin=0, end=None):
    """Samples of an audio file, or those from begin to end: mono, 16 kHz, float32, (N,).

    A part is what the whole file holds there, and is read without the rest. OSError or
    ValueError says in one line why a file cannot be heard.
    """
    path = Path(path)
    with opened(path) as file:
        rate, seconds = file.samplerate, file.frames / file.samplerate
        up, down = ratio(rate, SAMPLE_RATE)
        if begin * down >= file.frames * up > 0:
            raise ValueError(
                f"{path}: ends after {seconds:.1f} s, before the stretch that is wanted"
            )

        # Counted in periods of the filters: `down` samples in, `up` out.
        reach = math.ceil(CROSSINGS / cut_off(up, down))
        first = max(0, begin // up - -(-(reach + SEEK * rate) // down))
        count = -1
        if end is not None:
            count = max(0, -(-end * down // up) + reach - first * down)
        try:
            if first:
                file.seek(first * down)
            samples = file.read(count, dtype="float32", always_2d=True)  # (N, channels)
        except (soundfile.LibsndfileError, RuntimeError, ValueError, MemoryError):
            raise unreadable(
                path
            ) from None  # or its header promises more than memory holds

    if count == -1 and first == 0 and 0 < len(samples) < SHORT * file.frames:
        raise ended(path, len(samples) / rate, seconds)
    if len(samples) == 0:
        where = f" from {begin / SAMPLE_RATE:.1f} s on, though its header promises {seconds:.1f} s"
        raise ValueError(f"{path}: no samples in it" + where * (begin > 0))
    if not (np.abs(samples) < LOUDEST).all():
        raise ValueError(f"{path}: holds samples that are no sound: NaN, or above {LOUDEST:.0e}")
    mono = resample(samples.mean(axis=1), rate)
    return mono[begin - first * up : end and end - first * up]


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
    # A TypeError is of a name that ends in .raw.
    except (soundfile.LibsndfileError, RuntimeError, TypeError):
        path.open("rb").close()  # no permission is an OSError of its own
        raise unreadable(path) from None
    if not RATES[0] <= file.samplerate <= RATES[1]:
        file.close()
        raise ValueError(
            f"{path}: its header says {file.samplerate} samples a second, wanted "
            f"{RATES[0]} to {RATES[1]}; it is damaged"
        )

    # "data : 640000 (should be 383982)": the header of a WAV, and what there is.
    for promised, there in re.findall(r": (\d+) \(should be (\d+)\)", file.extra_info):
        if int(there) < SHORT * int(promised) and int(promised) < STREAMED:
            seconds = file.frames / file.samplerate
            file.close()
            raise ended(path, seconds, seconds * int(promised) / max(1, int(there)))
    return file


def ended(path, seconds, promised):
    return ValueError(
        f"{path}: ends after {seconds:.1f} s, though its header promises {promised:.1f} s"
    )


def unreadable(path):
    return ValueError(
        f"{path}: not audio that soundfile reads; convert it first: "
        f"ffmpeg -i {path.name} -ar 16000 -ac 1 {path.stem}_16k.wav"
    )


class Recording:
    """A file as if it were its samples: len() and slices [a:b], read when they are asked for.

    So hours of sound need the memory of a stretch.
    """

    def __init__(self, path):
        self.path = Path(path)
        with opened(self.path) as file:
            up, down = ratio(file.samplerate, SAMPLE_RATE)
            self.length = -(-file.frames * up // down)
            self.estimated = file.format == "MP3"  # from its size: may be some frames too many
        if not self.length:
            raise ValueError(f"{path}: no samples in it")
        hours = self.length / SAMPLE_RATE / 3600
        if hours > HOURS:
            raise ValueError(
                f"{path}: its header promises {hours:.0f} hours, more than any "
                "recording; it is damaged"
            )

    def __len__(self):
        return self.length

    def __getitem__(self, part):
        if part == slice(None):
            return load(self.path)
        begin, end, _ = part.indices(self.length)
        samples = load(self.path, begin, end)
        if len(samples) < end - begin and not self.estimated:
            there = (begin + len(samples)) / SAMPLE_RATE
            raise ended(self.path, there, self.length / SAMPLE_RATE)
        return samples


def lengths(entries):
    """Samples of every clip of a manifest's entries, as its header has them.

    An error names the first that cannot be opened: now, rather than hours into a run.
    """
    return [len(Recording(entry["audio"])) for entry in entries]


def can_be_heard(entries, hop, most):
    """Refuse clips under one frame, of `hop` samples, or longer than `most` seconds."""
    for entry, samples in zip(entries, lengths(entries)):
        if samples > most * SAMPLE_RATE:
            raise ValueError(f"{entry['audio']}: longer than {most} s; cut it first")
        if samples < hop:
            raise ValueError(
                f"{entry['audio']}: {samples} samples are under one frame ({hop}); take it out"
            )


def identity(entries):
    """A hash of which clips a corpus has and how long their files are: content would take hours."""
    sizes = []
    for entry in entries:
        path = entry["audio"]
        sizes.append(os.path.getsize(path) if os.path.exists(path) else -1)
    return hashlib.sha256(json.dumps([entries, sizes]).encode()).hexdigest()


# --- resampling ---------------------------------------------------------------


def ratio(rate, to):
    """(up, down), the reduced ratio of two rates."""
    common = math.gcd(rate, to)
    return to // common, rate // common


def cut_off(up, down):
    """Of the input's Nyquist: what both rates can carry, less the filter's skirt."""
    return 0.95 * min(1, up / down)


def resample(samples, rate, to=SAMPLE_RATE):
    """Band-limited change of rate: each output is the input convolved with a sinc at its own time.

    Output n lies at input time n * rate / to. With the ratio reduced to down / up there
    are only `up` different fractions of a sample, hence `up` filters (phases), and all
    outputs of one phase are one strided convolution.
    """
    if rate == to:
        return samples
    up, down = ratio(rate, to)
    cut = cut_off(up, down)
    reach = math.ceil(CROSSINGS / cut)
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    x = np.pad(samples, (reach, reach + down))
    length = -(-len(samples) * up // down)
    if up <= 1000:  # every usual rate
        filters = filter_table(up, down, reach, cut)                # (up, 1, taps)
        x = torch.from_numpy(x)[None, None]
        y = F.conv1d(x, filters, stride=down)                       # (1, up, blocks)
        return y[0].T.reshape(-1)[:length].numpy()

    # An odd rate has too many phases for a table of all: between two of PHASES a filter
    # is a line.
    table, rise = sparse_table(reach, cut)
    taps = np.arange(2 * reach + 1)
    out = []
    for n in range(0, length, 4096):
        time = np.arange(n, min(n + 4096, length)) * down / up
        whole = time.astype(np.int64)
        phase = (time - whole) * PHASES
        before = phase.astype(np.int64)
        share = (phase - before)[:, None].astype(np.float32)
        filters = table[before] + share * rise[before]              # (n, taps)
        out.append((x[whole[:, None] + taps] * filters).sum(1))
    return np.concatenate(out)


def phases(times, taps, reach, cut):
    """Filters (len(times), taps) that read the input at `times`, counted from tap `reach`.

    Each is a sinc in a Kaiser window.
    """
    t = np.arange(taps) - reach - times[:, None]
    inside = np.clip(1 - (t / reach) ** 2, 0, None)
    window = np.i0(8.6 * np.sqrt(inside)) / np.i0(8.6) * (abs(t) <= reach)
    return (cut * np.sinc(cut * t) * window).astype(np.float32)


@lru_cache
def filter_table(up, down, reach, cut):
    """All filters of a ratio, (up, 1, taps): computed once for a corpus."""
    times = np.arange(up) * down / up
    return torch.from_numpy(phases(times, 2 * reach + down, reach, cut))[:, None]


@lru_cache(4)
def sparse_table(reach, cut):
    """Filters of PHASES + 1 fractions from 0 to 1, (PHASES + 1, taps), and the steps between."""
    table = phases(np.arange(PHASES + 1) / PHASES, 2 * reach + 1, reach, cut)
    return table, np.diff(table, axis=0)


# --- lists of audio -----------------------------------------------------------


def read_manifest(path):
    """Entries {"audio": absolute path, "text"?, "speaker"?, "seconds"?, "words"?} of a corpus.

    A .jsonl manifest, with paths relative to it and in its order; or, sorted, a
    LibriSpeech, an LJSpeech or any folder of audio files; or one such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such manifest or folder")
    if path.is_dir():
        return read_folder(path)
    if path.suffix.lower() in AUDIO:
        return [{"audio": str(path.resolve())}]
    entries = runs.read_lines(path)
    for number, entry in enumerate(entries, 1):
        check_entry(entry, f"{path}, entry {number}")
    return [entry | {"audio": str((path.parent / entry["audio"]).resolve())} for entry in entries]


def check_entry(entry, where):
    """A ValueError for an entry of another form than read_manifest says."""
    if not isinstance(entry.get("audio"), str):
        raise ValueError(f'{where}: got no "audio", wanted a path relative to the manifest')
    if not isinstance(entry.get("text", ""), str):
        raise ValueError(
            f"{where}: got text = {str(entry['text'])[:40]}, wanted a string, or no text"
        )
    if not isinstance(entry.get("caption") or "", str):
        raise ValueError(
            f"{where}: got caption = {str(entry['caption'])[:40]}, wanted a string"
        )
    words = entry.get("words") or []
    if not isinstance(words, list):
        raise ValueError(f'{where}: got "words" = {str(words)[:40]}, wanted a list')
    for word in words:
        kinds = [type(part) for part in word] if isinstance(word, list) else []
        timed = len(kinds) == 3 and kinds[0] is str and set(kinds[1:]) <= {int, float}
        if not timed or not 0 <= word[1] <= word[2] < math.inf:
            raise ValueError(
                f'{where}: got {str(word)[:40]} among "words", wanted ["the", start, '
                "end] in seconds"
            )
    begins = [word[1] for word in words]
    if begins != sorted(begins):
        raise ValueError(f'{where}: its "words" are not in the order of their times')


def letters(text):
    """Letters and digits of a text, as two spellings of it have them in common."""
    return re.sub(r"[\W_]", "", text.lower())


def wrong_words(entry, samples):
    """Why an entry's word times cannot be those of its text, in so many samples; or ""."""
    words, seconds = entry.get("words"), samples / SAMPLE_RATE
    if not words:
        return ""
    spoken = " ".join(word[0] for word in words)
    if entry.get("text") and letters(spoken) != letters(entry["text"]):
        return (
            f'its "words" are {spoken[:60]!r}, its text {entry["text"][:60]!r}; wanted the times '
            "of all of its words, as whisper.py words finds them"
        )
    if words[-1][1] <= seconds:
        return ""
    return (
        f"{words[-1][0]!r} begins at {words[-1][1]} s, behind its {seconds:.2f} s; wanted the "
        "word times of this clip"
    )


def read_folder(path):
    """Entries of a folder's audio files, with the transcripts that lie beside them."""
    texts, inside = {}, files_under(path)

    # LibriSpeech: "84-121123-0000 GO DO YOU HEAR".
    for file in inside:
        if file.name.endswith(".trans.txt"):
            for line in filter(None, runs.utf8(file).split("\n")):
                name, _, text = line.partition(" ")
                texts[name] = text.lower()

    # LJSpeech: "LJ001-0001|as written|as read".
    if (path / "metadata.csv").exists():
        for line in filter(None, runs.utf8(path / "metadata.csv").split("\n")):
            name, *text = line.split("|")
            texts[name] = (text or [""])[-1]

    entries = []
    for file in inside:
        if file.suffix.lower() in UNREAD:
            raise unreadable(file)
        if file.suffix.lower() in AUDIO:
            text = {"text": texts[file.stem]} if file.stem in texts else {}
            entries.append({"audio": str(file.resolve())} | text)
    if not entries:
        raise ValueError(f"{path}: no audio files in it; wanted {' '.join(sorted(AUDIO))}")
    return entries


def files_under(folder):
    """All files of a folder but hidden ones, sorted, those of linked folders too.

    A ValueError for a link that leads back to where it stands.
    """
    files = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            inner = Path(here, name)
            if inner.is_symlink() and Path(here).resolve().is_relative_to(inner.resolve()):
                raise ValueError(f"{inner}: a link to a folder that it is in; remove it")
        files += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(files)


# --- a folder of units --------------------------------------------------------


class Units:
    """A units folder of tokenize_audio.py, read as it is needed.

    entries  its manifest      corpus[i]  (units, durations in frames) of entry i
    meta  how units were made
    """

    def __init__(self, folder):
        folder = Path(folder)
        if not (folder / "meta.json").exists():
            raise FileNotFoundError(
                f"{folder}: not a units folder (no meta.json); make one with "
                "tokenize_audio.py encode"
            )
        keys = ["features", "k", "frame_rate", "codebook_sha256"]
        self.meta = runs.read_json(folder / "meta.json", keys)
        self.entries = read_manifest(folder / "manifest.jsonl")
        try:
            self.offsets = np.load(folder / "index.npy")
        except (EOFError, ValueError) as error:
            raise ValueError(f"{folder / 'index.npy'}: damaged ({error}); encode again") from None
        self.units = mapped(folder / "units.bin")
        self.durations = mapped(folder / "durations.bin")
        counts = len(self.units), len(self.durations)
        if self.offsets.shape != (len(self.entries) + 1,) or counts != (self.offsets[-1],) * 2:
            raise ValueError(
                f"{folder}: index, units and manifest disagree; encode again with "
                "--overwrite"
            )

    def __getitem__(self, i):
        a, b = self.offsets[i], self.offsets[i + 1]
        return self.units[a:b], self.durations[a:b]

    def unit_seconds(self):
        """How much speech a unit stands for, on average."""
        return self.durations.mean(dtype=float) / self.meta["frame_rate"]


def mapped(path):
    """The uint16 numbers of a file, read as they are needed. An empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.zeros(0, np.uint16)
    return np.memmap(path, dtype=np.uint16, mode="r")


def between(units, durations, begin, end, rate):
    """The units of a stretch of time, in seconds: every run at least half of which is inside."""
    middle = (np.cumsum(durations) - durations / 2) / rate
    return units[(middle >= begin) & (middle < end)]


# --- MFCC ---------------------------------------------------------------------

MELS, CEPSTRA = 40, 13


def triangles(hertz):
    """Filters (WINDOW // 2 + 1, len(hertz) - 2): each rises from an edge to the next, and falls."""
    at = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)[:, None]
    rise = (at - hertz[:-2]) / np.diff(hertz)[:-1]
    fall = (hertz[2:] - at) / np.diff(hertz)[1:]
    return np.clip(np.minimum(rise, fall), 0, None)


@lru_cache
def mel_filters():
    """Triangles (WINDOW // 2 + 1, MELS), evenly spaced on the mel scale from 0 to 8 kHz."""
    mel = np.linspace(0, 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700), MELS + 2)
    return triangles(700 * (10 ** (mel / 2595) - 1))


def slopes(y):
    """The slope of each column of y (frames, ...) over five frames."""
    near = np.roll(y, -1, 0) - np.roll(y, 1, 0)
    far = np.roll(y, -2, 0) - np.roll(y, 2, 0)
    return (near + 2 * far) / 10


def mfcc(samples):
    """39 features a frame, (samples // HOP, 39) float32: 13 cepstra, slopes, slopes of slopes.

    Each has zero mean and unit variance over the clip, which takes the colour of speaker
    and microphone out.
    """
    frames = len(samples) // HOP
    if frames == 0:
        return np.zeros((0, 3 * CEPSTRA), dtype=np.float32)

    # Loudness in each mel band, in logarithms.
    padded = np.pad(samples, (PAD, PAD + WINDOW))
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)
    x = windows[: frames * HOP : HOP] * np.hanning(WINDOW)          # (frames, WINDOW)
    power = abs(np.fft.rfft(x)) ** 2                           # (frames, WINDOW // 2 + 1)
    loud = np.log(power @ mel_filters() + 1e-6)                     # (frames, MELS)

    # Its shape in a few cosines (DCT-II): the first say how the mouth stands, the rest is
    # pitch.
    mel, n = np.arange(MELS) + 0.5, np.arange(CEPSTRA)
    cepstra = loud @ np.cos(np.pi / MELS * np.outer(mel, n))        # (frames, CEPSTRA)

    # A margin, so that slopes at the ends do not wrap around.
    wide = np.pad(cepstra, ((4, 4), (0, 0)), mode="edge")
    features = np.concatenate([wide, slopes(wide), slopes(slopes(wide))], axis=1)[4:-4]
    features = (features - features.mean(0)) / (features.std(0) + 1e-3)
    return features.astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description="Say what audio files hold.")
    parser.add_argument("audio", nargs="+", help="audio files")
    for path in parser.parse_args().audio:
        samples = load(path)
        facts = {
            "audio": path,
            "seconds": round(len(samples) / SAMPLE_RATE, 3),
            "frames": len(mfcc(samples)),
            "loudest": round(float(abs(samples).max()), 3),
        }
        print(json.dumps(facts))


if __name__ == "__main__":
    runs.run(main)
