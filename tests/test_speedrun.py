"""The whole recipe, shrunken, end to end; and that every folder of it is a citizen of the
Hugging Face world.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from conftest import ROOT, call, first_on_path, shared
from hubert import Config as HubertConfig
from hubert import Hubert
from model import LM, Config
from vocab import Vocab

MODELS = ["base", "instruct", "speech", "merged"]


def test_every_step_leaves_its_result_and_what_made_it(speedrun):
    for name in (
        "toy", "base", "instruct", "codebook_mfcc", "units_mfcc", "hubert", "codebook", "units",
        "speech", "merged",
    ):
        recipe = json.loads((speedrun / name / "recipe.json").read_text())
        assert recipe["command"].startswith("python ") and recipe["versions"]["torch"]
    assert not list(speedrun.rglob("*.partial"))
    assert not list(speedrun.rglob("checkpoint.pt"))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_every_model_folder_with_our_logits_and_ids(speedrun, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(speedrun / name).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(speedrun / name)
    ours, vocab = LM.load(speedrun / name), Vocab(speedrun / name)
    text = "what is the capital of france? Ünï 🎧"
    assert tokenizer.encode(text, add_special_tokens=False) == vocab.encode(text)
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in vocab.special} == vocab.special
    assert len(tokenizer) == vocab.size == ours.config.vocab_size
    ids = torch.randint(0, vocab.size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = theirs(ids).logits, ours(ids)
    assert ((a - b).norm() / a.norm()).item() < 1e-5


def test_the_real_recipes_commands_run_on_the_tokenizer_and_rows_of_qwen2_5(
    speedrun, tmp_path, monkeypatch, capsys
):
    """Random weights, two narrow blocks below its 151,936 rows, bf16: what a user of open
    weights types, from --init to an answer, and the folder in transformers.
    """
    transformers = pytest.importorskip("transformers")
    for seed, name in enumerate(("base", "instruct")):
        shutil.copytree(shared("tokenizers/qwen2.5"), tmp_path / name)
        raw = json.loads(shared("configs/qwen2.5-0.5b.json").read_text())
        raw |= {
            "num_hidden_layers": 2,
            "max_window_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 256,
        }
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        LM.fresh(Config.read(tmp_path / name), seed).bfloat16().save(tmp_path / name)
    config = HubertConfig(
        **{
            name: value
            for name, value in json.loads(
                shared("configs/hubert-base.contentvec-rvc.json").read_text()
            ).items()
            if name in vars(HubertConfig())
        }
        | {"num_hidden_layers": 2}
    )
    (tmp_path / "hubert").mkdir()
    Hubert.fresh(config, 0).save(tmp_path / "hubert")
    speech = tmp_path / "LibriSpeech"
    speech.mkdir()
    for path in sorted(
        shared("librispeech_mini").rglob("*.flac"), key=lambda path: path.stat().st_size
    )[:5]:
        (speech / path.name).symlink_to(path)
    (speech / "x.trans.txt").write_text(
        "".join(f"{path.stem} A DOZEN WORDS SAID HERE\n" for path in speech.glob("*.flac"))
    )
    at = lambda name: str(tmp_path / name)
    small = {
        "fit": "--layer 2 --k 20 --frames 2000 --minibatch 500 --device cpu",
        "encode": "--device cpu",
        "--init": "--steps 2 --batch 1 --length 512 --accumulate 1 --device cpu",
    }
    script = (ROOT / "speedrun_real.sh").read_text().replace("\\\n", "")
    names = {
        "weights": str(tmp_path),
        "speech": str(speech),
        "out": str(tmp_path),
        "base": at("base"),
        "instruct": at("instruct"),
        "hubert": at("hubert"),
        "layer": "9",
        "hearing": re.search(r'^hearing="(.*)"', script, re.M)[1],
    }

    def fill(line):
        line = re.sub(r"\${\w+:-(\w+)}", r"\1", line)
        return re.sub(r"\$(\w+)", lambda name: names[name[1]], line)

    lines = re.findall(r"^(?:step|  python(?= -c)) (.+)$", script, re.M)
    assert [line.split()[0] for line in lines] == [
        "tokenize_audio.py", "tokenize_audio.py", "-c", "pretrain.py", "merge.py",
    ]
    assert re.findall(r"^  step (\w+.py \w+)", script, re.M) == [
        "whisper.py words", "tokenize_audio.py fit", "tokenize_audio.py encode",
        "hubert.py train",
    ], "with a Whisper, and without a HuBERT"
    for line in lines:
        line = fill(line)
        if line.startswith("-c"):
            subprocess.run(f"{sys.executable} {line}", shell=True, check=True)
            (tmp_path / "text.partial").rename(tmp_path / "text.txt")
        else:
            words = shlex.split(line)
            call(words + small.get(words[1], "").split(), monkeypatch)
    monkeypatch.setattr("chat.LIMIT", 4)
    with pytest.raises(SystemExit) as end:
        call(
            [
                "chat.py", at("merged"), str(next(speech.iterdir()).with_suffix(".flac")),
                "--device", "cpu",
            ],
            monkeypatch,
        )
    assert not end.value.code and "units]" in capsys.readouterr().out
    vocab, heard = Vocab(at("merged")), runs.read_json(tmp_path / "merged/speech.json")
    assert heard["speech"] == 151936
    assert vocab.size == 152064
    assert vocab.span([0]) == [151936, 151938, 151937], "new rows come after the padded embedding"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        at("merged"), dtype=torch.float32
    ).eval()
    ids = torch.tensor([vocab.turn([{"role": "user", "content": np.array([3, 1, 4])}])])
    with torch.no_grad():
        a, b = theirs(ids).logits, LM.load(at("merged"), dtype=torch.float32)(ids)
    assert ((a - b).norm() / a.norm()).item() < 1e-5


def test_transformers_loads_the_hubert_of_the_run_with_our_features(speedrun):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.HubertModel.from_pretrained(speedrun / "hubert").eval()
    samples = torch.randn(1, 8000)
    with torch.no_grad():
        wanted = theirs(
            torch.nn.functional.pad(samples, (40, 40)), output_hidden_states=True
        ).hidden_states[4]
        got = Hubert.load(speedrun / "hubert")(samples, 4)
    assert ((wanted - got).norm() / wanted.norm()).item() < 1e-4


def test_the_script_skips_what_is_done_and_stops_at_the_first_failure(tmp_path):
    """speedrun.sh itself, in a folder of stand-ins: each script writes its --out, or fails
    where told to.
    """
    stand_in = (
        "import sys, os\n"
        "out = sys.argv[sys.argv.index('--out') + 1] if '--out' in sys.argv else None\n"
        "print('RAN', out)\n"
        "if out and out.endswith(os.environ.get('FAIL', '-')): sys.exit(1)\n"
        "if out: os.makedirs(out)\n"
    )
    (tmp_path / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text())
    for name in ("toy", "pretrain", "tokenize_audio", "hubert", "merge", "evaluate", "chat"):
        (tmp_path / f"{name}.py").write_text(stand_in)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)

    def run(**env):
        words = ["bash", tmp_path / "speedrun.sh", "7"]
        env = first_on_path(tmp_path / "bin") | env
        return subprocess.run(words, capture_output=True, text=True, env=env)

    broken = run(FAIL="codebook")
    assert broken.returncode != 0
    assert "RAN out/seed7/units_mfcc" in broken.stdout
    assert "RAN out/seed7/speech" not in broken.stdout
    again = run()
    assert again.returncode == 0
    assert "== out/seed7/units_mfcc is there" in again.stdout
    assert "RAN out/seed7/units_mfcc" not in again.stdout
    assert "RAN out/seed7/codebook\n" in again.stdout
    assert "RAN out/seed7/table.json" in again.stdout
    assert again.stdout.rstrip().endswith("RAN None")
    assert Path(tmp_path / "out/seed7/merged").is_dir()


def test_the_real_recipe_knows_of_other_clips_and_of_a_whisper_that_came_later(tmp_path):
    """speedrun_real.sh itself, with a python that does nothing."""
    for name in ("base", "instruct", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\n")
    (tmp_path / "bin/python").chmod(0o755)
    clips = tmp_path / "clips.jsonl"
    clips.write_text('{"audio": "a.wav"}\n')

    def run(speech=clips):
        words = ["bash", ROOT / "speedrun_real.sh", tmp_path, speech, tmp_path / "out"]
        env = first_on_path(tmp_path / "bin")
        return subprocess.run(words, capture_output=True, text=True, env=env)

    assert run().returncode == run().returncode == 0
    (tmp_path / "whisper").mkdir()
    later = run()
    assert later.returncode == 1
    assert "no-whisper no-hubert, not of" in later.stderr
    (tmp_path / "whisper").rmdir()
    clips.write_text('{"audio": "b.wav"}\n')
    assert run().returncode == 1

    # Of a folder, another file.
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech/a.wav").write_text("")
    assert run(tmp_path / "speech").returncode == run(tmp_path / "speech").returncode == 0
    (tmp_path / "speech/b.wav").write_text("")
    assert run(tmp_path / "speech").returncode == 1
