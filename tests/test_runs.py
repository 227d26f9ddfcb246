import os
import re
import subprocess
import sys

import pytest
import torch

import runs
from conftest import ROOT, call
from test_repo import imports

# No bf16 on any x86.
SLOW = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    "half, wanted", [(0.01, torch.float32), (1.0, torch.float32), (2.0, torch.bfloat16)]
)
def test_bfloat16_is_taken_only_where_its_products_are_faster(monkeypatch, half, wanted):
    monkeypatch.setattr(
        runs, "product_rate", lambda dtype, **_: 100e9 * (half if dtype == torch.bfloat16 else 1)
    )
    runs.fast_dtype.cache_clear()
    assert runs.fast_dtype("cpu")[0] == wanted
    assert f"{half:.2g} times" in runs.fast_dtype("cpu")[1]
    runs.fast_dtype.cache_clear()


@pytest.mark.skipif(
    not hasattr(torch.backends, "mkldnn") or not torch.backends.mkldnn.is_available(),
    reason="oneDNN is not in this torch",
)
def test_without_the_instructions_a_command_multiplies_in_float32_and_says_so():
    said = python("import runs; print(runs.arithmetic('auto', 'cpu'))", **SLOW)
    assert said.stdout.strip() == "torch.float32"
    assert re.fullmatch(
        r"cpu: products in float32 \(here .* times the rate of float32\)", said.stderr.strip()
    )


def test_what_is_asked_for_is_taken(capsys):
    assert runs.arithmetic("bfloat16", "cpu") == torch.bfloat16
    assert runs.arithmetic("float32", "cpu") == torch.float32
    assert capsys.readouterr().err.count("as --dtype says") == 2


def test_products_are_made_in_the_dtype_that_was_chosen_and_weights_keep_theirs():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    for dtype in (torch.float32, torch.bfloat16):
        with runs.autocast("cpu", dtype):
            assert layer(x).dtype == dtype and layer.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["toy", "hubert", "tokenize_audio", "pretrain", "merge", "evaluate", "chat"]
)
def test_openmp_is_told_how_to_wait_before_torch_is_loaded(name):
    order = list(imports(ROOT / f"{name}.py"))
    ours = {path.stem for path in ROOT.glob("*.py")} - {"runs"}
    loads_torch = [n for n, name in enumerate(order) if name in {"torch", "safetensors"} | ours]
    assert order.index("runs") < min(loads_torch)


def test_convolutions_that_are_called_float32_are_float32():
    said = python("import runs, torch; print(torch.backends.cudnn.allow_tf32)").stdout
    assert said.strip() == "False"


def test_a_users_own_setting_of_openmp_stays():
    assert (
        python(
            "import runs, os; print(os.environ['GOMP_SPINCOUNT'])", GOMP_SPINCOUNT="7"
        ).stdout.strip()
        == "7"
    ), "a user's own setting stays"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:1", "cpu:", "cuda:x", ""])
def test_a_device_that_is_not_there_is_told_in_one_line(device, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(["chat.py", "folder", "--device", device], monkeypatch)
    assert "not on this machine; wanted cpu" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 11 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_want_of_memory_is_one_line_and_other_errors_of_torch_are_not(error):
    def main():
        raise error

    with pytest.raises(SystemExit, match=r"out of memory \(.*allocate [^\n]*; give smaller"):
        runs.run(main)
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="do not match"):
        runs.run(main)


def test_work_in_pieces_is_kept_now_and_then_and_when_it_stops(tmp_path, monkeypatch):
    clock, writes = [0], []
    write = runs.Checkpoint.write
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(
        runs.Checkpoint, "write",
        lambda self, **state: writes.append(len(state["done"])) or write(self, **state),
    )

    def work(part):
        clock[0] += 11
        if part == [8]:
            raise KeyboardInterrupt
        return [2 * item for item in part]

    with pytest.raises(KeyboardInterrupt):
        runs.in_pieces(f"{tmp_path}/out/", {}, list(range(9)), work, 1, "work", "item")
    assert writes == [3, 6, 8]
    assert (tmp_path / "out.pieces").exists()
    assert not (tmp_path / "out").exists()
    assert runs.in_pieces(
        tmp_path / "out", {}, list(range(9)), lambda part: [f"rest {part}"], 5, "work", "item"
    ) == [0, 2, 4, 6, 8, 10, 12, 14, "rest [8]"]


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    code = (
        "import runs, time\n"
        "runs.LINE_EVERY = 0.2\n"
        "for _ in runs.Bar(range(10), desc='counting', unit='step'): time.sleep(0.1)\n"
        "print('done')"
    )
    lines = python(code).stderr.splitlines()
    assert 2 <= len(lines) <= 6
    assert all(
        re.fullmatch(r"counting: \d+ of 10, +[\d.]+(step/s|s/step), 00:0\d gone, 00:0\d left", line)
        for line in lines
    ), lines


