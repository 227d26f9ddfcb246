"""What every benchmark shares: medians, a process's time and memory, one row of
results/bench-*.json; run alone, it prints the rows as a table.
"""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
median = statistics.median


def process(command, **given):
    """(seconds, peak resident memory in bytes, looked at every 10 ms) of a whole process; an
    error if it fails.
    """
    began, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(command, stdout=said, stderr=said, **given)
        while child.poll() is None:
            try:
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peak = max(
                    [peak]
                    + [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
                )
            except OSError:  # it has just ended
                break
            time.sleep(0.01)
        status = child.wait()
        seconds = time.perf_counter() - began
        said.seek(0)
        assert status == 0, f"{command}: {said.read().decode()[-2000:]}"
    return seconds, peak


def machine():
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.processor()}"


def record(kind, name, unit, ours, peer, peer_name, better="more", bound_share=None, **more):
    """Put one row into results/bench-KIND.json; ratio above 1: ours is better."""
    file = ROOT / f"results/bench-{kind}.json"
    rows = [
        row
        for row in (json.loads(file.read_text()) if file.exists() else [])
        if row["name"] != name
    ]
    ratio = peer / ours if better == "less" else ours / peer
    row = {
        "name": name,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": peer_name,
        "ratio": round(ratio, 3),
        "bound_share": bound_share,
        "unit": unit,
        **more,
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": version("numpy"),
        },
    }
    file.write_text(json.dumps(sorted([*rows, row], key=lambda r: r["name"]), indent=1) + "\n")
    print(f"{name}: ours {ours:.3g}, {peer_name} {peer:.3g} {unit}: ratio {ratio:.2f}")


def table(kind):
    """The rows of results/bench-KIND.json as the README shows them."""
    rows = json.loads((ROOT / f"results/bench-{kind}.json").read_text())
    lines = ["| what | ours | peer | ratio |", "|---|---|---|---|"]
    return lines + [
        f"| {row['name']} ({row['unit']}) | {row['ours']:.3g} | {row['peer']:.3g}, "
        f"{row['peer_name']} | {row['ratio']:.2f} |"
        for row in rows
    ]


if __name__ == "__main__":
    print("\n".join(table("cpu")))
