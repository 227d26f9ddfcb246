"""The idea: merged = base + lam * (speech - base) + (instruct - base). Hearing plus behaviour, added, never trained together.

in   three model folders: base, speech (from that base), instruct (from that base)      out  a model folder that hears and answers
see  SpeechCombine (ICML 2026); Task Arithmetic (arXiv:2212.04089); Chat Vector (arXiv:2310.04799)
run  python merge.py --base out/base --instruct out/instruct --speech out/speech --out out/merged

One rule per row, by token name:
    every tensor, and every row that base has     base + lam * (speech - base) + (instruct - base), in float64, rounded once
    rows of chat markers                          instruct's: speech training never saw them
    rows that only speech has (units, markers)    speech's: there is nothing to add
Rounded step by step in bf16, (speech + instruct) - base would lose 14 % of a delta of relative size 0.02.
"""
import argparse
import json
import math
import re
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

import weights
from vocab import CHATS, Vocab

BLOCK = 1 << 22                     # elements summed at a time: three float64 blocks are 100 MB, whatever the model's size
ROWS = ("model.embed_tokens.weight", "lm_head.weight")      # tensors whose rows are tokens


def add(base, speech, instruct, lam):
    """The formula on three tensors of one shape; dtypes may differ, the result has speech's."""
    out = torch.empty_like(speech)
    flat = [t.reshape(-1) for t in (out, base, speech, instruct)]
    for a in range(0, out.numel(), BLOCK):
        o, b, s, i = (t[a:a + BLOCK] for t in flat)
        b = b.double()
        o.copy_(b + lam * (s.double() - b) + (i.double() - b))
    return out


class Merge:
    """The merge of three folders, tensor by tensor: `merged(name, lam)`; `names` is speech's list. ValueError if they do not fit."""

    def __init__(self, base, instruct, speech):
        self.base, self.instruct, self.speech = weights.Tensors(base), weights.Tensors(instruct), weights.Tensors(speech)
        vocabs = {folder: Vocab(folder) for folder in (base, instruct, speech)}
        if not vocabs[speech].speech:
            raise ValueError(f"{speech}: cannot hear (no speech.json); --speech wants a model trained with pretrain.py --units")
        self.rows = self.base.shape(ROWS[0])[0]                             # rows that base has; speech's own come after
        names = {folder: {i: t for t, i in v.special.items() if i < self.rows and not t.startswith("<|unused_")} | v.bytes_of for folder, v in vocabs.items()}
        for folder in (instruct, speech):
            for i, token in names[folder].items():
                if names[base].get(i, token) != token:
                    raise ValueError(f"{folder}: row {i} is {token!r}, in {base} it is {names[base][i]!r}; the tokenizers must agree")
        template = "".join(CHATS.get(vocabs[instruct].family, ()))
        self.markers = [i for token, i in vocabs[instruct].special.items() if token in template]
        if any(i >= self.rows for i in self.markers):
            raise ValueError(f"{instruct}: has chat markers in rows that {base} lacks; instruct must come from this base")
        self.names = list(self.speech)
        for other, folder in ((self.base, base), (self.instruct, instruct)):
            difference = set(self.names) ^ set(other)
            if difference:
                raise ValueError(f"{folder} and {speech} do not have the same tensors: {sorted(difference)[:3]} in one only")
            for name in self.names:
                shape = self.speech.shape(name) if name not in ROWS else (self.rows, self.speech.shape(name)[1])
                if other.shape(name) != shape:
                    raise ValueError(f"{other.path(name)}: {name} has shape {other.shape(name)}, {speech} makes it {shape}")

    def shared(self, name):
        """base, speech and instruct of a tensor, cut to the rows all three have."""
        return self.base[name], self.speech[name][:self.rows] if name in ROWS else self.speech[name], self.instruct[name]

    def merged(self, name, lam):
        base, speech, instruct = self.shared(name)
        out = add(base, speech, instruct, lam)
        if name in ROWS:
            out[self.markers] = instruct[self.markers].to(out.dtype)
            out = torch.cat([out, self.speech[name][self.rows:]])
        return out

    def report(self):
        """How big the two deltas are and whether they point the same way, per block and in all but embeddings and head:
        {"rel": {"instruct", "speech"}, "cosine", "blocks": [...]}. rel = |delta| / |base|, Frobenius norms."""
        sums = {}                                                           # block -> [|base|^2, |s|^2, |i|^2, s.i]
        for name in self.names:
            if name not in ROWS:
                b, s, i = (t.double() for t in self.shared(name))
                s, i = s - b, i - b
                found = re.search(r"layers\.(\d+)\.", name)
                for key in {int(found[1]) if found else "norm", "all"}:
                    for n, value in enumerate((b.pow(2).sum(), s.pow(2).sum(), i.pow(2).sum(), (s * i).sum())):
                        sums.setdefault(key, [0.0] * 4)[n] += value.item()
        row = lambda b, s, i, si: {"instruct": math.sqrt(i / b), "speech": math.sqrt(s / b), "cosine": si / math.sqrt(s * i) if s * i else 0.0}
        blocks = [{"block": key} | row(*sums[key]) for key in sorted((key for key in sums if key != "all"), key=str)]
        total = row(*sums["all"])
        return {"rel": {"instruct": total["instruct"], "speech": total["speech"]}, "cosine": total["cosine"], "blocks": blocks}


def main():
    parser = argparse.ArgumentParser(description="Add what instruct training changed to a speech model: base + lam * (speech - base) + (instruct - base).")
    for name, what in (("base", "the base model"), ("instruct", "the instruct model, tuned from that base"), ("speech", "the speech model, from that base")):
        parser.add_argument(f"--{name}", required=True, help=f"folder of {what}")
    parser.add_argument("--lam", type=float, default=1.0, help="how much of the speech delta (default 1; the paper found 0.85 best)")
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    if not math.isfinite(args.lam):
        raise ValueError(f"--lam {args.lam}: wanted a finite number")
    for folder in (args.instruct, args.speech):
        weights.unchanged(folder, [args.base])
    plan = Merge(args.base, args.instruct, args.speech)
    with weights.new_folder(args.out, [args.base, args.instruct, args.speech], args.overwrite) as out:
        weights.save(out, {name: plan.merged(name, args.lam) for name in tqdm(plan.names, desc="merging", unit="tensor")})
        report = {"lam": args.lam} | plan.report()
        (out / "merge.json").write_text(json.dumps(report, indent=1) + "\n")
        for file in Path(args.speech).glob("*.json"):                       # config, tokenizer, speech.json: what the rows mean
            if file.name not in ("recipe.json", "training.json", "model.safetensors.index.json", "codebook.json"):
                shutil.copy(file, out / file.name)
        weights.copy_ears(args.speech, out)
    print(f"{'block':>6} {'|instruct|/|base|':>18} {'|speech|/|base|':>16} {'cosine':>8}")
    for row in [*report["blocks"], {"block": "all", **report["rel"], "cosine": report["cosine"]}]:
        print(f"{row['block']!s:>6} {row['instruct']:18.4f} {row['speech']:16.4f} {row['cosine']:8.3f}")


if __name__ == "__main__":
    weights.run(main)
