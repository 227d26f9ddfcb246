"""How fast does `generate` write? Random weights of real shapes, against transformers.generate
on the same folder.

in   nothing
out  rows of results/bench-cpu.json (bench-h200.json on a GPU): generate/...
run  python bench/generate.py
     # wants bench/requirements.txt; about three minutes on two cores

One process, interleaved rounds, medians; 128 ids of prompt, greedy: SmolLM2-135M's shape and
128 new ids on a CPU, Qwen2.5-0.5B's and Llama-3.2-1B's and 512 on a GPU, there also against
transformers' compiled static cache. First the gate, in float32 (which is all that a GPU does in
it): all must write the same ids. Share of the bound: every new id reads all weights once, at
the rate at which this memory is read by a sum (4.3 TB/s on an H200).
"""

import argparse
import sys
import tempfile
import time

import torch

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from model import LM, Config, generate

PROMPT = 128
SHAPES = {  # name: (Config, new ids, dtypes)
    "cpu": {
        "135M": (
            dict(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3,
            ),
            128,
            (torch.float32, torch.bfloat16),
        )
    },
    "cuda": {
        "0.5B": (
            dict(
                architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=896,
                intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                num_key_value_heads=2,
            ),
            512,
            (torch.float32, torch.bfloat16),
        ),
        "1B": (
            dict(
                vocab_size=128256, hidden_size=2048, intermediate_size=8192,
                num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
            ),
            512,
            (torch.float32, torch.bfloat16),
        ),
    },
}


def bandwidth(device):
    """Bytes a second that a sum over 512 MB reads; an H200's is known."""
    if device == "cuda":
        return 4.3e12
    x, times = torch.ones(1 << 27), []
    for _ in range(7):
        began = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - began)
    return 4 * len(x) / median(times)


def main():
    parser = argparse.ArgumentParser(description="Time generate against transformers.generate.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    import transformers

    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for name, (shape, new, dtypes) in SHAPES[args.device].items():
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as folder:
                LM.fresh(
                    Config(
                        **shape, max_position_embeddings=8192, rope_theta=1e5,
                        tie_word_embeddings=True,
                    ),
                    0,
                ).to(dtype).save(folder)
                ours = LM.load(folder, args.device).eval()
                theirs = (
                    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                    .to(args.device)
                    .eval()
                )
            prompt = torch.randint(
                0, shape["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(0)
            )
            given = dict(
                attention_mask=torch.ones_like(prompt[None]).to(args.device),
                max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
            )
            write = {
                "ours": lambda: torch.stack(
                    list(generate(ours, [prompt], new, stop=[shape["vocab_size"]]))
                )[:, 0].tolist(),
                "transformers": lambda: theirs.generate(prompt[None].to(args.device), **given)[
                    0, PROMPT:
                ].tolist(),
            }
            if args.device == "cuda":
                write["transformers, compiled static cache"] = lambda: theirs.generate(
                    prompt[None].to(args.device), **given, cache_implementation="static"
                )[0, PROMPT:].tolist()
            said = {way: run() for way, run in write.items()}  # also the warm-up
            same = {
                way: next((n for n, (a, b) in enumerate(zip(said["ours"], ids)) if a != b), new)
                for way, ids in said.items()
            }
            assert (
                dtype != torch.float32 or min(same.values()) == new
            ), f"the two write different ids: equal until {same}"
            if args.device == "cuda" and dtype == torch.float32:
                continue
            times = {way: [] for way in write}
            for _ in range(args.rounds):
                for way, run in write.items():
                    sync()
                    began = time.perf_counter()
                    run()
                    sync()
                    times[way].append(time.perf_counter() - began)
            rate = {way: new / median(t) for way, t in times.items()}
            label = str(dtype).removeprefix("torch.")
            held = sum(p.numel() * p.element_size() for p in ours.parameters())
            for way in list(rate)[1:]:
                record(
                    "cpu" if args.device == "cpu" else "h200",
                    f"generate/{name}-{label}" + way.removeprefix("transformers"),
                    f"new tokens a second, {new} after {PROMPT}", rate["ours"], rate[way],
                    way.replace("transformers", f"transformers {transformers.__version__}"),
                    bound_share=round(rate["ours"] * held / bandwidth(args.device), 2),
                    ids_equal_until=same[way],
                )


if __name__ == "__main__":
    main()
