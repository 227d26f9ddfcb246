"""A command's run on this machine: which arithmetic it is fast at, and how far the work is.

in   a device and what --dtype says; work to count      out  a torch dtype; a bar, or lines in a log
see  bfloat16 (arXiv:1905.12322); mixed precision (arXiv:1710.03740)
run  python runs.py                     # what this machine multiplies in, and how fast

Scripts import this file before torch: OpenMP reads its settings when torch is loaded.
"""
import os

# OpenMP's threads meet at the end of every product, and whoever comes first spins: it waits at full
# speed. With another program on one of the cores, it spins for that program's whole turn. After
# 1,000 rounds, some microseconds, it had better sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse  # noqa: E402
import functools  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORTH_IT = 1.2      # bfloat16 keeps three digits: it is taken where it is this much faster
TRIES = 10          # products that are timed; the fastest counts: a busy machine slows the others
LINE_EVERY = 30     # seconds between two lines about progress where there is no terminal


# --- arithmetic --------------------------------------------------------------------------------

def product_rate(dtype, shape=(256, 256, 256), enough=0.0):
    """Operations a second of the CPU's product (m, k) @ (k, n) in `dtype`, the best of TRIES.

    Stops early where the rate is below a tenth of `enough`: the rest would take seconds.
    """
    m, k, n = shape
    a, b = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
    a @ b           # the library prepares a product when it first meets it
    best = 0.0
    for _ in range(TRIES):
        begin = time.perf_counter()
        a @ b
        best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
        if best < enough / 10:
            break
    return best


@functools.cache
def fast_dtype(kind):
    """(dtype, why): the arithmetic that a "cpu" or a "cuda" device multiplies fast in.

    A processor without instructions for bfloat16 (AVX512_BF16, AMX, Arm's BF16) emulates it, a
    hundred times slower than float32. Asking the processor is not enough, as the library may not
    use what it has; so a small product is timed in both.
    """
    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU multiplies it"
    if kind == "cuda":
        return torch.float32, "this GPU does not multiply bfloat16"
    full = product_rate(torch.float32)
    half = product_rate(torch.bfloat16, enough=full)
    why = f"here a product in bfloat16 runs at {half / full:.2g} times the rate of float32"
    return torch.bfloat16 if half > WORTH_IT * full else torch.float32, why


def arithmetic(asked, device):
    """The dtype to multiply in, of --dtype and a device; says which and why, in one line.

    asked: "auto", "float32" or "bfloat16".
    """
    if asked == "auto":
        dtype, why = fast_dtype(torch.device(device).type)
    else:
        dtype, why = DTYPES[asked], "as --dtype says"

    # By default a GPU's convolutions round to 11 bits (TF32), and are called float32 all the same.
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32
    tqdm.write(f"{device}: products in {name_of(dtype)} ({why})", file=sys.stderr)
    return dtype


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def add_dtype(parser):
    """The --dtype of every command that multiplies for long."""
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto",
                        help="what products are made in; weights stay float32 "
                             "(default: auto, what this machine is fast at)")


def autocast(device, dtype):
    """Inside, products are made in `dtype`; weights, and sums that need it, stay in float32."""
    kind, half = torch.device(device).type, torch.bfloat16
    return torch.autocast(kind, half, enabled=dtype == half)


# --- progress ----------------------------------------------------------------------------------

class Bar(tqdm):
    """A tqdm bar on a terminal. Elsewhere, as in a log, a notebook or CI, a line every LINE_EVERY
    seconds, with rate and time left."""

    def __init__(self, *args, **settings):
        self.lines = not sys.stderr.isatty()
        if self.lines:
            settings |= {"mininterval": LINE_EVERY, "maxinterval": LINE_EVERY, "delay": LINE_EVERY}
            settings |= {"miniters": 1, "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, "
                                                      "{elapsed} gone, {remaining} left{postfix}"}
        super().__init__(*args, **settings)

    def display(self, msg=None, pos=None):
        if not self.lines:
            return super().display(msg, pos)
        print(msg or self, file=self.fp, flush=True)

    def clear(self, nolock=False):
        if not self.lines:
            super().clear(nolock)

    def refresh(self, nolock=False, lock_args=None):
        if not (self.lines and nolock):     # tqdm.write redraws bars; a line stays where it is
            return super().refresh(nolock, lock_args)

    def close(self):
        if self.lines and not self.disable:
            self.disable = True             # a last line would say what the command says anyway
            self._decr_instances(self)
        else:
            super().close()


def main():
    argparse.ArgumentParser(description="Say what this machine multiplies fast.").parse_args()
    threads = torch.get_num_threads()
    for name, dtype in DTYPES.items():
        rate = product_rate(dtype, (2048, 256, 768)) / 1e9
        print(f"cpu, {threads} threads, {name}: {rate:.0f} GFLOP/s")
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        dtype, why = fast_dtype(kind)
        print(f"{kind}: {name_of(dtype)} ({why})")


if __name__ == "__main__":
    main()
