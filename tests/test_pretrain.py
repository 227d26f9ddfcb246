import argparse
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import align
import pretrain
import runs
import weights
from conftest import ROOT, call
from model import LM, add_lora, merge_lora
from pretrain import learning_rate, next_token_loss
from vocab import Vocab


def test_the_rate_warms_up_then_falls_to_a_tenth():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == 0.2
    assert rates[4] == rates[5] == 1.0
    assert math.isclose(rates[99], 0.1, abs_tol=1e-3)
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_every_document_is_read_at_its_own_pace_from_position_0_on():
    start = torch.tensor([[0] * 100 + [100] * 156] * 8)
    even, uneven = (
        align.position_gaps(start, most, torch.Generator().manual_seed(0)) for most in (1, 8)
    )
    assert torch.equal(even, torch.arange(256) - start)
    assert (uneven.gather(1, start) == 0).all()
    assert (uneven >= even).all()
    assert 1.3 < uneven[:, 255].float().mean() / 155 < 2.8
    gaps = uneven.diff(dim=1)[:, 100:]
    assert gaps.min() == 1 and 0.6 < (gaps == 1).float().mean() < 0.9 and gaps.max() < 16
    together = (gaps[:, 1:] == 1) & (gaps[:, :-1] == 1) & (gaps > 1).any(1, keepdim=True)
    alone = (gaps[:, :-1] == 1) & (gaps > 1).any(1, keepdim=True)
    assert (
        together.sum() > 0.8 * alone.sum()
    ), "gaps come in stretches: behind no gap there mostly is none"


def test_a_difference_counts_by_how_much_texts_differ_there():
    torch.manual_seed(0)
    loud = torch.cat([5 * torch.randn(4000, 4), 0.2 * torch.randn(4000, 60)], dim=1)
    states = torch.nn.functional.rms_norm(loud, (64,))
    M, a, b = align.whitening(states[:2000]), states[:2000], states[2000:]
    assert abs((((a - b) @ M) * (a - b)).mean() - 2) < 0.05, "unrelated states are 2 apart"
    first, last = torch.eye(64)[0], torch.eye(64)[63]
    assert last @ M @ last > 10 * (first @ M @ first) > 0


def test_a_model_that_thinks_of_speech_as_of_text_is_not_unlike_and_a_deaf_one_is(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"transcribe": 1})
    batch, first_new = documents.batch(2, 256), documents.vocab.speech["speech"]

    def apart(batch):
        states = []
        with torch.no_grad():
            model.model(batch["ids"], start=batch["start"], states=states)
        return [part.item() for part in align.distillation(states, batch, model, first_new)]

    named, unlike = apart(batch)
    assert named > 1 and unlike > 0.1
    text = stream({"text": 1}).batch(2, 256)
    same = text | {
        "read": text["ids"],
        "read_start": text["start"],
        "place": torch.arange(256).expand(2, 256),
    }
    assert max(apart(same)) < 1e-9, "its own states are alike, and nothing spoken wants a name"


def test_a_model_of_one_block_has_its_words_to_learn_and_no_later_states(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"interleave": 1})
    model.model.layers = model.model.layers[:1]
    batch, states = documents.batch(2, 256), []
    with torch.no_grad():
        model.model(batch["ids"], start=batch["start"], states=states)
        named, unlike = align.distillation(
            states, batch, model, documents.vocab.speech["speech"]
        )
    assert named > 0
    assert torch.isfinite(unlike)


@pytest.mark.parametrize(
    "layers, embeddings", [((0, 1), "all"), ((0.5, 1), "special"), ((0, 1), "new")]
)
def test_every_matrix_is_stepped_by_muon_and_all_else_by_adamw_once(speedrun, layers, embeddings):
    model = LM.load(speedrun / "base")
    body, rows = pretrain.unfreeze(model, layers, embeddings)
    muon, adamw = pretrain.two_optimizers(body, rows, 1e-3, 0.0, 10, torch.float32)
    of = lambda optimizer: [p for group in optimizer.param_groups for p in group["params"]]
    assert all(p.dim() == 2 for p in of(muon))
    assert {id(p) for p in of(muon)} == {id(p) for p in body if p.dim() == 2}
    trained = [id(p) for p in of(muon) + of(adamw)]
    assert len(trained) == len(set(trained))
    assert set(trained) == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="none of 2 blocks"):
        pretrain.unfreeze(model, (0.6, 0.9), "all")


# --- the loop ---


def rows_of_units(vocab):
    return range(vocab.speech["first_unit"], vocab.speech["first_unit"] + vocab.speech["k"])


