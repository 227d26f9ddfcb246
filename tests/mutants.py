"""Mistakes planted one at a time, each with the tests that should notice: can the tests fail?

in   nothing                                out  a line a mistake: caught, or alive
run  python tests/mutants.py                # all of them (not timed yet); --sample 8 for some, --only WORD for those of a file

A mistake is a piece of a file and what it is replaced by, in a copy of the repository. ALIVE lists those that no test notices, with the reason.
"""
import argparse
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVALUATE, CHAT, TOKENIZE, PRETRAIN = "tests/test_evaluate.py", "tests/test_chat.py", "tests/test_tokenize_audio.py", "tests/test_pretrain.py"
DOCUMENTS, VOCAB, MODEL, HUBERT, MERGE = "tests/test_documents.py", "tests/test_vocab.py", "tests/test_model.py", "tests/test_hubert.py", "tests/test_merge.py"
FUSED, AUDIO, WEIGHTS, TOY, MUON, RUNS = "tests/test_fused.py", "tests/test_audio.py", "tests/test_weights.py", "tests/test_toy.py", "tests/test_muon.py", "tests/test_runs.py"
STEP = f"{PRETRAIN} -k 'flag or rows_go_first or beside_imitation or reader or covariance or rate_warms or paced or pace_from or two_optimizers or stepped or thinks or measure or difference'"

