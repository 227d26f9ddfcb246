"""Speech to units: samples -> MFCC or HuBERT features, 50 frames a second -> one of K centroids each -> runs collapsed.

in   a manifest or folder of audio      out  a codebook (fit); units.bin, durations.bin, index.npy, manifest.jsonl, meta.json (encode)
see  HuBERT (arXiv:2106.07447), GSLM (arXiv:2102.01192); k-means++ (Arthur & Vassilvitskii 2007); the mean of a clip is its speaker's
     (arXiv:2108.00917), and a price on every change of unit gives units near phones (arXiv:2012.07551)
run  python tokenize_audio.py fit --manifest out/toy/speech/train.jsonl --features mfcc --k 100 --out out/codebook_mfcc

Every folder that can turn sound into units (codebook, units folder, model that hears) holds codebook.safetensors, codebook.json
and, if its features come from a HuBERT under 50 MB, that HuBERT as hubert/: it needs nothing else.
"""
import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import audio
import weights
from hubert import Hubert

STEADY = 3                          # HuBERT units then change some 15 times a second, near the rate of phones and of letters
SMALL = 50e6                        # bytes: a HuBERT up to this size travels with its codebook


# --- features --------------------------------------------------------------------------------------------------------------

def feature_function(recipe, folder, device):
    """samples (N,) -> float32 tensor (N // 320, width) on `device`, by a recipe {"kind": "mfcc"} or {"kind": "hubert", "path", "layer", "sha256"}."""
    if recipe["kind"] == "mfcc":
        return lambda samples: torch.from_numpy(audio.mfcc(samples)).to(device)
    path = Path(folder) / "hubert" if (Path(folder) / "hubert").exists() else Path(recipe["path"])
    if not path.exists():
        raise FileNotFoundError(f"{path}: the HuBERT of {folder} is not there; pass it with --hubert")
    if weights.fingerprint(path) != recipe["sha256"]:
        raise ValueError(f"{path}: not the HuBERT that {folder} was fitted with (its sha256 differs); pass the right one with --hubert")
    model, layer = Hubert.load(path, device), recipe["layer"]

    @torch.inference_mode()
    def features(samples):
        if len(samples) < audio.HOP:
            return torch.zeros(0, model.config.hidden_size, device=device)
        x = model(torch.from_numpy(samples)[None].to(device), layer)[0]                                       # (T, C)
        return x - x.mean(0)                            # what stays the same through a clip is the voice and the room, not the words
    return features


# --- k-means ---------------------------------------------------------------------------------------------------------------

def nearest(x, centroids):
    """Index of the nearest centroid of each row of x (N, C): |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 changes nothing."""
    return (x @ centroids.T - 0.5 * centroids.pow(2).sum(1)).argmax(1)                                        # (N,)


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


def kmeans(x, k, seed=0, passes=50):
    """Centroids (k, C) of x (N, C), float32: a k-means++ start, then Lloyd's passes until no frame changes its cluster.

    A centroid that loses all its frames is put on the frame farthest from its own.
    """
    if len(x) < k:
        raise ValueError(f"{len(x)} frames are too few for {k} centroids; give more audio or a smaller --k")
    generator = torch.Generator().manual_seed(seed)
    centroids = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
    distance = (x - centroids).pow(2).sum(1)                                # (N,) to the nearest centroid so far
    for _ in tqdm(range(k - 1), desc="k-means++", unit="centroid"):         # the next one: a frame drawn by its distance
        sums = distance.double().cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64).to(x.device) * sums[-1]
        new = x[torch.searchsorted(sums, drawn).clamp(max=len(x) - 1)]
        centroids = torch.cat([centroids, new])
        distance = torch.minimum(distance, (x - new).pow(2).sum(1))
    label = None
    for _ in (bar := tqdm(range(passes), desc="k-means", unit="pass")):
        last, label = label, nearest(x, centroids)
        if last is not None and torch.equal(last, label):
            break
        sums, counts = torch.zeros_like(centroids).index_add_(0, label, x), torch.bincount(label, minlength=k)
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centroids)
        distance = (x - centroids[label]).pow(2).sum(1)
        dead = (counts == 0).nonzero()[:, 0]
        if len(dead):
            centroids[dead] = x[distance.topk(len(dead)).indices]
            label = None
        bar.set_postfix(inertia=f"{distance.mean().item():.4f}")
    return centroids


