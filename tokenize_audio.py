"""Speech to units: samples -> MFCC or HuBERT features, 50 frames a second -> one of K centroids each -> runs collapsed.

in   a manifest or folder of audio      out  a codebook (fit); units.bin, durations.bin, index.npy, manifest.jsonl, meta.json (encode)
see  HuBERT (arXiv:2106.07447), GSLM (arXiv:2102.01192); k-means++ (Arthur & Vassilvitskii 2007); the mean of a clip is its speaker's
     (arXiv:2108.00917), and a price on every change of unit gives units near phones (arXiv:2012.07551)
run  python tokenize_audio.py fit --manifest out/toy/speech/train.jsonl --features mfcc --k 100 --out out/codebook_mfcc

`encode` goes on behind its last mark when started again, and in several processes under torchrun (`torchrun --nproc-per-node 8
tokenize_audio.py encode ...`): each takes its stretch of the list, and the first joins them.

Every folder that can turn sound into units (codebook, units folder, model that hears) holds codebook.safetensors, codebook.json
and, if its features come from a HuBERT under 50 MB, that HuBERT as hubert/: it needs nothing else.
"""
import argparse
import hashlib
import json
import math
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import audio
import weights
from hubert import Config, Hubert

PREVIEW, PASSES_AFTER, SPREAD = 1, 20, 200    # k-means with --minibatch: passes' worth of steps, whole passes after them, frames a centroid for the start
ROWS = 2048                         # frames compared with all centroids at a time
STEADY = 3                          # HuBERT units then change some 15 times a second, near the rate of phones and of letters
LONG, AROUND = 60 * audio.SAMPLE_RATE, 2 * audio.SAMPLE_RATE      # a longer clip is heard in windows of a minute, two seconds more on each side
AHEAD = 64                          # clips decoded while the ones before are encoded; what a kill can cost
MOST = 65_535                       # frames of a run: what durations.bin can hold
SILENT = 1e-4                       # a clip that never gets louder than -80 dB
SMALL = 50e6                        # bytes: a HuBERT up to this size travels with its codebook


# --- features --------------------------------------------------------------------------------------------------------------

