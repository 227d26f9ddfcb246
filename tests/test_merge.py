import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import runs
import weights
from conftest import ROOT, call
from merge import Merge
from vocab import SIGNS, Vocab


def folders(speedrun):
    return [str(speedrun / name) for name in ("base", "instruct", "speech")]


def off(short, wide):
    """How many numbers of 16 bits have a neighbour that is nearer to what they were rounded
    from.
    """
    error = lambda y: (y.double() - wide).abs()
    return sum(
        error((short.view(torch.int16) + step).view(short.dtype)) < error(short) for step in (-1, 1)
    ).count_nonzero()


def copied(folder, to, change=lambda name, tensor: tensor, shards=1):
    """A copy of a model folder with its tensors changed, in so many shards."""
    shutil.copytree(folder, to)
    tensors = {
        name: change(name, weights.Tensors(folder)[name].clone())
        for name in weights.Tensors(folder)
    }
    if shards == 1:
        weights.save(to, tensors)
        return str(to)
    (to / "model.safetensors").unlink()
    home = {
        name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors"
        for n, name in enumerate(tensors)
    }
    for file in set(home.values()):
        save_file(
            {name: tensors[name].contiguous() for name in tensors if home[name] == file}, to / file
        )
    weights.write_index(to, home)
    return str(to)


def made(folder):
    tensors = weights.Tensors(folder)
    return {name: tensors[name] for name in tensors}


