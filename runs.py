"""What every command does around its work: one-line errors, whole folders out, a resume.

in   JSON files; a device and what --dtype says; work to count
out  output folders that are whole or not there, each with a recipe.json; a bar, or lines in a log
see  bfloat16 (arXiv:1905.12322); mixed precision (arXiv:1710.03740)
run  python runs.py                     # what this machine multiplies in, and how fast

A command is stopped at any moment, by Ctrl-C, a full disk or a power cut, and started
again. So an output is written under another name and renamed when it is whole, and long
work keeps a Checkpoint.

Scripts import this file before torch: OpenMP reads its settings when torch is loaded.
"""

import os

# OpenMP's threads meet at the end of every product, and whoever comes first spins: it
# waits at full speed. With another program on one of the cores, it spins for that
# program's whole turn. After 1,000 rounds, some microseconds, it had better sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import pickle  # noqa: E402
import platform  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

# By default a GPU's convolutions round to 11 bits (TF32), and are called float32 all the same.
torch.backends.cudnn.allow_tf32 = False

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORTH_IT = 1.2  # bfloat16 keeps three digits: it is taken where it is this much faster
TRIES = 10  # products that are timed; the fastest counts: a busy machine slows the others
LINE_EVERY = 30  # seconds between two lines about progress where there is no terminal
KEEP_EVERY = 30  # seconds between two checkpoints of work that is done in pieces
SAMPLED = 1 << 26  # bytes; a larger file is fingerprinted by samples of it


# --- a command ----------------------------------------------------------------


def run(main):
    """Run a script's main(). A bad input or a full disk ends in one line and exit status 1.

    Ctrl-C ends in another line and 130. `python -X dev SCRIPT ...` shows the traceback
    instead.
    """
    name = Path(sys.argv[0]).name
    try:
        main()
    except (MemoryError, RuntimeError) as error:  # of NumPy; of torch, on a GPU or a CPU
        if sys.flags.dev_mode or not out_of_memory(error):
            raise
        why = str(error).splitlines()[0]
        sys.exit(f"{name}: out of memory ({why}); give smaller batches, or shorter ones")
    except (ValueError, OSError, SafetensorError) as error:
        if sys.flags.dev_mode:
            raise
        named = isinstance(error, OSError) and error.filename
        sys.exit(
            f"{name}: {error.filename}: {error.strerror}" if named else f"{name}: {error}"
        )
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; the same command starts or resumes it", file=sys.stderr)
        sys.exit(130)


def out_of_memory(error):
    """Is it a want of memory, and no mistake of the program's?"""
    told = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return told or "can't allocate memory" in str(error)


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(
            f"RANK {rank} of WORLD_SIZE {world}: wanted whole numbers, ranks from 0; "
            "start with torchrun, or unset both"
        )
    return int(rank), int(world)


def device_of_rank(device, world):
    """Under torchrun "cuda" becomes this process's own card, "cuda:1"; else the device itself."""
    if world > 1 and device.startswith("cuda:"):
        raise ValueError(
            f"--device {device} under torchrun: wanted cuda, a card for each process"
        )
    if world > 1 and device == "cuda":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


# --- JSON in ------------------------------------------------------------------


def read_json(path, keys=()):
    """The JSON object of a file. A ValueError names the file if it is none, or lacks a key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None

    if not isinstance(value, dict):
        raise ValueError(f"{path}: got {str(value)[:40]!r}, wanted a JSON object {{...}}")
    lacking = [key for key in keys if key not in value]
    if lacking:
        raise ValueError(f"{path}: has no {lacking[0]!r}; wanted {', '.join(keys)}")
    return value


def utf8(path):
    """The text of a file. A ValueError names it where it is in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); "
            "convert it first"
        ) from None


def read_lines(path):
    """The objects of a JSON-lines file. A ValueError names the first line that is not one."""
    entries = []
    for number, line in enumerate(utf8(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path}, line {number}: got {line.strip()[:40]!r}, "
                "wanted a JSON object {...}"
            )
        entries.append(entry)
    return entries


# --- files out ----------------------------------------------------------------


def may_write(path, overwrite):
    """A FileExistsError if a file is there and may not be replaced: ask before hours of work."""
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")