def feature_function(recipe, folder, device, dtype=torch.float32):
    """(features, hop) by a recipe {"kind": "mfcc"} or {"kind": "hubert", "path", "layer", "sha256"}: features turns a list of clips,
    samples (N,) each, into float32 tensors (N // hop, width) on `device`; a clip gives in any list what it gives alone. A HuBERT is taken from
    folder/hubert, if a folder is given and has one."""
    if recipe["kind"] == "mfcc":
        return lambda clips: [torch.from_numpy(audio.mfcc(samples)).to(device) for samples in clips], audio.HOP
    path = Path(folder, "hubert") if folder and Path(folder, "hubert").exists() else Path(recipe["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path}: the HuBERT of these units is not there; pass it with --hubert")
    if weights.fingerprint(path) != recipe["sha256"]:
        raise ValueError(f"{path}: not the HuBERT that these units come from (its sha256 differs); pass the right one with --hubert")
    model, layer = Hubert.load(path, device), recipe["layer"]
    hop = model.hop()

    @torch.inference_mode()
    def features(clips):
        lengths = torch.tensor([len(samples) for samples in clips], device=device)
        if int(lengths.max()) < hop:
            return [torch.zeros(0, model.config.hidden_size, device=device) for _ in clips]
        x = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(samples) for samples in clips], batch_first=True).to(device)      # (B, N)
        with runs.autocast(device, dtype):
            x = model(x, layer, lengths=lengths if len(set(map(len, clips))) > 1 else None).float()                          # (B, T, C)
        each = [row[:n // hop] for row, n in zip(x, lengths.tolist())]
        return [row - row.mean(0) if len(row) else row for row in each]     # what stays the same through a clip is the voice and the room, not the words
    return features, hop


def windows(n, hop):
    """[(where to begin and where to end in n samples, the first frame there that counts, how many do)]: the clip itself, or, if it is long,
    windows that overlap, so that memory has a bound and every frame that counts has its surroundings."""
    if n <= LONG + 2 * AROUND:
        return [(0, n, 0, n // hop)]
    cut = []
    for a in range(0, n, LONG):
        low, b = max(0, a - AROUND), min(a + LONG, n)
        cut.append((low, min(b + AROUND, n), (a - low) // hop, b // hop - a // hop))
    return cut


def batches(lengths, seconds):
    """Indices of `lengths` (samples) in groups of like length, the longest first, at most `seconds` of sound in each, padding included."""
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    while waiting:
        fit = max(1, int(seconds * audio.SAMPLE_RATE) // max(1, lengths[waiting[-1]]))
        yield [waiting.pop() for _ in range(min(len(waiting), fit))]


def ahead(rows, decode):
    """(rows, what decode makes of each), AHEAD of them at a time; threads decode the next ones meanwhile."""
    chunks, ready, pool = [rows[a:a + AHEAD] for a in range(0, len(rows), AHEAD)], (), ThreadPoolExecutor(4)
    try:
        for n in range(-1, len(chunks)):
            done, ready = list(ready), pool.map(decode, chunks[n + 1]) if n + 1 < len(chunks) else ()
            if n >= 0:
                yield chunks[n], done
    finally:
        pool.shutdown(cancel_futures=True)                                 # whoever stops early waits for no clip that was not begun


# --- k-means ---------------------------------------------------------------------------------------------------------------

def nearest(x, centroids):
    """Index of the nearest centroid of each row of x (N, C): |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 changes nothing.
    Some thousand rows at a time: their products with all centroids stay in a cache."""
    half = 0.5 * centroids.pow(2).sum(1)
    return torch.cat([torch.addmm(-half, part, centroids.T).argmax(1) for part in x.split(ROWS if x.device.type == "cpu" else 1 << 20)])      # (N,)


def steady(x, centroids, switch):
    """Labels (T,) int64 of frames x (T, C): the path through the centroids with the least sum of squared distances plus `switch`
    for every change of label (Viterbi's algorithm; as a change costs the same wherever it leads, a step looks at K states, not K * K).

    switch = 0 is the nearest centroid of each frame. In between, a stray frame is not worth two changes: fewer, longer units.
    """
    if switch == 0 or not len(x):
        return nearest(x, centroids).cpu().numpy()
    distance = (x.pow(2).sum(1, keepdim=True) - 2 * (x @ centroids.T) + centroids.pow(2).sum(1)).cpu().numpy()      # (T, K)
    T, k = distance.shape
    cost, came = distance[0].copy(), np.empty((T, k), dtype=np.int32)      # cost of the best path that ends in each label; where it came from
    for t in range(1, T):
        best = cost.argmin()
        came[t] = np.where(cost <= cost[best] + switch, np.arange(k), best)
        cost = np.minimum(cost, cost[best] + switch) + distance[t]
    labels = np.empty(T, dtype=np.int64)
    labels[-1] = cost.argmin()
    for t in range(T - 1, 0, -1):
        labels[t - 1] = came[t, labels[t]]
    return labels


def kmeans(x, k, seed=0, passes=50, minibatch=0):
    """Centroids (k, C) of x (N, C), float32: a k-means++ start, then Lloyd's passes until no frame changes its cluster.

    `minibatch` frames at a time, if given, come first: PREVIEW passes' worth of steps on random frames, each centroid moving to the mean of
    what it lately got (Sculley 2010); from there few passes are needed, and the start is drawn among as many frames as SPREAD a centroid.
    A centroid that loses all its frames is put on the frame farthest from its own.
    """
    if len(x) < k:
        raise ValueError(f"{len(x)} frames are too few for {k} centroids; give more audio or a smaller --k")
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(len(x), (n,), generator=generator).to(x.device)
    centroids = plus_plus(x[draw(SPREAD * k)] if 0 < minibatch and SPREAD * k < len(x) else x, k, generator)
    lately = torch.zeros(k, device=x.device)                                # frames that each centroid is the mean of, older ones forgotten
    for _ in runs.Bar(range(PREVIEW * len(x) // minibatch if minibatch else 0), desc="k-means, minibatch", unit="step"):
        part = x[draw(minibatch)]
        sums, counts = gathered(part, nearest(part, centroids), k)
        lately = 0.8 * lately + counts
        centroids = centroids + (sums - counts[:, None] * centroids) / lately.clamp(min=1)[:, None]
    label = None
    for _ in (bar := runs.Bar(range(PASSES_AFTER if minibatch else passes), desc="k-means", unit="pass")):
        last, label = label, nearest(x, centroids)
        if last is not None and torch.equal(last, label):
            break
        sums, counts = gathered(x, label, k)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
        distance = (x - centroids[label]).pow(2).sum(1)
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead):
            centroids[dead] = x[distance.topk(len(dead)).indices]
            label = None
        bar.set_postfix(inertia=f"{distance.mean().item():.4f}", refresh=False)
    return centroids


def plus_plus(x, k, generator):
    """k rows of x (N, C), the k-means++ start: each next one drawn by its squared distance to those before, the best of a few draws."""
    centroids = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    distance, square = (x - centroids).pow(2).sum(1), x.pow(2).sum(1)       # (N,) to the nearest centroid so far; of each row
    for _ in runs.Bar(range(k - 1), desc="k-means++", unit="centroid"):
        sums = distance.double().cumsum(0)
        drawn = torch.rand(2 + int(math.log(k)), generator=generator, dtype=torch.float64).to(x.device) * sums[-1]
        new = x[torch.searchsorted(sums, drawn).clamp(max=len(x) - 1)]      # (draws, C)
        left = torch.addmm(square[:, None], x, new.T, alpha=-2).add_(new.pow(2).sum(1)).clamp_(min=0)          # (N, draws): |x - new|^2
        torch.minimum(left, distance[:, None], out=left)
        best = left.sum(0).argmin()
        centroids, distance = torch.cat([centroids, new[best, None]]), left[:, best]
    return centroids


def gathered(x, label, k):
    """(sum of the rows of x, their number) of each of k labels."""
    return torch.zeros(k, x.shape[1], device=x.device).index_add_(0, label, x), torch.bincount(label, minlength=k)


# --- units -----------------------------------------------------------------------------------------------------------------

def collapse(labels):
    """Runs made one: [7, 7, 7, 2, 2, 7] -> units [7, 2, 7], durations [3, 2, 1], in frames."""
    labels = np.asarray(labels)
    starts = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])) if len(labels) else np.zeros(0, dtype=int)
    lengths = np.diff(np.append(starts, len(labels)))
    if len(labels) and lengths.max() > MOST:                               # over twenty minutes of one unit, as digital silence gives: several runs of it
        starts = np.concatenate([np.arange(a, a + n, MOST) for a, n in zip(starts, lengths)])
    return labels[starts].astype(np.uint16), np.diff(np.append(starts, len(labels))).astype(np.uint16)


class AudioTokenizer:
    """Samples -> (units, durations), with the codebook and feature recipe of a folder. `recipe` is its codebook.json."""

    def __init__(self, folder, device="cpu", hubert=None, dtype=torch.float32):
        folder = Path(folder)
        if not (folder / "codebook.json").exists():
            raise FileNotFoundError(f"{folder}: no codebook in it, so it cannot hear; wanted a folder made by fit, encode, pretrain --units or merge")
        self.recipe = weights.read_json(folder / "codebook.json", ["features", "k", "frame_rate", "collapse", "switch", "sha256"])
        if weights.fingerprint(folder / "codebook.safetensors") != self.recipe["sha256"]:
            raise ValueError(f"{folder}: codebook.safetensors is not the one codebook.json describes (its sha256 differs); fit again")
        features = self.recipe["features"] | ({"path": hubert} if hubert else {})
        self.features, self.hop = feature_function(features, None if hubert else folder, device, dtype)
        self.centroids = load_file(folder / "codebook.safetensors")["centroids"].to(device)

    def __call__(self, samples):
        return self.many([samples])[0]

    def many(self, clips, seconds=40):
        """[(units, durations)] of a list of clips, samples or Recordings, heard in batches of like length, at most `seconds` of sound in each."""
        pieces = [(n, *window) for n, clip in enumerate(clips) for window in windows(len(clip), self.hop)]
        labels = [None] * len(pieces)
        for batch in batches([b - a for _, a, b, _, _ in pieces], seconds):
            heard = self.features([clips[n][a:b] for n, a, b, _, _ in map(pieces.__getitem__, batch)])
            for p, x in zip(batch, heard):
                *_, first, count = pieces[p]
                labels[p] = steady(x, self.centroids, self.recipe["switch"])[first:first + count]
        return [collapse(np.concatenate([labels[p] for p, piece in enumerate(pieces) if piece[0] == n])) for n in range(len(clips))]


# --- commands --------------------------------------------------------------------------------------------------------------

def fit(args):
    if (args.features == "hubert") != bool(args.hubert):
        raise ValueError("give --hubert FOLDER --layer N for HuBERT features, or --features mfcc")
    if args.switch is not None and not 0 <= args.switch < float("inf"):
        raise ValueError(f"--switch {args.switch}: wanted 0 or more")
    if args.minibatch < 0 or args.frames < 1:
        raise ValueError(f"--minibatch {args.minibatch} --frames {args.frames}: wanted 0 or more for the first, 1 or more for the second")
    if not 1 <= args.k <= 1 << 16:
        raise ValueError(f"--k {args.k}: wanted 1 to {1 << 16}, what a uint16 in units.bin can name")
    recipe = {"kind": "mfcc"}
    if args.hubert:
        recipe = {"kind": "hubert", "path": str(Path(args.hubert).resolve()), "layer": args.layer, "sha256": weights.fingerprint(args.hubert)}
        depth = Config.read(args.hubert).num_hidden_layers
        if not 0 <= args.layer <= depth:
            raise ValueError(f"--layer {args.layer}: {args.hubert} has layers 0 to {depth}")
    (features, hop), rows, kept = feature_function(recipe, None, args.device), audio.read_manifest(args.manifest), []
    if not rows:
        raise ValueError(f"{args.manifest}: empty; wanted at least one clip to fit on")
    with weights.new_folder(args.out, [args.hubert], args.overwrite, notes={"audio": identity(rows)}) as out:
        rng, have = random.Random(args.seed), 0
        rng.shuffle(rows)                                                   # enough frames may come before the list ends: take any clips
        with runs.Bar(total=args.frames, desc="features", unit="frame") as bar:
            for _, clips in ahead(rows, lambda row: audio.load(row["audio"], 0, LONG)):      # a minute of a clip is sample enough
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
        x = torch.cat(kept)
        centroids = kmeans(x, args.k, args.seed, minibatch=args.minibatch)
        inertia = (x - centroids[nearest(x, centroids)]).pow(2).sum(1).mean().item()
        switch = (STEADY if args.hubert else 0) if args.switch is None else args.switch
        save_file({"centroids": centroids.cpu().contiguous()}, out / "codebook.safetensors")
        made = {"features": recipe, "k": args.k, "frame_rate": audio.SAMPLE_RATE // hop, "collapse": True,
                "switch": switch * inertia, "frames": have, "sha256": weights.fingerprint(out / "codebook.safetensors")}
        (out / "codebook.json").write_text(json.dumps(made, indent=1) + "\n")
        if args.hubert and sum(f.stat().st_size for f in Path(args.hubert).rglob("*")) < SMALL:
            shutil.copytree(args.hubert, out / "hubert")
    print(f"{args.out}: {args.k} centroids from {have} frames ({have * hop / audio.SAMPLE_RATE / 3600:.2f} h)")


def identity(rows):
    """A hash of which clips a corpus has and how long their files are. Their content would take hours to read."""
    sizes = [os.path.getsize(row["audio"]) if os.path.exists(row["audio"]) else -1 for row in rows]
    return hashlib.sha256(json.dumps([rows, sizes]).encode()).hexdigest()


def encode(args):
    rows, (rank, world) = audio.read_manifest(args.manifest), weights.processes()
    args.out, args.identity = str(Path(args.out)), identity(rows)          # without a trailing slash: names of parts are made from it
    args.dtype = runs.name_of(runs.arithmetic(args.dtype, args.device))
    if world > max(1, len(rows)):
        raise ValueError(f"WORLD_SIZE {world} for {len(rows)} clips: wanted no more processes than clips")
    if rank == 0:
        weights.replaceable(Path(args.out), args.overwrite)
    elif Path(args.out).exists() and not args.overwrite:                   # all was encoded before a stop, and the first process has joined it
        return
    if world == 1:
        encode_rows(args, rows, args.out)
        return
    parts = [f"{args.out}.part-{r}-of-{world}" for r in range(world)]
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not Path(parts[rank]).exists():
        encode_rows(args, rows[len(rows) * rank // world:len(rows) * (rank + 1) // world], parts[rank])
    if rank == 0:
        while not all(Path(part).exists() for part in parts):               # torchrun ends all processes if one fails
            time.sleep(1)
        join(args, parts)


def encode_rows(args, rows, target):
    """Encode some rows into a units folder. A kill costs at most the clips since the last mark; the same command goes on behind it."""
    tokenizer = AudioTokenizer(args.codebook, args.device, args.hubert, runs.DTYPES[args.dtype])
    made_with = {"dtype": args.dtype, "audio": args.identity, "codebook": tokenizer.recipe["sha256"], "rows": len(rows)}
    files = ("units.bin", "durations.bin", "counts.bin", "manifest.jsonl", "skipped.jsonl")
    scratch = ["counts.bin", "mark.json"]                                  # what a resume needs
    with weights.new_folder(target, [args.codebook], args.overwrite, resume=True, notes={"audio": args.identity}, scratch=scratch) as out:
        mark = {"done": 0, "seconds": 0.0, "skipped": 0, "silent": 0, "clipped": 0, "sizes": dict.fromkeys(files, 0), "made_with": made_with}
        if (out / "mark.json").exists():
            mark = weights.read_json(out / "mark.json", list(mark))
            if mark["made_with"] != made_with:
                raise ValueError(f"{out} holds a run on other audio or another codebook; give what it was started with, or remove that folder")
            tqdm.write(f"resuming at clip {mark['done']} of {len(rows)}")
        open_ = {name: marked(out / name, mark["sizes"][name]) for name in files}
        began, before = time.time(), mark["seconds"]

        def decode(row):
            """(clip, is it silent, is it clipped), or the reason why it cannot be encoded. What is long stays in its file."""
            try:
                clip = audio.Recording(row["audio"])
                if len(clip) < tokenizer.hop:
                    return f"{len(clip)} samples are under one frame ({tokenizer.hop})"
                clip = clip if len(clip) > LONG + 2 * AROUND else clip[:]
                loudest, clipped = zip(*[(part.max(), (part > 0.999).sum()) for part in (abs(clip[a:a + LONG]) for a in range(0, len(clip), LONG))])
                return clip, max(loudest) < SILENT, sum(clipped) > 0.001 * len(clip)
            except (ValueError, OSError) as error:
                return str(error)

        with runs.Bar(total=len(rows), initial=mark["done"], desc=f"encoding {target}", unit="clip") as bar:
            for chunk, clips in ahead(rows[mark["done"]:], decode):
                for row, clip in zip(chunk, clips):
                    if isinstance(clip, str) and not args.skip_bad:
                        raise ValueError(f"{row['audio']}: {clip.removeprefix(row['audio']).lstrip(': ')}; take it out of the manifest, or pass --skip-bad to list such "
                                         f"clips in skipped.jsonl and go on")
                good = [(row, *clip) for row, clip in zip(chunk, clips) if not isinstance(clip, str)]
                for (row, clip, silent, clipped), (units, durations) in zip(good, tokenizer.many([clip for _, clip, *_ in good], args.batch)):
                    open_["units.bin"].write(units.tobytes())
                    open_["durations.bin"].write(durations.tobytes())
                    open_["counts.bin"].write(np.int64(len(units)).tobytes())
                    relative = os.path.relpath(row["audio"], Path(args.out).resolve())
                    open_["manifest.jsonl"].write((json.dumps(row | {"audio": relative, "seconds": round(len(clip) / audio.SAMPLE_RATE, 3)}) + "\n").encode())
                    mark["seconds"] += len(clip) / audio.SAMPLE_RATE
                    mark["silent"] += int(silent)
                    mark["clipped"] += int(clipped)
                for row, clip in zip(chunk, clips):
                    if isinstance(clip, str):
                        open_["skipped.jsonl"].write((json.dumps({"audio": row["audio"], "why": clip}) + "\n").encode())
                        mark["skipped"] += 1
                for name, file in open_.items():
                    weights.settle(file)
                    mark["sizes"][name] = file.tell()
                mark["done"] += len(chunk)
                weights.write_file(out / "mark.json", json.dumps(mark), overwrite=True)
                bar.set_postfix_str(f"{mark['seconds'] / 3600:.2f} h, {(mark['seconds'] - before) / (time.time() - began):.0f}x real time", refresh=False)
                bar.update(len(chunk))
        for file in open_.values():
            file.close()
        counts = np.fromfile(out / "counts.bin", dtype=np.int64)
        if not len(counts) and target == args.out:
            raise ValueError(f"{args.manifest}: not one clip in it could be encoded")
        np.save(out / "index.npy", np.concatenate([[0], counts.cumsum()]))
        finish(args, tokenizer.recipe, out)
        if not mark["skipped"]:
            (out / "skipped.jsonl").unlink()
    odd = {"skipped": " skipped (skipped.jsonl says why)", "silent": " of them silent", "clipped": " of them clipped"}
    said = "".join(f", {mark[name]}{what}" for name, what in odd.items() if mark[name])
    print(f"{target}: {len(counts)} clips{said}, {mark['seconds'] / 3600:.2f} h, {counts.sum()} units, {counts.sum() / max(1e-9, mark['seconds']):.1f} a second")


def marked(path, size):
    """A file open behind the bytes that a mark vouches for; what was written behind them is encoded again."""
    path.touch()
    if path.stat().st_size < size:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, its mark says {size}; the disk has lost some. Remove {path.parent} to start anew")
    file = open(path, "r+b")
    file.truncate(size)
    file.seek(size)
    return file


def finish(args, recipe, out):
    """What every units folder holds beside its units: the codebook, and how they were made."""
    weights.copy_ears(args.codebook, out)
    meta = {name: recipe[name] for name in ("features", "k", "frame_rate", "collapse", "switch")} | {"codebook_sha256": recipe["sha256"]}
    (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


def join(args, parts):
    """One units folder of the parts that several processes wrote, in their order; then the parts go."""
    wanted = weights.recipe([args.codebook])["inputs"], args.identity
    for part in parts:
        made = weights.read_json(Path(part) / "recipe.json", ["inputs", "audio"])
        if (made["inputs"], made["audio"]) != wanted:
            raise ValueError(f"{part} was made from other audio or another codebook; remove it and start again")
    with weights.new_folder(args.out, [args.codebook], args.overwrite, notes={"audio": args.identity}) as out:
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
        finish(args, weights.read_json(Path(args.codebook) / "codebook.json"), out)
    for part in parts:
        shutil.rmtree(part)
    print(f"{args.out}: {len(index) - 1} clips, {index[-1]} units, joined from {len(parts)} parts")


def edit_distance(a, b):
    """Least insertions, deletions and substitutions from sequence a to b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def report(args):
    corpus, rng = audio.Units(args.units), random.Random(0)
    counts = np.bincount(corpus.units, weights=corpus.durations, minlength=corpus.meta["k"])
    p = counts[counts > 0] / counts.sum()
    seconds = corpus.durations.sum() / corpus.meta["frame_rate"]
    said = {"clips": len(corpus.rows), "hours": round(float(seconds) / 3600, 3), "units_used": int((counts > 0).sum()), "of": corpus.meta["k"],
            "perplexity": round(float(np.exp(-(p * np.log(p)).sum())), 1), "units_per_second": round(float(len(corpus.units) / seconds), 2),
            "frames_per_run": round(float(corpus.durations.mean()), 2)}
    words = {}                                                              # word -> [(speaker, its units)]
    for i, row in enumerate(corpus.rows):
        for word, begin, end in row.get("words") or []:
            units = audio.between(*corpus[i], begin, end, corpus.meta["frame_rate"])
            if len(word) > 3 and len(units):
                words.setdefault(word.strip(".").lower(), []).append((row.get("speaker"), units))
    same, other = [], []
    for word in sorted(words):
        for _ in range(20):
            (speaker, a), (another, b) = rng.choice(words[word]), rng.choice(words[word])
            _, c = rng.choice(words[rng.choice([w for w in sorted(words) if w != word] or [word])])
            if speaker != another:
                same.append(edit_distance(a, b) / max(len(a), len(b)))
                other.append(edit_distance(a, c) / max(len(a), len(c)))
    if same:
        said |= {"distance_same_word_other_voice": round(float(np.mean(same)), 3), "distance_other_word": round(float(np.mean(other)), 3)}
    print(json.dumps(said, indent=1))


def main():
    parser = argparse.ArgumentParser(description="Audio to units: fit a codebook, encode a corpus with it, report on the units.")
    commands = parser.add_subparsers(dest="action", required=True)
    one = commands.add_parser("fit", help="k-means centroids of a corpus' features")
    two = commands.add_parser("encode", help="the units of every clip of a corpus")
    for command in (one, two):
        command.add_argument("--manifest", required=True, help="a .jsonl manifest, or a LibriSpeech, LJSpeech or plain folder of audio")
        command.add_argument("--hubert", help="a Hugging Face HuBERT folder" + (" (default: the one beside the codebook)" if command is two else ""))
        command.add_argument("--out", required=True, help="folder to write")
        command.add_argument("--batch", type=float, default=600 if torch.cuda.is_available() else 40, help="seconds of sound in a batch (default 40, on a GPU 600)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
        command.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    one.add_argument("--features", choices=["hubert", "mfcc"], default="hubert", help="what is clustered (default hubert)")
    one.add_argument("--layer", type=int, default=9, help="HuBERT layer: 9 is the stream after nine blocks (default 9)")
    one.add_argument("--k", type=int, default=500, help="centroids (default 500)")
    one.add_argument("--switch", type=float, help="price of a change of unit, in mean squared distances of a frame to its centroid "
                                                  f"(default {STEADY} for HuBERT features, 0 for MFCC: every frame for itself)")
    one.add_argument("--frames", type=int, default=200_000, help="frames to fit on, from clips drawn at random (default 200000: 1.1 h)")
    one.add_argument("--minibatch", type=int, default=0, help="begin k-means with steps on so many frames: quicker for large --frames (default 0: whole passes only)")
    one.add_argument("--seed", type=int, default=0, help="of the clips and the start (default 0)")
    two.add_argument("--codebook", required=True, help="a folder made by fit")
    runs.add_dtype(two)
    two.add_argument("--skip-bad", action="store_true", help="list clips that cannot be read in skipped.jsonl and go on, instead of stopping at the first")
    three = commands.add_parser("report", help="used units, perplexity, rate, and how alike a word is across voices")
    three.add_argument("--units", required=True, help="a folder made by encode")
    args = parser.parse_args()
    if args.action != "report" and not 0 < args.batch < math.inf:
        parser.error(f"--batch {args.batch}: wanted more than 0 seconds")
    {"fit": fit, "encode": encode, "report": report}[args.action](args)


if __name__ == "__main__":
    weights.run(main)