MUTANTS = [     # (file, what stands there, what is planted, the tests that should notice)
    ("evaluate.py", "model_at(plan, config, 0.0, args.device)", "model_at(plan, config, 1.0, args.device)", EVALUATE),
    ("evaluate.py", 'answers(models["instruct"], plain, heard', 'answers(models["speech"], plain, heard', EVALUATE),
    ("evaluate.py", "model = model_at(plan, config, lam, args.device)", "model = model_at(plan, config, 1.0, args.device)", EVALUATE),
    ("evaluate.py", "spoken = {group: hear(ears, folder, test, group)", 'spoken = {group: hear(ears, folder, test, "near")', EVALUATE),
    ("evaluate.py", "barred[vocab.text_rows()] = False", "barred[:] = False", EVALUATE),
    ("evaluate.py", "LIMIT, stop, vocab.text_rows())", "LIMIT, stop, None)", EVALUATE),
    ("evaluate.py", 'vocab.encode("\\n")[:1], bar)', "(), bar)", EVALUATE),
    ("evaluate.py", 'for text, q in zip(said, questions) if not q["seen"]]', 'for text, q in zip(said, questions) if q["seen"]]', EVALUATE),
    ("evaluate.py", "[2.5, 97.5]", "[50, 50]", EVALUATE),
    ("evaluate.py", "n, z = len(right), 1.96", "n, z = len(right), 1.0", EVALUATE),
    ("evaluate.py", "(middle - half) / (1 + z * z / n)", "(middle + half) / (1 + z * z / n)", EVALUATE),
    ("evaluate.py", "return max(right, key=right.get)", "return min(right, key=right.get)", EVALUATE),
    ("evaluate.py", "sounds, prompts[name], bar)", 'sounds, "chat", bar)', EVALUATE),
    ("evaluate.py", 'normal(text) == normal(q["answer"]) for text, q in zip(said', 'normal(q["answer"]) in normal(text) for text, q in zip(said', EVALUATE),
    ("evaluate.py", "counts.append(len(ids) - 1)", "counts.append(len(ids))", EVALUATE),
    ("evaluate.py", "cell(parts.sum() / wholes.sum()", "cell((parts / wholes).mean()", EVALUATE),
    ("evaluate.py", "if g > b else 0.5 if g == b", "if g < b else 0.5 if g == b", EVALUATE),
    ("evaluate.py", "else 0.5 if g == b", "else 1.0 if g == b", EVALUATE),
    ("evaluate.py", 'q.get("noisy", q["question"])', 'q["question"]', EVALUATE),
    ("evaluate.py", 'if row["answer"] in row["choices"] else letter.upper()', "if True else letter.upper()", EVALUATE),
    ("evaluate.py", "out[i] = None if end is None else", "out[i] = vocab.decode(ids) if end is None else", EVALUATE),
    ("evaluate.py", 'hear(ears[folder], Path(args.questions).parent, test, "near")', 'hear(ears[folder], Path(args.questions).parent, dev, "near")', EVALUATE),

    ("chat.py", "self.vocab.stop, self.vocab.text_rows(), self.temperature", "self.vocab.stop, None, self.temperature", CHAT),
    ("chat.py", "self.temperature, seed=", "0.0, seed=", CHAT),
    ("chat.py", "if alone > self.room:", "if False:", CHAT),
    ("chat.py", "del self.messages[len(system):len(system) + 2]", "del self.messages[0:2]", CHAT),
    ("chat.py", "if seconds * SLOWEST > self.room:", "if seconds > self.room * 1e9:", CHAT),
    ("chat.py", 'self.messages.append({"role": "assistant", "content": said})', "pass", CHAT),
    ("chat.py", 'sys.exit(not all(', "sys.exit(all(", CHAT),

    ("tokenize_audio.py", "return [row - row.mean(0) if len(row) else row for row in each]", "return each", TOKENIZE),
    ("tokenize_audio.py", 'steady(x, self.centroids, self.recipe["switch"])', "steady(x, self.centroids, 0)", TOKENIZE),
    ("tokenize_audio.py", "half = 0.5 * centroids.pow(2).sum(1)", "half = 0 * centroids.pow(2).sum(1)", TOKENIZE),
    ("tokenize_audio.py", "cost = np.minimum(cost, cost[best] + switch) + distance[t]", "cost = np.minimum(cost, cost[best] + 2 * switch) + distance[t]", TOKENIZE),
    ("tokenize_audio.py", "labels[1:] != labels[:-1]", "labels[1:] > labels[:-1]", TOKENIZE),
    ("tokenize_audio.py", "lengths.max() > MOST", "lengths.max() > 1e9", TOKENIZE),
    ("tokenize_audio.py", "(a - low) // hop, b // hop - a // hop", "0, b // hop - a // hop", TOKENIZE),
    ("tokenize_audio.py", "file.truncate(size)\n", "pass\n", TOKENIZE),
    ("tokenize_audio.py", "np.load(Path(part) / \"index.npy\")[1:] + index[-1]", "np.load(Path(part) / \"index.npy\")[1:]", TOKENIZE),
    ("tokenize_audio.py", "(x != y)", "2 * (x != y)", TOKENIZE),

    ("pretrain.py", 'paced(batch["start"], args.pace,', 'paced(batch["start"], 1.0,', STEP),
    ("pretrain.py", "loss + args.imitate * sum(", "loss + 0 * args.imitate * sum(", STEP),
    ("pretrain.py", '(batch["kind"] == by_turns) & imitated(batch) if reader else None', "None", STEP),
    ("pretrain.py", "if step <= args.rows_first:", "if step <= 0:", STEP),
    ("pretrain.py", "ROWS_FASTER if first_new else 1, dtype)", "1, dtype)", STEP),
    ("pretrain.py", "positions=position.gather(1, place)", 'positions=place - batch["start"].gather(1, place)', STEP),
    ("pretrain.py", "args.lora_alpha or 2 * args.lora", "2 * args.lora", STEP),
    ("pretrain.py", "return peak * (step + 1) / warm", "return peak", STEP),
    ("pretrain.py", "peak * (0.1 + 0.45 *", "peak * (0.0 + 0.5 *", STEP),
    ("pretrain.py", "(p.data - anchor) @ filters[p]", "(p.data - anchor)", STEP),
    ("pretrain.py", "p.grad[stay] = 0", "pass", PRETRAIN),
    ("pretrain.py", "with torch.autocast(x.device.type, enabled=False):                 # in", "with torch.autocast(x.device.type, enabled=True):                 # in", STEP),
    ("pretrain.py", "inverse * len(spread) / (inverse * spread).sum()", "inverse", STEP),
    ("pretrain.py", "spread + 0.1 * torch.eye", "spread + 100 * torch.eye", STEP),
    ("pretrain.py", "worth = parts.sum(0) if n >= ears else parts[1]", "worth = 0 * parts.sum(0)", STEP),
    ("pretrain.py", "(loss / args.accumulate).backward()", "loss.backward()", f"{PRETRAIN} -k two_processes"),
    ("pretrain.py", "documents.drawn = saved[\"step\"], saved[\"seconds\"], saved[\"heard\"], saved[\"drawn\"]", "documents.drawn = saved[\"step\"], saved[\"seconds\"], saved[\"heard\"], documents.drawn", f"{PRETRAIN} -k killed"),
    ("pretrain.py", "if layers[0] <= i / depth < layers[1]", "if True", PRETRAIN),
    ("pretrain.py", "body = [p for p in body if p.dim() == 2] if first_new else", "body = body if first_new else", PRETRAIN),

    ("documents.py", "self.below = texts[len(texts) // HELD_OUT:]", "self.below = texts", DOCUMENTS),
    ("documents.py", "edges = [-math.inf, *middles, math.inf]", "edges = [words[0][1], *middles, words[-1][2]]", DOCUMENTS),
    ("documents.py", "i = int(self.orders[name][1][at]) + n // HELD_OUT", "i = int(self.orders[name][1][at])", DOCUMENTS),
    ("documents.py", "if room[r] >= len(document.ids)", "if room[r] > len(document.ids)", DOCUMENTS),
    ("documents.py", 'batch["loss"][r, a:b - 1] = ids[1:], loss[1:]', 'batch["loss"][r, a:b - 1] = ids[1:], loss[:-1]', DOCUMENTS),
    ("documents.py", 'batch["start"][r, a:b], batch["kind"][r, a:b] = ids, a, kind', 'batch["start"][r, a:b], batch["kind"][r, a:b] = ids, 0, kind', DOCUMENTS),
    ("documents.py", "max(0, progress - ALONE) * GROWTH", "progress * GROWTH", DOCUMENTS),
    ("documents.py", "below = draw(1 / 3), draw(1 / 2)", "below = draw(0), draw(0)", DOCUMENTS),

    ("vocab.py", "place += [max(first, last - n) for n in range(len(written), 0, -1)]", "place += [first for n in written]", DOCUMENTS),
    ("vocab.py", 'bears = int(message["role"] == "assistant")', "bears = 1", VOCAB),
    ("vocab.py", 'silent = (self.speech["speech"], self.speech["end_speech"], self.eos, *self.begin)', "silent = ()", f"{VOCAB} {DOCUMENTS}"),
    ("vocab.py", "loss=[int(n >= silent)", "loss=[int(n > silent)", VOCAB),
    ("vocab.py", "total = -(-(first + 2 + k) // 128) * 128", "total = first + 2 + k", VOCAB),
    ("vocab.py", "return sorted(self.bytes_of) + self.stop", "return sorted(self.bytes_of)", f"{VOCAB} {EVALUATE}"),
    ("vocab.py", 'return self.begin + self.span(units) + self.encode(CUE)', "return self.begin + self.span(units)", f"{VOCAB} {CHAT} tests/test_speedrun.py"),
    ("vocab.py", 'if i != NO_ID]\n        return ids', "]\n        return ids", VOCAB),

    ("model.py", "std=0.02 / math.sqrt(2 * config.num_hidden_layers) if writer else 0.02", "std=0.02", MODEL),
    ("model.py", "sample(logits / temperature, top_p, sampler)", "sample(logits / temperature, 1.0, sampler)", MODEL),
    ("model.py", "torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)", "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)", MODEL),
    ("model.py", "eps=self.eps).to", "eps=1e-2).to", MODEL),
    ("model.py", "turn * (keep + (1 - keep) / s[\"factor\"])", "turn", MODEL),
    ("model.py", "q, k = self.q_norm(q), self.k_norm(k)", "q, k = self.q_norm(q), k", MODEL),
    ("model.py", "ids = torch.where(ended, last, ids) if last is not None else ids", "pass", MODEL),
    ("model.py", "lora.linear.weight += lora.scale * (lora.B @ lora.A)", "lora.linear.weight += lora.B @ lora.A", f"{PRETRAIN} -k lora"),
    ("model.py", "used.mean(0) + 0.1 * used.std(0)", "used.mean(0) + 1.0 * used.std(0)", MODEL),
    ("model.py", '"torch_dtype": str(dtype).removeprefix("torch.")', '"torch_dtype": "float16"', MODEL),

    ("fused.py", "visible & (key >= start[:, :, None])", "visible", FUSED),
    ("fused.py", "-worth[part, None]).to(hidden.dtype)", "-1.0 + 0 * worth[part, None]).to(hidden.dtype)", FUSED),
    ("fused.py", "logits.masked_fill_(barred, -math.inf)", "pass", FUSED),
    ("fused.py", "l = l * old + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", FUSED),
    ("fused.py", "ds = p * (tl.dot(g, tl.trans(v), input_precision=\"ieee\") - go[:, None])", "ds = p * tl.dot(g, tl.trans(v), input_precision=\"ieee\")", FUSED),

    ("merge.py", "rounded(b.add_(s, alpha=lam).add_(i, alpha=mu), out.dtype)", "rounded(b.add_(s, alpha=mu).add_(i, alpha=lam), out.dtype)", MERGE),
    ("merge.py", "if ii == 0 and lam == 1:", "if ii == 0:", MERGE),
    ("merge.py", "bits[lost] = (bits[lost] - (abs(short[lost]) > abs(wide[lost]))) | 1", "pass", MERGE),
    ("merge.py", "return speech, None", "return speech * 0, None", MERGE),
    ("merge.py", "share = lambda delta: math.sqrt(delta / b) if b else 0.0", "share = lambda delta: delta / b if b else 0.0", MERGE),

    ("hubert.py", "return F.cross_entropy(logits[at], targets[at]) + F.cross", "return F.cross", HUBERT),
    ("hubert.py", "- self.hop()) // 2        # 40", "- self.hop()) // 4        # 40", HUBERT),
    ("hubert.py", "x = x * real[:, None]", "pass", HUBERT),
    ("hubert.py", "samples = samples * torch.rsqrt(", "samples = samples * torch.sqrt(", HUBERT),
    ("hubert.py", "for block in self.layers[:layer]:", "for block in self.layers[:layer + 1]:", HUBERT),

    ("audio.py", "return 0.95 * min(1, up / down)", "return 0.5 * min(1, up / down)", AUDIO),
    ("audio.py", "middle = (np.cumsum(durations) - durations / 2) / rate", "middle = np.cumsum(durations) / rate", f"{AUDIO} {DOCUMENTS}"),
    ("audio.py", "samples.mean(axis=1)", "samples[:, 0]", AUDIO),
    ("audio.py", "followlinks=True", "followlinks=False", AUDIO),
    ("audio.py", "features.std(0) + 1e-3", "features.std(0) + 1e3", AUDIO),

    ("muon.py", "average.lerp_(p.grad, 1 - group[\"momentum\"])", "average.copy_(p.grad)", MUON),
    ("muon.py", "size = 0.2 * shape[1] ** 0.5 * group[\"lr\"]", "size = 0.2 * group[\"lr\"]", MUON),
    ("muon.py", "p.add_(step if lie else step.T", "p.add_(step if lie else -step.T", MUON),
    ("muon.py", "x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)", "x", MUON),
    ("muon.py", "ITERATIONS = 5", "ITERATIONS = 2", MUON),

    ("runs.py", "if half > WORTH_IT * full", "if half < WORTH_IT * full", RUNS),
    ("runs.py", "enabled=dtype == half)", "enabled=False)", RUNS),
    ("runs.py", 'os.environ.setdefault("GOMP_SPINCOUNT", "1000")', 'os.environ["GOMP_SPINCOUNT"] = "1000"', RUNS),

    ("weights.py", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", WEIGHTS),
    ("weights.py", "for name in scratch:", "for name in ():", WEIGHTS),
    ("weights.py", "out = out.resolve() if out.is_symlink() else out", "pass", WEIGHTS),
    ("weights.py", "if not torch.isfinite(tensor).all():", "if False:", WEIGHTS),
    ("weights.py", "missing or unused:", "missing:", WEIGHTS),

    ("toy.py", 'unseen = dict.fromkeys(pairs, set(rng.sample(range(n), n // 3)))', "unseen = dict.fromkeys(pairs, set())", TOY),
    ("toy.py", "if any(question in listed for question in self.asked):", "if False:", TOY),
]
ALIVE = {}      # a piece that is planted: why no test notices


def caught(copy, file, old, new, tests):
    """Whether the tests fail with `old` replaced by `new` in a file of a copy of the repository; an error if it is not there once."""
    path = copy / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file}: {old!r} stands there {text.count(old)} times"
    path.write_text(text.replace(old, new))
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)], cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(text)
    assert done.returncode in (0, 1), done.stdout[-2000:] + done.stderr[-2000:]
    name = re.search(r"^(?:FAILED|ERROR) \S*?::(\S+)", done.stdout, re.M)
    return done.returncode == 1 and (name[1] if name else "?")


def main():
    parser = argparse.ArgumentParser(description="Plant mistakes, one at a time, and see whether the tests notice.")
    parser.add_argument("--sample", type=int, help="only so many, drawn at random (seed 0)")
    parser.add_argument("--only", default="", help="only those of files whose name holds this")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.only in mutant[0]]
    chosen = random.Random(0).sample(chosen, args.sample) if args.sample else chosen
    alive = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out", ".venv", "__pycache__"))
        if (ROOT.parent / "shared").exists():
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        for file, old, new, tests in chosen:
            by = caught(copy, file, old, new, tests)
            print(f"{'caught' if by else 'ALIVE '} {file}: {old[:60]!r} -> {new[:40]!r}{f' by {by}' if by else ''}", flush=True)
            alive += [] if by or old in ALIVE else [old]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} caught or explained")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
