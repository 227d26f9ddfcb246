"""Mistakes planted one at a time, each with the tests that should notice: can the tests fail?

in   nothing                                out  a line a mistake: caught, or alive
run  python tests/mutants.py                # all of them, 10 to 40 s each; --sample 8 for some, --only WORD for those of a file

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
WHISPER, DESTA, PROSODY, MANNER = "tests/test_whisper.py", "tests/test_desta.py", "tests/test_prosody.py", "tests/test_manner.py"
STEP = f"{PRETRAIN} -k 'flag or rows_go_first or beside_imitation or reader or covariance or rate_warms or pace or stepped or thinks or difference or filtered'"

MUTANTS = [     # (file, what stands there, what is planted, the tests that should notice)
    ("evaluate.py", "model_at(plan, config, 0.0, args.device)", "model_at(plan, config, 1.0, args.device)", EVALUATE),
    ("evaluate.py", 'answers, models["instruct"], plain', 'answers, models["speech"], plain', EVALUATE),
    ("evaluate.py", "            model = model_at(plan, config, lam, args.device)", "            model = model_at(plan, config, 1.0, args.device)", EVALUATE),
    ("evaluate.py", "spoken = {group: hear(ears, folder, test, group)", 'spoken = {group: hear(ears, folder, test, "near")', EVALUATE),
    ("evaluate.py", "not_text[vocab.text_rows()] = False", "not_text[:] = False", EVALUATE),
    ("evaluate.py", "limit, stop, vocab.text_rows()))", "limit, stop, None))", EVALUATE),
    ("evaluate.py", 'vocab.encode("\\n")[:1], bar)', "(), bar)", EVALUATE),
    ("evaluate.py", 'zip(said, questions) if not q["seen"]]', 'zip(said, questions) if q["seen"]]', EVALUATE),
    ("evaluate.py", "[2.5, 97.5]", "[50, 50]", EVALUATE),
    ("evaluate.py", "n, z = len(right), 1.96", "n, z = len(right), 1.0", EVALUATE),
    ("evaluate.py", "(middle - half) / scale", "(middle + half) / scale", EVALUATE),
    ("evaluate.py", "return max(right, key=right.get)", "return min(right, key=right.get)", EVALUATE),
    ("evaluate.py", "sounds, prompts[name], bar)", 'sounds, "chat", bar)', EVALUATE),
    ("evaluate.py", 'right = [normal(text) == normal(q["answer"]) for', 'right = [normal(q["answer"]) in normal(text) for', EVALUATE),
    ("evaluate.py", "counts.append(len(ids) - 1)", "counts.append(len(ids))", EVALUATE),
    ("evaluate.py", "cell(part.sum() / whole.sum()", "cell((part / whole).mean()", EVALUATE),
    ("evaluate.py", 'q.get("noisy", q["question"])', 'q["question"]', EVALUATE),
    ("evaluate.py", "None if end is None and whole else", "vocab.decode(ids) if end is None else", EVALUATE),
    ("evaluate.py", 'Path(args.questions).parent, asked, "near")', 'Path(args.questions).parent, dev, "near")', EVALUATE),
    ("evaluate.py", "lead(right[first] - right[other]", "lead(right[first]", EVALUATE),
    ("evaluate.py", 'apart["low"] <= 0 <= apart', 'apart["low"] <= 1 <= apart', EVALUATE),
    ("evaluate.py", "return ratio(right, [1] * len(right), facts(questions))", "return ratio(right, [1] * len(right))", EVALUATE),
    ("evaluate.py", "diagonal + (x != y)", "diagonal + 2 * (x != y)", TOKENIZE),

    ("benchmark.py", "1.0 if good > bad", "1.0 if good < bad", EVALUATE),
    ("benchmark.py", "0.5 if good == bad", "1.0 if good == bad", EVALUATE),
    ("benchmark.py", 'if row["answer"] in row["choices"] else letter', "if True else letter", EVALUATE),
    ("benchmark.py", "ids].argmax()", "ids].argmin()", EVALUATE),
    ("benchmark.py", 'starts, limit=args.limit, whole', 'starts, whole', EVALUATE),
    ("benchmark.py", '("exact", "ends") if whole', '("exact", "ends", "wer") if whole', EVALUATE),
    ("benchmark.py", 'inputs(args))["inputs"] | {"limit": args.limit}', 'inputs(args))["inputs"]', EVALUATE),
    ("benchmark.py", "args.rows, args.hubert, args.transcriber]", "args.rows]", EVALUATE),
    ("runs.py", "if len(done) > kept:", "if False:", EVALUATE),
    ("runs.py", "time.monotonic() - since > KEEP_EVERY", "False", RUNS),
    ("runs.py", 'return Path(f"{Path(out)}.rows")', 'return Path(f"{out}.rows")', RUNS),
    ("runs.py", "int(number or 0) >= count", "False", RUNS),

    ("chat.py", "vocab.text_rows(),\n                self.temperature,", "None,\n                self.temperature,", CHAT),
    ("chat.py", "                self.temperature,\n", "                0.0,\n", CHAT),
    ("chat.py", "if alone > self.room:", "if False:", CHAT),
    ("chat.py", "del self.messages[len(system) : len(system) + 2]", "del self.messages[0:2]", CHAT),
    ("chat.py", "if seconds * SLOWEST > self.room:", "if seconds > self.room * 1e9:", CHAT),
    ("chat.py", 'self.messages.append({"role": "assistant", "content": said})', "pass", CHAT),
    ("chat.py", "sys.exit(not all(done))", "sys.exit(all(done))", CHAT),
    ("chat.py", 'chat.begin(asked["system"] or "")', "chat.begin()", CHAT),

    ("tokenize_audio.py", "return [row - row.mean(0) if len(row) else row for row in each]", "return each", TOKENIZE),
    ("tokenize_audio.py", 'self.centroids, self.recipe["switch"])', "self.centroids, 0)", TOKENIZE),
    ("tokenize_audio.py", "half = 0.5 * centroids.pow(2).sum(1)", "half = 0 * centroids.pow(2).sum(1)", TOKENIZE),
    ("tokenize_audio.py", "np.take_along_axis(cost, best, 1) + switch", "np.take_along_axis(cost, best, 1) + 2 * switch", TOKENIZE),
    ("tokenize_audio.py", "labels[1:] != labels[:-1]", "labels[1:] > labels[:-1]", TOKENIZE),
    ("tokenize_audio.py", "lengths.max() > MOST", "lengths.max() > 1e9", TOKENIZE),
    ("tokenize_audio.py", "(a - begin) // hop, b // hop - a // hop", "0, b // hop - a // hop", TOKENIZE),
    ("tokenize_audio.py", "file.truncate(size)\n", "pass\n", TOKENIZE),
    ("tokenize_audio.py", "[1:] + index[-1])", "[1:])", TOKENIZE),
    ("tokenize_audio.py", "switch * inertia", "switch", TOKENIZE),

    ("align.py", "return {\"position\": position_gaps(start, self.pace, rng)}", "return {}", STEP),
    ("align.py", "return self.weight * sum(", "return 0 * self.weight * sum(", STEP),
    ("align.py", 'return (batch["kind"] == self.interleaved) & taught(batch)', "return None", STEP),
    ("align.py", "positions=position.gather(1, place)", 'positions=place - batch["start"].gather(1, place)', STEP),
    ("align.py", "(p - self.before[p]) @ keep", "(p - self.before[p])", STEP),
    ("align.py", "with torch.autocast(x.device.type, enabled=False):", "with torch.autocast(x.device.type, enabled=True):", STEP),
    ("align.py", "return inverse * len(moment) / (inverse * moment).sum()", "return inverse", STEP),
    ("align.py", "RIDGE = 0.1", "RIDGE = 100", STEP),
    ("align.py", "weight = speech + text if n >= naming else text", "weight = 0 * text", STEP),
    ("align.py", "+ strength * C\n", "+ 0 * C\n", STEP),
    ("align.py", "stretch = torch.where(draw() < 1 / 8", "stretch = torch.where(draw() < 2", STEP),

    ("pretrain.py", "p.requires_grad_(step > args.rows_first * args.steps)", "p.requires_grad_(True)", STEP),
    ("pretrain.py", 'NEW_FASTER if args.embeddings == "new" else 1', "1", STEP),
    ("pretrain.py", "args.lora_alpha or 2 * args.lora", "2 * args.lora", STEP),
    ("pretrain.py", "return peak * (step + 1) / warm", "return peak", STEP),
    ("pretrain.py", "0.1 + 0.45 *", "0.0 + 0.5 *", STEP),
    ("pretrain.py", "p.grad[run.frozen] = 0", "pass", PRETRAIN),
    ("pretrain.py", "(minimised / args.accumulate).backward()", "minimised.backward()", f"{PRETRAIN} -k mean_of_its_batches"),
    ("pretrain.py", "stream.restore(documents[part])", "pass", f"{PRETRAIN} -k killed"),
    ("pretrain.py", "optimizer.load_state_dict(state)", "pass", f"{PRETRAIN} -k killed"),
    ("pretrain.py", "if layers[0] <= i / len(blocks) < layers[1]:", "if True:", PRETRAIN),
    ("pretrain.py", 'if embeddings == "new":\n        body =', 'if False:\n        body =', PRETRAIN),
    ("pretrain.py", "at = at & (~masked | is_unit)", "pass", PRETRAIN),
    ("pretrain.py", "torch.where(is_unit, unit_weight, 1.0)", "torch.ones(len(is_unit))", PRETRAIN),
    ("pretrain.py", "at = at & (~masked | is_unit)", "at = at & ~masked", PRETRAIN),
    ("pretrain.py", "weight[~is_unit], not_text\n", "weight[~is_unit], None\n", PRETRAIN),
    ("pretrain.py", "defaults |= PLAIN", "pass", PRETRAIN),
    ("pretrain.py", "clip_grad_norm_([*run.body, *run.tables], 1.0)", "clip_grad_norm_([*run.body, *run.tables], 1e9)", f"{PRETRAIN} -k mean_of_its_batches"),

    ("documents.py", "self.below = texts[len(texts) // HELD_OUT :]", "self.below = texts", DOCUMENTS),
    ("documents.py", "edges = [-math.inf, *middles, math.inf]", "edges = [words[0][1], *middles, words[-1][2]]", DOCUMENTS),
    ("documents.py", "i = int(self.orders[name][1][at]) + held_out", "i = int(self.orders[name][1][at])", DOCUMENTS),
    ("documents.py", "if room[r] >= len(document.ids)", "if room[r] > len(document.ids)", DOCUMENTS),
    ("documents.py", 'batch["loss"][r, a : b - 1] = loss[1:]', 'batch["loss"][r, a : b - 1] = loss[:-1]', DOCUMENTS),
    ("documents.py", 'batch["start"][r, a:b] = a', 'batch["start"][r, a:b] = 0', DOCUMENTS),
    ("documents.py", "max(0, progress - ALONE) * GROWTH", "progress * GROWTH", DOCUMENTS),
    ("documents.py", "below = some(texts, 1 / 2, rng)", "below = some(texts, 0, rng)", DOCUMENTS),
    ("documents.py", "self.drawn[name] * self.parts + self.part", "self.drawn[name]", DOCUMENTS),

    ("vocab.py", "place += [max(first, last - n) for n in range(len(written), 0, -1)]", "place += [first for n in written]", DOCUMENTS),
    ("vocab.py", 'reply = int(message["role"] == "assistant")', "reply = 1", VOCAB),
    ("vocab.py", 'no_loss = {self.speech["speech"], self.speech["end_speech"], self.eos, *self.begin}', "no_loss = set()", f"{VOCAB} {DOCUMENTS}"),
    ("vocab.py", "loss=[int(at >= first)", "loss=[int(at > first)", VOCAB),
    ("vocab.py", "total = -(-(first + 2 + k) // 128) * 128", "total = first + 2 + k", VOCAB),
    ("vocab.py", "return sorted({*self.bytes_of, *self.stop})", "return sorted(self.bytes_of)", f"{VOCAB} {EVALUATE}"),
    ("vocab.py", 'return self.begin + self.span(units) + self.encode(CUE)', "return self.begin + self.span(units)", f"{VOCAB} {CHAT} tests/test_speedrun.py"),
    ("vocab.py", "tolist() if i != NO_ID]", "tolist()]", VOCAB),

    ("model.py", "writers = 2 * config.num_hidden_layers if writer else 1", "writers = 1", MODEL),
    ("model.py", "sample(logits / temperature, top_p, sampler)", "sample(logits / temperature, 1.0, sampler)", MODEL),
    ("model.py", "torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)", "torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)", MODEL),
    ("model.py", "eps=self.eps)", "eps=1e-2)", MODEL),
    ("model.py", 'turn * (keep + (1 - keep) / s["factor"])', "turn", MODEL),
    ("model.py", "q, k = self.q_norm(q), self.k_norm(k)", "q, k = self.q_norm(q), k", MODEL),
    ("model.py", "ids = torch.where(ended, last, ids)", "pass", MODEL),
    ("model.py", "lora.linear.weight += lora.scale * (lora.B @ lora.A)", "lora.linear.weight += lora.B @ lora.A", f"{PRETRAIN} -k lora"),
    ("model.py", "used.mean(0) + 0.1 * used.std(0)", "used.mean(0) + 1.0 * used.std(0)", MODEL),
    ("model.py", '"torch_dtype": str(dtype).removeprefix("torch.")', '"torch_dtype": "float16"', MODEL),
    ("model.py", "start = torch.minimum(first, torch", "start = 0 * torch.minimum(first, torch", MODEL),

    ("fused.py", "visible = (past & (key >= start[:, :, None]))[:, None]", "visible = past[None, None]", FUSED),
    ("fused.py", "scatter_add_(-1, right, -value)", "scatter_add_(-1, right, -1.0 + 0 * value)", FUSED),
    ("fused.py", "logits.masked_fill_(barred, -math.inf)", "pass", FUSED),
    ("fused.py", "l = l * old + tl.sum(p, 1)", "l = l + tl.sum(p, 1)", FUSED),
    ("fused.py", 'ds = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - go[:, None])', 'ds = p * tl.dot(g, tl.trans(v), input_precision="ieee")', FUSED),
    ("fused.py", "unseen = (key > key[:, None]) | (key < start[:, :, None])", "unseen = (key > key[:, None]) | (key < 0 * start[:, :, None])", FUSED),

    ("merge.py", "lam * speech_delta + mu * instruct_delta", "mu * speech_delta + lam * instruct_delta", MERGE),
    ("merge.py", "rounded = merged.to(speech.dtype)", "rounded = merged.bfloat16().to(speech.dtype)", MERGE),
    ("merge.py", "rounded[markers] = instruct[markers].to(speech.dtype)", "pass", MERGE),
    ("merge.py", "            models.finite(speech, name, a, b)\n", "", MERGE),
    ("merge.py", "models.finite(rounded, name, a, b)", "models.finite(merged, name, a, b)", MERGE),
    ("merge.py", "yield a, speech, None", "yield a, speech * 0, None", MERGE),
    ("merge.py", '"instruct": math.sqrt(part["instruct"] / base)', '"instruct": (part["instruct"] / base)', MERGE),
    ("merge.py", "self.begin[name] + first * rows.shape[1]", "self.begin[name] + 0 * rows.shape[1]", MERGE),

    ("hubert.py", "mean_loss(logits[at], targets[at]) + ", "", HUBERT),
    ("hubert.py", "max(1, len(targets))", "len(targets)", HUBERT),
    ("hubert.py", "(self.receptive_field() - self.hop()) // 2", "(self.receptive_field() - self.hop()) // 4", HUBERT),
    ("hubert.py", "x = x * real[:, None]", "pass", HUBERT),
    ("hubert.py", "samples = samples * torch.rsqrt(", "samples = samples * torch.sqrt(", HUBERT),
    ("hubert.py", "for block in self.layers[:layer]:", "for block in self.layers[:layer + 1]:", HUBERT),

    ("audio.py", "return 0.95 * min(1, up / down)", "return 0.5 * min(1, up / down)", AUDIO),
    ("audio.py", "middle = (np.cumsum(durations) - durations / 2) / rate", "middle = np.cumsum(durations) / rate", f"{AUDIO} {DOCUMENTS}"),
    ("audio.py", "samples.mean(axis=1)", "samples[:, 0]", AUDIO),
    ("audio.py", "followlinks=True", "followlinks=False", AUDIO),
    ("audio.py", "features.std(0) + 1e-3", "features.std(0) + 1e3", AUDIO),
    ("audio.py", "table[before] + share * rise[before]", "table[before]", AUDIO),

    ("muon.py", 'average.lerp_(p.grad, 1 - group["momentum"])', "average.copy_(p.grad)", MUON),
    ("muon.py", 'size = 0.2 * shape[1] ** 0.5 * group["lr"]', 'size = 0.2 * group["lr"]', MUON),
    ("muon.py", "p.add_(step if lie else step.T", "p.add_(step if lie else -step.T", MUON),
    ("muon.py", "x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)", "x", MUON),
    ("muon.py", "ITERATIONS = 5", "ITERATIONS = 2", MUON),
    ("muon.py", "else p @ gram @ p", "else gram @ p", MUON),

    ("runs.py", "if half > WORTH_IT * full", "if half < WORTH_IT * full", RUNS),
    ("runs.py", "enabled=dtype == half)", "enabled=False)", RUNS),
    ("runs.py", 'os.environ.setdefault("GOMP_SPINCOUNT", "1000")', 'os.environ["GOMP_SPINCOUNT"] = "1000"', RUNS),
    ("runs.py", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", WEIGHTS),
    ("runs.py", "for name in scratch:", "for name in ():", WEIGHTS),
    ("runs.py", "out = out.resolve() if out.is_symlink() else out", "pass", WEIGHTS),
    ("runs.py", "differs = [name for name in now if before.get(name) != now[name]]", "differs = []", PRETRAIN),
    ("runs.py", "if before not in (None, fingerprint(path)):", "if False:", f"{WEIGHTS} {MERGE}"),
    ("weights.py", "if not torch.isfinite(tensor).all():", "if False:", WEIGHTS),
    ("weights.py", "missing or unused:", "missing:", WEIGHTS),

    ("whisper.py", "loud.max() - 8", "loud.max() - 4", WHISPER),
    ("whisper.py", "causal=past is None", "causal=False", WHISPER),
    ("whisper.py", "no[self.times : said[-1] + int(", "no[self.times : 0 * said[-1] + int(", WHISPER),
    ("whisper.py", "reached = round(time * rate) if followed else len(window)", "reached = len(window)", WHISPER),
    ("whisper.py", "no[self.times + 1 + round(FIRST_BY / TICK) :] = True", "pass", WHISPER),
    ("whisper.py", "max(best[t, f], best[t, f + 1], best[t + 1, f])", "max(best[t, f], best[t + 1, f])", WHISPER),

    ("desta.py", "memory_key_padding_mask=silent", "memory_key_padding_mask=None", DESTA),
    ("desta.py", "self.mixing.softmax(-1)", "torch.full_like(self.mixing, 1 / taps)", DESTA),
    ("desta.py", "bears[n, len(asked) : len(asked) + len(said)] = True", "bears[n, : len(asked) + len(said)] = True", DESTA),
    ("desta.py", "torch.manual_seed(args.seed << 32 | step)", "pass", DESTA),
    ("desta.py", "file.truncate(2 * per_frame * sum(counts))", "pass", DESTA),
    ("desta.py", 'listener.said[first] = row["text"]', "pass", DESTA),
    ("runs.py", "if fingerprint(path) != digest:", "if False:", DESTA),
    ("listen.py", "written_down(model, vocab, ears(samples)[0])", "''", MANNER),

    ("prosody.py", "peak, here + HIGHER * octave, -np.inf", "peak, here - 5 * HIGHER * octave, -np.inf", PROSODY),
    ("prosody.py", "np.where(bend < 0, bend, -1)", "np.where(bend < 0, -bend, -1)", PROSODY),
    ("prosody.py", "here[at] > VOICED) & (loud", "here[at] > 0.0) & (loud", PROSODY),
    ("prosody.py", "STRAIN * np.log(n / want) ** 2", "0.0 * np.log(n / want) ** 2", PROSODY),
    ("prosody.py", "best = cost + np.append(cut, 0.0)", "best = cost + 0.0 * np.append(cut, 0.0)", PROSODY),
    ("prosody.py", "np.median(tone) - speaker", "np.median(tone)", PROSODY),
    ("prosody.py", "np.log2(lasts / letters)", "np.log2(lasts)", PROSODY),
    ("prosody.py", 'lengths[n] - speaker["rate"]', "lengths[n]", PROSODY),
    ("prosody.py", 'together(loud[a:b]) - speaker["level"]', "together(loud[a:b])", PROSODY),
    ("prosody.py", "(10 ** (loud / 10)).mean()", "(10 ** (loud / 20)).mean()", PROSODY),
    ("prosody.py", "if gap >= PAUSE:", "if gap >= 0:", PROSODY),
    ("prosody.py", "UNVOICED if np.isnan(value) else row", "0 if np.isnan(value) else row", PROSODY),
    ("documents.py", "below = f", "below = '' and f", PROSODY),
    ("documents.py", "where > 1 - ends", "where > ends", PROSODY),
    ("vocab.py", "ids = self.encode(units.text()) + [", "ids = [", PROSODY),
    ("audio.py", "samples = load(self.path, begin, end)", "samples = load(self.path)[begin:end]", f"{TOKENIZE} -k any_length"),
    ("manner.py", "told = [manner.told(relation, line) for relation in relations]", "told = [manner.told(relation, line) for relation in relations[1:]]", MANNER),
    ("manner.py", "answer: {caption}. {said}", "answer: {said}", MANNER),
    ("manner.py", "page = written(line, rng)", "pass", MANNER),
    ("manner.py", 'reader.read(out / name, line, manner, "near")', 'reader.read(out / name, line, manner, "heard")', MANNER),
    ("manner.py", "rate, pitch, manner.stress)", "rate, pitch, None)", MANNER),
    ("benchmark.py", r'(?<!\w){re.escape(normal(answer))}$', '{re.escape(normal(answer))}$', MANNER),
    ("benchmark.py", 'args.transcriber and row.get("audio")', 'None', MANNER),
    ("listen.py", "if transcriber and not isinstance(ears, prosody.Ears):", "if False:", MANNER),
    ("prosody.py", "    audio.lengths(rows)", "    #", PROSODY),
    ("whisper.py", "    audio.lengths(rows)", "    #", PROSODY),
    ("documents.py", "if caption and where < before", "if where < before", PROSODY),
    ("vocab.py", "sum(bool(word) for word, _ in self)", "len(self)", MANNER),
    ("benchmark.py", 'if row.get("group") == group]', 'if row.get("group") != group]', MANNER),

    ("toy.py", "unseen = dict.fromkeys(pairs, set(rng.sample(range(n), n // 3)))", "unseen = dict.fromkeys(pairs, set())", TOY),
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
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out", ".venv", ".weights", "__pycache__"))
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
