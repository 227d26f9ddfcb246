r"""Speech to units: samples -> features, 50 frames a second -> one of K centroids each.

in   a manifest or folder of audio
out  a codebook (fit); units.bin, durations.bin, index.npy, manifest.jsonl, meta.json (encode)
see  HuBERT (arXiv:2106.07447), GSLM (arXiv:2102.01192); k-means++ (Arthur & Vassilvitskii 2007);
     the mean of a clip is its speaker's (arXiv:2108.00917); a price on every change of unit gives
     units near phones (arXiv:2012.07551)
run  python tokenize_audio.py fit --manifest out/toy/speech/train.jsonl --features mfcc --k 100 \
         --out out/codebook_mfcc

Features are MFCCs or a HuBERT layer. A small penalty for switching keeps one number for
about the length of a phone. Repeats are collapsed: 7 7 7 2 2 7 -> 7 2 7. The result is a
string over an alphabet of K units.

`encode` goes on behind its last mark when started again. Under torchrun (`torchrun
--nproc-per-node 8 tokenize_audio.py encode ...`; on a CPU with --dtype) each process takes
its stretch of the list; the first joins them.

Every folder that can turn sound into units (codebook, units folder, model that hears)
holds codebook.safetensors, codebook.json and, if its features come from a HuBERT under 50
MB, that HuBERT as hubert/: it needs nothing else.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import audio
import weights
from hubert import Config, Hubert

# k-means with --minibatch: passes' worth of steps, whole passes after them, and among how
# many frames a centroid the start is drawn.
PREVIEW, PASSES_AFTER, SPREAD = 1, 20, 200
ROWS = 2048  # frames compared with all centroids at a time, on a CPU
LAYER = 9  # of HuBERT, unless told: the stream after nine of its blocks
STEADY = 3  # HuBERT units then change some 15 times a second, near phones
LONG = 60 * audio.SAMPLE_RATE  # a longer clip is heard in windows of a minute ...
AROUND = 2 * audio.SAMPLE_RATE  # ... and two seconds more on each side
AHEAD = 64  # clips decoded while others are encoded; what a kill can cost
MOST = 65_535  # frames of a run: what durations.bin can hold
SILENT = 1e-4  # a clip that never gets louder than -80 dB
CLIPPED = 0.999, 0.001  # a sample is clipped from here on; a clip where this share is
SMALL = 50e6  # bytes: a HuBERT up to this size travels with its codebook


# --- features -----------------------------------------------------------------


def feature_function(recipe, folder, device, dtype=torch.float32):
    """(features, hop) by a recipe: {"kind": "mfcc"} or {"kind": "hubert", "path", "layer", ...}.

    `features` turns a list of clips, samples (N,) each, into float32 tensors (N // hop,
    width) on `device`. A clip gives in any list what it gives alone. A HuBERT is taken
    from folder/hubert, if a folder is given and has one.
    """
    if recipe["kind"] == "mfcc":

        def mfccs(clips):
            return [torch.from_numpy(audio.mfcc(samples)).to(device) for samples in clips]

        return mfccs, audio.HOP

    path = Path(recipe["path"])
    if folder and Path(folder, "hubert").exists():
        path = Path(folder, "hubert")
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: the HuBERT of these units is not there; pass it with --hubert"
        )
    if runs.fingerprint(path) != recipe["sha256"]:
        raise ValueError(
            f"{path}: not the HuBERT that these units come from (its sha256 differs); "
            "pass the right one with --hubert"
        )
    model = Hubert.load(path, device)
    layer = recipe["layer"]
    hop = model.hop()

    @torch.inference_mode()
    def features(clips):
        lengths = torch.tensor([len(samples) for samples in clips], device=device)
        if int(lengths.max()) < hop:
            return [torch.zeros(0, model.config.hidden_size, device=device) for _ in clips]
        alike = len(set(map(len, clips))) == 1
        x = [torch.from_numpy(samples) for samples in clips]
        x = torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device)  # (B, N)
        with runs.autocast(device, dtype):
            x = model(x, layer, lengths=None if alike else lengths).float()  # (B, T, C)
        each = [row[: n // hop] for row, n in zip(x, lengths.tolist())]

        # What stays the same through a clip (of a long one, a window) is the voice and
        # the room, not the words.
        return [row - row.mean(0) if len(row) else row for row in each]

    return features, hop


class Window(NamedTuple):
    """Samples `begin` to `end` of a clip; the frames that count there, from `first` on."""

    begin: int
    end: int
    first: int
    count: int


def windows(n, hop):
    """The windows of a clip of n samples: the clip itself, or, of a long one, windows that overlap.

    So memory has a bound, and every frame that counts has its surroundings.
    """
    if n <= LONG + 2 * AROUND:
        return [Window(0, n, 0, n // hop)]
    cut = []
    for a in range(0, n, LONG):
        b = min(a + LONG, n)
        begin, end = max(0, a - AROUND), min(b + AROUND, n)
        cut.append(Window(begin, end, (a - begin) // hop, b // hop - a // hop))
    return cut


def batches(lengths, seconds):
    """Indices of `lengths` (samples) in groups of like length, the longest first.

    In a group is at most `seconds` of sound, padding included, or one clip.
    """
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    while waiting:
        longest = max(1, lengths[waiting[-1]])
        fit = max(1, int(seconds * audio.SAMPLE_RATE) // longest)
        yield [waiting.pop() for _ in range(min(len(waiting), fit))]


def ahead(entries, decode):
    """Yield (entries, what `decode` makes of each), AHEAD at a time; threads decode ahead."""
    chunks = [entries[a : a + AHEAD] for a in range(0, len(entries), AHEAD)]
    pool = ThreadPoolExecutor(4)
    decoding = ()
    try:
        for chunk, following in zip([[], *chunks], [*chunks, []]):
            decoded, decoding = list(decoding), pool.map(decode, following)
            if chunk:
                yield chunk, decoded
    finally:  # whoever stops early waits for no clip that was not begun
        pool.shutdown(cancel_futures=True)


# --- k-means ------------------------------------------------------------------


def nearest(x, centroids):
    """Index (N,) of the nearest centroid of each row of x (N, C).

    |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 changes nothing. On a CPU some thousand rows
    at a time: their products with all centroids stay in a cache. On a GPU so many that these are
    1 GB.
    """
    half = 0.5 * centroids.pow(2).sum(1)                            # (K,)
    rows = ROWS if x.device.type == "cpu" else max(1, (1 << 28) // len(centroids))
    return torch.cat(
        [torch.addmm(-half, part, centroids.T).argmax(1) for part in x.split(rows)]
    )


def steady(clips, centroids, switch):
    """Labels (T,) int64 of each clip's frames (T, C): the path through the centroids with the least
    sum of squared distances plus `switch` for every change of label (Viterbi's
    algorithm).

    A change costs the same wherever it leads, so a step looks at K states, not K * K.
    switch = 0 is the nearest centroid of each frame. Above it, a stray frame is not worth
    two changes: fewer, longer units. All clips take a step together: a loop in Python
    costs the same for one of them.
    """
    lengths = [len(x) for x in clips]
    if switch == 0 or not max(lengths):
        labels = torch.cat([nearest(x, centroids) for x in clips]).cpu().numpy()
        return np.split(labels, np.cumsum(lengths)[:-1])

    def squared_distances(x):
        """(T, K), of frames (T, C)."""
        own, theirs = x.pow(2).sum(1, keepdim=True), centroids.pow(2).sum(1)
        return own - 2 * (x @ centroids.T) + theirs

    # Behind its end a clip's distances are 0: no change is worth its price there.
    distance = torch.nn.utils.rnn.pad_sequence([squared_distances(x) for x in clips])
    distance = distance.cpu().numpy()                               # (T, B, K)
    T, B, K = distance.shape

    # The cost of the best path that ends in each label, and where that path came from.
    cost = distance[0].copy()                                       # (B, K)
    came = np.empty((T, B, K), dtype=np.int32)
    for t in range(1, T):
        best = cost.argmin(1)[:, None]                              # (B, 1)
        changed = np.take_along_axis(cost, best, 1) + switch        # (B, 1)
        came[t] = np.where(cost <= changed, np.arange(K), best)
        cost = np.minimum(cost, changed) + distance[t]

    labels = np.empty((T, B), dtype=np.int64)
    labels[-1] = cost.argmin(1)
    for t in range(T - 1, 0, -1):
        labels[t - 1] = came[t, np.arange(B), labels[t]]
    return [labels[:n, b] for b, n in enumerate(lengths)]


def kmeans(x, k, seed=0, passes=50, minibatch=0):
    """Centroids (k, C) of x (N, C), float32: Lloyd's passes, at most so many, until none changes.

    The start is k-means++. `minibatch` frames at a time, if given, come first: steps on
    random frames, each centroid moving to the mean of what it lately got (Sculley 2010).
    From there few passes are needed, and the start is drawn among fewer frames. A
    centroid that loses all its frames is put on the frame farthest from its own.
    """
    if len(x) < k:
        raise ValueError(
            f"{len(x)} frames are too few for {k} centroids; give more audio or a "
            "smaller --k"
        )
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(len(x), (n,), generator=generator).to(x.device)

    few = 0 < minibatch and SPREAD * k < len(x)
    centroids = plus_plus(x[draw(SPREAD * k)] if few else x, k, generator)

    # `lately`: frames that each centroid is the mean of, older ones forgotten.
    lately = torch.zeros(k, device=x.device)
    steps = range(PREVIEW * len(x) // minibatch if minibatch else 0)
    for _ in runs.Bar(steps, desc="k-means, minibatch", unit="step"):
        part = x[draw(minibatch)]
        sums, counts = gathered(part, nearest(part, centroids), k)
        lately = 0.8 * lately + counts
        change = (sums - counts[:, None] * centroids) / lately.clamp(min=1)[:, None]
        centroids = centroids + change

    label = None
    bar = runs.Bar(
        range(PASSES_AFTER if minibatch else passes), desc="k-means", unit="pass"
    )
    for _ in bar:
        last = label
        label = nearest(x, centroids)
        if last is not None and torch.equal(last, label):
            break
        sums, counts = gathered(x, label, k)
        means = sums / counts[:, None].clamp(min=1)
        centroids = torch.where(counts[:, None] > 0, means, centroids)
        distance = (x - centroids[label]).pow(2).sum(1)
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead):
            centroids[dead] = x[distance.topk(len(dead)).indices]
            label = None
        bar.set_postfix(inertia=f"{distance.mean().item():.4f}", refresh=False)
    return centroids


def plus_plus(x, k, generator):
    """The k-means++ start: k rows of x (N, C).

    Each next one is drawn by its squared distance to those before: the best of a few
    draws.
    """
    centroids = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    distance = (x - centroids).pow(2).sum(1)        # (N,): to the nearest centroid so far
    square = x.pow(2).sum(1)                                        # (N,)
    draws = 2 + int(math.log(k))
    for _ in runs.Bar(range(k - 1), desc="k-means++", unit="centroid"):
        sums = distance.double().cumsum(0)
        drawn = (
            torch.rand(draws, generator=generator, dtype=torch.float64).to(x.device)
            * sums[-1]
        )
        new = x[torch.searchsorted(sums, drawn).clamp(max=len(x) - 1)]  # (draws, C)

        # (N, draws): |x - new|^2, or the distance that there is if it is smaller.
        left = torch.addmm(square[:, None], x, new.T, alpha=-2).add_(new.pow(2).sum(1))
        torch.minimum(left.clamp_(min=0), distance[:, None], out=left)
        best = left.sum(0).argmin()
        centroids = torch.cat([centroids, new[best, None]])
        distance = left[:, best]
    return centroids


def gathered(x, label, k):
    """(the sum of the rows of x, their number) of each of k labels."""
    sums = torch.zeros(k, x.shape[1], device=x.device).index_add_(0, label, x)
    return sums, torch.bincount(label, minlength=k)


# --- units --------------------------------------------------------------------


def collapse(labels):
    """Runs made one: [7, 7, 7, 2, 2, 7] -> units [7, 2, 7], durations [3, 2, 1], in frames."""
    labels = np.asarray(labels, dtype=np.uint16)
    begins = np.ones(len(labels), dtype=bool)
    begins[1:] = labels[1:] != labels[:-1]
    begins[::MOST] = True  # over twenty minutes of one unit, as of silence, are several runs
    starts = np.flatnonzero(begins)
    return labels[starts], np.diff(np.append(starts, len(labels))).astype(np.uint16)


class AudioTokenizer:
    """Samples -> (units, durations), with the codebook of a folder. `recipe` is codebook.json."""

    makes = "units"
    most = math.inf  # seconds of a clip
    lacks_words = False  # they come from the sound

    def __init__(self, folder, device="cpu", hubert=None, dtype=torch.float32):
        folder = Path(folder)
        if not (folder / "codebook.json").exists():
            raise FileNotFoundError(
                f"{folder}: no codebook in it, so it cannot hear; wanted a "
                "folder made by fit, encode, pretrain --units or merge"
            )
        keys = ["features", "k", "frame_rate", "collapse", "switch", "sha256"]
        self.recipe = runs.read_json(folder / "codebook.json", keys)
        if runs.fingerprint(folder / "codebook.safetensors") != self.recipe["sha256"]:
            raise ValueError(
                f"{folder}: codebook.safetensors is not the one codebook.json "
                "describes (its sha256 differs); fit again"
            )
        features = self.recipe["features"]
        kind = features.get("kind") if isinstance(features, dict) else None
        wanted = {"mfcc": set(), "hubert": {"path", "sha256", "layer"}}
        if kind not in wanted or not wanted[kind] <= features.keys():
            raise ValueError(
                f"{folder}/codebook.json: got features {str(features)[:60]}, wanted those of mfcc "
                "or hubert; fit again"
            )
        if hubert and kind != "hubert":
            raise ValueError(f"--hubert {hubert}: {folder} hears without one; leave the flag out")
        features = features | ({"path": hubert} if hubert else {})
        self.features, self.hop = feature_function(
            features, None if hubert else folder, device, dtype
        )
        self.centroids = load_file(folder / "codebook.safetensors")["centroids"].to(device)

    def forget(self):
        """Units are numbers of centroids: nothing is kept of a clip."""

    def __call__(self, samples):
        return self.many([samples])[0]

    def many(self, clips, seconds=40):
        """[(units, durations)] of a list of clips, samples or Recordings.

        They are heard in batches of like length, at most `seconds` of sound in each.
        """
        cuts = [windows(len(clip), self.hop) for clip in clips]
        pieces = [(clip, window) for clip, cut in zip(clips, cuts) for window in cut]
        labels = [None] * len(pieces)
        lengths = [window.end - window.begin for _, window in pieces]
        for batch in batches(lengths, seconds):
            samples = []
            for p in batch:
                clip, window = pieces[p]
                samples.append(clip[window.begin : window.end])
            paths = steady(self.features(samples), self.centroids, self.recipe["switch"])
            for p, path in zip(batch, paths):
                _, window = pieces[p]
                labels[p] = path[window.first : window.first + window.count]

        # The windows of a clip, put together again.
        ends = np.cumsum([len(cut) for cut in cuts])
        return [
            collapse(np.concatenate(labels[end - len(cut) : end]))
            for cut, end in zip(cuts, ends)
        ]


def add_ears(parser):
    """The flags of every command that takes a folder that hears."""
    runs.add_device(parser)
    parser.add_argument(
        "--hubert", help="the HuBERT folder, if it was too big to travel with the model"
    )


# --- fit ----------------------------------------------------------------------


def fit(args):
    """A codebook: the centroids of a corpus' features."""
    recipe = feature_recipe(args)
    features, hop = feature_function(recipe, None, args.device)
    entries = audio.read_manifest(args.manifest)
    if not entries:
        raise ValueError(f"{args.manifest}: empty; wanted at least one clip to fit on")
    with runs.new_folder(
        args.out, [args.hubert], args.overwrite, notes={"audio": audio.identity(entries)}
    ) as out:
        x = sampled_frames(args, entries, features)
        centroids = kmeans(x, args.k, args.seed, minibatch=args.minibatch)

        # The price of a change is counted in mean squared distances.
        inertia = (x - centroids[nearest(x, centroids)]).pow(2).sum(1).mean().item()
        switch = args.switch
        if switch is None:
            switch = STEADY if args.hubert else 0
        tensors = {"centroids": centroids.cpu().contiguous()}
        runs.write_tensors(out / "codebook.safetensors", tensors)
        made = {
            "features": recipe,
            "k": args.k,
            "frame_rate": audio.SAMPLE_RATE // hop,
            "collapse": True,
            "switch": switch * inertia,
            "frames": len(x),
            "sha256": runs.fingerprint(out / "codebook.safetensors"),
        }
        (out / "codebook.json").write_text(json.dumps(made, indent=1) + "\n")
        if args.hubert:
            size = sum(file.stat().st_size for file in Path(args.hubert).rglob("*"))
            if size < SMALL:
                shutil.copytree(args.hubert, out / "hubert")
    hours = len(x) * hop / audio.SAMPLE_RATE / 3600
    print(f"{args.out}: {args.k} centroids from {len(x)} frames ({hours:.2f} h)")


