r"""The idea of SpeechCombine: add what instruct training changed to a model that hears.

    for name in base:
        merged[name] = base[name] + lam * (speech[name] - base[name]) \
                                  + mu * (instruct[name] - base[name])

in   three model folders: base, and from it speech and instruct
out  a model folder that hears and answers, with the size of both deltas in merge.json
see  SpeechCombine (ICML 2026); Task Arithmetic (arXiv:2212.04089); Chat Vector (arXiv:2310.04799)
run  python merge.py --base out/base --instruct out/instruct --speech out/speech --lam 1.15 \
         --out out/merged

Tensors meet by name, and their rows by number: row n of an embedding is token n in all
three. The sum is taken in float64 and rounded once, to speech's dtype. Rounded step by step
in bfloat16, (speech + instruct) - base would lose 14 % of a delta of relative size 0.02.
Slices of rows are read, added and written one after the other, so a model of 8B parameters
wants no more memory than a small one.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch

import weights
from vocab import CHATS, SIGNS, Vocab


def add(models, name, lam, mu):
    """Yield (first row, rows, sizes) of a tensor of the sum, slice by slice of its rows.

    models  `Merge`: the three folders
    rows    (n, width) in speech's dtype
    sizes   what `measure` says of the slice; None for rows that base lacks
    """
    for a, b in models.slices(name):
        speech = models.rows("speech", name, a, b)                  # (n, width)
        if a >= models.count(name):  # tokens that only speech has
            new = models.nearer_signs(speech, name)
            models.finite(new, name, a, b)
            yield a, new, None
            continue
        base = models.rows("base", name, a, b).double()
        instruct = models.rows("instruct", name, a, b).double()

        speech_delta = speech.double() - base
        instruct_delta = instruct - base
        merged = base + lam * speech_delta + mu * instruct_delta

        rounded = merged.to(speech.dtype)
        models.finite(rounded, name, a, b)
        if name in TABLES:
            markers = [row - a for row in models.markers if a <= row < b]
            rounded[markers] = instruct[markers].to(speech.dtype)
        yield a, rounded, measure(base, speech_delta, instruct_delta)


def measure(base, speech_delta, instruct_delta):
    """What the report needs of a slice, to be summed: squared norms, and how the deltas agree."""
    return Counter(
        base=dot(base, base),
        speech=dot(speech_delta, speech_delta),
        instruct=dot(instruct_delta, instruct_delta),
        product=dot(speech_delta, instruct_delta),
        against=(speech_delta * instruct_delta < 0).sum().item(),
        count=base.numel(),
    )


def dot(x, y):
    return x.flatten().dot(y.flatten()).item()


RULES = {
    "shared": "every tensor, and every row that base has: base + lam * (speech - base) + "
    "mu * (instruct - base), in float64, rounded once to speech's dtype",
    "chat markers": "their rows are instruct's, whatever lam and mu: speech has no chats",
    "new rows": "tokens that only speech has are speech's, there being nothing to add; --signs "
    "puts them nearer to signs",
}
SLICE = 1 << 17  # elements read and added at a time: in float64 1 MB, which a cache holds
# In config.json: what the same tensors are used with.
ARITHMETIC = (
    "num_attention_heads", "num_key_value_heads", "head_dim",
    "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "hidden_act",
)
TABLES = "model.embed_tokens.weight", "lm_head.weight"  # tensors whose rows are tokens


class Merge:
    """base, instruct and speech, found to fit, and their sum.

    tensors  {"base", "instruct", "speech": weights.Tensors}
    names    of tensors, the same in all three
    markers  rows that are instruct's: the tokens of its chat template
    nearer   (width,) what is added to rows of new tokens: `signs` times the mean row of SIGNS; or
             None
    A ValueError names the first difference that makes a sum impossible.
    """

    def __init__(self, base, instruct, speech, signs=0.0):
        self.paths = {"base": base, "instruct": instruct, "speech": speech}
        self.tensors = {name: weights.Tensors(path) for name, path in self.paths.items()}
        vocabs = {name: Vocab(path) for name, path in self.paths.items()}
        if not vocabs["speech"].speech:
            raise ValueError(
                f"{speech}: cannot hear (no speech.json); --speech wants a model "
                "trained with pretrain.py --units"
            )
        weights.codebook_files(speech)  # the sum gets them, when it is written
        self.names = self.same_names()
        self.same_arithmetic()
        self.same_shapes()
        self.same_tokens(vocabs)

        # Chat markers: the special tokens that instruct's chat template spells.
        template = "".join(CHATS.get(vocabs["instruct"].family, ()))
        special = vocabs["instruct"].special
        self.markers = sorted(i for token, i in special.items() if token in template)

        # Instruct has never read the new tokens, and they confuse it. It ignores signs like #, so
        # in the sum new rows are made more like theirs.
        self.nearer = None
        if signs:
            ids = sorted({i for sign in SIGNS for i in vocabs["base"].encode(sign)})
            if not ids:
                raise ValueError(f"{base}: its tokenizer knows none of {SIGNS}; leave --signs out")
            rows = torch.cat([self.rows("base", TABLES[0], i, i + 1) for i in ids])
            self.nearer = signs * rows.double().mean(0)             # (width,)

    def merged(self, name, lam, mu=1.0):
        """A whole tensor of the sum."""
        parts = [rows for _, rows, _ in add(self, name, lam, mu)]
        return torch.cat(parts).view(self.tensors["speech"].shape(name))

    def run(self, lam, mu, out=None):
        """Write the sum to the folder `out`, if given, in speech's own files; the report."""
        file = Output(out, self) if out else None
        sizes = {}
        for name in runs.Bar(self.names, desc="merging", unit="tensor"):
            for first, rows, part in add(self, name, lam, mu):
                if part:
                    sizes.setdefault(name, Counter()).update(part)
                if file:
                    file.write(name, first, rows)
        if file:
            file.close()
        return delta_report(sizes)

    # --- do the three fit? ---

    def same_names(self):
        """The names of all tensors; architectures and names must be the same."""
        kinds, names = {}, {}
        for which, path in self.paths.items():
            config = runs.read_json(Path(path) / "config.json")
            named = config.get("architectures")
            kinds[which] = named[0] if isinstance(named, list) and named else named

            # Some files hold the tied head and the frequencies of rotation beside the rest.
            tied = config.get("tie_word_embeddings")
            names[which] = [
                name
                for name in self.tensors[which]
                if not name.endswith("rotary_emb.inv_freq")
                and not (tied and name == "lm_head.weight")
            ]
        for which in ("instruct", "speech"):
            if kinds[which] != kinds["base"]:
                raise ValueError(
                    f"{self.paths[which]} is a {kinds[which]}, {self.paths['base']} a "
                    f"{kinds['base']}; all three must come from one base"
                )
        for which in ("base", "instruct"):
            differ = sorted(set(names["speech"]) ^ set(names[which]))
            if differ:
                raise ValueError(
                    f"{self.paths[which]} and {self.paths['speech']} do not have the "
                    f"same tensors: {differ[:3]} in one only"
                )
        return names["speech"]

    def same_arithmetic(self):
        """What shapes do not show, and weights rely on, must be as in base where both name it."""
        configs = {
            which: runs.read_json(Path(path) / "config.json")
            for which, path in self.paths.items()
        }
        base = configs.pop("base")
        for which, config in configs.items():
            for name in ARITHMETIC:
                ours, its = config.get(name), base.get(name)
                if None not in (ours, its) and ours != its:
                    raise ValueError(
                        f"{self.paths[which]} has {name} = {ours}, {self.paths['base']} {its}; "
                        "all three must come from one base"
                    )

    def same_shapes(self):
        """All shapes must be speech's, but for rows of the tables that only speech has."""
        rows = self.count(TABLES[0])
        for name in self.names:
            shape = self.tensors["speech"].shape(name)
            if name in TABLES and shape[0] < rows:
                raise ValueError(
                    f"{self.tensors['speech'].path(name)}: {name} has {shape[0]} rows, base's "
                    f"{rows}; wanted all of base's, and its own behind them"
                )
            for which in ("base", "instruct"):
                tensors = self.tensors[which]
                wanted = (rows, *shape[1:]) if name in TABLES else shape
                if tensors.shape(name) != wanted:
                    raise ValueError(
                        f"{tensors.path(name)}: {name} has shape "
                        f"{tensors.shape(name)}, {self.paths['speech']} makes it "
                        f"{wanted}"
                    )

    def same_tokens(self, vocabs):
        """Where two tokenizers know a row of base's, they must name it alike."""
        rows = self.count(TABLES[0])
        names = {}
        for which, vocab in vocabs.items():
            special = {
                i: token
                for token, i in vocab.special.items()
                if i < rows and not token.startswith("<|unused_")
            }
            names[which] = special | vocab.bytes_of
        for which in ("instruct", "speech"):
            for i, token in names[which].items():
                ours = names["base"].get(i, token)
                if token != ours:
                    raise ValueError(
                        f"{self.paths[which]}: row {i} is {token!r}, in "
                        f"{self.paths['base']} it is {ours!r}; the tokenizers must "
                        "agree"
                    )

    def count(self, name):
        """Rows of a tensor that base has; speech's own come after."""
        return self.tensors["base"].shape(name)[0]

    def slices(self, name):
        """(a, b) of slices of rows; none lies across the end of base's."""
        have = self.count(name)
        every = self.tensors["speech"].shape(name)[0]
        step = max(1, SLICE // self.width(name))
        return [
            (a, min(a + step, end))
            for begin, end in ((0, have), (have, every))
            for a in range(begin, end, step)
        ]

    def width(self, name):
        return math.prod(self.tensors["speech"].shape(name)[1:])

    def rows(self, which, name, a, b):
        """Rows a to b of a tensor of one of the three, (b - a, width)."""
        width = self.width(name)
        return self.tensors[which].slice(name, a * width, b * width).view(b - a, width)

    def nearer_signs(self, new, name):
        """Rows of new tokens as they stand in the sum, (n, width)."""
        if self.nearer is None or name != TABLES[0]:
            return new
        return (new.double() + self.nearer).to(new.dtype)

    def finite(self, merged, name, a, b):
        """A ValueError if rows of the sum hold NaN or infinity. It names the files that do, too."""
        if torch.isfinite(merged).all():
            return
        ill = [
            str(tensors.path(name))
            for which, tensors in self.tensors.items()
            if b <= tensors.shape(name)[0]
            and not torch.isfinite(self.rows(which, name, a, b)).all()
        ]
        raise ValueError(f"{' and '.join(ill) or 'the sum'}: {name} holds NaN or infinity")


class Output:
    """Files like speech's, of one or several shards, whose slices come one after the other."""

    def __init__(self, out, models):
        speech = models.tensors["speech"]
        self.out = Path(out)
        self.files = {}  # {name of a file: it, open}
        self.begin = {}  # {tensor name: where it begins in its file}
        self.home = {}  # {tensor name: its file}
        for name in models.names:
            file = speech.home[name].replace("pytorch_model", "model")
            self.home[name] = file.replace(".bin", ".safetensors")
        for file in sorted(set(self.home.values())):
            mine = {
                name: (speech.shape(name), speech.dtype(name))
                for name in models.names
                if self.home[name] == file
            }
            self.files[file], begin = weights.allocate(self.out / file, mine)
            self.begin |= begin

    def write(self, name, first, rows):
        at = self.begin[name] + first * rows.shape[1] * rows.element_size()
        weights.write_slice(self.files[self.home[name]], at, rows)

    def close(self):
        for handle in self.files.values():
            os.close(handle)
        if set(self.files) != {"model.safetensors"}:
            weights.write_index(self.out, self.home)


def signs_of(folder):
    """The --signs of a sum; 0 if its folder does not say."""
    file = Path(folder) / "merge.json"
    signs = runs.read_json(file).get("signs", 0.0) if file.exists() else 0.0
    if not isinstance(signs, int | float) or not 0 <= signs < math.inf:
        raise ValueError(f"{file}: got signs = {str(signs)[:40]}, wanted a number from 0 on")
    return signs


# --- the report ---------------------------------------------------------------


def delta_report(sizes):
    """How big the two deltas are and whether they point the same way, of {tensor: `measure`}.

    {"rel", "cosine", "against", "blocks", "tensors"}: rel is |delta| / |base| (Frobenius
    norms, of all but embeddings and head), cosine that of the two deltas, against the
    share of elements that they move in opposite directions.
    """
    groups = {}
    for name, part in sizes.items():
        block = re.search(r"layers\.(\d+)\.", name)
        group = int(block[1]) if block else "norm"
        for key in ["rows"] if name in TABLES else [group, "all"]:
            groups.setdefault(key, Counter()).update(part)
    table = {key: relations(part) for key, part in groups.items()}
    total = table.pop("all")
    in_order = sorted(table, key=lambda key: (isinstance(key, str), key))
    return {
        "rel": {"instruct": total["instruct"], "speech": total["speech"]},
        "cosine": total["cosine"],
        "against": total["against"],
        "blocks": [{"block": key, **table[key]} for key in in_order],
        "tensors": {name: relations(part) for name, part in sizes.items()},
    }


def relations(part):
    """A row of the report from a sum of `measure`."""
    base = part["base"]
    lengths = math.sqrt(part["speech"] * part["instruct"])
    return {
        "instruct": math.sqrt(part["instruct"] / base) if base else 0.0,
        "speech": math.sqrt(part["speech"] / base) if base else 0.0,
        "cosine": part["product"] / lengths if lengths else None,  # one side did not move
        "against": part["against"] / part["count"],
    }


def print_report(report):
    """Print the report as a table."""
    print(
        f"{'block':>6} {'|instruct|/|base|':>18} {'|speech|/|base|':>16} {'cosine':>8} "
        f"{'opposed':>14}"
    )
    total = {
        "block": "all",
        **report["rel"],
        "cosine": report["cosine"],
        "against": report["against"],
    }
    for row in [*report["blocks"], total]:
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:.3f}"
        print(
            f"{row['block']!s:>6} {row['instruct']:18.4f} {row['speech']:16.4f} "
            f"{cosine:>8} {row['against']:14.3f}"
        )
    for name, what in (("instruct", "behaviour"), ("speech", "hearing")):
        if report["rel"][name] == 0:
            print(f"{name} equals base in every block: it adds no {what}")


