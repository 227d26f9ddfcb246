"""The idea: merged = base + lam * (speech - base) + mu * (instruct - base). Hearing plus behaviour, added, never trained together.

in   three model folders: base, speech (from that base), instruct (from that base)      out  a model folder that hears and answers
see  SpeechCombine (ICML 2026); Task Arithmetic (arXiv:2212.04089); Chat Vector (arXiv:2310.04799)
run  python merge.py --base out/base --instruct out/instruct --speech out/speech --out out/merged

RULES says which row gets what. Rounded step by step in bf16, (speech + instruct) - base would lose 14 % of a delta of relative size
0.02; so blocks of all three are read, added in float64, rounded once and written, in as many threads as there are cores.
"""
import argparse
import io
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import runs  # before torch: it sets how OpenMP waits
import torch

import weights
from vocab import CHATS, Vocab

RULES = {
    "shared": "every tensor, and every row that base has: base + lam * (speech - base) + mu * (instruct - base), in float64, rounded once to speech's dtype",
    "chat markers": "their rows are instruct's: speech training never saw them",
    "new rows": "units and speech markers are speech's: there is nothing to add",
}
BLOCK, CACHE = 1 << 20, 1 << 17     # elements read and written at a time, and added at a time: small enough for a cache, large enough that threads rarely meet
ROWS = ("model.embed_tokens.weight", "lm_head.weight")      # tensors whose rows are tokens
SUMS = ("base", "speech", "instruct", "product", "against", "n")     # of a tensor: squared norms of base and both deltas, their dot product, signs that differ, size


def add(base, speech, instruct, lam, mu=1.0):
    """(the formula on three flat tensors of one length, in float64, rounded to speech's dtype; their SUMS).

    Where one side has learnt nothing and the other is wholly taken, the result is that other side, to the bit.
    """
    out, sums, wide = torch.empty_like(speech), np.zeros(len(SUMS)), torch.empty(4, CACHE, dtype=torch.float64)
    for a in range(0, len(out), CACHE):
        n = min(CACHE, len(out) - a)
        b, s, i, product = wide[:, :n]                                      # the same memory each time: fresh pages cost more than the sums
        for to, given in ((b, base), (s, speech), (i, instruct)):
            to.copy_(given[a:a + n])
        s.sub_(b), i.sub_(b)                                                # the deltas
        bb, ss, ii, si = (x.dot(y).item() for x, y in ((b, b), (s, s), (i, i), (s, i)))
        sums += bb, ss, ii, si, np.count_nonzero(torch.mul(s, i, out=product).numpy() < 0), n
        if ii == 0 and lam == 1:
            out[a:a + n] = speech[a:a + n]
        elif ss == 0 and mu == 1:
            out[a:a + n] = instruct[a:a + n]
        else:
            out[a:a + n] = rounded(b.add_(s, alpha=lam).add_(i, alpha=mu), out.dtype)
    return out, sums


def rounded(x, dtype):
    """x (n,) float64 in another dtype, rounded once. torch goes to 16 bits by way of float32, and what is a tie there need not have been one:
    8 in a million would be off by one. So where float32 lost something it is cut, and its last bit set ("round to odd"): no longer a tie."""
    near = x.float()
    if dtype in (torch.bfloat16, torch.float16):
        wide, short = x.numpy(), near.numpy()
        lost = np.flatnonzero(short != wide)
        bits = short.view(np.int32)                                         # the same memory: sign and size, so that 1 less is one step nearer to 0
        bits[lost] = (bits[lost] - (abs(short[lost]) > abs(wide[lost]))) | 1
    return (x if dtype == torch.float64 else near).to(dtype)