def write_file(path, data, overwrite=False):
    """Write text or bytes beside `path`, then rename: a reader never sees half a file."""
    path = Path(path)
    may_write(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        settle(file)
    os.replace(partial, path)


def write_tensors(path, tensors):
    """A safetensors file of {name: tensor}, whole or not there, for the same readers as others.

    (safetensors lets the owner alone read what it writes.)
    """
    partial = Path(path).with_suffix(".tmp")
    partial.touch()
    mode = partial.stat().st_mode
    save_file(tensors, partial, {"format": "pt"})
    partial.chmod(mode)
    os.replace(partial, path)


def settle(file):
    """Put what was written to an open file on the disk, before anything says it is there."""
    file.flush()
    os.fsync(file.fileno())


def reopened(path, size):
    """A file open behind its first `size` bytes; the rest is cut off."""
    path.touch()
    if path.stat().st_size < size:
        raise ValueError(
            f"{path}: {path.stat().st_size} bytes, its mark says {size}; the disk has "
            f"lost some. Remove {path.parent} to start anew"
        )
    file = open(path, "r+b")
    file.truncate(size)
    file.seek(size)
    return file


# --- folders out --------------------------------------------------------------


@contextmanager
def new_folder(out, inputs=(), overwrite=False, notes=None, scratch=()):
    """Yield OUT.partial to write into; when the block ends well, rename it to OUT.

    inputs    files and folders it is made from: their hashes go into OUT/recipe.json, with `notes`
    overwrite replace OUT, at the very end, and only if this project made it (it has a recipe.json)
    scratch   files that only a resume needs. An earlier OUT.partial with one of them is kept, for
              its owner to go on from; any other is emptied. They go after the rename, so a stop
              costs nothing
    Where OUT is a link, what it points to is replaced. OUT.partial and OUT.replaced are ours.
    """
    out = Path(out)
    out = out.resolve() if out.is_symlink() else out
    partial = out.with_name(out.name + ".partial")
    old = out.with_name(out.name + ".replaced")
    replaceable(out, overwrite)
    partial.mkdir(parents=True, exist_ok=True)

    with owned(partial):
        if old.exists() and not out.exists():  # a kill came between the two renames below
            os.replace(old, out)
        replaceable(out, overwrite)  # another process may have written it meanwhile
        if old.exists():  # a run was killed while it removed what it replaced
            replaceable(old, overwrite=True)
            shutil.rmtree(old)
        if not any((partial / name).exists() for name in scratch):
            for path in partial.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

        # Inputs are hashed before the work: as they were when they were read.
        made = recipe(inputs) | (notes or {})
        yield partial

        (partial / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")
        os.sync()  # after a power cut a folder is whole, too
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        for name in scratch:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def replaceable(out, overwrite):
    """A FileExistsError for a folder that is there and may not be replaced."""
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"{out} exists; pass --overwrite to replace it, or another --out"
        )
    if out.exists() and not (out / "recipe.json").exists():
        raise FileExistsError(
            f"{out} was not made by this project (it has no recipe.json); "
            "remove it yourself, or pass another --out"
        )


@contextmanager
def owned(folder):
    """One process at a time writes into a folder. The lock goes when the process ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError  # its last owner has just renamed it
    except BlockingIOError:
        os.close(handle)
        raise FileExistsError(
            f"{folder}: another process is writing it; wait for its end, "
            "or pass another --out"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


# --- what made an output ------------------------------------------------------


def recipe(inputs=()):
    """What made an output: the command, machine and versions, a fingerprint of each input."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": machine,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "inputs": {str(Path(path).resolve()): fingerprint(path) for path in inputs if path},
    }


def made_of(folder):
    """{path: fingerprint} of what a folder was made from, as its recipe says; {} without one."""
    file = Path(folder) / "recipe.json"
    made = read_json(file).get("inputs") if file.exists() else None
    made = made if isinstance(made, dict) else {}
    return {Path(path).resolve(): digest for path, digest in made.items()}


def unchanged(folder, inputs):
    """Refuse a folder that was made from another state of one of `inputs`."""
    made = made_of(folder)
    file = Path(folder) / "recipe.json"
    for path in inputs:
        before = made.get(Path(path).resolve())  # "out/base", "./out/base/": one folder
        if before not in (None, fingerprint(path)):
            raise ValueError(
                f"{path} has changed since {folder} was made from it; make {folder} "
                f"again with --overwrite ({file} has the command)"
            )