# --- units -----------------------------------------------------------------------------------------------------------------

def collapse(labels):
    """Runs made one: [7, 7, 7, 2, 2, 7] -> units [7, 2, 7], durations [3, 2, 1], in frames."""
    labels = np.asarray(labels)
    starts = np.flatnonzero(np.concatenate([[True], labels[1:] != labels[:-1]])) if len(labels) else np.zeros(0, dtype=int)
    return labels[starts].astype(np.uint16), np.diff(np.append(starts, len(labels))).astype(np.uint16)


class AudioTokenizer:
    """Samples -> (units, durations), with the codebook and feature recipe of a folder. `recipe` is its codebook.json."""

    def __init__(self, folder, device="cpu", hubert=None):
        folder = Path(folder)
        if not (folder / "codebook.json").exists():
            raise FileNotFoundError(f"{folder}: no codebook in it, so it cannot hear; wanted a folder made by fit, encode, pretrain --units or merge")
        self.recipe = weights.read_json(folder / "codebook.json", ["features", "k", "frame_rate", "collapse", "switch", "sha256"])
        if weights.fingerprint(folder / "codebook.safetensors") != self.recipe["sha256"]:
            raise ValueError(f"{folder}: codebook.safetensors is not the one codebook.json describes (its sha256 differs); fit again")
        features = self.recipe["features"] | ({"path": hubert} if hubert else {})
        self.features = feature_function(features, "." if hubert else folder, device)
        self.centroids = load_file(folder / "codebook.safetensors")["centroids"].to(device)

    def __call__(self, samples):
        return collapse(steady(self.features(samples), self.centroids, self.recipe["switch"]))


# --- commands --------------------------------------------------------------------------------------------------------------

def fit(args):
    if (args.features == "hubert") != bool(args.hubert):
        raise ValueError("give --hubert FOLDER --layer N for HuBERT features, or --features mfcc")
    if args.switch is not None and not 0 <= args.switch < float("inf"):
        raise ValueError(f"--switch {args.switch}: wanted 0 or more")
    if not 1 <= args.k <= 1 << 16:
        raise ValueError(f"--k {args.k}: wanted 1 to {1 << 16}, what a uint16 in units.bin can name")
    recipe = {"kind": "mfcc"}
    if args.hubert:
        recipe = {"kind": "hubert", "path": str(Path(args.hubert).resolve()), "layer": args.layer, "sha256": weights.fingerprint(args.hubert)}
        depth = weights.read_json(Path(args.hubert) / "config.json")["num_hidden_layers"]
        if not 0 <= args.layer <= depth:
            raise ValueError(f"--layer {args.layer}: {args.hubert} has layers 0 to {depth}")
    features, rows, kept = feature_function(recipe, "", args.device), audio.read_manifest(args.manifest), []
    with weights.new_folder(args.out, [args.manifest, args.hubert], args.overwrite) as out:
        rng, have = random.Random(args.seed), 0
        rng.shuffle(rows)                                                   # enough frames may come before the list ends: take any clips
        with tqdm(total=args.frames, desc="features", unit="frame") as bar:
            for row in rows:
                kept.append(features(audio.load(row["audio"])))
                have += len(kept[-1])
                bar.update(len(kept[-1]))
                if have >= args.frames:
                    break
        x = torch.cat(kept)
        centroids = kmeans(x, args.k, args.seed)
        inertia = (x - centroids[nearest(x, centroids)]).pow(2).sum(1).mean().item()
        switch = (STEADY if args.hubert else 0) if args.switch is None else args.switch
        save_file({"centroids": centroids.cpu().contiguous()}, out / "codebook.safetensors")
        made = {"features": recipe, "k": args.k, "frame_rate": audio.FRAME_RATE, "collapse": True,
                "switch": switch * inertia, "frames": have, "sha256": weights.fingerprint(out / "codebook.safetensors")}
        (out / "codebook.json").write_text(json.dumps(made, indent=1) + "\n")
        if args.hubert and sum(f.stat().st_size for f in Path(args.hubert).rglob("*")) < SMALL:
            shutil.copytree(args.hubert, out / "hubert")
    print(f"{args.out}: {args.k} centroids from {have} frames ({have / audio.FRAME_RATE / 3600:.2f} h)")


