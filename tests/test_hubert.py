import json

import pytest
import runs
import torch

import weights
from conftest import call
from hubert import Config, Hubert, hide, masked_loss

transformers = pytest.importorskip("transformers")
KINDS = {
    "mhubert-25hz": dict(
        feat_extract_norm="group", do_stable_layer_norm=False, conv_bias=False,
        feat_proj_layer_norm=True, conv_pos_batch_norm=True, conv_dim=(16,) * 8,
        conv_kernel=(10, 3, 3, 3, 3, 2, 2, 2), conv_stride=(5, 2, 2, 2, 2, 2, 2, 2),
    ),
    "base": dict(
        feat_extract_norm="group", do_stable_layer_norm=False, conv_bias=False,
        feat_proj_layer_norm=True,
    ),
    "large": dict(
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
        feat_proj_layer_norm=True,
    ),
}
SMALL = dict(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)


def theirs_of(kind, tmp_path):
    torch.manual_seed(0)
    model = transformers.HubertModel(transformers.HubertConfig(**(SMALL | KINDS[kind]))).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1 or "bias" in name:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_equals_transformers(kind, tmp_path):
    theirs, ours = theirs_of(kind, tmp_path), Hubert.load(tmp_path)
    samples = torch.randn(2, 8000)
    with torch.no_grad():
        pad = (ours.receptive_field() - ours.hop()) // 2
        wanted = theirs(
            torch.nn.functional.pad(samples, (pad, pad)), output_hidden_states=True
        ).hidden_states
        # A large model's last state has a norm that ours leaves out.
        for layer in range(3 + (kind != "large")):
            got = ours(samples, layer)
            assert ((wanted[layer] - got).norm() / wanted[layer].norm()).item() < 1e-4, layer


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_batch_every_clip_is_computed_as_if_alone(kind, normalize, tmp_path):
    theirs_of(kind, tmp_path)
    model = Hubert.load(tmp_path)
    model.config.do_normalize = normalize
    lengths = torch.tensor([8000, 3333, 641, 5119])
    clips = [
        torch.randn(n) * scale + 0.1 for n, scale in zip(lengths.tolist(), (1.0, 0.1, 3.0, 0.5))
    ]
    # What fills up is loud, and must not be heard.
    batch = torch.full((4, 8000), 7.0)
    for row, clip in zip(batch, clips):
        row[: len(clip)] = clip
    with torch.no_grad():
        together = model(batch, 2, lengths=lengths)
        for n, clip in enumerate(clips):
            alone = model(clip[None], 2)[0]
            assert len(alone) == len(clip) // model.hop()
            assert ((together[n, : len(alone)] - alone).norm() / alone.norm()).item() < 1e-4, (
                kind,
                n,
            )


def test_both_spellings_of_weight_norm_and_a_head_are_read(tmp_path):
    theirs_of("base", tmp_path)
    import weights

    ours, tensors = Hubert.load(tmp_path), weights.Tensors(tmp_path)
    old = {
        "hubert."
        + name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensors[name]
        for name in tensors
    }
    weights.save(tmp_path, old | {"lm_head.weight": torch.zeros(3, 48)})
    with torch.no_grad():
        assert torch.equal(
            ours(torch.ones(1, 3200), 2), Hubert.load(tmp_path)(torch.ones(1, 3200), 2)
        )


def test_a_second_of_sound_is_fifty_frames():
    model = Hubert.fresh(Config(**SMALL), 0)
    assert model.receptive_field() == 400
    with torch.no_grad():
        assert [model(torch.randn(1, n), 1).shape[1] for n in (16000, 15999, 190800)] == [
            50, 49, 596,
        ]


def test_in_bfloat16_the_toys_hubert_hears_what_it_hears_in_float32():
    """Some CPUs with AMX multiply groups of 12 channels wrongly in bfloat16."""
    model = Hubert.fresh(Config(), seed=0).eval()
    samples = torch.randn(2, 16000)
    with torch.no_grad():
        whole = model(samples, 4)
        with runs.autocast("cpu", torch.bfloat16):
            half = model(samples, 4).float()
    assert (half - whole).norm() < 0.03 * whole.norm()


