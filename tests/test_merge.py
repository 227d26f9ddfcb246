import shutil

import pytest
import torch

import weights
from conftest import call
from merge import Merge, add
from vocab import Vocab


def folders(speedrun):
    return [str(speedrun / name) for name in ("base", "instruct", "speech")]


def test_the_formula_is_exact_with_one_rounding():
    b, s, i = (torch.randn(50, 60, dtype=torch.float64) for _ in range(3))
    assert torch.allclose(add(b, s, i, 0.85), b + 0.85 * (s - b) + (i - b), atol=1e-14)
    low = [t.bfloat16() for t in (b, s, i)]
    wide = [t.double() for t in low]
    assert torch.equal(add(*low, 0.85), (wide[0] + 0.85 * (wide[1] - wide[0]) + (wide[2] - wide[0])).bfloat16())


def test_blocks_do_not_change_the_sum(monkeypatch):
    import merge
    b, s, i = (torch.randn(7, 11) for _ in range(3))
    whole = add(b, s, i, 0.5)
    monkeypatch.setattr(merge, "BLOCK", 10)
    assert torch.equal(add(b, s, i, 0.5), whole)


def test_two_identities_nothing_learnt_by_one_side_leaves_the_other(speedrun):
    base, instruct, speech = folders(speedrun)
    plan = Merge(base, base, speech)
    for name in plan.names:                                                  # instruct = base: the sum is speech
        assert torch.allclose(plan.merged(name, 1.0), weights.Tensors(speech)[name], atol=1e-7)
    plan, tuned = Merge(base, instruct, speech), weights.Tensors(instruct)
    for name in plan.names:                                                  # lam = 0: the sum is instruct, plus new rows
        assert torch.allclose(plan.merged(name, 0.0)[:len(tuned[name])], tuned[name], atol=1e-7)


def test_every_row_follows_its_rule(speedrun):
    base, instruct, speech = (weights.Tensors(folder) for folder in folders(speedrun))
    merged, name, vocab = weights.Tensors(speedrun / "merged"), "model.embed_tokens.weight", Vocab(speedrun / "merged")
    n = base.shape(name)[0]
    b, i, s, m = base[name], instruct[name], speech[name], merged[name]
    markers = [vocab.special[t] for t in ("<|im_start|>", "<|im_end|>")]
    assert torch.equal(m[n:], s[n:]) and torch.equal(m[markers], i[markers])
    text = [r for r in range(n) if r not in markers]
    assert torch.allclose(m[text], b[text] + (s[:n][text] - b[text]) + (i[text] - b[text]), atol=1e-7)
    assert vocab.speech == Vocab(speedrun / "speech").speech


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
    weights.save(tmp_path / "other", state)
    file = tmp_path / "other/tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|im_begin|>"))
    with pytest.raises(ValueError, match="the tokenizers must agree"):
        Merge(base, tmp_path / "other", speech)


def test_the_report_measures_both_deltas(speedrun):
    base, instruct, speech = folders(speedrun)
    report, b, s = Merge(base, instruct, speech).report(), weights.Tensors(base), weights.Tensors(speech)
    names = [name for name in b if "embed" not in name]
    wanted = (sum((s[n] - b[n]).pow(2).sum() for n in names) / sum(b[n].pow(2).sum() for n in names)).sqrt().item()
    assert abs(report["rel"]["speech"] - wanted) < 1e-5 and report["rel"]["instruct"] > 0 and -1 <= report["cosine"] <= 1
    assert Merge(base, base, speech).report()["rel"]["instruct"] == 0


def test_nothing_is_overwritten_and_lam_must_be_a_number(speedrun, tmp_path, monkeypatch):
    base, instruct, speech = folders(speedrun)
    words = ["merge.py", "--base", base, "--instruct", instruct, "--speech", speech]
    with pytest.raises(FileExistsError, match="--overwrite"):
        call([*words, "--out", str(speedrun / "merged")], monkeypatch)
    with pytest.raises(ValueError, match="finite"):
        call([*words, "--lam", "nan", "--out", str(tmp_path / "x")], monkeypatch)


def test_a_base_that_changed_after_speech_was_trained_from_it_is_noticed(speedrun, tmp_path, monkeypatch):
    for name in ("base", "instruct", "speech"):
        shutil.copytree(speedrun / name, tmp_path / name)
    recipe = tmp_path / "speech/recipe.json"
    recipe.write_text(recipe.read_text().replace(str(speedrun), str(tmp_path)))
    words = ["merge.py", *(w for name in ("base", "instruct", "speech") for w in (f"--{name}", str(tmp_path / name)))]
    call([*words, "--out", str(tmp_path / "fine")], monkeypatch)
    (tmp_path / "base/config.json").write_text((tmp_path / "base/config.json").read_text() + " ")
    with pytest.raises(ValueError, match="has changed since .*speech was made from it"):
        call([*words, "--out", str(tmp_path / "x")], monkeypatch)