def test_text_targets_compete_with_text_rows_only_and_units_with_units(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"interleave": 1})
    units, batch = rows_of_units(documents.vocab), documents.batch(2, 256)
    with torch.no_grad():
        _, ce, is_unit, _ = next_token_loss(model, batch, units)
        logits = model(batch["ids"], start=batch["start"])[batch["loss"] > 0]
    target = batch["target"][batch["loss"] > 0]
    n = int(is_unit.nonzero()[0])
    assert math.isclose(
        ce[n], -logits[n, units.start : units.stop].log_softmax(-1)[target[n] - units.start],
        rel_tol=1e-4,
    )
    n = int((~is_unit).nonzero()[0])
    text = torch.cat([logits[n, : units.start], logits[n, units.stop :]])
    assert target[n] < units.start
    assert math.isclose(ce[n], -text.log_softmax(-1)[target[n]], rel_tol=1e-4)


def test_speech_training_leaves_text_rows_and_norms_to_the_bit(speedrun):
    base, speech = weights.Tensors(speedrun / "base"), weights.Tensors(speedrun / "speech")
    n = base.shape("model.embed_tokens.weight")[0]
    moved = {
        name
        for name in base
        if not torch.equal(base[name], speech[name][:n] if "embed" in name else speech[name])
    }
    assert moved and all("_proj" in name for name in moved)


def test_behaviour_in_the_upper_blocks_moves_no_word_but_the_chat_markers_and_full_depth_does(
    speedrun, tmp_path, monkeypatch
):
    vocab = Vocab(speedrun / "base")
    base = weights.Tensors(speedrun / "base")["model.embed_tokens.weight"]
    moved = lambda folder: {
        int(i)
        for i in (weights.Tensors(folder)["model.embed_tokens.weight"] != base).any(1).nonzero()
    }
    upper = moved(speedrun / "instruct")
    assert (
        {vocab.special["<|im_start|>"], vocab.special["<|im_end|>"]}
        <= upper
        <= set(vocab.special.values())
    )
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"),
            "--chat", str(speedrun / "toy/chat.jsonl"), "--layers", "0:1",
            "--embeddings", "all", "--steps", "2", "--batch", "2",
            "--out", str(tmp_path / "all"),
        ],
        monkeypatch,
    )
    assert len(moved(tmp_path / "all")) > len(upper)


def test_targets_that_are_silent_or_worth_nothing_bear_no_loss(speedrun, stream):
    model = LM.load(speedrun / "speech")
    documents = stream({"interleave": 1, "transcribe": 1})
    units, batch = rows_of_units(documents.vocab), documents.batch(2, 256)
    with torch.no_grad():
        whole, ce, is_unit, kind = next_token_loss(model, batch, units, unit_weight=0.5)
        text, ce_text, none, _ = next_token_loss(model, batch, units, unit_weight=0.0)
        _, _, heard, left = next_token_loss(model, batch, units, masked=batch["kind"] == 0)
    assert is_unit.any()
    assert not none.any()
    assert torch.allclose(ce_text, ce[~is_unit], atol=1e-5)
    assert set(kind.tolist()) == {0, 1}
    assert heard[left == 0].all()
    assert heard.any()
    assert not heard[left == 1].all(), "what is masked is text"
    worth = torch.where(is_unit, 0.5, 1.0)
    assert torch.allclose(whole, (ce * worth).sum() / worth.sum(), rtol=1e-4)
    assert torch.allclose(text, ce_text.mean(), rtol=1e-4)

    batch["loss"] *= torch.where(batch["kind"] == 0, 8, 1)
    with torch.no_grad():
        heavy, ce, is_unit, kind = next_token_loss(model, batch, units, unit_weight=0.5)
    worth = torch.where(is_unit, 0.5, 1.0) * torch.where(kind == 0, 8, 1)
    assert torch.allclose(heavy, (ce * worth).sum() / worth.sum(), rtol=1e-4)
    assert (heavy - whole).abs() > 1e-3


