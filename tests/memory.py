"""How much memory a process has held.

in   nothing
out  MB
run  python tests/memory.py    # of Python alone

`ru_maxrss` of a process that another one has started begins at what that one held when it started
it: below a large test run it never moves, and a test that reads it cannot fail. Linux keeps a
figure of the process's own.
"""

import re
import resource
from pathlib import Path


def peak():
    """MB that this process has held at most."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # on macOS in bytes


if __name__ == "__main__":
    print(f"{peak():.0f} MB")