def feature_recipe(args):
    """What `fit` clusters, for codebook.json; a ValueError for flags that make no sense."""
    if (args.features == "hubert") != bool(args.hubert):
        raise ValueError(
            "give --hubert FOLDER --layer N for HuBERT features, or --features mfcc"
        )
    if not args.hubert:
        if args.layer is not None:
            raise ValueError(f"--layer {args.layer}: MFCCs have no layers; leave it out")
        return {"kind": "mfcc"}
    layer = LAYER if args.layer is None else args.layer
    depth = Config.read(args.hubert).num_hidden_layers
    if not 0 <= layer <= depth:
        raise ValueError(f"--layer {layer}: {args.hubert} has layers 0 to {depth}")
    return {
        "kind": "hubert",
        "path": str(Path(args.hubert).resolve()),
        "layer": layer,
        "sha256": runs.fingerprint(args.hubert),
    }


def sampled_frames(args, entries, features):
    """Features (N, C) of clips drawn at random, until there are --frames of them."""
    kept = []
    have = 0
    random.Random(args.seed).shuffle(entries)
    with runs.Bar(total=args.frames, desc="features", unit="frame") as bar:
        # A minute of a clip is sample enough.
        for _, clips in ahead(entries, lambda entry: opening(entry["audio"], args.skip_bad)):
            clips = [clip for clip in clips if len(clip)]
            heard = [None] * len(clips)
            for batch in batches([len(clip) for clip in clips], args.batch):
                for n, x in zip(batch, features([clips[n] for n in batch])):
                    heard[n] = x
            while heard and have < args.frames:
                kept.append(heard.pop(0))
                have += len(kept[-1])
                bar.update(len(kept[-1]))
            if have >= args.frames:
                break
    if not kept:
        raise ValueError(f"{args.manifest}: not one clip of it could be read")
    return torch.cat(kept)


