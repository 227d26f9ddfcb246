import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from torch import nn

import runs
import weights
from conftest import ROOT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "m").mkdir()
    weights.save(
        tmp_path / "m", {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    )
    return tmp_path / "m"


def module():
    return nn.ModuleDict({"a": nn.Linear(3, 2)})


def test_tensors_come_back_by_name_and_shape(folder):
    tensors = weights.Tensors(folder)
    assert tensors.shape("a.weight") == (2, 3)
    assert torch.equal(tensors["a.bias"], torch.ones(2))


def test_bin_and_sharded_folders_read_like_single_ones(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert torch.equal(weights.Tensors(tmp_path)["x"], torch.ones(2))
    other = tmp_path / "sharded"
    other.mkdir()
    weights.save(other, {"x": torch.ones(2)})
    (other / "model.safetensors").rename(other / "one.safetensors")
    weights.save(other, {"y": torch.zeros(3)})
    (other / "model.safetensors").rename(other / "two.safetensors")
    (other / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}})
    )
    assert set(weights.Tensors(other)) == {"x", "y"}


@pytest.mark.parametrize("damage", ["truncated", "header that lies", "empty", "text"])
def test_a_damaged_file_is_refused_in_one_line_that_names_it(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[:-4],
            "header that lies": struct.pack("<Q", 1 << 60) + whole[8:],
            "empty": b"",
            "text": b"hello",
        }[damage]
    )
    with pytest.raises(ValueError) as error:
        weights.Tensors(folder)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_an_index_that_points_outside_or_nowhere_is_refused(tmp_path):
    for shard, kind in (
        ("../other.safetensors", ValueError),
        ("gone.safetensors", FileNotFoundError),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": shard}})
        )
        with pytest.raises(kind):
            weights.Tensors(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("boom",))

    torch.save({"x": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="refused|damaged"):
        weights.Tensors(tmp_path)


def test_loading_is_strict_both_ways_and_names_tensor_and_both_shapes(folder):
    model = module()
    weights.load_into(model, folder)
    assert torch.equal(model["a"].weight, torch.arange(6.0).reshape(2, 3))
    weights.save(folder, {"a.weight": torch.zeros(2, 4), "a.bias": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"a\.weight has shape \(2, 4\), the config wants \(2, 3\)"
    ):
        weights.load_into(module(), folder)
    weights.save(folder, {"a.weight": torch.zeros(2, 3), "b": torch.ones(2)})
    with pytest.raises(ValueError, match=r"missing \['a.bias'\], unused \['b'\]"):
        weights.load_into(module(), folder)
    weights.save(
        folder, {"a.weight": torch.zeros(2, 3), "a.bias": torch.ones(2), "b": torch.ones(2)}
    )
    with pytest.raises(ValueError, match=r"missing \[\], unused \['b'\]"):
        weights.load_into(module(), folder)
    weights.save(folder, {"a.weight": torch.full((2, 3), torch.nan), "a.bias": torch.ones(2)})
    with pytest.raises(ValueError, match="a.weight holds NaN"):
        weights.load_into(module(), folder)


def test_a_folder_appears_whole_or_not_at_all_and_is_never_overwritten_unasked(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError), runs.new_folder(out) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError("killed")
    assert not out.exists()
    with runs.new_folder(out) as partial:
        assert not (partial / "half").exists()
        (partial / "whole").write_text("1")
    assert (out / "whole").exists()
    assert "command" in json.loads((out / "recipe.json").read_text())
    with pytest.raises(FileExistsError, match="--overwrite"), runs.new_folder(out):
        pass
    with runs.new_folder(out, overwrite=True) as partial:
        assert (out / "whole").exists(), "the old folder stays until the new one is whole"
    assert not (out / "whole").exists()


def test_overwrite_never_replaces_a_folder_this_project_did_not_make(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError, match="not made by this project"), runs.new_folder(
        tmp_path / "thesis", overwrite=True
    ):
        pass


def test_a_recipe_holds_the_fingerprint_of_every_input(tmp_path):
    (tmp_path / "in.txt").write_text("a")
    before = runs.recipe([tmp_path / "in.txt"])["inputs"]
    (tmp_path / "in.txt").write_text("b")
    assert before != runs.recipe([tmp_path / "in.txt"])["inputs"]


def test_a_large_file_is_known_by_samples_that_notice_other_weights_and_another_end(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "SAMPLED", 1 << 20)
    file = tmp_path / "w"
    file.write_bytes(torch.randn(1 << 20).numpy().tobytes())
    first = runs.fingerprint(file)
    assert runs.fingerprint(file) == first
    with open(file, "ab") as f:
        f.write(b"x")
    longer = runs.fingerprint(file)
    file.write_bytes(
        (torch.frombuffer(bytearray(file.read_bytes()[: 1 << 22]), dtype=torch.float32) * 1.001)
        .numpy()
        .tobytes()
        + b"x"
    )
    assert len({first, longer, runs.fingerprint(file)}) == 3


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_slice_of_a_tensor_is_its_elements_and_a_written_one_comes_back(tmp_path, kind):
    tensors = {"x": torch.randn(7, 5), "y": torch.randn(11).bfloat16()}
    if kind.endswith(".bin"):
        torch.save(tensors, tmp_path / kind)
    else:
        handle, at = weights.allocate(
            tmp_path / kind, {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        )
        for name, t in tensors.items():
            for a in (4, 0):  # in any order
                weights.write_slice(
                    handle, at[name] + a * t.element_size(),
                    t.flatten()[a:] if a else t.flatten()[:4],
                )
    read = weights.Tensors(tmp_path)
    for name, t in tensors.items():
        assert torch.equal(read[name], t)
        assert torch.equal(read.slice(name, 2, 9), t.flatten()[2:9])
        assert read.dtype(name) == t.dtype
    assert not (tmp_path / kind).stat().st_mode & 0o111, "weights are nothing to execute"


def test_bad_json_lines_name_their_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match="line 2"):
        runs.read_lines(tmp_path / "x.jsonl")


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"a": "one\u2028line\u0085still"}\r\n{"a": 2}\n', encoding="utf-8"
    )
    assert runs.read_lines(tmp_path / "x.jsonl") == [{"a": "one\u2028line\u0085still"}, {"a": 2}]


