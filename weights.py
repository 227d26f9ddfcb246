"""Folders on disk: named tensors in and out, strictly; whole folders written beside and renamed; what made them, and from what.

in   a Hugging Face model folder: model.safetensors, or shards with an index, or pytorch_model.bin
out  tensors by name, one at a time; new folders that appear complete or not at all, each with a recipe.json
see  the safetensors format (8-byte header length, JSON header, raw little-endian tensors)
run  python weights.py out/base                    # name, shape and dtype of every tensor of a folder
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


SAMPLED = 1 << 26                   # bytes; larger files are known by samples of them
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}       # as safetensors and torch name them


# --- reading ---------------------------------------------------------------------------------------------------------------

def read_json(path, keys=()):
    """The JSON object of a file; a ValueError names the file if it is not one, or lacks one of `keys`."""
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


def processes():
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK {rank} of WORLD_SIZE {world}: wanted whole numbers, ranks from 0; start with torchrun, or unset both")
    return int(rank), int(world)


def read_checkpoint(path, device, keys):
    """What a stopped training left in a file; a ValueError if it is damaged, or lacks one of `keys` as one of another version does."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        saved = {}
    lacking = [key for key in keys if not isinstance(saved, dict) or key not in saved]
    if lacking:
        raise ValueError(f"{path}: no checkpoint of this version, or a damaged one (no {lacking[0]!r} in it); remove {Path(path).parent} to start anew")
    return saved


def read_lines(path):
    """The objects of a JSON-lines file; a ValueError names file and line of the first that is not one."""
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number}: got {line.strip()[:40]!r}, wanted a JSON object {{...}}")
    return rows


class Tensors:
    """The named tensors of a model folder, read lazily: `Tensors(folder)[name]` touches the disk for that tensor alone.

    Raises FileNotFoundError or ValueError, in one line, for a folder that is missing, damaged or points outside itself.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such model folder")
        self.home = {}                                                     # tensor name -> the file that holds it
        self.files = {}                                                    # file -> open safetensors handle, or dict of a .bin
        self.headers = {}                                                  # file -> (open file, where its tensors begin, header), for `block`
        single = next((f for f in ("model.safetensors", "pytorch_model.bin") if (self.folder / f).exists()), None)
        index = next((f for f in ("model.safetensors.index.json", "pytorch_model.bin.index.json") if (self.folder / f).exists()), None)
        if single:
            self.home = dict.fromkeys(self._open(single), single)
        elif index:
            self.home = read_json(self.folder / index).get("weight_map", {})
            if not isinstance(self.home, dict) or not all(isinstance(file, str) for file in self.home.values()):
                raise ValueError(f"{self.folder / index}: wanted a weight_map of tensor names and file names")
            for file in sorted(set(self.home.values())):
                if Path(file).name != file:
                    raise ValueError(f"{self.folder / index}: names the shard {file!r}, which is not a plain file name inside the folder")
                have = set(self._open(file))
                lost = [name for name, home in self.home.items() if home == file and name not in have]
                if lost:
                    raise ValueError(f"{self.folder / file}: {lost[0]} is missing, though the index puts it there")
        if not self.home:
            raise FileNotFoundError(f"{folder}: no model.safetensors, no shards with an index, no pytorch_model.bin in it")

    def _open(self, file):
        path = self.folder / file
        if not path.exists():
            raise FileNotFoundError(f"{path}: shard missing; the index names it")
        try:
            if file.endswith(".bin"):
                self.files[file] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:
                self.files[file] = safe_open(path, framework="pt")
            return list(self.files[file].keys())
        except (SafetensorError, RuntimeError, EOFError, AttributeError) as error:
            raise ValueError(f"{path}: damaged, cannot be read ({str(error).splitlines()[0]})") from None
        except Exception as error:                                         # weights_only refuses foreign pickles with its own error class
            raise ValueError(f"{path}: refused, not a plain tensor file ({type(error).__name__})") from None

    def __iter__(self):
        return iter(self.home)

    def __contains__(self, name):
        return name in self.home

    def path(self, name):
        return self.folder / self.home[name]

    def shape(self, name):
        file = self.files[self.home[name]]
        return tuple(file[name].shape if isinstance(file, dict) else file.get_slice(name).get_shape())

    def __getitem__(self, name):
        file = self.files[self.home[name]]
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def dtype(self, name):
        """The torch dtype of a tensor; ValueError for one that is not a float of 16 to 64 bits."""
        file = self.files[self.home[name]]
        dtype = str(file[name].dtype).removeprefix("torch.") if isinstance(file, dict) else file.get_slice(name).get_dtype()
        if dtype not in DTYPES and dtype not in DTYPES.values():
            raise ValueError(f"{self.path(name)}: {name} is {dtype}; wanted {', '.join(DTYPES.values())}")
        return getattr(torch, DTYPES.get(dtype, dtype))

    def block(self, name, a, b):
        """Elements a to b of a tensor, flat. Read, not mapped: pages of a mapped file would count as this process's memory."""
        file, dtype = self.home[name], self.dtype(name)
        if isinstance(self.files[file], dict):
            return self.files[file][name].reshape(-1)[a:b].clone()
        if file not in self.headers:
            f = open(self.folder / file, "rb")                             # 8 bytes: the header's length; the header; then the tensors
            size = int.from_bytes(f.read(8), "little")
            self.headers[file] = f, 8 + size, json.loads(f.read(size))
        f, data, header = self.headers[file]
        raw = bytearray((b - a) * dtype.itemsize)
        if os.preadv(f.fileno(), [raw], data + header[name]["data_offsets"][0] + a * dtype.itemsize) != len(raw):
            raise ValueError(f"{self.path(name)}: {name} ends early; the file has changed since it was opened")
        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def load_into(module, folder, rename=lambda name: name, optional=()):
    """Fill a module's parameters from a folder, strictly both ways, each keeping the dtype it has on disk.

    `rename` maps a name on disk to ours, or to None for what is deliberately dropped; `optional` names of ours may be absent.
    The module may live on the meta device: tensors are assigned, not copied.
    """
    have, tensors, want = {}, Tensors(folder), module.state_dict()
    for name in tensors:
        if rename(name) is not None:
            have[rename(name)] = name
    missing, unused = want.keys() - have.keys() - set(optional), have.keys() - want.keys()
    if missing or unused:
        raise ValueError(f"{folder}: tensors do not match the config: missing {sorted(missing)[:3]}, unused {sorted(unused)[:3]} "
                         f"({len(missing)} and {len(unused)} in all)")
    for ours, name in have.items():
        if tuple(want[ours].shape) != tensors.shape(name):
            raise ValueError(f"{tensors.path(name)}: {name} has shape {tensors.shape(name)}, the config wants {tuple(want[ours].shape)}")
    state = {ours: tensors[name].clone() for ours, name in have.items()}   # clone: no tensor stays tied to a file that may change
    for ours, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{tensors.path(have[ours])}: {have[ours]} holds NaN or infinity")
    module.load_state_dict(state, strict=False, assign=True)