def test_filtered_changes_are_not_felt_by_text_and_are_by_what_text_never_sends(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"text": 1})
    body, _ = pretrain.unfreeze(model, (0, 1), "new")
    filters = align.text_filters(model, body, [documents.batch(8, 256)], 1e6)
    assert filters.keys() == set(body)
    inputs, hook = [], model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, x: inputs.append(x[0].detach().flatten(0, -2))
    )
    model.model(documents.batch(1, 64)["ids"])
    hook.remove()
    weight = model.model.layers[0].mlp.down_proj.weight
    torch.manual_seed(0)
    change, text = torch.randn_like(weight), inputs[0]
    felt = lambda d, x: (x @ d.T).norm().item()
    assert felt(change @ filters[weight], text) < 0.05 * felt(
        change, text
    ), "text hardly feels what is left of a change"
    # Directions that text uses least.
    silent = torch.linalg.eigh((text.T @ text).double())[1][:, :8].T.float()
    weak = align.text_filters(model, body, [stream({"text": 1}).batch(8, 256)], 1e-3)[weight]
    assert felt(change @ weak, silent) > 0.9 * felt(
        change, silent
    ), "and what text leaves silent stays"


def test_keeping_text_keeps_its_loss_where_free_training_does_not(speedrun, tmp_path, monkeypatch):
    vocab, far = Vocab(speedrun / "base"), {}
    ids = torch.tensor([vocab.text("the capital of france is paris")[0]])
    with torch.no_grad():
        before = LM.load(speedrun / "base").model(ids)
    for strength in ("0", "100"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--units", str(speedrun / "units"), "--text", str(speedrun / "toy/base.jsonl"),
                "--steps", "6", "--batch", "2", "--rows-first", "0", "--keep-text", strength,
                "--device", "cpu", "--out", str(tmp_path / strength),
            ],
            monkeypatch,
        )
        with torch.no_grad():
            far[strength] = (LM.load(tmp_path / strength).model(ids) - before).norm().item()
    assert far["100"] < 0.2 * far["0"]


def test_keeping_text_wants_text(speedrun, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--keep-text 0.\d+: wants --text"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--units", str(speedrun / "units"), "--steps", "1", "--device", "cpu",
                "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_speech_without_text_says_that_there_is_nothing_to_predict(speedrun, tmp_path, monkeypatch):
    shutil.copytree(speedrun / "units", tmp_path / "units")
    entries = [
        {name: entry[name] for name in ("audio", "seconds")}
        for entry in runs.read_lines(tmp_path / "units/manifest.jsonl")
    ]
    (tmp_path / "units/manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    with pytest.raises(ValueError, match="no text to predict.*--unit-loss above 0"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--units", str(tmp_path / "units"), "--mix", "interleave=1", "--keep-text", "0",
                "--unit-loss", "0", "--steps", "2", "--batch", "1", "--device", "cpu",
                "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_chats_too_can_keep_text(speedrun, tmp_path, monkeypatch):
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"),
            "--chat", str(speedrun / "toy/chat.jsonl"),
            "--text", str(speedrun / "toy/base.jsonl"), "--keep-text", "0.1", "--steps", "2",
            "--batch", "1", "--device", "cpu", "--out", str(tmp_path / "x"),
        ],
        monkeypatch,
    )


