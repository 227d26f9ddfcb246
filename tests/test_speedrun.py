"""The whole recipe, shrunken, end to end; and that every folder of it is a citizen of the Hugging Face world."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import weights
from conftest import ROOT, call, shared
from model import LM, Config
from vocab import Vocab

MODELS = ["base", "instruct", "speech", "merged"]


def test_every_step_leaves_its_result_and_what_made_it(speedrun):
    for name in ("toy", "base", "instruct", "codebook_mfcc", "units_mfcc", "hubert", "codebook", "units", "speech", "merged"):
        recipe = json.loads((speedrun / name / "recipe.json").read_text())
        assert recipe["command"].startswith("python ") and recipe["versions"]["torch"]
    assert not list(speedrun.rglob("*.partial")) and not list(speedrun.rglob("checkpoint.pt"))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_every_model_folder_with_our_logits_and_ids(speedrun, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(speedrun / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(speedrun / name)
    ours, vocab = LM.load(speedrun / name), Vocab(speedrun / name)
    text = "what is the capital of france? Ünï 🎧"
    assert tokenizer.encode(text, add_special_tokens=False) == vocab.encode(text)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in vocab.special} == vocab.special and len(tokenizer) == vocab.size == ours.config.vocab_size
    ids = torch.randint(0, vocab.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = theirs(ids).logits, ours(ids)
    assert ((a - b).norm() / a.norm()).item() < 1e-5


def test_the_real_recipes_commands_run_on_the_real_shape_and_tokenizer_of_qwen2_5(speedrun, tmp_path, monkeypatch, capsys):
    """Random weights, two of its 24 blocks, bf16: what a user of open weights types, from --init to an answer, and the folder in transformers."""
    transformers = pytest.importorskip("transformers")
    for seed, name in enumerate(("base", "instruct")):
        shutil.copytree(shared("tokenizers/qwen2.5"), tmp_path / name)
        raw = json.loads(shared("configs/qwen2.5-0.5b.json").read_text()) | {"num_hidden_layers": 2, "max_window_layers": 2}
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        LM.fresh(Config.read(tmp_path / name), seed).bfloat16().save(tmp_path / name)
    at = lambda name: str(tmp_path / name)
    call(["pretrain.py", "--init", at("base"), "--units", str(speedrun / "units"), "--text", str(speedrun / "toy/base.jsonl"), "--lr", "1e-4",
          "--steps", "2", "--rows", "1", "--length", "64", "--device", "cpu", "--out", at("speech")], monkeypatch)
    call(["merge.py", "--base", at("base"), "--instruct", at("instruct"), "--speech", at("speech"), "--out", at("merged")], monkeypatch)
    monkeypatch.setattr("chat.LIMIT", 4)
    with pytest.raises(SystemExit) as end:
        call(["chat.py", at("merged"), str(speedrun / "question.wav"), "--device", "cpu"], monkeypatch)
    assert not end.value.code and "units]" in capsys.readouterr().out
    vocab, speech = Vocab(at("merged")), weights.read_json(tmp_path / "merged/speech.json")
    assert speech["speech"] == 151936 and vocab.size == 152064 and vocab.span([0]) == [151936, 151938, 151937], "new rows come after the padded embedding"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(at("merged"), dtype=torch.float32).eval()
    ids = torch.tensor([vocab.turn([{"role": "user", "content": np.array([3, 1, 4])}])])
    with torch.no_grad():
        a, b = theirs(ids).logits, LM.load(at("merged"), dtype=torch.float32)(ids)
    assert ((a - b).norm() / a.norm()).item() < 1e-5


def test_transformers_loads_the_hubert_of_the_run_with_our_features(speedrun):
    transformers = pytest.importorskip("transformers")
    from hubert import Hubert
    theirs, samples = transformers.HubertModel.from_pretrained(speedrun / "hubert").eval(), torch.randn(1, 8000)
    with torch.no_grad():
        wanted = theirs(torch.nn.functional.pad(samples, (40, 40)), output_hidden_states=True).hidden_states[4]
        got = Hubert.load(speedrun / "hubert")(samples, 4)
    assert ((wanted - got).norm() / wanted.norm()).item() < 1e-4


def test_the_script_skips_what_is_done_and_stops_at_the_first_failure(tmp_path):
    """speedrun.sh itself, in a folder of stand-ins: each script writes its --out, or fails where told to."""
    stand_in = "import sys, os\nout = sys.argv[sys.argv.index('--out') + 1] if '--out' in sys.argv else None\nprint('RAN', out)\n" \
               "if out and out.endswith(os.environ.get('FAIL', '-')): sys.exit(1)\nif out: os.makedirs(out)\n"
    (tmp_path / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text())
    for name in ("toy", "pretrain", "tokenize_audio", "hubert", "merge", "evaluate", "chat"):
        (tmp_path / f"{name}.py").write_text(stand_in)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    run = lambda **env: subprocess.run(["bash", tmp_path / "speedrun.sh", "7"], capture_output=True, text=True,
                                       env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **env})
    broken = run(FAIL="codebook")
    assert broken.returncode != 0 and "RAN out/seed7/units_mfcc" in broken.stdout and "RAN out/seed7/speech" not in broken.stdout
    again = run()
    assert again.returncode == 0 and "== out/seed7/units_mfcc is there" in again.stdout and "RAN out/seed7/units_mfcc" not in again.stdout
    assert "RAN out/seed7/codebook\n" in again.stdout and "RAN out/seed7/table.json" in again.stdout and again.stdout.rstrip().endswith("RAN None")
    assert Path(tmp_path / "out/seed7/merged").is_dir()