def same(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def merge(out, monkeypatch, base, instruct, speech, *flags):
    call(
        [
            "merge.py", "--base", base, "--instruct", instruct, "--speech", speech,
            "--out", str(out), *flags,
        ],
        monkeypatch,
    )
    return made(out)


def test_the_sum_is_the_formula_in_float64_with_one_rounding(speedrun, tmp_path):
    paths = [
        copied(folder, tmp_path / str(n), lambda name, tensor: tensor.bfloat16())
        for n, folder in enumerate(folders(speedrun))
    ]
    plan, differ = Merge(*paths), 0
    for name in plan.names:
        b, i, s = (weights.Tensors(path)[name].double() for path in paths)
        if "embed" not in name:
            differ += off(plan.merged(name, 0.85), b + 0.85 * (s - b) + (i - b))
    assert differ <= 1, "8 in a million are ties in float32 that were none"


def test_nothing_learnt_by_one_side_leaves_the_other_bit_for_bit(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    assert same(
        merge(tmp_path / "m1", monkeypatch, base, base, speech), made(speech)
    ), "merge(base, base, S) is S"
    old = made(base)
    deaf = copied(
        speech, tmp_path / "deaf",
        lambda name, tensor: torch.cat([old[name], tensor[len(old[name]) :]]),
    )
    sum_, tuned = merge(tmp_path / "m2", monkeypatch, base, instruct, deaf), made(instruct)
    assert same(
        {name: sum_[name][: len(tuned[name])] for name in tuned}, tuned
    ), "merge(base, I, base) is I"
    assert same(
        {name: sum_[name][len(tuned[name]) :] for name in tuned},
        {name: made(speech)[name][len(tuned[name]) :] for name in tuned},
    ), "and hears with speech's rows"


def test_the_sum_is_the_same_however_folders_are_cut_into_shards_and_slices(
    speedrun, tmp_path, monkeypatch
):
    base, instruct, speech = folders(speedrun)
    flags = "--lam", "0.7", "--signs", "0.5"
    whole = merge(tmp_path / "whole", monkeypatch, base, instruct, speech, *flags)
    monkeypatch.setattr("merge.SLICE", 1000)
    parts = [
        copied(folder, tmp_path / f"p{n}", shards=n)
        for n, folder in zip((2, 3, 4), (base, instruct, speech))
    ]
    cut = merge(tmp_path / "cut", monkeypatch, *parts, *flags)
    assert same(whole, cut)
    assert len(list((tmp_path / "cut").glob("model-*.safetensors"))) == 4
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(theirs[name], cut[name]) for name in cut)


def test_dtypes_may_differ_and_the_sum_has_speechs(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    wide = [made(folder) for folder in (base, instruct, speech)]
    half = [
        copied(folder, tmp_path / str(kind), lambda name, tensor: tensor.to(kind))
        for folder, kind in ((base, torch.float16), (speech, torch.bfloat16))
    ]
    sum_ = merge(tmp_path / "m", monkeypatch, half[0], instruct, half[1], "--mu", "0.5")
    name = "model.layers.0.mlp.up_proj.weight"
    b = wide[0][name].half().double()
    i = wide[1][name].double()
    s = wide[2][name].bfloat16().double()
    assert torch.equal(sum_[name], (b + (s - b) + 0.5 * (i - b)).bfloat16())


def test_what_an_open_base_holds_a_second_time_is_left_out(speedrun, tmp_path, monkeypatch):
    """A tied head, and the rotation's frequencies, are in some checkpoints' files and in
    others' not.
    """
    base, instruct, speech = folders(speedrun)
    shutil.copytree(base, tmp_path / "b")
    tensors = made(base)
    weights.save(
        tmp_path / "b",
        tensors
        | {
            "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        },
    )
    recipe_free = [
        shutil.copytree(folder, tmp_path / f"{n}", ignore=shutil.ignore_patterns("recipe.json"))
        for n, folder in enumerate((instruct, speech))
    ]
    assert same(
        merge(tmp_path / "m", monkeypatch, str(tmp_path / "b"), *map(str, recipe_free)),
        merge(tmp_path / "n", monkeypatch, base, instruct, speech),
    )


@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "(_ for _ in ()).throw(OSError(28, 'No space left on device'))",
    ],
)
def test_killed_or_out_of_space_it_leaves_no_folder_and_the_next_try_a_whole_one(
    speedrun, quick, tmp_path, end
):
    """A process of its own, that ends in the middle of its writing."""
    words = [
        w for name in ("base", "instruct", "speech") for w in (f"--{name}", str(speedrun / name))
    ] + ["--out", str(tmp_path / "m")]
    script = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import merge, runs, "
        "weights; write, left = weights.write_slice, [7]\n"
        f"def dying(*given):\n  left[0] -= 1\n  return write(*given) if left[0] else {end}\n"
        f"weights.write_slice = dying; sys.argv = ['merge.py', *{words!r}]; runs.run(merge.main)"
    )
    done = subprocess.run([quick / "python", "-c", script], capture_output=True, text=True)
    killed = -signal.SIGKILL, 128 + signal.SIGKILL  # as Python tells it, and a shell
    assert done.returncode in (killed if "SIGKILL" in end else [1]), done.stderr
    assert not (tmp_path / "m").exists()
    if "OSError" in end:
        assert done.stderr.strip().splitlines()[-1].endswith("No space left on device")
        assert "Traceback" not in done.stderr
    subprocess.run([quick / "python", ROOT / "merge.py", *words], check=True, capture_output=True)
    subprocess.run(
        [quick / "python", ROOT / "merge.py", *words[:-1], tmp_path / "straight"],
        check=True,
        capture_output=True,
    )
    assert same(
        made(tmp_path / "m"), made(tmp_path / "straight")
    ), "the rest of the first try is in nobody's way"


def test_every_row_follows_its_rule(speedrun):
    base, instruct, speech = (weights.Tensors(folder) for folder in folders(speedrun))
    merged = weights.Tensors(speedrun / "merged")
    name = "model.embed_tokens.weight"
    vocab = Vocab(speedrun / "merged")
    n = base.shape(name)[0]
    b, i, s, m = base[name], instruct[name], speech[name], merged[name]
    markers = [vocab.special[t] for t in ("<|im_start|>", "<|im_end|>")]
    assert torch.equal(m[n:], s[n:]) and torch.equal(m[markers], i[markers])
    text = [r for r in range(n) if r not in markers]
    assert torch.allclose(
        m[text], b[text] + (s[:n][text] - b[text]) + (i[text] - b[text]), atol=1e-7
    )
    recipe = runs.read_json(speedrun / "merged/recipe.json", ["rules", "lam", "signs"])
    assert recipe["signs"] == 0.0
    assert vocab.speech == Vocab(speedrun / "speech").speech


