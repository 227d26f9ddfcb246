r"""How it was said: pitch, melody, length and loudness of every word, as tokens beside it.

in   a manifest of audio and its text, with word times or without
out  a folder: codebook.json and codebook.safetensors (the bins), manifest.jsonl (what was said,
     and of each word its tokens)
see  ProsodyLM (arXiv:2507.20091), whose tokens SpeechCombine takes; Boersma (1993) for pitch by
     autocorrelation
run  python prosody.py out/manner/world/speech/train.jsonl --out out/manner/prosody

    anna likes<|speech|><|speaker_3|><|letter_9|><|level_5|>anna<|pitch_8|><|range_4|><|slope_7|>
    <|length_2|><|loud_9|> likes<|pitch_2|>...<|/speech|>   (in one line)

The speaker comes first: median pitch, how long a letter lasts, loudness. Then every word,
and behind it five numbers: pitch, range and slope of its melody, length and loudness. A
pause is a sixth. A word's pitch, length and loudness are told against the speaker's own.
Each number is the quantile of the corpus that it falls into.

The words themselves come from a transcript. So a model has no words to learn from sound:
only how they were spoken.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
from safetensors.torch import load_file

import audio
from vocab import Said

STEP = 160  # samples between frames: 10 ms
FRAME_RATE = audio.SAMPLE_RATE // STEP  # frames in a second
WINDOW = 800  # samples that pitch is read from: three periods of the lowest voice
LOWEST, HIGHEST = 60, 500  # Hz
VOICED = 0.5  # the least correlation with the period before that counts as a voice
OCTAVE_BONUS = 0.04  # for each octave up: two periods together correlate as well as one
FAR = 0.05  # what an octave away from the clip's median costs it

QUIET = 35  # dB below the loudest frame: no sound of speech
PAUSE = 0.2  # seconds between words, at least
STRAIN = 2.0  # what a word costs that lasts e times too long, or too short, for its letters
FLOOR = 60  # dB below the loudest frame: a cut costs nothing there, and 6 in the loudest

# Three for the speaker, once; five for every word; a pause where one follows.
KINDS = "speaker", "letter", "level", "pitch", "range", "slope", "length", "loud", "pause"
BINS = 16  # of each kind
UNVOICED = len(KINDS) * BINS  # stands for what a word without a voice lacks
NAMES = [f"{kind}_{i}" for kind in KINDS for i in range(BINS)] + ["unvoiced"]
PIECE = 64  # clips measured between two checkpoints
MOST = 300  # seconds of a clip: measuring takes 5 MB for each


# --- pitch and loudness -------------------------------------------------------


def frames_of(samples, width):
    """Windows (len(samples) // STEP, width), one every STEP, each around the middle of its step."""
    count = len(samples) // STEP
    side = (width - STEP) // 2
    padded = np.pad(np.asarray(samples, np.float32), (side, width))
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    return windows[: count * STEP : STEP]


def level(samples):
    """Loudness of every frame, (frames,) in dB of full scale."""
    x = frames_of(samples, audio.WINDOW)                            # (frames, WINDOW)
    return 10 * np.log10((x**2).mean(1) + 1e-10)


def mean_level(loud):
    """Loudness of frames as one, in dB: that of their mean energy; NaN of none."""
    return 10 * np.log10((10 ** (loud / 10)).mean()) if len(loud) else np.nan


def correlated(x):
    """Of each row of x (frames, N): its product with itself, shifted by 0, 1, ... samples."""
    size = 2 * x.shape[1]
    spectrum = np.fft.rfft(x, size)                            # (frames, size // 2 + 1)
    return np.fft.irfft(abs(spectrum) ** 2, size)[:, : x.shape[1]]


def pitch(samples):
    """Fundamental frequency of every frame, (frames,) in Hz; 0 where there is no voice.

    A voice repeats itself after a period. So the shift at which a frame is most like
    itself is the period, or a multiple of it: octaves are checked twice. A lower octave
    costs a little, and so does one that is far from the clip's median.
    """
    x = frames_of(samples, WINDOW)                                  # (frames, WINDOW)
    if not len(x):
        return np.zeros(0)
    window = np.hanning(WINDOW)
    x = (x - x.mean(1, keepdims=True)) * window
    r = correlated(x)                                               # (frames, shifts)
    r = r / (r[:, :1] + 1e-9)

    # A window fades at its ends, so a long shift correlates less. That is divided out, by the
    # window's own correlation with itself (Boersma 1993).
    faded = correlated(window[None])
    r = r / (faded / faded[:, :1] + 1e-9)
    shifts = np.arange(audio.SAMPLE_RATE // HIGHEST, audio.SAMPLE_RATE // LOWEST)
    before, here, behind = r[:, shifts - 1], r[:, shifts], r[:, shifts + 1]
    peak = (here > before) & (here >= behind)
    octave = np.log2(audio.SAMPLE_RATE / shifts)
    strength = np.where(peak, here + OCTAVE_BONUS * octave, -np.inf)  # (frames, shifts)

    loud = level(samples)

    def is_voice(best):
        """(frames,) bool: is each frame's shift number best[frame] that of a voice?"""
        at = np.arange(len(x)), best
        return peak[at] & (here[at] > VOICED) & (loud > loud.max() - QUIET)

    best = strength.argmax(1)                                       # (frames,)
    voiced = is_voice(best)
    if not voiced.any():
        return np.zeros(len(x))
    median = np.median(octave[best[voiced]])
    best = (strength - FAR * abs(octave - median)).argmax(1)
    voiced = is_voice(best)

    # Between samples: the top of the parabola through a peak and its neighbours.
    at = np.arange(len(x)), best
    bend = before[at] - 2 * here[at] + behind[at]
    shift = shifts[best] + 0.5 * (before[at] - behind[at]) / np.where(bend < 0, bend, -1)
    return np.where(voiced, audio.SAMPLE_RATE / shift, 0.0)


# --- words in time ------------------------------------------------------------


def aligned(text, samples):
    """Word times [[word, start, end]], in seconds, of a clip whose text is known.

    A cut falls where it is quiet, and a word lasts about as long as its letters want: of
    all ways to cut, the one of least cost (Viterbi's algorithm). It knows no language and
    needs no model. Speech without gaps wants better times: those of whisper.py.
    """
    words = text.split()
    loud = level(samples)
    if not words or not len(loud):
        return []
    sounding = np.flatnonzero(loud > loud.max() - QUIET)
    first, last = sounding[0], sounding[-1] + 1
    cut = np.clip(loud[first:last] - loud.max() + FLOOR, 0, None) / 10  # its cost at a frame
    T = last - first
    letters = np.array([len(word) + 1 for word in words])
    wanted = letters * T / letters.sum()                            # frames of each word

    # best[t]: the least cost of the words so far, when they end at frame t. A word lasts a
    # quarter to four times what its letters want.
    best = np.full(T + 1, np.inf)
    best[0] = 0.0
    lasted = []  # lasted[word][t]: how long a word is best, if it ends at frame t
    for want in wanted:
        cost = np.full(T + 1, np.inf)
        length = np.ones(T + 1, int)
        least, most = max(1, int(want / 4)), min(T, int(4 * want) + 1)
        for n in range(least, most + 1):
            strained = best[: T + 1 - n] + STRAIN * np.log(n / want) ** 2
            better = strained < cost[n:]
            cost[n:][better] = strained[better]
            length[n:][better] = n
        best = cost + np.append(cut, 0.0)  # the end of the clip costs nothing
        lasted.append(length)
    if not np.isfinite(best[T]):
        return by_letters(words, first / FRAME_RATE, last / FRAME_RATE)

    edges = [T]
    for length in reversed(lasted):
        edges.append(edges[-1] - length[edges[-1]])
    times = [float((first + edge) / FRAME_RATE) for edge in reversed(edges)]
    return [[word, a, b] for word, a, b in zip(words, times, times[1:])]


def by_letters(words, begin, end):
    """Word times that share a stretch of seconds by letters."""
    letters = np.cumsum([0] + [len(word) + 1 for word in words])
    times = (begin + (end - begin) * letters / letters[-1]).tolist()
    return [[word, a, b] for word, a, b in zip(words, times, times[1:])]


# --- how each word was said ---------------------------------------------------


def measured(samples, words):
    """[(word, {kind: value})]: first ("", the speaker), then every word in its order.

    words  [[word, start, end]] in seconds
    Pitch in semitones, slope in semitones a second, loudness in dB. A letter's length is the
    binary logarithm of its seconds; a word's is its length a letter, less the speaker's median.
    NaN where there is nothing to measure.
    """
    hertz, loud = pitch(samples), level(samples)
    tone = np.full(len(hertz), np.nan)
    tone[hertz > 0] = 12 * np.log2(hertz[hertz > 0])
    sounds = loud > loud.max(initial=-np.inf) - QUIET

    # Each word without the silence around it.
    stretches = []
    for _, begin, end in words:
        a, b = round(begin * FRAME_RATE), round(end * FRAME_RATE)
        inside = a + np.flatnonzero(sounds[a:b])
        stretches.append((inside[0], inside[-1] + 1) if len(inside) else (a, max(b, a + 1)))
    letters = np.array([len(word) + 1 for word, _, _ in words])
    lasts = np.array([(b - a) / FRAME_RATE for a, b in stretches])
    lengths = np.log2(lasts / letters)                              # (words,)

    speaker = {
        "speaker": np.nanmedian(tone) if (hertz > 0).any() else np.nan,
        "letter": np.median(lengths) if len(words) else np.nan,
        "level": mean_level(loud[sounds]),
    }
    said = [("", speaker)]
    for n, ((word, _, _), (a, b)) in enumerate(zip(words, stretches)):
        values = contour(tone[a:b], speaker["speaker"])
        values["length"] = lengths[n] - speaker["letter"]
        values["loud"] = mean_level(loud[a:b]) - speaker["level"]
        gap = (stretches[n + 1][0] - b) / FRAME_RATE if n + 1 < len(words) else 0.0
        if gap >= PAUSE:
            values["pause"] = np.log2(gap)
        said.append((" " * (n > 0) + word, values))
    # Plain numbers: a checkpoint holds no NumPy.
    return [(word, {kind: float(x) for kind, x in of_word.items()}) for word, of_word in said]


def contour(tone, speaker):
    """{"pitch", "range", "slope"} of a word's frames, semitones with NaN where no voice is."""
    at = np.flatnonzero(~np.isnan(tone))
    if len(at) < 3:
        return dict.fromkeys(("pitch", "range", "slope"), np.nan)
    tone = tone[at]
    low, high = np.percentile(tone, [5, 95])
    slope = np.polyfit(at / FRAME_RATE, tone, 1)[0]
    return {"pitch": np.median(tone) - speaker, "range": high - low, "slope": slope}


# --- bins ---------------------------------------------------------------------


def edges_of(corpus):
    """(kinds, BINS - 1) float32: of each kind the quantiles of its values in a corpus."""
    values = {kind: [] for kind in KINDS}
    for said in corpus:
        for _, of_word in said:
            for kind, value in of_word.items():
                if not np.isnan(value):
                    values[kind].append(value)
    at = np.linspace(0, 1, BINS + 1)[1:-1]
    empty = np.zeros(BINS - 1)
    edges = [np.quantile(values[kind], at) if values[kind] else empty for kind in KINDS]
    return np.array(edges, dtype=np.float32)


def numbered(said, edges):
    """What `measured` found, in numbers: a `Said`."""
    pairs = []
    for word, of_word in said:
        numbers = []
        for kind, value in of_word.items():
            row = KINDS.index(kind)
            place = int(np.searchsorted(edges[row], value))
            numbers.append(UNVOICED if np.isnan(value) else row * BINS + place)
        pairs.append((word, numbers))
    return Said(pairs)


class Ears:
    """Samples -> (`Said`, None): a transcript, and how each word of it was spoken.

    transcriber  samples -> text; None if the caller gives the text
    """

    hop = audio.HOP
    most = 30  # seconds of a clip
    makes = "words"

    def __init__(self, folder):
        self.edges = read_edges(folder)
        self.transcriber = None

    @property
    def lacks_words(self):
        """Must the caller give the transcript?"""
        return not self.transcriber

    def __call__(self, samples, text=None, words=None):
        """`words` are [["the", start, end] in seconds] of a text, where they are known."""
        if text is None:
            text = self.transcriber(samples)
        return numbered(measured(samples, words or aligned(text, samples)), self.edges), None

    def forget(self):
        """Nothing is kept of a clip."""


def read_edges(folder):
    """The bins of a folder, (kinds, BINS - 1)."""
    made = runs.read_json(Path(folder) / "codebook.json", ["features", "k", "sha256"])
    if made["features"] != {"kind": "prosody"}:
        raise ValueError(f"{folder}: its codebook is of {made['features']}, wanted prosody")
    file = Path(folder) / "codebook.safetensors"
    if runs.fingerprint(file) != made["sha256"]:
        raise ValueError(
            f"{file}: not the one that codebook.json describes (its sha256 differs)"
        )
    return load_file(file)["edges"].numpy()


# --- the command --------------------------------------------------------------


def is_prosody(folder):
    """Is it a folder of this command, or a model that hears so?"""
    file = Path(folder) / "codebook.json"
    made = runs.read_json(file) if file.exists() else {}
    return made.get("features") == {"kind": "prosody"}


class Prosody:
    """A folder of this command: `entries` of its manifest; corpus[i], the `Said` of one; `meta`."""

    def __init__(self, folder):
        read_edges(folder)
        made = runs.read_json(Path(folder) / "codebook.json", ["frame_rate"])
        self.meta = made | {"codebook_sha256": made["sha256"], "names": NAMES}
        self.entries = audio.read_manifest(Path(folder) / "manifest.jsonl")
        self.said = []
        for number, entry in enumerate(self.entries, 1):
            where = f"{folder}/manifest.jsonl, entry {number}"
            self.said.append(Said.read(entry.get("said"), where))

    def __getitem__(self, i):
        return self.said[i]

    def unit_seconds(self):
        """How much speech a number stands for, on average."""
        count = sum(len(numbers) for said in self.said for _, numbers in said)
        return sum(entry.get("seconds", 0) for entry in self.entries) / max(1, count)


def encode(args):
    """Measure every clip of a manifest, and write it in numbers."""
    if args.bins and not Path(args.bins).exists():
        raise FileNotFoundError(f"{args.bins}: no such folder")
    entries = audio.read_manifest(args.manifest)
    if not entries:
        raise ValueError(f"{args.manifest}: empty; wanted at least one clip")
    for entry in entries:
        if not entry.get("text", "").strip():
            raise ValueError(
                f"{args.manifest}: {entry['audio']} has no text; wanted a transcript of every clip "
                "(whisper.py words writes them)"
            )
    edges = read_edges(args.bins) if args.bins else None
    runs.replaceable(Path(args.out), args.overwrite)
    for entry, samples in zip(entries, audio.lengths(entries)):
        if samples > MOST * audio.SAMPLE_RATE:
            raise ValueError(f"{entry['audio']}: longer than {MOST} s; cut it first")

    def work(part):
        out = []
        for entry in part:
            samples = audio.load(entry["audio"])
            words = entry.get("words") or aligned(entry["text"], samples)
            seconds = len(samples) / audio.SAMPLE_RATE
            wrong = audio.wrong_words(entry, len(samples))
            if wrong or not words:
                raise ValueError(f"{entry['audio']}: {wrong or 'too short to hold its text'}")
            out.append((round(seconds, 3), measured(samples, words)))
        return out

    settings = {"audio": audio.identity(entries)}
    about = {"desc": f"measuring {args.manifest}", "unit": "clip"}
    corpus = runs.in_pieces(args.out, settings, entries, work, PIECE, **about)
    if edges is None:
        edges = edges_of(said for _, said in corpus)
    with runs.new_folder(args.out, [args.bins], args.overwrite, notes=settings) as out:
        runs.write_tensors(out / "codebook.safetensors", {"edges": torch.from_numpy(edges)})
        made = {
            "features": {"kind": "prosody"},
            "k": len(NAMES),
            "frame_rate": FRAME_RATE,
            "sha256": runs.fingerprint(out / "codebook.safetensors"),
        }
        (out / "codebook.json").write_text(json.dumps(made, indent=1) + "\n")
        with open(out / "manifest.jsonl", "w") as file:
            for entry, (seconds, said) in zip(entries, corpus):
                made = {"seconds": seconds, "said": numbered(said, edges)}
                file.write(json.dumps(entry | made) + "\n")
    runs.pieces_of(args.out).unlink(missing_ok=True)
    print(f"{args.out}: {len(entries)} clips, {len(NAMES)} tokens")


def main():
    parser = argparse.ArgumentParser(description="Say how every word of a corpus was said.")
    add = parser.add_argument
    add("manifest", help='JSON lines with "audio" and "text", or a LibriSpeech folder')
    add("--bins", help="a folder of this command, or a model that hears, whose bins to use")
    add("--out", required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace an existing --out")
    encode(parser.parse_args())


if __name__ == "__main__":
    runs.run(main)