def opening(path, skip_bad):
    """The first samples of a file; none of one that cannot be read, if such are left out."""
    try:
        return audio.load(path, 0, LONG)
    except (ValueError, OSError) as error:
        if not skip_bad:
            raise
        tqdm.write(f"left out: {error}")
        return []


# --- encode -------------------------------------------------------------------


def encode(args):
    """The units of every clip of a corpus; under torchrun, of a stretch of it."""
    entries = audio.read_manifest(args.manifest)
    rank, world = runs.processes()
    args.out = str(Path(args.out))  # without a trailing slash: parts are named after it
    args.identity = audio.identity(entries)
    if world > max(1, len(entries)):
        raise ValueError(
            f"WORLD_SIZE {world} for {len(entries)} clips: wanted no more processes than "
            "clips"
        )
    if world > 1 and args.dtype == "auto" and args.device.startswith("cpu"):
        raise ValueError(
            f"--dtype auto for {world} processes on a CPU: each measures for itself, and they "
            "must agree; give float32 or bfloat16"
        )
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    if rank == 0:
        runs.replaceable(Path(args.out), args.overwrite)
    elif Path(args.out).exists() and not args.overwrite:
        return  # before a stop, the first process has joined all parts
    if world == 1:
        encode_entries(args, entries, args.out)
        return

    parts = [f"{args.out}.part-{r}-of-{world}" for r in range(world)]
    args.device = runs.device_of_rank(args.device, world)
    if not Path(parts[rank]).exists():
        a, b = len(entries) * rank // world, len(entries) * (rank + 1) // world
        encode_entries(args, entries[a:b], parts[rank])
    if rank == 0:
        while not all(Path(part).exists() for part in parts):  # torchrun ends all if one fails
            time.sleep(1)
        join(args, parts)