def draw(report, path):
    """A picture of the report: both deltas, block by block, and their cosine."""
    from matplotlib.figure import Figure

    rows = [row for row in report["blocks"] if isinstance(row["block"], int)]
    blocks = [row["block"] for row in rows]
    figure = Figure(figsize=(10, 3.5), layout="tight")
    left, right = figure.subplots(1, 2)
    for name, form in (("instruct", "s--"), ("speech", "o-")):
        left.plot(blocks, [row[name] for row in rows], form, label=name, clip_on=False)
    left.set(
        xlabel="block",
        ylabel="|delta| / |base|",
        ylim=(0, None),
        title="How far each side moved",
    )
    left.legend()
    cosines = [math.nan if row["cosine"] is None else row["cosine"] for row in rows]
    most = max([0.25, *(abs(cosine) for cosine in cosines if not math.isnan(cosine))])
    right.plot(blocks, cosines, "o-", color="0.3")
    right.axhline(0, color="grey", linewidth=0.5)
    right.set(
        xlabel="block",
        xlim=left.get_xlim(),
        ylabel="cosine of the two deltas",
        ylim=(-most, most),
        title="Do they pull the same way?",
    )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    runs.write_file(path, picture.getvalue())


# --- the command --------------------------------------------------------------


def add_signs(parser):
    parser.add_argument(
        "--signs",
        type=runs.not_negative,
        default=0.0,
        help=f"how much of the mean row of {SIGNS.replace('%', '%%')} new tokens get, so that "
        "instruct reads past them as past markup (default 0; 0.5 for the toy's prosody)",
    )