def test_hidden_frames_are_replaced_and_change_only_through_context():
    model = Hubert.fresh(Config(**SMALL), 0)
    hidden = torch.zeros(1, 50, dtype=torch.bool)
    hidden[:, 10:20] = True
    a, b = torch.randn(1, 16000), torch.randn(1, 16000)
    # They differ inside the hidden stretch only.
    b[:, :3300], b[:, 6300:] = a[:, :3300], a[:, 6300:]
    # That norm spans the clip, by design.
    model.feature_extractor.conv_layers[0].layer_norm = torch.nn.Identity()
    with torch.no_grad():
        assert torch.allclose(model(a, 3, hidden), model(b, 3, hidden), atol=1e-5)
        assert not torch.allclose(model(a, 3), model(b, 3), atol=1e-3)


def test_about_half_of_the_frames_are_hidden_in_stretches():
    import numpy as np

    hidden = hide((50, 100), np.random.default_rng(0))
    assert 0.4 < hidden.mean() < 0.6
    assert (np.diff(hidden.astype(int), axis=1) != 0).sum() < 0.2 * hidden.size


def test_a_folder_without_the_mask_vector_hears_as_one_with_it(tmp_path):
    model = Hubert.fresh(Config(**SMALL), 0)
    (tmp_path / "m").mkdir()
    model.save(tmp_path / "m")
    kept = {
        name: tensor for name, tensor in model.state_dict().items() if name != "masked_spec_embed"
    }
    weights.save(tmp_path / "m", kept)
    samples = torch.randn(1, 4000)
    loaded = Hubert.load(tmp_path / "m")
    assert not loaded.masked_spec_embed.any()
    with torch.no_grad():
        assert torch.equal(loaded(samples, 2), model.eval()(samples, 2))


def test_what_a_config_lacks_is_as_transformers_has_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    made = Config.read(tmp_path)
    assert made.do_stable_layer_norm is transformers.HubertConfig().do_stable_layer_norm
    assert made.do_normalize is False, "a model alone does not"
    (tmp_path / "preprocessor_config.json").write_text("{}")
    theirs = transformers.Wav2Vec2FeatureExtractor()
    assert Config.read(tmp_path).do_normalize is theirs.do_normalize


def test_a_switch_that_is_a_word_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": "no"}')
    with pytest.raises(ValueError, match="preprocessor_config.json: got do_normalize = 'no'"):
        Config.read(tmp_path)


def test_lists_of_layers_of_unlike_length_are_refused(tmp_path):
    raw = {"model_type": "hubert", "conv_kernel": [10, 3]}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="differ in length"):
        Config.read(tmp_path)


@pytest.mark.parametrize("wrong", [{"conv_stride": [5, 0]}, {"hidden_size": "48"}, {"conv_dim": 3}])
def test_a_config_with_a_size_that_is_none_is_refused(wrong, tmp_path):
    raw = {"model_type": "hubert"} | wrong
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="wanted whole numbers above 0"):
        Config.read(tmp_path)


def test_the_loss_is_on_hidden_and_on_seen_frames_alike_and_not_on_what_filled_a_clip_up():
    logits = torch.zeros(1, 6, 4, requires_grad=True)
    targets = torch.tensor([[0, 1, 2, 3, -100, -100]])
    hidden = torch.tensor([[True, False, False, True, True, False]])
    loss, at = masked_loss(logits, targets, hidden)
    loss.backward()
    assert at.tolist() == [[True, False, False, True, False, False]]
    assert torch.isclose(loss, 2 * torch.tensor(4.0).log())
    assert torch.allclose(
        logits.grad[0, :4].gather(1, targets[0, :4, None]), torch.full((4, 1), -0.375)
    )
    assert not logits.grad[0, 4:].any()


def test_a_batch_in_which_nothing_is_hidden_has_a_loss_all_the_same():
    logits, targets = torch.zeros(1, 6, 4), torch.zeros(1, 6, dtype=torch.long)
    for hidden in (torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)):
        assert torch.isclose(masked_loss(logits, targets, hidden)[0], torch.tensor(4.0).log())


def test_a_model_that_normalizes_hears_loud_and_soft_alike(tmp_path):
    theirs_of("large", tmp_path)
    config = tmp_path / "preprocessor_config.json"
    config.write_text('{"do_normalize": true}')
    model, clip = Hubert.load(tmp_path), 0.1 * torch.randn(1, 8000)
    with torch.no_grad():
        soft, loud = model(clip, 2), model(10 * clip, 2)
    assert model.config.do_normalize and (soft - loud).abs().max() < 1e-3 < soft.abs().max()