# --- writing ---------------------------------------------------------------------------------------------------------------

def save(folder, tensors):
    """Write named tensors as folder/model.safetensors. Shared storage (tied weights) must be dropped by the caller."""
    file = Path(folder) / "model.safetensors"
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file.with_suffix(".tmp"), {"format": "pt"})
    os.replace(file.with_suffix(".tmp"), file)


def allocate(file, tensors):
    """A safetensors file for {name: (shape, dtype)}, its header written and its data still to come: the file's handle for `write_block`,
    and where in it each tensor begins."""
    header, at, spelled = {"__metadata__": {"format": "pt"}}, 0, {name: letters for letters, name in DTYPES.items()}
    for name, (shape, dtype) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name], at = {"dtype": spelled[str(dtype).removeprefix("torch.")], "shape": list(shape), "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
    os.ftruncate(handle, 8 + len(text) + at)
    return handle, {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}


def write_index(folder, home):
    """model.safetensors.index.json for {tensor: the shard that holds it}."""
    size = sum((Path(folder) / file).stat().st_size for file in set(home.values()))
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": home}, indent=1) + "\n")


def write_block(handle, at, tensor):
    """Write a flat tensor at a byte of the file, whole: a full disk is an OSError, never a short file."""
    data = memoryview(tensor.contiguous().view(torch.uint8).numpy())
    while data:
        done = os.pwrite(handle, data, at)
        data, at = data[done:], at + done


def free(path, overwrite):
    """A FileExistsError if the file is there and may not be replaced. What works for minutes asks before it begins."""
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")


def write_file(path, data, overwrite=False):
    """Write text or bytes to a file beside `path`, then rename: a reader sees the old file or the new, never half of one."""
    path = Path(path)
    free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        settle(file)
    os.replace(partial, path)


def settle(file):
    """Have what was written to an open file on the disk before anything claims that it is there."""
    file.flush()
    os.fsync(file.fileno())


def copy_ears(source, target):
    """What hears goes where the model goes: copy the codebook, and a small HuBERT beside it, from one folder to another."""
    for name in ("codebook.safetensors", "codebook.json"):
        shutil.copy(Path(source) / name, Path(target) / name)
    if (Path(source) / "hubert").exists():
        shutil.copytree(Path(source) / "hubert", Path(target) / "hubert", dirs_exist_ok=True)


@contextmanager
def new_folder(out, inputs=(), overwrite=False, resume=False, notes=None, scratch=()):
    """Yield OUT.partial to write into; when the block ends well, add recipe.json and rename it to OUT.

    `inputs` are the files and folders it is made from (their hashes go into the recipe, beside `notes`). With `resume` an earlier
    OUT.partial is kept, for its owner to go on from; else it is emptied. OUT itself is replaced only with `overwrite`, only at the
    very end, and only if this project made it (it has a recipe.json). `scratch` names files of the partial folder that only a resume
    needs: they go after the rename, so that a stop before it costs nothing. Where OUT is a link, what it points to is replaced.
    """
    out = Path(out)
    out = out.resolve() if out.is_symlink() else out
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    if old.exists() and not out.exists():                                  # a kill came between the two renames below
        os.replace(old, out)
    replaceable(out, overwrite)
    partial.mkdir(parents=True, exist_ok=True)
    with owned(partial):
        replaceable(out, overwrite)                                        # another process may have written it meanwhile
        if old.exists():                                                   # of a run that was killed while it removed what it had replaced
            replaceable(old, overwrite=True)
            shutil.rmtree(old)
        if not resume:
            for path in partial.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        made = recipe(inputs) | (notes or {})                              # before the work: inputs are hashed as they were read
        yield partial

        (partial / "recipe.json").write_text(json.dumps(made, indent=1) + "\n")
        os.sync()                                                          # after a power cut a folder is whole, too
        if out.exists():
            os.replace(out, old)
        os.replace(partial, out)
        for name in scratch:
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def replaceable(out, overwrite):
    """A FileExistsError for a folder that is there and may not be replaced."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; pass --overwrite to replace it, or another --out")
    if out.exists() and not (out / "recipe.json").exists():
        raise FileExistsError(f"{out} was not made by this project (it has no recipe.json); remove it yourself, or pass another --out")


@contextmanager
def owned(folder):
    """One process at a time writes into a folder. The lock is the kernel's: whatever ends the process releases it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or os.stat(folder).st_ino != os.fstat(handle).st_ino:
            raise BlockingIOError                                          # its last owner has just renamed it
    except BlockingIOError:
        os.close(handle)
        raise FileExistsError(f"{folder}: another process is writing it; wait for its end, or pass another --out") from None
    try:
        yield
    finally:
        os.close(handle)


def recipe(inputs=()):
    """What made an output: the command, the versions, a fingerprint of each input."""
    return {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "inputs": {str(path): fingerprint(path) for path in inputs if path}}


def unchanged(folder, inputs):
    """Refuse a folder whose recipe names one of `inputs` with another fingerprint than it has now: it was made from something else."""
    file = Path(folder) / "recipe.json"
    made = read_json(file).get("inputs", {}) if file.exists() else {}
    made = {Path(path).resolve(): digest for path, digest in made.items()}      # "out/base" and "./out/base/" are one folder
    for path in inputs:
        if made.get(Path(path).resolve(), None) not in (None, fingerprint(path)):
            raise ValueError(f"{path} has changed since {folder} was made from it; make {folder} again with --overwrite ({file} has the command)")


def hidden(path):
    return any(part.startswith(".") for part in path.parts)


def fingerprint(path):
    """sha256 of a file; of a folder, that of its files' names and hashes (recipe.json left out: it tells how, not what; and what is
    hidden, as a downloader's .cache is). Of a file over 64 MB that of its size and 64 samples of 64 KB: enough to notice other weights, in no time."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(f for f in path.rglob("*") if f.is_file() and f.name != "recipe.json" and not hidden(f.relative_to(path))):
            digest.update(f"{file.relative_to(path)} {fingerprint(file)}\n".encode())
    elif (size := path.stat().st_size) > SAMPLED:
        digest.update(f"{size}\n".encode())
        with open(path, "rb") as f:
            for n in range(64):
                f.seek((size - (1 << 16)) * n // 63)
                digest.update(f.read(1 << 16))
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()


# --- commands --------------------------------------------------------------------------------------------------------------

def run(main):
    """Run a script's main(); a bad input or a full disk ends in one line and exit status 1, Ctrl-C in another and 130.

    `python -X dev SCRIPT ...` shows the traceback instead.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        sys.exit(f"{Path(sys.argv[0]).name}: {said}")
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: stopped; the same command starts or resumes it", file=sys.stderr)
        sys.exit(130)


def main():
    parser = argparse.ArgumentParser(description="List a model folder's tensors.")
    parser.add_argument("folder", help="a Hugging Face model folder")
    tensors = Tensors(parser.parse_args().folder)
    for name in tensors:
        print(f"{name:60} {str(tensors.shape(name)):20} {str(tensors[name].dtype).removeprefix('torch.')}")


if __name__ == "__main__":
    run(main)