def made_from(folder, base):
    """May a folder have been made from `base`? No, if its recipe names others alone."""
    made = made_of(folder)
    return not made or fingerprint(base) in made.values()


def fingerprint(path):
    """sha256 of a file; of a folder, that of the names and fingerprints of its files.

    A folder's recipe.json (it tells how, not what) and hidden files are left out. A file
    over 64 MB is known by its size and 64 samples of 64 KB: enough to notice other weights,
    in no time.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            within = file.relative_to(path)
            hidden = any(part.startswith(".") for part in within.parts)
            if file.is_file() and file.name != "recipe.json" and not hidden:
                digest.update(f"{within} {fingerprint(file)}\n".encode())
    elif (size := path.stat().st_size) > SAMPLED:
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as file:
            for n in range(64):
                file.seek((size - (1 << 16)) * n // 63)
                digest.update(file.read(1 << 16))
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- a resume -----------------------------------------------------------------


class Checkpoint:
    """All that a stopped run needs to go on, in one file that is replaced whole.

    `settings` {name: text} tell one run from another: who goes on must have been started
    alike.
    """

    def __init__(self, path, settings):
        self.path, self.settings = Path(path), settings

    def read(self, *names):
        """The values saved under `names`, on the CPU; None if nothing was saved.

        A ValueError if the file is damaged, of another version, or of a run with other
        settings.
        """
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError):
            saved = {}
        lacking = [
            n for n in (*names, "settings") if not isinstance(saved, dict) or n not in saved
        ]
        if lacking:
            raise ValueError(
                f"{self.path}: no checkpoint of this version, or a damaged one "
                f"(no {lacking[0]!r} in it); remove it to start anew"
            )

        before, now = saved["settings"], self.settings
        differs = [name for name in now | before if before.get(name) != now.get(name)]
        if differs:
            name = differs[0]
            raise ValueError(
                f"{self.path} is of a run with another {name} ({before.get(name)}, "
                f"now {now.get(name)}); give what it was started with, or remove it"
            )
        return [saved[name] for name in names]

    def write(self, **state):
        """Save values by name. A full disk is an OSError, and what was saved before stays."""
        partial = self.path.with_suffix(".tmp")
        try:
            with open(partial, "wb") as file:
                torch.save(state | {"settings": self.settings}, file)
                settle(file)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            partial.unlink(missing_ok=True)
            why = str(error).splitlines()[0]
            raise OSError(
                f"{partial} could not be written, is the disk full? ({why}) "
                "What was saved before is kept"
            ) from None
        os.replace(partial, self.path)


def in_pieces(out, settings, items, work, size, desc, unit):
    """All that `work` makes of items, given `size` of them at a time; a list, in their order.

    A checkpoint beside `out` keeps what is done, until `finish_pieces` has written `out`.
    As it holds all of it, it is written now and then (KEEP_EVERY), and at the end or a stop.
    """
    checkpoint = Checkpoint(pieces_of(out), settings)
    checkpoint.path.parent.mkdir(parents=True, exist_ok=True)
    saved = checkpoint.read("done")
    done = saved[0] if saved else []
    kept = len(done)
    since = time.monotonic()
    with Bar(total=len(items), initial=len(done), desc=desc, unit=unit) as bar:
        try:
            while len(done) < len(items):
                results = work(items[len(done) : len(done) + size])
                done += results
                bar.update(len(results))
                if time.monotonic() - since > KEEP_EVERY:
                    checkpoint.write(done=done)
                    kept = len(done)
                    since = time.monotonic()
        finally:
            if len(done) > kept:
                checkpoint.write(done=done)
    return done


def pieces_of(out):
    """Where `in_pieces` keeps what is done of an output."""
    return Path(f"{Path(out)}.pieces")  # beside "out/", too


def finish_pieces(out, data, overwrite=False):
    """Write what the pieces were for, and forget their checkpoint."""
    write_file(out, data, overwrite)
    pieces_of(out).unlink(missing_ok=True)


def keep_log(path, step):
    """Of a log, JSON lines with a "step", keep the steps that are done; a kill may have left more,
    and half a line at the end."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    done = [
        line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step
    ]
    path.write_text("".join(done))


# --- arithmetic ---------------------------------------------------------------