class Merge:
    """The merge of three folders, a block of a tensor at a time. ValueError, naming the difference, if they do not fit."""

    def __init__(self, base, instruct, speech):
        self.base, self.instruct, self.speech = weights.Tensors(base), weights.Tensors(instruct), weights.Tensors(speech)
        vocabs = {folder: Vocab(folder) for folder in (base, instruct, speech)}
        if not vocabs[speech].speech:
            raise ValueError(f"{speech}: cannot hear (no speech.json); --speech wants a model trained with pretrain.py --units")
        configs = {folder: weights.read_json(Path(folder) / "config.json") for folder in (base, instruct, speech)}
        architectures = {folder: (config.get("architectures") or ["none"])[0] for folder, config in configs.items()}
        for folder in (instruct, speech):
            if architectures[folder] != architectures[base]:
                raise ValueError(f"{folder} is a {architectures[folder]}, {base} a {architectures[base]}; all three must come from one base")
        copy = lambda name, folder: name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and configs[folder].get("tie_word_embeddings")   # some files hold it twice
        self.names = [name for name in self.speech if not copy(name, speech)]
        for other, folder in ((self.base, base), (self.instruct, instruct)):
            difference = set(self.names) ^ {name for name in other if not copy(name, folder)}
            if difference:
                raise ValueError(f"{folder} and {speech} do not have the same tensors: {sorted(difference)[:3]} in one only")
        self.rows = self.base.shape(ROWS[0])[0]                             # rows that base has; speech's own come after
        names = {folder: {i: t for t, i in v.special.items() if i < self.rows and not t.startswith("<|unused_")} | v.bytes_of for folder, v in vocabs.items()}
        for folder in (instruct, speech):
            for i, token in names[folder].items():
                if names[base].get(i, token) != token:
                    raise ValueError(f"{folder}: row {i} is {token!r}, in {base} it is {names[base][i]!r}; the tokenizers must agree")
        template = "".join(CHATS.get(vocabs[instruct].family, ()))
        self.markers = sorted(i for token, i in vocabs[instruct].special.items() if token in template)
        if any(i >= self.rows for i in self.markers):
            raise ValueError(f"{instruct}: has chat markers in rows that {base} lacks; instruct must come from this base")
        for other in (self.base, self.instruct):
            for name in self.names:
                shape = self.speech.shape(name) if name not in ROWS else (self.rows, self.speech.shape(name)[1])
                if other.shape(name) != shape:
                    raise ValueError(f"{other.path(name)}: {name} has shape {other.shape(name)}, {speech} makes it {shape}")

    def blocks(self, name):
        """(a, b) of a tensor's blocks, flat; none lies across the end of base's rows."""
        ends = [0, math.prod(self.base.shape(name)), math.prod(self.speech.shape(name))]
        return [(a, min(a + BLOCK, end)) for begin, end in zip(ends, ends[1:]) for a in range(begin, end, BLOCK)]

    def block(self, name, a, b, lam, mu=1.0):
        """(elements a to b of the sum, their SUMS or None where base has no such row)."""
        speech = self.speech.block(name, a, b)
        if a >= math.prod(self.base.shape(name)):
            return speech, None
        base, instruct = self.base.block(name, a, b), self.instruct.block(name, a, b)
        out, sums = add(base, speech, instruct, lam, mu)
        if not np.isfinite(sums).all():                                     # one NaN or infinity anywhere spoils them
            ill = [str(tensors.path(name)) for tensors, part in ((self.base, base), (self.speech, speech), (self.instruct, instruct)) if not torch.isfinite(part).all()]
            raise ValueError(f"{' and '.join(ill) or 'the sum'}: {name} holds NaN or infinity")
        width = self.base.shape(name)[-1]
        for row in self.markers if name in ROWS else []:
            first, last = max(a, row * width) - a, min(b, (row + 1) * width) - a
            if first < last:
                out[first:last] = instruct[first:last].to(out.dtype)
        return out, sums

    def merged(self, name, lam, mu=1.0):
        """A whole tensor of the sum."""
        return torch.cat([self.block(name, a, b, lam, mu)[0] for a, b in self.blocks(name)]).view(self.speech.shape(name))

    def run(self, lam, mu, out=None):
        """Write the sum to the folder `out`, if given, in speech's own files; return the report."""
        home = {name: file.replace("pytorch_model", "model").replace(".bin", ".safetensors") for name, file in self.speech.home.items() if name in self.names}
        files, places = {}, {}
        for file in sorted(set(home.values())) if out else []:
            mine = {name: (self.speech.shape(name), self.speech.dtype(name)) for name in self.names if home[name] == file}
            files[file], at = weights.allocate(Path(out) / file, mine)
            places |= at
        jobs = [(name, a, b) for name in self.names for a, b in self.blocks(name)]

        def job(name, a, b):
            block, sums = self.block(name, a, b, lam, mu)
            if out:
                weights.write_block(files[home[name]], places[name] + a * block.element_size(), block)
            return sums

        threads, sums = torch.get_num_threads(), {}
        torch.set_num_threads(1)                                            # the pool's threads are the parallel ones
        with ThreadPoolExecutor(os.cpu_count()) as pool, runs.Bar(total=len(jobs), desc="merging", unit="block") as bar:
            for (name, _, _), part in zip(jobs, pool.map(lambda given: job(*given), jobs)):
                if part is not None:
                    sums[name] = sums.get(name, 0) + part
                bar.update()
        torch.set_num_threads(threads)
        for handle in files.values():
            os.close(handle)
        if files and set(files) != {"model.safetensors"}:
            weights.write_index(out, home)
        return report(sums)