def test_new_rows_may_stand_nearer_to_signs_and_all_else_stays(speedrun, monkeypatch):
    base, instruct, speech = folders(speedrun)
    name = "model.embed_tokens.weight"
    table, vocab = weights.Tensors(base)[name], Vocab(base)
    mean = table[[vocab.encode(sign)[0] for sign in SIGNS]].double().mean(0)
    assert mean.abs().max() > 0.001
    plain, near = Merge(base, instruct, speech), Merge(base, instruct, speech, signs=0.5)
    moved = near.merged(name, 0.7).double() - plain.merged(name, 0.7).double()
    assert not moved[: len(table)].any()
    assert torch.allclose(moved[len(table) :], 0.5 * mean.expand_as(moved[len(table) :]), atol=1e-6)
    assert all(
        torch.equal(near.merged(other, 0.7), plain.merged(other, 0.7))
        for other in plain.names
        if other != name
    )
    rows = torch.ones(2, table.shape[1])
    assert near.nearer_signs(rows, "lm_head.weight") is rows, "a head of its own predicts no sign"
    monkeypatch.setattr("merge.SIGNS", "")
    with pytest.raises(ValueError, match="knows none of"):
        Merge(base, instruct, speech, signs=0.5)


def test_chat_markers_are_instructs_whatever_speech_made_of_them(speedrun, tmp_path):
    base, instruct, speech = folders(speedrun)
    name = "model.embed_tokens.weight"
    markers = [Vocab(instruct).special[token] for token in ("<|im_start|>", "<|im_end|>")]
    moved = copied(
        speech, tmp_path / "s",
        lambda which, tensor: (
            tensor.index_add(0, torch.tensor(markers), torch.ones(2, tensor.shape[1]))
            if which == name
            else tensor
        ),
    )
    sum_ = Merge(base, instruct, moved).merged(name, 1.0)
    assert torch.equal(sum_[markers], weights.Tensors(instruct)[name][markers])


def test_folders_that_do_not_belong_together_are_refused(speedrun, tmp_path):
    base, instruct, speech = folders(speedrun)
    with pytest.raises(ValueError, match="cannot hear"):
        Merge(base, speech, instruct)
    shutil.copytree(instruct, tmp_path / "other")
    tensors = weights.Tensors(instruct)
    state = {name: tensors[name].clone() for name in tensors}
    weights.save(tmp_path / "other", {**state, "model.norm.weight": torch.ones(5)})
    with pytest.raises(ValueError, match="model.norm.weight has shape"):
        Merge(base, tmp_path / "other", speech)
    weights.save(tmp_path / "other", {**state, "extra": torch.ones(5)})
    with pytest.raises(ValueError, match="extra"):
        Merge(base, tmp_path / "other", speech)
    table = "model.embed_tokens.weight"
    cut = copied(speech, tmp_path / "cut", lambda name, t: t[:300] if name == table else t)
    with pytest.raises(ValueError, match=f"{table} has 300 rows, base's .*wanted all of base's"):
        Merge(base, instruct, cut)
    weights.save(tmp_path / "other", state)
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with pytest.raises(ValueError, match="the tokenizers must agree"):
        Merge(base, tmp_path / "other", speech)
    config = tmp_path / "other/config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "Qwen3ForCausalLM"))
    with pytest.raises(ValueError, match="is a Qwen3ForCausalLM, .* a LlamaForCausalLM"):
        Merge(base, tmp_path / "other", speech)


