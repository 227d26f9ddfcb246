"""How fast, and in how little memory, is the merge? Three random folders of Qwen2.5-0.5B's
shape, against mergekit and against copying.

in   a scratch folder (7 GB)
out  rows of results/bench-cpu.json: merge/0.5B (mergekit), merge/copy
run  python bench/merge.py --scratch out/bench
     # wants bench/requirements.txt; about five minutes on two cores

Whole processes, imports and all, in interleaved rounds; medians. First the gate: both sums must
be equal but for mergekit's roundings.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from bench import ROOT, median, process, record

sys.path.insert(0, str(ROOT))
import vocab as text
import weights

# Qwen2.5-0.5B.
SHAPE = dict(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=151936,
)
UNITS = 500
MERGEKIT = """merge_method: task_arithmetic
base_model: {base}
dtype: bfloat16
models:
  - {{model: {instruct}, parameters: {{weight: 1.0}}}}
  - {{model: {speech}, parameters: {{weight: 1.0}}}}
"""


def names():
    """{tensor: shape} of Qwen2.5-0.5B, tied."""
    c, f, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 128
    block = {
        "self_attn.q_proj.weight": (c, c),
        "self_attn.q_proj.bias": (c,),
        "self_attn.k_proj.weight": (kv, c),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, c),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (c, c),
        "mlp.gate_proj.weight": (f, c),
        "mlp.up_proj.weight": (f, c),
        "mlp.down_proj.weight": (c, f),
        "input_layernorm.weight": (c,),
        "post_attention_layernorm.weight": (c,),
    }
    layers = {
        f"model.layers.{n}.{name}": shape
        for n in range(SHAPE["num_hidden_layers"])
        for name, shape in block.items()
    }
    return {
        "model.embed_tokens.weight": (SHAPE["vocab_size"], c),
        **layers,
        "model.norm.weight": (c,),
    }


def make(scratch):
    """base, instruct and speech (and speech without its new rows, which mergekit could not
    take), bf16, with a tokenizer of letters.
    """
    config = SHAPE | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "eos_token_id": 256,
        "bos_token_id": 256,
    }
    letters = text.tokenizer_json(
        {letter: i for i, letter in enumerate(text.LETTERS)},
        [],
        {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
    )
    base = {name: torch.randn(shape).mul_(0.02).bfloat16() for name, shape in names().items()}
    for name in ("base", "instruct", "speech", "speech_short"):
        folder = scratch / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps(letters))
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
        if name in ("instruct", "speech"):
            torch.manual_seed(len(name))
            tensors = {
                n: (t.float() + torch.randn(t.shape).mul_(0.0005)).bfloat16()
                for n, t in base.items()
            }
        weights.save(folder, base if name == "base" else tensors)
    vocab, folder = text.Vocab(scratch / "speech"), scratch / "speech"
    first = vocab.with_speech(SHAPE["vocab_size"], UNITS)
    vocab.speech = {"speech": first - 2, "end_speech": first - 1, "first_unit": first, "k": UNITS}
    vocab.save(folder)
    rows = torch.randn(vocab.size - SHAPE["vocab_size"], SHAPE["hidden_size"]).mul_(0.02).bfloat16()
    weights.save(
        folder,
        tensors
        | {"model.embed_tokens.weight": torch.cat([tensors["model.embed_tokens.weight"], rows])},
    )
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": vocab.size}))
    for name in ("codebook.safetensors", "codebook.json"):
        (folder / name).write_text("{}")


def main():
    parser = argparse.ArgumentParser(
        description="Time merge.py against mergekit and against copying."
    )
    parser.add_argument(
        "--scratch", required=True, type=Path,
        help="an empty or new folder for 7 GB of random weights",
    )
    parser.add_argument(
        "--mergekit", default="mergekit-yaml", help="mergekit's command (default mergekit-yaml)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    s = args.scratch.resolve()
    if not (s / "speech_short/model.safetensors").exists():
        make(s)
    (s / "mergekit.yaml").write_text(
        MERGEKIT.format(base=s / "base", instruct=s / "instruct", speech=s / "speech_short")
    )
    three = [str(s / name / "model.safetensors") for name in ("base", "instruct", "speech")]
    commands = {
        "ours": [
            sys.executable, str(ROOT / "merge.py"), "--base", str(s / "base"),
            "--instruct", str(s / "instruct"), "--speech", str(s / "speech"),
            "--out", str(s / "ours"),
        ],
        "mergekit": [args.mergekit, str(s / "mergekit.yaml"), str(s / "peer")],
        "copying": ["bash", "-c", f"cat {three[0]} {three[1]} > /dev/null; cp {three[2]} {s}/copy"],
        "start-up": [sys.executable, str(ROOT / "merge.py"), "--help"],
    }
    times, memory = {name: [] for name in commands}, {name: 0 for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            if name in ("ours", "mergekit"):
                shutil.rmtree(s / {"ours": "ours", "mergekit": "peer"}[name], ignore_errors=True)
            os.sync()
            seconds, peak = process(command)
            times[name].append(seconds)
            memory[name] = max(memory[name], peak)
            print(f"{name:10} {seconds:6.2f} s   peak {peak / 2 ** 20:7.0f} MB", flush=True)
        ours = weights.Tensors(s / "ours")
        peer = weights.Tensors(s / "peer")  # the gate
        for tensor in names():
            a, b = ours[tensor][: SHAPE["vocab_size"]].float(), peer[tensor].float()
            if tensor == "model.embed_tokens.weight":
                # Chat markers: ours are instruct's, by rule.
                a[257:259] = b[257:259]
            assert (a - b).abs().max() <= 2**-7 * b.abs().max(), f"{tensor}: the two sums differ"
    extra = memory["ours"] - memory["start-up"]
    done = {name: median(t) for name, t in times.items()}
    record(
        "cpu", "merge/0.5B", "s, whole process", done["ours"], done["mergekit"],
        "mergekit "
        + subprocess.run(
            [
                str(Path(shutil.which(args.mergekit)).parent / "python"), "-c",
                "import importlib.metadata as m; print(m.version('mergekit'))",
            ],
            capture_output=True,
            text=True,
        ).stdout.strip(),
        better="less", memory_above_start_up_mb=round(extra / 2**20),
    )
    record(
        "cpu", "merge/copy", "s, whole process", done["ours"], done["copying"],
        "cat two files, cp one", better="less",
    )


if __name__ == "__main__":
    main()