def report(sums):
    """How big the two deltas are and whether they point the same way: {"rel", "cosine", "blocks", "tensors"} of {tensor: SUMS}.

    rel = |delta| / |base|, Frobenius norms, of all but embeddings and head; cosine of the two deltas; against: the share of
    elements that they move in opposite directions.
    """
    def row(b, s, i, si, against, n):
        share = lambda delta: math.sqrt(delta / b) if b else 0.0
        return {"instruct": share(i), "speech": share(s), "cosine": si / math.sqrt(s * i) if s * i else 0.0, "against": against / n}

    groups = {}
    for name, part in sums.items():
        found = re.search(r"layers\.(\d+)\.", name)
        for key in [int(found[1]) if found else "norm", "all"] if name not in ROWS else ["rows"]:
            groups[key] = groups.get(key, 0) + part
    table = {key: row(*part.tolist()) for key, part in groups.items()}
    total = table.pop("all")
    return {"rel": {"instruct": total["instruct"], "speech": total["speech"]}, "cosine": total["cosine"], "against": total["against"],
            "blocks": [{"block": key, **table[key]} for key in sorted(table, key=lambda key: (isinstance(key, str), key))],
            "tensors": {name: row(*part.tolist()) for name, part in sums.items()}}


def show(report):
    """The report for a human."""
    print(f"{'block':>6} {'|instruct|/|base|':>18} {'|speech|/|base|':>16} {'cosine':>8} {'signs against':>14}")
    for row in [*report["blocks"], {"block": "all", **report["rel"], "cosine": report["cosine"], "against": report["against"]}]:
        print(f"{row['block']!s:>6} {row['instruct']:18.4f} {row['speech']:16.4f} {row['cosine']:8.3f} {row['against']:14.3f}")
    for name, what in (("instruct", "behaviour"), ("speech", "hearing")):
        if report["rel"][name] == 0:
            print(f"{name} equals base in every block: it adds no {what}")


def draw(report, path):
    """A picture of the report: both deltas, block by block, and their cosine."""
    from matplotlib.figure import Figure
    rows = [row for row in report["blocks"] if isinstance(row["block"], int)]
    figure = Figure(figsize=(10, 3.5), layout="tight")
    left, right = figure.subplots(1, 2)
    for name in ("instruct", "speech"):
        left.plot([row["block"] for row in rows], [row[name] for row in rows], marker="o", label=name)
    left.set(xlabel="block", ylabel="|delta| / |base|", ylim=(0, None), title="How far each side moved")
    left.legend()
    right.plot([row["block"] for row in rows], [row["cosine"] for row in rows], marker="o")
    right.axhline(0, color="grey", linewidth=0.5)
    right.set(xlabel="block", ylabel="cosine of the two deltas", title="Do they pull the same way?")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    weights.write_file(path, picture.getvalue())


def main():
    parser = argparse.ArgumentParser(description="Add what instruct training changed to a speech model: base + lam * (speech - base) + mu * (instruct - base).")
    for name, what in (("base", "the base model"), ("instruct", "the instruct model, tuned from that base"), ("speech", "the speech model, from that base")):
        parser.add_argument(f"--{name}", required=True, help=f"folder of {what}")
    parser.add_argument("--lam", type=float, default=1.0, help="how much of the speech delta (default 1; the paper found 0.85 best)")
    parser.add_argument("--mu", type=float, default=1.0, help="how much of the instruct delta (default 1)")
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--out", help="model folder to write")
    end.add_argument("--dry-run", action="store_true", help="only check that the three fit and say how large both deltas are")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    for name in ("lam", "mu"):
        if not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} {getattr(args, name)}: wanted a finite number")
    for folder in (args.instruct, args.speech):
        weights.unchanged(folder, [args.base])
    plan = Merge(args.base, args.instruct, args.speech)
    for rule, what in RULES.items():
        print(f"{rule:13} {what}")
    if args.dry_run:
        show(plan.run(args.lam, args.mu))
        return
    with weights.new_folder(args.out, [args.base, args.instruct, args.speech], args.overwrite,
                            notes={"lam": args.lam, "mu": args.mu, "rules": RULES}) as out:
        said = plan.run(args.lam, args.mu, out)
        (out / "merge.json").write_text(json.dumps({"lam": args.lam, "mu": args.mu} | said, indent=1) + "\n")
        draw(said, out / "merge.png")
        for file in Path(args.speech).glob("*.json"):                       # config, tokenizer, speech.json: what the rows mean
            if file.name not in ("recipe.json", "training.json", "codebook.json") and not file.name.endswith(".index.json"):
                shutil.copy(file, out / file.name)
        weights.copy_ears(args.speech, out)
    show(said)


if __name__ == "__main__":
    weights.run(main)