def test_a_json_file_that_is_no_object_or_lacks_a_key_is_named(tmp_path):
    for text, wanted in (
        ("[]", "wanted a JSON object"),
        ('{"a": 1}', "has no 'b'"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=f"x.json.*{wanted}"):
            runs.read_json(tmp_path / "x.json", ["a", "b"])


# --- one owner, and nothing lost ---


def made(out, text, **given):
    with runs.new_folder(out, **given) as partial:
        (partial / "x").write_text(text)


def test_what_a_killed_replacement_left_behind_does_not_stop_the_next_one(tmp_path):
    made(tmp_path / "out", "1")
    made(tmp_path / "out.old", "somebody's own copy")
    made(tmp_path / "out.replaced", "0")
    made(tmp_path / "out", "2", overwrite=True)
    assert (tmp_path / "out/x").read_text() == "2" and not (tmp_path / "out.replaced").exists()
    assert (tmp_path / "out.old/x").read_text() == "somebody's own copy"
    (tmp_path / "out.replaced").mkdir()
    with pytest.raises(FileExistsError, match="out.replaced was not made by this project"):
        made(tmp_path / "out", "3", overwrite=True)
    assert (tmp_path / "out/x").read_text() == "2"


def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path, monkeypatch):
    made(tmp_path / "out", "1")
    real, calls = runs.os.replace, []

    def killed(source, target):
        if calls:
            raise KeyboardInterrupt
        calls.append(source)
        real(source, target)

    monkeypatch.setattr(runs.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "out", "2", overwrite=True)
    monkeypatch.setattr(runs.os, "replace", real)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        made(tmp_path / "out", "3")
    assert (tmp_path / "out/x").read_text() == "1"
    assert (tmp_path / "out.partial/x").read_text() == "2"