def product_rate(dtype, shape=(256, 256, 256)):
    """Operations a second of the CPU's product (m, k) @ (k, n) in `dtype`, the best of TRIES."""
    m, k, n = shape
    a, b = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype)
    a @ b  # the library prepares a product when it first meets it
    best = 0.0
    for _ in range(TRIES):
        begin = time.perf_counter()
        a @ b
        best = max(best, 2 * m * k * n / (time.perf_counter() - begin))
    return best


@functools.cache
def fast_dtype(kind):
    """(dtype, why): the arithmetic that a "cpu" or a "cuda" device multiplies fast in.

    A processor without instructions for bfloat16 (AVX512_BF16, AMX, Arm's BF16) emulates
    it, a hundred times slower than float32. Asking the processor is not enough, as the
    library may not use what it has; so a small product is timed in both.
    """
    if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU multiplies it"
    if kind == "cuda":
        return torch.float32, "this GPU does not multiply bfloat16"
    full = product_rate(torch.float32)
    half = product_rate(torch.bfloat16)
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

    tqdm.write(f"{device}: products in {name_of(dtype)} ({why})", file=sys.stderr)
    return dtype


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def add_dtype(parser):
    """The --dtype of every command that multiplies for long."""
    parser.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="what products are made in; weights stay float32 "
        "(default: auto, what this machine is fast at)",
    )


def number(kind, least, most=math.inf):
    """The type of a flag: an int or a float from `least` to `most`; infinity and nan are none."""

    def read(text):
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            limits = f"{least} to {most}" if most < math.inf else f"a number from {least} on"
            raise argparse.ArgumentTypeError(f"got {text}, wanted {limits}")
        return value

    read.__name__ = kind.__name__  # of "abc" argparse says: invalid int value
    return read


count = number(int, 1)
not_negative = number(float, 0.0)
seed = number(int, 0, (1 << 31) - 1)


def positive(text):
    """The type of a flag: a float above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a number above 0")
    return value


positive.__name__ = "float"


def device(text):
    """A --device that this machine has."""
    kind, colon, number = text.partition(":")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    number = number if colon else "0"
    if not number.isdecimal() or int(number) >= count:
        raise argparse.ArgumentTypeError(
            f"{text}: not on this machine; wanted cpu, or with a GPU cuda or cuda:0"
        )
    return text


def add_device(parser):
    """The --device of every command that a GPU makes faster."""
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: cuda if there is one)",
    )


def autocast(device, dtype):
    """Inside, products are made in `dtype`; weights, and sums that need it, stay in float32."""
    kind = torch.device(device).type
    half = torch.bfloat16
    return torch.autocast(kind, half, enabled=dtype == half)


# --- progress -----------------------------------------------------------------


class Bar(tqdm):
    """A tqdm bar on a terminal. Elsewhere, as in a log, a notebook or CI, a line every LINE_EVERY
    seconds, with rate and time left."""

    def __init__(self, *args, **settings):
        self.lines = not sys.stderr.isatty()
        if self.lines:
            settings |= {
                "mininterval": LINE_EVERY,
                "maxinterval": LINE_EVERY,
                "delay": LINE_EVERY,
            }
            settings |= {
                "miniters": 1,
                "bar_format": "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, "
                "{elapsed} gone, {remaining} left{postfix}",
            }
        super().__init__(*args, **settings)

    def display(self, msg=None, pos=None):
        if not self.lines:
            return super().display(msg, pos)
        print(msg or self, file=self.fp, flush=True)

    def clear(self, nolock=False):
        if not self.lines:
            super().clear(nolock)

    def refresh(self, nolock=False, lock_args=None):
        if self.lines and nolock:  # tqdm.write redraws bars; a line stays where it is
            return None
        return super().refresh(nolock, lock_args)

    def close(self):
        if self.lines and not self.disable:
            self.disable = True  # a last line would say what the command says anyway
            self._decr_instances(self)
        else:
            super().close()


def main():
    argparse.ArgumentParser(
        description="Say what this machine multiplies fast."
    ).parse_args()
    threads = torch.get_num_threads()
    for name, dtype in DTYPES.items():
        rate = product_rate(dtype, (2048, 256, 768)) / 1e9
        print(f"cpu, {threads} threads, {name}: {rate:.0f} GFLOP/s")
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        dtype, why = fast_dtype(kind)
        print(f"{kind}: {name_of(dtype)} ({why})")


if __name__ == "__main__":
    run(main)