class Clip(NamedTuple):
    """A clip to encode, or the `error` why it cannot be."""

    samples: object = None                         # (N,), or a Recording where it is long
    silent: bool = False
    clipped: bool = False
    error: str = ""


def read_clip(path, hop):
    """The `Clip` of an audio file."""
    try:
        clip = audio.Recording(path)
        if len(clip) < hop:
            return Clip(error=f"{len(clip)} samples are under one frame ({hop})")
        if len(clip) <= LONG + 2 * AROUND:
            clip = clip[:]  # what is long stays in its file
        if len(clip) < hop:  # its header promised more
            return Clip(error=f"{len(clip)} samples are under one frame ({hop})")
        loudest, clipped = 0.0, 0
        for a in range(0, len(clip), LONG):
            part = abs(clip[a : a + LONG])
            loudest = max(loudest, part.max(initial=0))  # empty, where a header promises more
            clipped += int((part > CLIPPED[0]).sum())
        return Clip(clip, bool(loudest < SILENT), clipped > CLIPPED[1] * len(clip))
    except (ValueError, OSError) as error:
        return Clip(error=str(error))


class Shard:
    """A units folder as it grows. A kill costs at most the clips since the last mark.

    What was written behind the mark is cut off when the run goes on, and encoded again.
    """

    FILES = "units.bin", "durations.bin", "counts.bin", "manifest.jsonl", "skipped.jsonl"
    SCRATCH = "counts.bin", "mark.pt"  # what only a resume needs

    def __init__(self, folder, settings):
        self.mark = runs.Checkpoint(folder / "mark.pt", settings)
        saved = self.mark.read("counts", "sizes")
        none = dict.fromkeys(("done", "skipped", "silent", "clipped", "seconds"), 0)
        self.counts, sizes = saved or (none, dict.fromkeys(self.FILES, 0))
        self.files = {name: runs.reopened(folder / name, sizes[name]) for name in self.FILES}

    def append(self, entry, clip, units, durations):
        self.files["units.bin"].write(units.tobytes())
        self.files["durations.bin"].write(durations.tobytes())
        self.files["counts.bin"].write(np.int64(len(units)).tobytes())
        seconds = len(clip.samples) / audio.SAMPLE_RATE
        line = json.dumps(entry | {"seconds": round(seconds, 3)})
        self.files["manifest.jsonl"].write((line + "\n").encode())
        self.counts["seconds"] += seconds
        self.counts["silent"] += int(clip.silent)
        self.counts["clipped"] += int(clip.clipped)

    def skip(self, entry, error):
        line = json.dumps({"audio": entry["audio"], "why": error})
        self.files["skipped.jsonl"].write((line + "\n").encode())
        self.counts["skipped"] += 1

    def save(self, clips):
        """`clips` more are done, and all of them on the disk."""
        for file in self.files.values():
            runs.settle(file)
        self.counts["done"] += clips
        sizes = {name: file.tell() for name, file in self.files.items()}
        self.mark.write(counts=self.counts, sizes=sizes)

    def close(self):
        for file in self.files.values():
            file.close()