@pytest.mark.parametrize("stage", ["base", "speech"])
def test_a_killed_run_resumes_to_the_bit(stage, speedrun, tmp_path, monkeypatch):
    common = ["--steps", "6", "--batch", "2", "--seed", "0", "--device", "cpu"]
    words = {
        "base": [
            "--size", "micro", "--tokenizer", str(speedrun / "toy/tokenizer"),
            "--text", str(speedrun / "toy/base.jsonl"),
        ],
        "speech": [
            "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
            "--text", str(speedrun / "toy/base.jsonl"), "--rows-first", "0.34",
        ],
    }[stage]
    command = ["pretrain.py", *words, *common]
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    call([*command, "--out", str(tmp_path / "straight")], monkeypatch)

    def killed(step, *rest, real=learning_rate):
        # In its sixth step, one past the checkpoint at four.
        if step == 5:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(pretrain, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        call([*command, "--out", str(tmp_path / "again")], monkeypatch)
    monkeypatch.setattr(pretrain, "learning_rate", learning_rate)
    assert not (tmp_path / "again").exists()
    assert torch.load(tmp_path / "again.partial/checkpoint.pt", weights_only=True)["step"] == 4
    with pytest.raises(ValueError, match="another steps"):
        call([*command, "--steps", "7", "--out", str(tmp_path / "again")], monkeypatch)
    checkpoint = tmp_path / "again.partial/checkpoint.pt"
    whole, saved = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    older = {name: value for name, value in saved.items() if name != "optimizers"}
    for damage in (
        lambda: checkpoint.write_bytes(whole[:1000]), lambda: checkpoint.write_bytes(b""),
        lambda: torch.save(older, checkpoint),
    ):
        damage()
        with pytest.raises(ValueError, match="no checkpoint of this version, or a damaged one"):
            call([*command, "--out", str(tmp_path / "again")], monkeypatch)
        assert checkpoint.exists(), "it is left to its owner"
    checkpoint.write_bytes(whole)
    call([*command, "--out", str(tmp_path / "again")], monkeypatch)
    a, b = weights.Tensors(tmp_path / "straight"), weights.Tensors(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "again/checkpoint.pt").exists()


def test_a_full_disk_says_so_and_keeps_the_checkpoint_before(speedrun, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(step, *rest, real=learning_rate):
        if step == 2:
            # No file may grow beyond this.
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        return real(step, *rest)

    monkeypatch.setattr(pretrain, "learning_rate", filling)
    try:
        with pytest.raises(OSError, match="is the disk full"):
            call(
                [
                    "pretrain.py", "--size", "micro",
                    "--tokenizer", str(speedrun / "toy/tokenizer"),
                    "--text", str(speedrun / "toy/base.jsonl"), "--steps", "6", "--batch", "2",
                    "--device", "cpu", "--out", str(tmp_path / "m"),
                ],
                monkeypatch,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(tmp_path / "m.partial/checkpoint.pt", weights_only=True)["step"] == 2
    assert not list((tmp_path / "m.partial").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    speedrun, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match=r"step \d: the loss is nan"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--chat", str(speedrun / "toy/chat.jsonl"), "--steps", "8", "--batch", "1",
                "--lr", "1e30", "--device", "cpu", "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_moves_a_weight(
    speedrun, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf"))
    )
    with pytest.raises(ValueError, match="step 1: .* its gradient's norm inf"):
        trained(speedrun, tmp_path, monkeypatch, "chat")


def test_a_codebook_that_is_missing_is_told_before_the_first_step(speedrun, tmp_path, monkeypatch):
    shutil.copytree(speedrun / "units", tmp_path / "units")
    (tmp_path / "units/codebook.safetensors").unlink()
    monkeypatch.setattr(pretrain, "learning_rate", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(FileNotFoundError, match="codebook.safetensors: missing"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--units", str(tmp_path / "units"), "--text", str(speedrun / "toy/base.jsonl"),
                "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_a_model_from_nothing_with_lora_is_told_to_take_init(
    speedrun, tmp_path, monkeypatch, capsys
):
    with pytest.raises(SystemExit):
        call(
            [
                "pretrain.py", "--size", "micro", "--tokenizer", str(speedrun / "toy/tokenizer"),
                "--text", str(speedrun / "toy/base.jsonl"), "--plain", "--lora", "2",
                "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )
    assert "give --init" in capsys.readouterr().err


def test_a_run_that_ended_before_its_first_checkpoint_leaves_no_line_in_the_next_ones_log(
    speedrun, tmp_path, monkeypatch
):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial/log.jsonl").write_text('{"step": 50, "layouts": {}}\n')
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"),
            "--chat", str(speedrun / "toy/chat.jsonl"), "--steps", "2", "--batch", "1",
            "--device", "cpu", "--out", str(tmp_path / "x"),
        ],
        monkeypatch,
    )
    assert [
        json.loads(line)["step"] for line in (tmp_path / "x/log.jsonl").read_text().splitlines()
    ] == [2]


@pytest.mark.parametrize(
    "words, wanted",
    [
        (["--init", "{base}", "--text", "{base}/nowhere.jsonl"], "no such file"),
        (["--init", "{base}", "--text", "{base}/config.json"], "line 1"),
        (["--init", "{base}", "--units", "{base}"], "not a units folder"),
        (
            ["--init", "{base}", "--units", "{units}", "--mix", "interleave=1,text=1"],
            "--mix wants text",
        ),
    ],
)
def test_bad_inputs_say_what_to_do(words, wanted, speedrun, tmp_path, monkeypatch):
    places = {"base": speedrun / "base", "units": speedrun / "units"}
    with pytest.raises((ValueError, OSError), match=wanted):
        call(
            [
                "pretrain.py", *(w.format(**places) for w in words), "--steps", "1",
                "--device", "cpu", "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "flags, wanted",
    [
        ("--chat {chat} --imitate 3", "only speech"),
        ("--units {units} --mix interleave=0", "one of them above 0"),
        ("--units {units} --mix interleave=nan,transcribe=1", "weights of 0 or more"),
        ("--units {units} --layers 0.9:0.1", "two rising shares"),
        ("--units {units} --layers nan:1", "two rising shares"),
        ("--chat {chat} --lora-alpha 8", "give both"),
        ("--chat {chat} --lora 2 --keep-text 1", "give one of the two"),
        ("--chat {chat} --unit-loss 1", "no --units are given"),
        ("--units {units} --caption-loss 8", "only speech of prosody.py has captions"),
        ("--chat {chat} --echo-loss 0", "--echo-loss 0: only speech of prosody.py"),
        ("--chat {chat} --tokenizer {units}", "leave --tokenizer out"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(
    flags, wanted, speedrun, tmp_path, monkeypatch, capsys
):
    places = {"units": speedrun / "units", "chat": speedrun / "toy/chat.jsonl"}
    with pytest.raises(SystemExit):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                *flags.format(**places).split(), "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )
    assert wanted in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--chat {chat}", "--units {units} --text {text}"])
def test_a_model_from_nothing_learns_all_of_itself_or_is_refused(
    flags, speedrun, tmp_path, monkeypatch, capsys
):
    flags = flags.format(
        units=speedrun / "units", chat=speedrun / "toy/chat.jsonl", text=speedrun / "toy/base.jsonl"
    ).split()
    with pytest.raises(SystemExit):
        call(
            [
                "pretrain.py", "--size", "micro",
                "--tokenizer", str(speedrun / "toy/tokenizer"), *flags,
                "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )
    assert "--size starts from noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (
            "--units {units} --text {text} --chat {chat}",
            "--chat is given, and the mix is ",
        ),
        ("--chat {chat} --text {text}", "--text is given, and the mix is chat;"),
    ],
)
def test_what_is_given_is_read_or_refused(flags, wanted, speedrun, tmp_path, monkeypatch):
    places = {
        "units": speedrun / "units",
        "chat": speedrun / "toy/chat.jsonl",
        "text": speedrun / "toy/base.jsonl",
    }
    with pytest.raises(ValueError, match=wanted):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                *flags.format(**places).split(), "--device", "cpu",
                "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


@pytest.mark.parametrize(
    "lacking, flags, wanted",
    [
        ("words", (), "has word times, and without them there is nothing to imitate"),
        ("text", ("--imitate", "0"), "has no text to transcribe"),
    ],
)
def test_speech_without_words_or_text_is_told_before_the_first_step(
    lacking, flags, wanted, speedrun, tmp_path, monkeypatch
):
    shutil.copytree(speedrun / "units", tmp_path / "units")
    entries = runs.read_lines(speedrun / "units/manifest.jsonl")
    for n, entry in enumerate(entries):
        entry.pop("words")
        if lacking == "text" and n == 1:
            entry["text"] = " "
    (tmp_path / "units/manifest.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    with pytest.raises(ValueError, match=wanted):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--units", str(tmp_path / "units"), "--text", str(speedrun / "toy/base.jsonl"),
                *flags, "--device", "cpu", "--out", str(tmp_path / "x"),
            ],
            monkeypatch,
        )


def test_utterances_that_do_not_fit_into_a_row_are_told(speedrun, tmp_path, monkeypatch, capsys):
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
            "--text", str(speedrun / "toy/base.jsonl"), "--length", "24", "--steps", "1",
            "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "x"),
        ],
        monkeypatch,
    )
    assert re.search(
        r"utterances with their text are longer than a row of 24 ids and are cut",
        "".join(capsys.readouterr()),
    )


def test_a_batch_without_speech_has_nothing_to_imitate(speedrun, tmp_path, monkeypatch):
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
            "--text", str(speedrun / "toy/base.jsonl"), "--mix", "text=1", "--steps", "2",
            "--batch", "1", "--device", "cpu", "--out", str(tmp_path / "x"),
        ],
        monkeypatch,
    )
    assert (tmp_path / "x/model.safetensors").exists()


@pytest.mark.parametrize(
    "flag, line, wanted",
    [
        ("--chat", '{"messages": "hi"}', "got messages = hi"),
        ("--chat", '{"messages": ["hi"]}', "got the message hi"),
        ("--text", '{"text": 5}', "got text = 5"),
        ("--text", '{"words": "hi"}', "in an entry with words"),
        ("--text", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_rows_of_the_wrong_form_are_shown(flag, line, wanted, speedrun, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_bytes(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=wanted):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"), flag,
                str(tmp_path / "x.jsonl"), "--steps", "1", "--device", "cpu",
                "--out", str(tmp_path / "o"),
            ],
            monkeypatch,
        )


# --- one GPU to many ---


def trained_with(folder, speedrun, *flags):
    """The words of two tiny steps of speech training."""
    return [
        "pretrain.py", "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
        "--text", str(speedrun / "toy/base.jsonl"), "--rows-first", "0.34", "--steps", "3",
        "--batch", "2", "--device", "cpu", "--out", str(folder), *flags,
    ]


def same_weights(a, b, tolerance):
    a, b = weights.Tensors(a), weights.Tensors(b)
    return all((a[name] - b[name]).abs().max() <= tolerance for name in a)


def test_two_processes_train_what_one_does_with_twice_the_batches(
    speedrun, quick, tmp_path, monkeypatch
):
    call(trained_with(tmp_path / "one", speedrun, "--accumulate", "2"), monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = trained_with(tmp_path / "two", speedrun)
    runs = [
        subprocess.Popen(
            [python, *words],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        # Processes of torchrun hash words differently.
        for rank, python in enumerate((sys.executable, quick / "python"))
    ]
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert same_weights(tmp_path / "one", tmp_path / "two", 1e-5)
    last = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert abs(last[0]["loss"] - last[1]["loss"]) < 1e-3 and last[0]["hours"] > 0


def test_lora_changes_matrices_by_its_rank_alone_and_is_added_when_saved(
    speedrun, tmp_path, monkeypatch
):
    call(trained_with(tmp_path / "lora", speedrun, "--lora", "2"), monkeypatch)
    base, low = weights.Tensors(speedrun / "base"), weights.Tensors(tmp_path / "lora")
    assert set(base) == set(low)
    for name in base:
        if "_proj" in name:
            values = torch.linalg.svdvals((low[name] - base[name]).double())
            assert values[0] > 1e-6 and values[2] < 1e-2 * values[0], name
        elif "embed" not in name:
            assert torch.equal(low[name], base[name]), name


def test_a_lora_says_at_first_what_the_model_says_and_merged_what_it_learnt(speedrun):
    model, ids = LM.load(speedrun / "base").eval(), torch.arange(20)[None]
    plain = model(ids)
    add_lora(model, 4, 8)
    assert torch.equal(model(ids), plain)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.02)
    learnt = model(ids)
    merge_lora(model)
    assert not torch.allclose(learnt, plain, atol=1e-2)
    assert torch.allclose(model(ids), learnt, atol=1e-4)
    assert list(model.state_dict()) == list(LM.load(speedrun / "base").state_dict())


@pytest.mark.parametrize("flag", ["--recompute", "--compile"])
def test_what_saves_memory_or_time_changes_nothing_else(flag, speedrun, tmp_path, monkeypatch):
    """Blocks are traced, forward and backward, as torch.compile does; no C++ compiler then
    spends a minute on them. The teacher's are counted, as they would take as long again.
    """
    blocks = []
    compiled = torch.nn.Module.compile
    layers = LM.load(speedrun / "base").config.num_hidden_layers

    def traced(block):
        blocks.append(block)
        if len(blocks) <= layers:
            compiled(block, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    call(trained_with(tmp_path / "plain", speedrun), monkeypatch)
    call(trained_with(tmp_path / "other", speedrun, flag), monkeypatch)
    assert len(blocks) == (2 * layers if flag == "--compile" else 0)
    if flag == "--recompute":
        assert same_weights(tmp_path / "plain", tmp_path / "other", 0)
    loss = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])["loss"]
        for name in ("plain", "other")
    ]
    assert abs(loss[0] - loss[1]) < 0.02 * loss[0], "traced blocks may round in other places"
    assert (speedrun / "base/loss.png").read_bytes().startswith(b"\x89PNG")


# --- every flag changes what it says, and nothing else ---


def trained(speedrun, tmp_path, monkeypatch, kind, *flags):
    """(the tensors that a step or two of training leave, the last line of its log, its folder)."""
    out = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
    data = {
        "chat": ["--chat", str(speedrun / "toy/chat.jsonl")],
        "units": [
            "--units", str(speedrun / "units"), "--text", str(speedrun / "toy/base.jsonl"),
            "--rows-first", "0",
        ],
    }[kind]
    call(
        [
            "pretrain.py", "--init", str(speedrun / "base"), *data, "--steps", "1",
            "--batch", "2", "--device", "cpu", "--dtype", "float32", *flags, "--out", str(out),
        ],
        monkeypatch,
    )
    tensors = weights.Tensors(out)
    return (
        {name: tensors[name] for name in tensors},
        json.loads((out / "log.jsonl").read_text().splitlines()[-1]),
        out,
    )


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    "kind, one, other",
    [
        ("chat", ["--pace", "8"], ["--pace", "1"]),
        ("chat", ["--lr", "1e-3"], ["--lr", "2e-3"]),
        ("chat", ["--seed", "0"], ["--seed", "1"]),
        ("chat", ["--length", "128"], ["--length", "64"]),
        (
            "chat",
            ["--lora", "2", "--lora-alpha", "2", "--steps", "2"],
            ["--lora", "2", "--lora-alpha", "8", "--steps", "2"],
        ),
        ("chat", ["--accumulate", "1"], ["--accumulate", "2"]),
        ("chat", ["--batch", "2"], ["--batch", "3"]),
        ("chat", ["--layers", "0:1"], ["--layers", "0.5:1"]),
        ("chat", ["--dtype", "float32"], ["--dtype", "bfloat16"]),
        ("units", ["--imitate", "7"], ["--imitate", "14"]),
        ("units", ["--keep-text", "0.01"], ["--keep-text", "0.1"]),
        ("units", ["--imitate", "0", "--unit-loss", "0"], ["--imitate", "0", "--unit-loss", "1"]),
        ("units", ["--pace", "1"], ["--pace", "8"]),
        ("units", ["--mix", "interleave=1"], ["--mix", "transcribe=1"]),
    ],
)
def test_a_flag_with_another_value_leaves_other_weights_and_with_the_same_the_same(
    kind, one, other, speedrun, tmp_path, monkeypatch
):
    first, again, second = (
        trained(speedrun, tmp_path, monkeypatch, kind, *flags)[0] for flags in (one, one, other)
    )
    assert not differ(first, again)
    assert any("_proj" in name for name in differ(first, second))


def test_plain_is_the_recipe_without_what_a_small_model_needs(
    speedrun, tmp_path, monkeypatch, capsys
):
    off = [
        "--pace", "1", "--imitate", "0", "--keep-text", "0", "--rows-first", "0",
        "--layers", "0:1", "--embeddings", "all",
    ]
    data = [
        "pretrain.py", "--init", str(speedrun / "base"), "--units", str(speedrun / "units"),
        "--steps", "1", "--batch", "2", "--device", "cpu",
    ]
    for name, flags in (("plain", ["--plain"]), ("off", off)):
        call([*data, *flags, "--out", str(tmp_path / name)], monkeypatch)
    plain, other = weights.Tensors(tmp_path / "plain"), weights.Tensors(tmp_path / "off")
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    base = weights.Tensors(speedrun / "base")
    assert all(
        not torch.equal(base[name], plain[name][: len(base[name])]) for name in base
    ), "every parameter is trained"
    with pytest.raises(SystemExit):
        call([*data, "--plain", "--imitate", "7", "--out", str(tmp_path / "x")], monkeypatch)
    assert "--plain turns --imitate off; give one of the two" in capsys.readouterr().err


def test_while_new_rows_go_first_the_body_stays_and_rows_move_ten_times_the_rate(
    speedrun, tmp_path, monkeypatch
):
    _, _, units_ = pretrain.start_model(
        argparse.Namespace(init=str(speedrun / "base"), units=str(speedrun / "units"), seed=0)
    )
    model, *_ = pretrain.start_model(
        argparse.Namespace(init=str(speedrun / "base"), units=str(speedrun / "units"), seed=0)
    )
    base, lr = dict(model.state_dict()), 1e-3
    after, _, _ = trained(
        speedrun, tmp_path, monkeypatch, "units", "--rows-first", "1", "--lr", str(lr),
        "--keep-text", "0",
    )
    moved = {name for name in after if not torch.equal(after[name], base[name])}
    assert moved == {"model.embed_tokens.weight"}
    units = (after["model.embed_tokens.weight"] - base["model.embed_tokens.weight"])[
        units_.start : units_.stop
    ]
    # AdamW's first step is the rate itself, in every number that has a gradient.
    rate = 10 * learning_rate(0, 1, lr)
    assert math.isclose(units.abs().max().item(), rate, rel_tol=1e-2)
    free, _, _ = trained(speedrun, tmp_path, monkeypatch, "units", "--keep-text", "0")
    assert any("_proj" in name for name in free if not torch.equal(free[name], base[name]))


def test_beside_imitation_interleaved_documents_bear_no_loss_and_without_it_they_do(
    speedrun, tmp_path, monkeypatch
):
    def layouts(*flags):
        words = ["--mix", "interleave=0.5,transcribe=0.5", "--batch", "4", *flags]
        _, log, _ = trained(speedrun, tmp_path, monkeypatch, "units", *words)
        return log["layouts"]

    assert set(layouts()) == {"transcribe"}
    assert set(layouts("--imitate", "0")) == {"interleave", "transcribe"}


def test_units_bear_a_loss_beside_imitation_if_they_are_given_a_weight(
    speedrun, tmp_path, monkeypatch
):
    def of(weight):
        words = ["--mix", "interleave=1", "--unit-loss", weight]
        return trained(speedrun, tmp_path, monkeypatch, "units", *words)[0]

    assert any("_proj" in name for name in differ(of("0"), of("1")))


def test_the_reader_reads_every_word_at_the_position_where_it_is_said(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"text": 1})
    batch = documents.batch(2, 256)
    batch |= {
        "read": batch["ids"],
        "read_start": batch["start"],
        "place": torch.arange(256).expand(2, 256),
        "position": 3 * (torch.arange(256) - batch["start"]),
    }
    states = []
    with torch.no_grad():
        model.model(batch["ids"], start=batch["start"], positions=batch["position"], states=states)
        _, unlike = align.distillation(states, batch, model, documents.vocab.speech["speech"])
        del batch["position"]
        _, elsewhere = align.distillation(states, batch, model, documents.vocab.speech["speech"])
    assert unlike < 1e-9
    assert elsewhere > 1e-6, "the same ids at the same positions are alike"


def test_the_covariance_of_text_is_summed_in_float32_under_autocast_too(speedrun, stream):
    model, documents = LM.load(speedrun / "speech"), stream({"text": 1})
    body, _ = pretrain.unfreeze(model, (0, 1), "new")
    with torch.autocast("cpu", torch.bfloat16):
        filters = align.text_filters(model, body, [documents.batch(8, 256) for _ in range(2)], 1.0)
    for filter_ in filters.values():
        values = torch.linalg.eigvalsh(filter_)
        assert filter_.dtype == torch.float32
        assert values.min() > 0
        assert values.max() < 1 + 1e-4, "none amplifies a change"


def test_chats_longer_than_a_row_are_told_before_they_are_cut(
    speedrun, tmp_path, monkeypatch, capsys
):
    trained(speedrun, tmp_path, monkeypatch, "chat", "--length", "16")
    assert "chats are longer than a row of 16 ids and are cut" in capsys.readouterr().out
    trained(speedrun, tmp_path, monkeypatch, "chat", "--length", "512")
    assert "longer than a row" not in capsys.readouterr().out


def test_the_arithmetic_is_kept_with_the_run_and_a_resume_in_another_is_refused(
    speedrun, tmp_path, monkeypatch
):
    _, _, out = trained(speedrun, tmp_path, monkeypatch, "chat")
    assert json.loads((out / "training.json").read_text())["settings"]["dtype"] == "float32"
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    monkeypatch.setattr(pretrain.Log, "draw", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = [
        "pretrain.py", "--init", str(speedrun / "base"),
        "--chat", str(speedrun / "toy/chat.jsonl"), "--steps", "2", "--batch", "2",
        "--device", "cpu", "--out", str(tmp_path / "x"),
    ]
    with pytest.raises(KeyboardInterrupt):
        call([*words, "--dtype", "float32"], monkeypatch)
    with pytest.raises(ValueError, match=r"another dtype \(float32, now bfloat16\)"):
        call([*words, "--dtype", "bfloat16"], monkeypatch)


def test_a_step_is_the_mean_of_its_batches_and_its_gradient_has_a_norm_of_at_most_one(
    speedrun, tmp_path, monkeypatch
):
    """Every batch is given the same loss here: two of them then have the gradient of one."""
    forward, clip, norms = pretrain.forward, torch.nn.utils.clip_grad_norm_, []

    def alike(run, *rest):
        _, loss = forward(run, *rest)
        return sum(p.square().sum() for p in [*run.body, *run.tables]), loss

    def watched(parameters, most):
        before = clip(parameters, most)
        norms.append((before.item(), sum(p.grad.square().sum() for p in parameters).sqrt().item()))
        return before

    monkeypatch.setattr(pretrain, "forward", alike)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for count in ("1", "2"):
        call(
            [
                "pretrain.py", "--init", str(speedrun / "base"),
                "--text", str(speedrun / "toy/base.jsonl"), "--plain", "--steps", "1",
                "--batch", "2", "--accumulate", count, "--device", "cpu",
                "--out", str(tmp_path / count),
            ],
            monkeypatch,
        )
    assert norms[0][0] > 1 and norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert norms[0][1] == pytest.approx(1, rel=1e-3)


def test_rows_is_no_flag_any_more_and_not_taken_for_rows_first(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call("pretrain.py --init a --text b --out c --rows 1".split(), monkeypatch)
    assert "unrecognized arguments: --rows 1" in capsys.readouterr().err
