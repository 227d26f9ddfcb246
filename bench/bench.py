"""What every benchmark shares: medians, a process's time and memory, and one row of results/bench-*.json."""
import json
import os
import platform
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
median = statistics.median


def process(command, **given):
    """(seconds, peak memory in bytes) of a whole process; an error if it fails."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **given)
    error = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    assert status == 0, f"{command}: {error.decode()[-2000:]}"
    return time.perf_counter() - began, used.ru_maxrss * 1024


def machine():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


def record(kind, name, unit, ours, peer, peer_name, better="more", bound_share=None, **more):
    """Put one row into results/bench-KIND.json; ratio above 1: ours is better."""
    file = ROOT / f"results/bench-{kind}.json"
    rows = [row for row in (json.loads(file.read_text()) if file.exists() else []) if row["name"] != name]
    ratio = peer / ours if better == "less" else ours / peer
    row = {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "peer_name": peer_name, "ratio": round(ratio, 3), "bound_share": bound_share, "unit": unit, **more,
           "machine": machine(), "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": version("numpy")}}
    file.write_text(json.dumps(sorted([*rows, row], key=lambda r: r["name"]), indent=1) + "\n")
    print(f"{name}: ours {ours:.3g}, {peer_name} {peer:.3g} {unit}: ratio {ratio:.2f}")