def test_where_out_is_a_link_what_it_points_to_is_replaced_as_often_as_one_likes(tmp_path):
    made(tmp_path / "disk/real", "1")
    (tmp_path / "out").symlink_to(tmp_path / "disk/real")
    for text in "23":
        made(tmp_path / "out", text, overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/real/x").read_text() == "3"


def test_what_a_resume_needs_goes_only_after_the_rename(tmp_path, monkeypatch):
    def no(*_):
        raise OSError("full")

    real = runs.os.replace
    monkeypatch.setattr(runs.os, "replace", no)
    with pytest.raises(OSError):
        made(tmp_path / "out", "1", scratch=["x"])
    assert (tmp_path / "out.partial/x").exists()
    monkeypatch.setattr(runs.os, "replace", real)
    made(tmp_path / "out", "1", scratch=["x"])
    assert (tmp_path / "out/recipe.json").exists() and not (tmp_path / "out/x").exists()


def test_one_process_at_a_time_writes_a_folder_and_a_kill_releases_it(tmp_path):
    out = tmp_path / "out"
    code = (
        "import runs, time\n"
        f"with runs.new_folder({str(out)!r}):\n"
        "    print('mine', flush=True)\n"
        "    time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n"
    with pytest.raises(FileExistsError, match="another process is writing it"):
        made(out, "1")
    other.kill()
    other.wait()
    made(out, "1")
    assert (out / "x").exists()


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/../base"])
def test_a_changed_input_is_noticed_however_its_path_is_spelled(tmp_path, spelling):
    made(tmp_path / "base", "1")
    made(tmp_path / "speech", "2", inputs=[str(tmp_path / "base")])
    runs.unchanged(tmp_path / "speech", [spelling.format(tmp_path / "base")])
    (tmp_path / "base/x").write_text("other")
    with pytest.raises(ValueError, match="has changed since"):
        runs.unchanged(tmp_path / "speech", [spelling.format(tmp_path / "base")])


def test_a_changed_input_is_noticed_from_another_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "base", "1")
    made(tmp_path / "speech", "2", inputs=["base"])
    made(tmp_path / "other/base", "3")
    monkeypatch.chdir(tmp_path / "other")
    runs.unchanged(tmp_path / "speech", ["base"])  # another folder of that name
    (tmp_path / "base/x").write_text("other")
    with pytest.raises(ValueError, match="has changed since"):
        runs.unchanged(tmp_path / "speech", [tmp_path / "base"])


def test_who_may_read_a_folder_may_read_its_weights(folder):
    (folder / "as_others").touch()
    assert (folder / "model.safetensors").stat().st_mode == (folder / "as_others").stat().st_mode
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_of_16_bits_or_more_are_one_line(dtype, tmp_path):
    (tmp_path / "m").mkdir()
    tensors = {"a.weight": torch.ones(2, 3).to(dtype), "a.bias": torch.ones(2)}
    weights.save(tmp_path / "m", tensors)
    with pytest.raises(ValueError, match=f"a.weight is {runs.name_of(dtype)}; wanted float64"):
        weights.load_into(module(), tmp_path / "m")


def test_a_bin_that_holds_more_than_tensors_is_refused(tmp_path):
    (tmp_path / "m").mkdir()
    torch.save({"a": torch.ones(2), "step": 7}, tmp_path / "m/pytorch_model.bin")
    with pytest.raises(ValueError, match="refused, not a plain tensor file"):
        weights.Tensors(tmp_path / "m")


def test_a_downloaders_cache_is_no_part_of_a_folder(tmp_path):
    made(tmp_path / "m", "1")
    before = runs.fingerprint(tmp_path / "m")
    (tmp_path / "m/.cache").mkdir()
    (tmp_path / "m/.cache/metadata").write_text("now")
    assert runs.fingerprint(tmp_path / "m") == before


def test_json_nested_without_end_and_a_weight_map_of_numbers_are_one_line(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        runs.read_json(tmp_path / "x.json")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ValueError, match="wanted a weight_map"):
        weights.Tensors(tmp_path)


def test_a_write_that_the_system_cuts_short_goes_on_behind_it(tmp_path, monkeypatch):
    rows, real = torch.randn(40, 64), weights.os.pwrite
    handle, at = weights.allocate(tmp_path / "model.safetensors", {"x": ((40, 64), torch.float32)})
    monkeypatch.setattr(
        weights.os, "pwrite", lambda file, data, place: real(file, bytes(data)[:1000], place)
    )
    weights.write_slice(handle, at["x"], rows)
    os.close(handle)
    assert torch.equal(weights.Tensors(tmp_path)["x"], rows)


def test_what_another_run_left_beside_an_output_does_not_get_into_it(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/stale").write_text("of another run")
    made(tmp_path / "out", "1", scratch=["checkpoint.pt"])
    assert not (tmp_path / "out/stale").exists()