def test_a_bar_that_ends_before_its_first_line_says_nothing():
    assert python("import runs\nfor _ in runs.Bar(range(3), unit='step'): pass").stderr == ""


def test_a_rate_is_the_operations_of_a_product_over_the_shortest_of_its_times(monkeypatch):
    """Ten products take 2 ms each, one of them 1 ms, whatever this machine does."""
    now, took = [0.0], [2e-3] * 4 + [1e-3] + [2e-3] * 5

    def clock():
        now[0] += took.pop(0) if clock.running else 0.0
        clock.running = not clock.running
        return now[0]

    clock.running = False
    monkeypatch.setattr(runs.time, "perf_counter", clock)
    assert runs.product_rate(torch.float32, (8, 4, 2)) == pytest.approx(2 * 8 * 4 * 2 / 1e-3)
    assert not took


def test_a_run_without_a_setting_that_it_was_begun_with_is_another_run(tmp_path):
    runs.Checkpoint(tmp_path / "c.pt", {"rows": "1", "whisper": "2"}).write(done=[1])
    with pytest.raises(ValueError, match="another whisper"):
        runs.Checkpoint(tmp_path / "c.pt", {"rows": "1"}).read("done")


@pytest.mark.parametrize(
    "words, wanted",
    [
        ("pretrain.py --steps 0", "a number from 1 on"),
        ("pretrain.py --batch 0", "a number from 1 on"),
        ("pretrain.py --accumulate 0", "a number from 1 on"),
        ("pretrain.py --length 1", "a number from 2 on"),
        ("pretrain.py --lora -1", "a number from 0 on"),
        ("pretrain.py --lora-alpha nan", "a number from 0.0 on"),
        ("pretrain.py --unit-loss -1", "a number from 0.0 on"),
        ("pretrain.py --imitate inf", "a number from 0.0 on"),
        ("pretrain.py --keep-text -1", "a number from 0.0 on"),
        ("pretrain.py --rows-first 1.1", "0.0 to 1.0"),
        ("pretrain.py --pace 0.5", "a number from 1.0 on"),
        ("pretrain.py --lr 0", "a number above 0"),
        ("pretrain.py --lr inf", "a number above 0"),
        ("pretrain.py --lr nan", "a number above 0"),
        ("pretrain.py --seed 2147483648", "0 to 2147483647"),
        ("hubert.py train --steps 0", "a number from 1 on"),
        ("hubert.py train --batch 0", "a number from 1 on"),
        ("hubert.py train --lr -1", "a number above 0"),
        ("tokenize_audio.py fit --k 65537", "1 to 65536"),
        ("tokenize_audio.py fit --switch -1", "a number from 0.0 on"),
        ("tokenize_audio.py fit --frames 0", "a number from 1 on"),
        ("tokenize_audio.py encode --batch nan", "a number above 0"),
        ("desta.py train --queries 0", "a number from 1 on"),
        ("desta.py train --seed -1", "0 to 2147483647"),
        ("toy.py world --test 0", "a number from 1 on"),
        ("toy.py world --hours inf", "a number above 0"),
        ("manner.py --lines 0", "a number from 1 on"),
        ("documents.py --length 1", "a number from 2 on"),
        ("benchmark.py questions --limit 0", "a number from 1 on"),
        ("chat.py --temperature nan", "a number from 0.0 on"),
        ("chat.py --temperature inf", "a number from 0.0 on"),
    ],
)
def test_a_flag_takes_numbers_of_its_range_alone(words, wanted, monkeypatch, capsys):
    *_, flag, value = words.split()
    with pytest.raises(SystemExit):
        call(words.split(), monkeypatch)
    said = capsys.readouterr().err
    assert f"error: argument {flag}: got {value}, wanted {wanted}\n" in said