def test_nan_is_refused_by_the_name_of_the_folder_that_holds_it(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    ill = copied(
        instruct, tmp_path / "ill",
        lambda name, tensor: tensor * float("nan") if "layers.1.mlp.up" in name else tensor,
    )
    with pytest.raises(
        ValueError, match="ill/model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN"
    ):
        merge(tmp_path / "m", monkeypatch, base, ill, speech)
    assert not (tmp_path / "m").exists()
    bare = copied(base, tmp_path / "bare")
    weights.save(bare, {name: tensor for name, tensor in made(base).items() if "embed" not in name})
    with pytest.raises(ValueError, match="do not have the same tensors.*embed_tokens"):
        Merge(bare, instruct, speech)


def test_nan_in_a_row_that_instruct_replaces_is_refused_too(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    row = Vocab(instruct).special["<|im_start|>"]
    ill = copied(
        base, tmp_path / "ill",
        lambda name, tensor: (
            tensor.index_fill(0, torch.tensor([row]), float("nan")) if "embed" in name else tensor
        ),
    )
    with pytest.raises(
        ValueError, match="ill/model.safetensors: model.embed_tokens.weight holds NaN"
    ):
        Merge(ill, instruct, speech).merged("model.embed_tokens.weight", 1.0)


def test_nan_in_a_row_that_only_speech_has_is_refused_too(speedrun, tmp_path):
    base, instruct, speech = folders(speedrun)
    ill = copied(
        speech, tmp_path / "ill",
        lambda name, tensor: (
            tensor.index_fill(0, torch.tensor([len(tensor) - 1]), float("nan"))
            if "embed" in name
            else tensor
        ),
    )
    with pytest.raises(
        ValueError, match="^[^ ]*ill/model.safetensors: model.embed_tokens.weight holds NaN"
    ):
        Merge(base, instruct, ill).merged("model.embed_tokens.weight", 1.0)


def test_a_sum_too_large_for_float16_is_refused_though_no_part_of_it_is(speedrun, tmp_path):
    base, instruct, speech = folders(speedrun)
    large = copied(
        speech, tmp_path / "large",
        lambda name, tensor: tensor.fill_(60_000).half() if name == "model.norm.weight" else tensor,
    )
    with pytest.raises(ValueError, match="^the sum: model.norm.weight holds NaN or infinity"):
        Merge(base, instruct, large).merged("model.norm.weight", 2.0)


def test_a_model_whose_recipe_names_another_base_is_told(speedrun, tmp_path, monkeypatch, capsys):
    base, instruct, speech = folders(speedrun)
    merge(tmp_path / "m", monkeypatch, base, instruct, speech)
    assert "does not name" not in capsys.readouterr().err
    other = copied(base, tmp_path / "other", lambda name, tensor: tensor + 1e-3)
    merge(tmp_path / "m2", monkeypatch, other, instruct, speech)
    assert capsys.readouterr().err.count("does not name") == 2
    shutil.copy(tmp_path / "m/merge.json", copied(speech, tmp_path / "speech"))
    assert json.loads((tmp_path / "speech/merge.json").read_text())["lam"] == 1.0
    call(
        [
            "merge.py", "--base", base, "--instruct", instruct,
            "--speech", str(tmp_path / "speech"), "--lam", "0.5", "--out", str(tmp_path / "m3"),
        ],
        monkeypatch,
    )
    assert (
        json.loads((tmp_path / "m3/merge.json").read_text())["lam"] == 0.5
    ), "not what the speech folder came with"


def test_the_report_measures_both_deltas(speedrun):
    base, instruct, speech = folders(speedrun)
    report, b, s, i = Merge(base, instruct, speech).run(1.0, 1.0), *map(
        made, (base, speech, instruct)
    )
    names = [name for name in b if "embed" not in name]
    wanted = (
        (sum((s[n] - b[n]).pow(2).sum() for n in names) / sum(b[n].pow(2).sum() for n in names))
        .sqrt()
        .item()
    )
    assert abs(report["rel"]["speech"] - wanted) < 1e-5
    wanted = (
        (sum((i[n] - b[n]).pow(2).sum() for n in names) / sum(b[n].pow(2).sum() for n in names))
        .sqrt()
        .item()
    )
    assert abs(report["rel"]["instruct"] - wanted) < 1e-5
    one = report["tensors"]["model.layers.1.mlp.up_proj.weight"]
    name = "model.layers.1.mlp.up_proj.weight"
    ds, di = (s[name] - b[name]).flatten().double(), (i[name] - b[name]).flatten().double()
    assert abs(one["cosine"] - torch.cosine_similarity(ds, di, dim=0).item()) < 1e-9
    assert abs(one["against"] - (ds.sign() * di.sign() < 0).double().mean().item()) < 1e-9
    assert [row["block"] for row in report["blocks"]] == [0, 1, "norm", "rows"]


def test_a_dry_run_reports_and_writes_nothing_and_equal_folders_are_noticed(
    speedrun, tmp_path, monkeypatch, capsys
):
    base, instruct, speech = folders(speedrun)
    call(
        ["merge.py", "--base", base, "--instruct", base, "--speech", speech, "--dry-run"],
        monkeypatch,
    )
    said = capsys.readouterr().out
    assert "instruct equals base in every block: it adds no behaviour" in said
    assert "shared" in said
    assert "opposed" in said
    assert re.search(r"^ +0 +0\.0000 +0\.\d+ +- ", said, re.M), "where one did not move, no cosine"


def test_nothing_is_overwritten_and_lam_must_be_a_number(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    words = ["merge.py", "--base", base, "--instruct", instruct, "--speech", speech]
    with pytest.raises(FileExistsError, match="--overwrite"):
        call([*words, "--out", str(speedrun / "merged")], monkeypatch)
    for flag in ("--lam", "--mu"):
        with pytest.raises(ValueError, match=f"{flag} nan: wanted a finite"):
            call([*words, flag, "nan", "--out", str(tmp_path / "x")], monkeypatch)
    with pytest.raises(SystemExit):
        call([*words, "--signs", "nan", "--out", str(tmp_path / "x")], monkeypatch)


def test_models_that_compute_otherwise_with_the_same_shapes_are_refused(
    speedrun, tmp_path, monkeypatch
):
    base, instruct, speech = folders(speedrun)
    shutil.copytree(instruct, tmp_path / "instruct")
    config = json.loads((tmp_path / "instruct/config.json").read_text())
    (tmp_path / "instruct/config.json").write_text(json.dumps(config | {"rope_theta": 1e7}))
    with pytest.raises(ValueError, match="instruct has rope_theta = 10000000.0, .*one base"):
        call(
            [
                "merge.py", "--base", base, "--instruct", str(tmp_path / "instruct"),
                "--speech", speech, "--dry-run",
            ],
            monkeypatch,
        )


def test_a_base_that_changed_after_speech_was_trained_from_it_is_noticed(
    speedrun, tmp_path, monkeypatch
):
    for name in ("base", "instruct", "speech"):
        shutil.copytree(speedrun / name, tmp_path / name)
    recipe = tmp_path / "speech/recipe.json"
    recipe.write_text(recipe.read_text().replace(str(speedrun), str(tmp_path)))
    words = [
        "merge.py",
        *(
            w
            for name in ("base", "instruct", "speech")
            for w in (f"--{name}", str(tmp_path / name))
        ),
    ]
    call([*words, "--out", str(tmp_path / "fine")], monkeypatch)
    (tmp_path / "base/config.json").write_text((tmp_path / "base/config.json").read_text() + " ")
    with pytest.raises(ValueError, match="has changed since .*speech was made from it"):
        call([*words, "--out", str(tmp_path / "x")], monkeypatch)
