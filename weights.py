"""Named tensors on disk: read lazily and strictly, written whole.

in   a Hugging Face model folder: model.safetensors, or shards with an index, or pytorch_model.bin
out  tensors by name, one at a time; model.safetensors
see  the safetensors format (8-byte header length, JSON header, raw little-endian tensors)
run  python weights.py out/base         # name, shape and dtype of every tensor of a folder
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path

import runs  # before torch: it sets how OpenMP waits
import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

# As safetensors and torch name them.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


# --- reading ------------------------------------------------------------------


class Tensors:
    """The named tensors of a model folder: `Tensors(folder)[name]` reads that one from the disk.

    Raises FileNotFoundError or ValueError, in one line, for a folder that is missing,
    damaged or points outside itself.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such model folder")
        self.home = {}  # tensor name -> the file that holds it
        self.files = {}  # file -> open safetensors handle, or dict of a .bin
        self.headers = {}  # file -> (open file, where its tensors begin, header), for `slice`

        single = self._first("model.safetensors", "pytorch_model.bin")
        index = self._first("model.safetensors.index.json", "pytorch_model.bin.index.json")
        if single:
            self.home = dict.fromkeys(self._open(single), single)
        elif index:
            self.home = self._read_index(index)
        if not self.home:
            raise FileNotFoundError(
                f"{folder}: no model.safetensors, no shards with an index, "
                "no pytorch_model.bin in it"
            )

    def _first(self, *names):
        return next((name for name in names if (self.folder / name).exists()), None)

    def _read_index(self, index):
        """{tensor name: shard}, every shard opened and found to hold what the index says."""
        path = self.folder / index
        home = runs.read_json(path).get("weight_map", {})
        if not isinstance(home, dict) or not all(
            isinstance(file, str) for file in home.values()
        ):
            raise ValueError(f"{path}: wanted a weight_map of tensor names and file names")

        for file in sorted(set(home.values())):
            if Path(file).name != file:
                raise ValueError(
                    f"{path}: names the shard {file!r}, which is not a plain file "
                    "name inside the folder"
                )
            have = set(self._open(file))
            lost = [
                name for name, shard in home.items() if shard == file and name not in have
            ]
            if lost:
                raise ValueError(
                    f"{self.folder / file}: {lost[0]} is missing, though the index "
                    "puts it there"
                )
        return home

    def _open(self, file):
        """Open a file of tensors; their names."""
        path = self.folder / file
        if not path.exists():
            raise FileNotFoundError(f"{path}: shard missing; the index names it")
        try:
            if file.endswith(".bin"):
                held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if not all(isinstance(tensor, torch.Tensor) for tensor in held.values()):
                    raise TypeError  # refused below
                self.files[file] = held
            else:
                self.files[file] = safe_open(path, framework="pt")
            return list(self.files[file].keys())
        except (SafetensorError, RuntimeError, EOFError, AttributeError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{path}: damaged, cannot be read ({why})") from None
        except Exception as error:  # weights_only refuses a pickle with an error of its own
            why = type(error).__name__
            raise ValueError(f"{path}: refused, not a plain tensor file ({why})") from None

    def __iter__(self):
        return iter(self.home)

    def __contains__(self, name):
        return name in self.home

    def path(self, name):
        """The file that holds a tensor."""
        return self.folder / self.home[name]

    def shape(self, name):
        return tuple(self[name].shape)

    def __getitem__(self, name):
        """A tensor, mapped: nothing of it is read before it is used."""
        file = self.files[self.home[name]]
        return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def dtype(self, name):
        """The torch dtype of a tensor; ValueError for one that is no float of 16 to 64 bits."""
        dtype = self[name].dtype
        if runs.name_of(dtype) not in DTYPES.values():
            raise ValueError(
                f"{self.path(name)}: {name} is {runs.name_of(dtype)}; "
                f"wanted {', '.join(DTYPES.values())}"
            )
        return dtype

    def slice(self, name, a, b):
        """Elements a to b of a tensor, flat.

        They are read, not mapped: pages of a mapped file would count as this process's
        memory.
        """
        file = self.home[name]
        dtype = self.dtype(name)
        if isinstance(self.files[file], dict):
            return self.files[file][name].reshape(-1)[a:b].clone()

        # 8 bytes: the header's length; the header; then the tensors.
        if file not in self.headers:
            handle = open(self.folder / file, "rb")
            size = int.from_bytes(handle.read(8), "little")
            self.headers[file] = handle, 8 + size, json.loads(handle.read(size))
        handle, data, header = self.headers[file]

        raw = bytearray((b - a) * dtype.itemsize)
        begin = data + header[name]["data_offsets"][0] + a * dtype.itemsize
        if os.preadv(handle.fileno(), [raw], begin) != len(raw):
            raise ValueError(
                f"{self.path(name)}: {name} ends early; the file has changed since it "
                "was opened"
            )
        return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


class Unfilled(TorchFunctionMode):
    """Modules that are made inside get no values of torch.nn.init: `load_into` fills them.

    Torch would draw values for the meta device, too, which keeps none. For that it imports its
    compiler, which is nearly half of a start.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def load_into(module, folder, rename=lambda name: name, optional=()):
    """Fill a module's parameters from a folder, strictly both ways, each in its dtype on disk.

    rename    maps a name on disk to ours, or to None for what is deliberately dropped
    optional  names of ours that may be absent
    The module may live on the meta device: tensors are assigned, not copied.
    """
    tensors = Tensors(folder)
    want = module.state_dict()
    have = {rename(name): name for name in tensors if rename(name) is not None}
    missing = want.keys() - have.keys() - set(optional)
    unused = have.keys() - want.keys()
    if missing or unused:
        raise ValueError(
            f"{folder}: tensors do not match the config: "
            f"missing {sorted(missing)[:3]}, unused {sorted(unused)[:3]} "
            f"({len(missing)} and {len(unused)} in all)"
        )
    state = {}
    for ours, name in have.items():
        if tuple(want[ours].shape) != tensors.shape(name):
            raise ValueError(
                f"{tensors.path(name)}: {name} has shape {tensors.shape(name)}, "
                f"the config wants {tuple(want[ours].shape)}"
            )
        if want[ours].is_floating_point():
            tensors.dtype(name)  # an error for whole numbers, and for floats of 8 bits
        state[ours] = tensors[name].clone()  # no tensor stays tied to a file that may change
        if not torch.isfinite(state[ours]).all():
            raise ValueError(f"{tensors.path(name)}: {name} holds NaN or infinity")
    module.load_state_dict(state, strict=False, assign=True)


# --- writing ------------------------------------------------------------------


def save(folder, tensors):
    """Write {name: tensor} as folder/model.safetensors, without storage shared (tied weights)."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    runs.write_tensors(Path(folder) / "model.safetensors", whole)


def allocate(file, tensors):
    """A safetensors file for {name: (shape, dtype)}: its header is written, its data to come.

    Returns the file's handle for `write_slice`, and where in it each tensor begins.
    """
    letters = {name: short for short, name in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + math.prod(shape) * dtype.itemsize
        kind = letters[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    os.pwrite(handle, len(text).to_bytes(8, "little") + text, 0)
    os.ftruncate(handle, 8 + len(text) + at)
    return handle, {
        name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors
    }


def write_index(folder, home):
    """model.safetensors.index.json for {tensor: the shard that holds it}."""
    folder = Path(folder)
    size = sum((folder / file).stat().st_size for file in set(home.values()))
    index = {"metadata": {"total_size": size}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_slice(handle, at, tensor):
    """Write a tensor at a byte of the file, whole: a full disk is an OSError."""
    data = memoryview(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    while data:
        done = os.pwrite(handle, data, at)
        data = data[done:]
        at = at + done


def codebook_files(folder):
    """The files of a folder's codebook; a FileNotFoundError names the one that it lacks."""
    files = [Path(folder) / name for name in ("codebook.safetensors", "codebook.json")]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: missing; copy it from where {folder} was made")
    return files


def copy_codebook(source, target):
    """Copy what hears from folder to folder: the codebook, and a small HuBERT beside it."""
    for file in codebook_files(source):
        shutil.copy(file, Path(target) / file.name)
    if (Path(source) / "hubert").exists():
        shutil.copytree(
            Path(source) / "hubert", Path(target) / "hubert", dirs_exist_ok=True
        )


def main():
    parser = argparse.ArgumentParser(description="List a model folder's tensors.")
    parser.add_argument("folder", help="a Hugging Face model folder")
    tensors = Tensors(parser.parse_args().folder)
    for name in tensors:
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        print(f"{name:60} {str(tensors.shape(name)):20} {dtype}")


if __name__ == "__main__":
    runs.run(main)