def encode_entries(args, entries, target):
    """Encode some entries of a corpus into a units folder."""
    tokenizer = AudioTokenizer(
        args.codebook, args.device, args.hubert, runs.DTYPES[args.dtype]
    )
    settings = {
        "dtype": args.dtype,
        "audio": args.identity,
        "clips": str(len(entries)),
        "codebook": runs.fingerprint(args.codebook),  # centroids, and the price of a change
    }
    with runs.new_folder(
        target,
        [args.codebook],
        args.overwrite,
        notes={"audio": args.identity, "dtype": args.dtype},
        scratch=Shard.SCRATCH,
    ) as out:
        shard = Shard(out, settings)
        counts = shard.counts
        done = counts["done"]
        heard = counts["seconds"]
        began = time.time()
        if done:
            tqdm.write(f"resuming at clip {done} of {len(entries)}")
        with runs.Bar(
            total=len(entries), initial=done, desc=f"encoding {target}", unit="clip"
        ) as bar:
            decoded = ahead(entries[done:], lambda entry: read_clip(entry["audio"], tokenizer.hop))
            for chunk, clips in decoded:
                encode_chunk(args, tokenizer, shard, chunk, clips)
                speed = (counts["seconds"] - heard) / (time.time() - began)
                bar.set_postfix_str(
                    f"{counts['seconds'] / 3600:.2f} h, {speed:.0f}x real time",
                    refresh=False,
                )
                bar.update(len(chunk))
        shard.close()

        numbers = np.fromfile(out / "counts.bin", dtype=np.int64)
        if not len(numbers) and target == args.out:
            raise ValueError(f"{args.manifest}: not one clip in it could be encoded")
        np.save(out / "index.npy", np.concatenate([[0], numbers.cumsum()]))
        finish(args, tokenizer.recipe, out)
        if not counts["skipped"]:
            (out / "skipped.jsonl").unlink()

    tell(target, counts, numbers)


