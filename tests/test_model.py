import json

import pytest
import torch

from conftest import shared
from model import LM, Config, Linear, add_rows, generate, rope, sample

transformers = pytest.importorskip("transformers")
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
GOLDEN = [26, 95, 95, 65, 23, 68, 27, 48, 25, 85, 25, 57, 16, 95, 81, 25]
FAMILIES = {
    "llama": ("Llama", dict(tie_word_embeddings=False, rms_norm_eps=1e-5)),
    "llama3": (
        "Llama",
        dict(tie_word_embeddings=True, rope_scaling=LLAMA3, rope_theta=500000.0, head_dim=32),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=False, head_dim=32)),
}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """(transformers' model, ours from its folder, the folder), random weights."""
    name, extra = FAMILIES[request.param]
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, **extra,
        )
    ).eval()
    for p in theirs.parameters():
        # Biases and norms too, so that none can be forgotten.
        torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, LM.load(tmp_path / "theirs").eval(), tmp_path


def far(a, b):
    return ((a - b).norm() / a.norm()).item()


def test_logits_equal_transformers_and_survive_the_round_trip(pair):
    theirs, ours, folder = pair
    ids = torch.randint(0, 300, (2, 150))
    (folder / "ours").mkdir()
    ours.save(folder / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
    with torch.no_grad():
        assert far(theirs(ids).logits, ours(ids)) < 1e-5
        assert far(theirs(ids).logits, again(ids).logits) < 1e-6


def test_in_bf16_logits_equal_transformers_to_its_rounding(pair):
    theirs, ours, _ = pair
    ids = torch.randint(0, 300, (2, 60))
    with torch.no_grad():
        assert far(theirs.bfloat16()(ids).logits.float(), ours.bfloat16()(ids).float()) < 2e-2


def test_the_cache_changes_nothing(pair):
    _, ours, _ = pair
    prompt = torch.randint(0, 300, (6,))
    with_cache = [int(i[0]) for i in generate(ours, [prompt], 12, stop=[300])]
    ids = prompt.tolist()
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(ours(torch.tensor([ids]))[0, -1].argmax()))
    assert with_cache == ids[6:]