def arguments():
    parser = argparse.ArgumentParser(
        description="Add what instruct training changed to a speech "
        "model: base + lam * (speech - base) + mu * (instruct - base)"
    )
    add_ = parser.add_argument
    add_("--base", required=True, help="folder of the base model")
    add_(
        "--instruct",
        required=True,
        help="folder of the instruct model, tuned from that base",
    )
    add_("--speech", required=True, help="folder of the speech model, from that base")
    add_(
        "--lam",
        type=float,
        default=1.0,
        help="how much of the speech delta (default 1; the paper's is 0.85, the toy's 1.15 for "
        "units and 0.45 to 0.6 for prosody)",
    )
    add_("--mu", type=float, default=1.0, help="how much of the instruct delta (default 1)")
    add_signs(parser)
    end = parser.add_mutually_exclusive_group(required=True)
    end.add_argument("--out", help="model folder to write")
    end.add_argument(
        "--dry-run",
        action="store_true",
        help="only check that the three fit and say how large both deltas are",
    )
    add_("--overwrite", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    for name in ("lam", "mu"):
        if not math.isfinite(getattr(args, name)):
            raise ValueError(f"--{name} {getattr(args, name)}: wanted a finite number")
    return args


def main():
    args = arguments()
    for folder in (args.instruct, args.speech):  # base must be what these were trained from
        runs.unchanged(folder, [args.base])
        if not runs.made_from(folder, args.base):
            print(
                f"{folder}: its recipe.json does not name {args.base}; of another base, the "
                "sum means nothing",
                file=sys.stderr,
            )
    models = Merge(args.base, args.instruct, args.speech, args.signs)
    for rule, what in RULES.items():
        print(f"{rule:13} {what}")
    if args.dry_run:
        print_report(models.run(args.lam, args.mu))
        return

    strengths = {"lam": args.lam, "mu": args.mu, "signs": args.signs}
    with runs.new_folder(
        args.out,
        [args.base, args.instruct, args.speech],
        args.overwrite,
        notes=strengths | {"rules": RULES},
    ) as out:
        made = models.run(args.lam, args.mu, out)
        (out / "merge.json").write_text(json.dumps(strengths | made, indent=1) + "\n")
        draw(made, out / "merge.png")

        # Config, tokenizer, speech.json: what the rows mean.
        for file in Path(args.speech).glob("*.json"):
            own = "recipe.json", "training.json", "merge.json", "codebook.json"
            if file.name not in own and not file.name.endswith(".index.json"):
                shutil.copy(file, out / file.name)
        weights.copy_codebook(args.speech, out)
    print_report(made)


if __name__ == "__main__":
    runs.run(main)