def tell(target, counts, numbers):
    """Print what a units folder holds. counts: a Shard's; numbers: units of each clip."""
    odd = {
        "skipped": "skipped (skipped.jsonl says why)",
        "silent": "of them silent",
        "clipped": "of them clipped",
    }
    notes = "".join(f", {counts[name]} {what}" for name, what in odd.items() if counts[name])
    rate = numbers.sum() / max(1e-9, counts["seconds"])
    if rate < 1:  # people speak five syllables and more
        tqdm.write(
            f"{target}: under one unit a second, so hardly a word is in them; are the HuBERT, "
            "its codebook and --dtype right?",
            file=sys.stderr,
        )
    print(
        f"{target}: {len(numbers)} clips{notes}, {counts['seconds'] / 3600:.2f} h, "
        f"{numbers.sum()} units, {rate:.1f} a second"
    )


def encode_chunk(args, tokenizer, shard, chunk, clips):
    """Encode some entries, whose clips are decoded, and mark them as done."""
    for n, (entry, clip) in enumerate(zip(chunk, clips)):
        if not clip.error:
            clips[n] = clip._replace(error=audio.wrong_words(entry, len(clip.samples)))
    for entry, clip in zip(chunk, clips):
        if clip.error and not args.skip_bad:
            why = clip.error.removeprefix(entry["audio"]).lstrip(": ")
            raise ValueError(
                f"{entry['audio']}: {why}; take it out of the manifest, or pass "
                "--skip-bad to list such clips in skipped.jsonl and go on"
            )

    good = [(entry, clip) for entry, clip in zip(chunk, clips) if not clip.error]
    heard = tokenizer.many([clip.samples for _, clip in good], args.batch)
    for (entry, clip), (units, durations) in zip(good, heard):
        relative = os.path.relpath(entry["audio"], Path(args.out).resolve())
        shard.append(entry | {"audio": relative}, clip, units, durations)
    for entry, clip in zip(chunk, clips):
        if clip.error:
            shard.skip(entry, clip.error)
    shard.save(len(chunk))