def test_greedy_generation_equals_transformers_in_a_batch_of_unequal_prompts(pair):
    theirs, ours, _ = pair
    prompts = [torch.randint(0, 300, (n,)) for n in (9, 4)]
    wanted = [
        theirs.generate(
            p[None], max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    assert torch.stack(list(generate(ours, prompts, 16, stop=[300]))).T.tolist() == wanted


@pytest.mark.parametrize("rows, bias", [(12, True), (12, False), (7, True)])
def test_a_single_vector_is_multiplied_on_all_cores_to_the_same_result(rows, bias, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    halves, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (halves.append(len(b)), real(a, b))[1])
    layer, x = Linear(5, rows, bias=bias), torch.randn(1, 1, 5)
    wanted = torch.nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.allclose(layer(x), wanted, atol=1e-6)
        assert layer(x).shape == (1, 1, rows)
        assert halves == ([2, 2] if rows % 2 == 0 else [])
        assert torch.equal(
            layer(x.repeat(1, 3, 1)),
            torch.nn.functional.linear(x.repeat(1, 3, 1), layer.weight, layer.bias),
        )
    layer(x.requires_grad_()).sum().backward()
    assert torch.allclose(x.grad[0, 0], layer.weight.sum(0), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_writes_what_a_cpu_writes(pair):
    _, ours, _ = pair
    prompts = [torch.randint(0, 300, (n,)) for n in (9, 4)]
    write = lambda: torch.stack([ids.cpu() for ids in generate(ours, prompts, 16, stop=[300])])
    assert torch.equal(write(), (ours.cuda(), write())[1])


def test_embeddings_are_as_good_a_prompt_as_ids(pair):
    _, ours, _ = pair
    ids = torch.randint(0, 300, (7,))
    both = [
        torch.stack(list(generate(ours, [prompt], 8, stop=[300]))).tolist()
        for prompt in (ids, ours.model.embed_tokens(ids).detach())
    ]
    assert both[0] == both[1]


def test_a_packed_document_is_computed_as_if_alone(pair):
    _, ours, _ = pair
    a, b = torch.randint(0, 300, (1, 5)), torch.randint(0, 300, (1, 8))
    start = torch.tensor([[0] * 5 + [5] * 8])
    with torch.no_grad():
        assert far(torch.cat([ours(a), ours(b)], 1), ours(torch.cat([a, b], 1), start=start)) < 1e-5


def test_the_real_stories_model_tells_its_published_story():
    folder = shared("stories260K")
    golden = json.loads((folder / "greedy_ids.json").read_text())
    golden = (
        golden
        if isinstance(golden, list)
        else next(v for v in golden.values() if isinstance(v, list))
    )
    said = [1] + [
        int(i[0])
        for i in generate(LM.load(folder / "hf_derived"), [torch.tensor([1])], 200, stop=[2])
    ]
    assert said[: len(golden)] == golden or said[1 : len(golden) + 1] == golden


def test_a_golden_of_our_own_where_the_stories_are_absent():
    """Weights from plain arithmetic, so that no random generator can move them; the ids were
    checked against transformers when stored.
    """
    model = LM.fresh(
        Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        ),
        0,
    )
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p.copy_(
                torch.sin(
                    (torch.arange(p.numel(), dtype=torch.float64) + 1) ** 1.5 * (n + 1) * 1.3
                ).view_as(p)
                * (1.0 if p.dim() == 1 else 0.8)
            )
    said = [int(i[0]) for i in generate(model, [torch.tensor([5, 9, 11])], 16, stop=[97])]
    assert said == GOLDEN


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "smollm2-135m"])
def test_real_configs_are_read(name, tmp_path):
    raw = json.loads(shared(f"configs/{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = Config.read(tmp_path)
    assert (
        config.head_dim * config.num_attention_heads
        == raw.get("head_dim", raw["hidden_size"] // raw["num_attention_heads"])
        * raw["num_attention_heads"]
    )
    assert config.rope_theta == raw["rope_theta"]
    assert config.tie_word_embeddings
    assert bool(config.rope_scaling) == (name == "llama-3.2-1b")


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["MambaForCausalLM"]},
        {"architectures": 5},
        {"architectures": {"a": 1}},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"mlp_bias": True},
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(change, tmp_path):
    Config().write(tmp_path, torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match="not supported; wanted"):
        Config.read(tmp_path)


def test_a_rope_scaling_that_is_no_object_is_shown(tmp_path):
    Config().write(tmp_path, torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"rope_scaling": "x"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="got rope_scaling = 'x'"):
        Config.read(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_where_used_rows_are_markers_at_a_known_row_and_old_rows_stay(tied):
    model = LM.fresh(
        Config(
            vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, tie_word_embeddings=tied,
        ),
        0,
    )
    old = model.model.embed_tokens.weight.detach().clone()
    assert add_rows(model, 5, {0: 7}, range(10), seed=0) == 50
    new = model.model.embed_tokens.weight.detach()
    assert model.config.vocab_size == len(new) == len(model.lm_head.weight) == 128
    assert torch.equal(new[:50], old)
    apart = (new[51:] - old[:10].mean(0)) / old[:10].std(0)
    assert torch.equal(new[50], old[7])
    assert abs(apart.mean()) < 0.01
    assert 0.09 < apart.std() < 0.11
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_only_allowed_rows_are_written_and_a_stopped_row_repeats_its_stop():
    model = LM.fresh(
        Config(
            vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1,
        ),
        0,
    )
    said = torch.stack(
        list(
            generate(
                model,
                [torch.tensor([1, 2]), torch.tensor([3])],
                12,
                stop=[5],
                allowed=[5, 6],
                temperature=1.0,
            )
        )
    )
    assert set(said.flatten().tolist()) <= {5, 6}
    for row in said.T.tolist():
        assert 5 not in row or set(row[row.index(5) :]) == {5}


def test_the_nucleus_leaves_out_the_tail():
    logits = torch.log(torch.tensor([[0.6, 0.3, 0.1]])).repeat(200, 1)
    assert set(sample(logits, 0.8, torch.Generator().manual_seed(0)).tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_says_the_dtype_that_its_weights_have_whatever_the_base_said(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    config = Config(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, raw={"torch_dtype": "float16", "dtype": "float16"},
    )
    model = LM.fresh(config, 0).to(dtype)
    model.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.lm_head.weight.dtype == dtype
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


def test_fresh_weights_that_write_to_the_residual_stream_are_smaller_by_their_number():
    model = LM.fresh(
        Config(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=8,
            num_attention_heads=2, num_key_value_heads=2,
        ),
        0,
    )
    spread = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    for name, std in spread.items():
        wanted = 0.02 / 4 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert abs(std / wanted - 1) < 0.05, name


def test_a_nucleus_of_almost_nothing_is_greedy_at_any_temperature(pair):
    _, ours, _ = pair
    write = lambda **given: [
        int(i[0]) for i in generate(ours, [torch.tensor([1, 2, 3])], 8, stop=[300], **given)
    ]
    assert write(temperature=5.0, top_p=1e-6) == write() != write(temperature=5.0)


def test_a_block_compiles_to_one_graph():
    block = LM.fresh(
        Config(
            vocab_size=32, hidden_size=64, num_attention_heads=1, num_key_value_heads=1,
            intermediate_size=96, num_hidden_layers=1,
        ),
        0,
    ).model.layers[0]
    x, (cos, sin) = torch.randn(1, 8, 64), rope(Config(head_dim=64), torch.arange(8)[None])
    whole = torch.compile(block, fullgraph=True, backend="eager")
    assert torch.allclose(whole(x, cos, sin, None, None), block(x, cos, sin, None, None))


def test_a_row_that_has_ended_repeats_its_end_while_others_go_on():
    config = Config(
        vocab_size=64, hidden_size=64, num_attention_heads=1, num_key_value_heads=1,
        intermediate_size=96, num_hidden_layers=2,
    )
    model = LM.fresh(config, 0).eval()
    prompts = [torch.tensor([1, 2, 3]), torch.tensor([9, 8, 7])]
    for seed in range(50):

        def drawn(stop):
            steps = generate(model, prompts, 6, stop, temperature=1.0, seed=seed)
            return torch.stack(list(steps))  # (6, 2)

        free = drawn([])
        end = int(free[1, 0])
        if end != free[0, 0] and (free[2:, 0] != end).any() and not (free[:, 1] == end).any():
            held = drawn([end])
            assert held[1:, 0].tolist() == [end] * 5 and torch.equal(held[:, 1], free[:, 1])
            return
    raise AssertionError("no seed gave a row that ends and one that does not")


def test_numbers_of_a_config_that_are_none_are_named(tmp_path):
    Config().write(tmp_path, torch.float32)
    made = json.loads((tmp_path / "config.json").read_text())
    for change, name in (
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(made | change))
        with pytest.raises(ValueError, match=f"got {name} = .*, wanted a number above 0"):
            Config.read(tmp_path)


@pytest.mark.parametrize("size", ["300", 0, 1.5, True])
def test_a_size_that_is_no_number_is_named(size, speedrun, tmp_path):
    made = json.loads((speedrun / "base/config.json").read_text())
    for name in "vocab_size", "head_dim":
        (tmp_path / "config.json").write_text(json.dumps(made | {name: size}))
        with pytest.raises(ValueError, match=f"got {name} = .*, wanted a number from 1 on"):
            Config.read(tmp_path)