def encode(args):
    tokenizer = AudioTokenizer(args.codebook, args.device, args.hubert)
    rows, offsets, heard, began = audio.read_manifest(args.manifest), [0], 0.0, time.time()
    with weights.new_folder(args.out, [args.manifest, args.codebook], args.overwrite) as out:
        with open(out / "units.bin", "wb") as units_file, open(out / "durations.bin", "wb") as durations_file, open(out / "manifest.jsonl", "w") as manifest:
            for row in (bar := tqdm(rows, desc="encoding", unit="clip")):
                samples = audio.load(row["audio"])
                units, durations = tokenizer(samples)
                if not len(units):
                    raise ValueError(f"{row['audio']}: {len(samples)} samples are under one frame ({audio.HOP}); take it out of the manifest")
                units_file.write(units.tobytes())
                durations_file.write(durations.tobytes())
                offsets.append(offsets[-1] + len(units))
                relative = os.path.relpath(row["audio"], Path(args.out).resolve())
                manifest.write(json.dumps(row | {"audio": relative, "seconds": round(len(samples) / audio.SAMPLE_RATE, 3)}) + "\n")
                heard += len(samples) / audio.SAMPLE_RATE
                bar.set_postfix_str(f"{heard / 3600:.2f} h, {heard / (time.time() - began):.0f}x real time")
        np.save(out / "index.npy", np.array(offsets, dtype=np.int64))
        weights.copy_ears(args.codebook, out)
        meta = {name: tokenizer.recipe[name] for name in ("features", "k", "frame_rate", "collapse", "switch")} | {"codebook_sha256": tokenizer.recipe["sha256"]}
        (out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(f"{args.out}: {len(rows)} clips, {heard / 3600:.2f} h, {offsets[-1]} units, {offsets[-1] / heard:.1f} a second")


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
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default: cuda if there is one)")
        command.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    one.add_argument("--features", choices=["hubert", "mfcc"], default="hubert", help="what is clustered (default hubert)")
    one.add_argument("--layer", type=int, default=9, help="HuBERT layer: 9 is the stream after nine blocks (default 9)")
    one.add_argument("--k", type=int, default=500, help="centroids (default 500)")
    one.add_argument("--switch", type=float, help="price of a change of unit, in mean squared distances of a frame to its centroid "
                                                  f"(default {STEADY} for HuBERT features, 0 for MFCC: every frame for itself)")
    one.add_argument("--frames", type=int, default=200_000, help="frames to fit on, from clips drawn at random (default 200000: 1.1 h)")
    one.add_argument("--seed", type=int, default=0, help="of the clips and the start (default 0)")
    two.add_argument("--codebook", required=True, help="a folder made by fit")
    three = commands.add_parser("report", help="used units, perplexity, rate, and how alike a word is across voices")
    three.add_argument("--units", required=True, help="a folder made by encode")
    args = parser.parse_args()
    {"fit": fit, "encode": encode, "report": report}[args.action](args)


if __name__ == "__main__":
    weights.run(main)