def finish(args, recipe, out):
    """What every units folder holds beside units: the codebook, and how they were made."""
    weights.copy_codebook(args.codebook, out)
    names = "features", "k", "frame_rate", "collapse", "switch"
    meta = {name: recipe[name] for name in names} | {"codebook_sha256": recipe["sha256"]}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def join(args, parts):
    """One units folder of the parts that several processes wrote, in order; then they go."""
    wanted = runs.recipe([args.codebook])["inputs"], args.identity, args.dtype
    for part in parts:
        made = runs.read_json(Path(part) / "recipe.json", ["inputs", "audio", "dtype"])
        if (made["inputs"], made["audio"], made["dtype"]) != wanted:
            raise ValueError(
                f"{part} was made from other audio or another codebook, or in another "
                "dtype; remove it and start again"
            )

    with runs.new_folder(
        args.out, [args.codebook], args.overwrite, notes={"audio": args.identity}
    ) as out:
        for name in ("units.bin", "durations.bin", "manifest.jsonl", "skipped.jsonl"):
            have = [Path(part) / name for part in parts if (Path(part) / name).exists()]
            if have:
                with open(out / name, "wb") as file:
                    for part in have:
                        with open(part, "rb") as source:
                            shutil.copyfileobj(source, file)
        index = np.zeros(1, dtype=np.int64)
        for part in parts:
            index = np.append(index, np.load(Path(part) / "index.npy")[1:] + index[-1])
        if len(index) == 1:
            raise ValueError(f"{args.manifest}: not one clip in it could be encoded")
        np.save(out / "index.npy", index)
        finish(args, runs.read_json(Path(args.codebook) / "codebook.json"), out)
    for part in parts:
        shutil.rmtree(part)
    print(
        f"{args.out}: {len(index) - 1} clips, {index[-1]} units, joined from {len(parts)} parts"
    )


# --- a picture ----------------------------------------------------------------


