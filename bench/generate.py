"""How fast does `generate` write? Random weights of SmolLM2-135M's shape, against transformers.generate on the same folder.

in   nothing     out  a row of results/bench-cpu.json (bench-h200.json on a GPU): generate/135M
run  python bench/generate.py                        # wants bench/requirements.txt; about three minutes on two cores

One process, interleaved rounds, medians; 128 ids of prompt, 128 new ones, greedy. First the gate: both must write the same ids.
"""
import argparse
import sys
import tempfile
import time

import torch

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from model import LM, Config, generate

SHAPE = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
             max_position_embeddings=8192, rope_theta=1e5)                # SmolLM2-135M
PROMPT, NEW = 128, 128


def main():
    parser = argparse.ArgumentParser(description="Time generate against transformers.generate.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    import transformers
    sync = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    for dtype in (torch.float32, torch.bfloat16):
        with tempfile.TemporaryDirectory() as folder:
            LM.fresh(Config(**SHAPE, tie_word_embeddings=True), 0).to(dtype).save(folder)
            ours = LM.load(folder, args.device).eval()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(args.device).eval()
        prompt = torch.randint(0, SHAPE["vocab_size"], (PROMPT,), generator=torch.Generator().manual_seed(0))
        write = {
            "ours": lambda: [int(i[0]) for i in generate(ours, [prompt], NEW, stop=[SHAPE["vocab_size"]])],
            "transformers": lambda: theirs.generate(prompt[None].to(args.device), attention_mask=torch.ones_like(prompt[None]).to(args.device), max_new_tokens=NEW, do_sample=False,
                                                    eos_token_id=None, pad_token_id=0)[0, PROMPT:].tolist(),
        }
        said = {name: run() for name, run in write.items()}               # also the warm-up
        same = next((n for n, (a, b) in enumerate(zip(*said.values())) if a != b), NEW)
        assert same == NEW or dtype != torch.float32, f"the two write different ids from place {same} on"
        times = {name: [] for name in write}
        for _ in range(args.rounds):
            for name, run in write.items():
                sync()
                began = time.perf_counter()
                run()
                sync()
                times[name].append(time.perf_counter() - began)
        rate = {name: NEW / median(t) for name, t in times.items()}
        label = str(dtype).removeprefix("torch.")
        record("cpu" if args.device == "cpu" else "h200", f"generate/135M-{label}", "new tokens a second, 128 after 128", rate["ours"], rate["transformers"],
               f"transformers {transformers.__version__}", ids_equal_until=same)


if __name__ == "__main__":
    main()