def draw(args):
    """A picture of how a sound becomes units: its samples, its frames as MFCCs, its units."""
    from matplotlib.figure import Figure

    if Path(args.out).suffix != ".png":
        raise ValueError(f"--out {args.out}: wanted a name that ends in .png")
    runs.may_write(args.out, args.overwrite)
    ears = AudioTokenizer(args.codebook, args.device, args.hubert)
    samples = audio.load(args.audio)
    units, durations = ears(samples)
    seconds = len(samples) / audio.SAMPLE_RATE
    ends = np.cumsum(durations) / ears.recipe["frame_rate"]

    figure = Figure(figsize=(12, 5), layout="tight")
    wave, frames, runs_ = figure.subplots(3, 1, sharex=True, height_ratios=(2, 2, 1))
    wave.plot(
        np.arange(len(samples)) / audio.SAMPLE_RATE, samples, color="0.3", linewidth=0.5
    )
    wave.set(ylabel="samples", yticks=[], xlim=(0, seconds))
    frames.imshow(
        audio.mfcc(samples)[:, : audio.CEPSTRA].T,
        aspect="auto",
        origin="lower",
        cmap="gray",
        extent=(0, seconds, 0, audio.CEPSTRA),
    )
    frames.set(ylabel="frames (MFCC)", yticks=[])

    # A run of one unit is a box; its grey is by turns, its number is what the model reads.
    for n, (unit, end) in enumerate(zip(units, ends)):
        begin = ends[n - 1] if n else 0.0
        runs_.axvspan(begin, end, color="0.8" if n % 2 else "0.92")
        runs_.text(
            (begin + end) / 2,
            0.5,
            str(unit),
            ha="center",
            va="center",
            fontsize=8,
            rotation=90,
        )
    runs_.set(ylabel="units", yticks=[], ylim=(0, 1), xlabel="seconds")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    runs.write_file(args.out, picture.getvalue(), args.overwrite)
    print(
        f"{args.out}: {seconds:.2f} s, {len(samples)} samples, {durations.sum()} frames, "
        f"{len(units)} units"
    )


# --- the command --------------------------------------------------------------


def add_corpus_flags(command, hubert):
    """The flags of `fit` and `encode`: both take a corpus and write a folder."""
    gpu = torch.cuda.is_available()
    add = command.add_argument
    add(
        "--manifest",
        required=True,
        help="a .jsonl manifest, or a LibriSpeech, LJSpeech or plain folder of audio",
    )
    add("--hubert", help=hubert)
    add("--out", required=True, help="folder to write")
    add(
        "--batch",
        type=runs.positive,
        default=150 if gpu else 40,
        help="seconds of sound in a batch "
        "(default 40; on a GPU 150, where the first convolution of a base HuBERT takes 1 GB)",
    )
    runs.add_device(command)
    add("--overwrite", action="store_true", help="replace an existing --out")
    add(
        "--skip-bad",
        action="store_true",
        help="leave out clips that cannot be read, and list them (of encode in skipped.jsonl), "
        "instead of stopping at the first",
    )


def add_fit_flags(command):
    add_corpus_flags(command, "a Hugging Face HuBERT folder")
    add = command.add_argument
    add(
        "--features",
        choices=["hubert", "mfcc"],
        default="hubert",
        help="what is clustered (default hubert)",
    )
    add(
        "--layer",
        type=int,
        help=f"HuBERT layer, the stream after so many blocks (default {LAYER})",
    )
    add("--k", type=runs.number(int, 1, 1 << 16), default=500, help="centroids (default 500)")
    add(
        "--switch",
        type=runs.not_negative,
        help="price of a change of unit, in mean squared distances of a "
        f"frame to its centroid (default {STEADY} for HuBERT features, 0 for MFCC: every frame for "
        "itself)",
    )
    add(
        "--frames",
        type=runs.count,
        default=200_000,
        help="frames to fit on, from clips drawn at random (default 200000: 1.1 h)",
    )
    add(
        "--minibatch",
        type=runs.number(int, 0),
        default=0,
        help="begin k-means with steps on so many frames: "
        "quicker for large --frames (default 0: whole passes only)",
    )
    add("--seed", type=runs.seed, default=0, help="of the clips and the start (default 0)")


def add_encode_flags(command):
    add_corpus_flags(command, "a Hugging Face HuBERT folder (default: beside the codebook)")
    add = command.add_argument
    add("--codebook", required=True, help="a folder made by fit")
    runs.add_dtype(command)


def add_draw_flags(command):
    add = command.add_argument
    add("audio", help="an audio file")
    add("--codebook", required=True, help="a folder made by fit, or any that hears")
    add("--out", required=True, help="a .png to write")
    add_ears(command)
    add("--overwrite", action="store_true", help="replace an existing --out")


def main():
    parser = argparse.ArgumentParser(
        description="Audio to units: fit a codebook, encode a corpus with it, draw a clip's."
    )
    commands = parser.add_subparsers(dest="action", required=True)
    add_fit_flags(
        commands.add_parser("fit", help="k-means centroids of a corpus' features")
    )
    add_encode_flags(
        commands.add_parser("encode", help="the units of every clip of a corpus")
    )
    add_draw_flags(
        commands.add_parser("draw", help="a picture of how a sound becomes units")
    )
    args = parser.parse_args()
    if args.action == "fit":
        fit(args)
    elif args.action == "encode":
        encode(args)
    else:
        draw(args)


if __name__ == "__main__":
    runs.run(main)
