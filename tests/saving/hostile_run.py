"""Load hostile folders one after the other in this process, and say what they took.

`python -m tests.saving.hostile_run FOLDER FIRST COUNT SEEDS` prints a line for each seed to SEEDS
before it is tried, and a summary as JSON at the end.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import transformers

import fxopt
from fxopt.errors import SaveError
from tests.saving.hostile_graphs import hostile_folder

_ROOM = 1 << 29
_OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|can't allocate|allocate memory")


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) << 10


def tried(folder: Path) -> tuple[str, int, float]:
    """(what came of loading `folder`, peak of bytes taken, seconds of this process)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status("VmRSS"), time.process_time()
    try:
        fxopt.load(folder)
        outcome = "loaded"
    except SaveError as error:
        outcome = f"out of memory: {error}" if _OUT_OF_MEMORY.search(str(error)) else "refused"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, status("VmHWM") - before, time.process_time() - start


def main(pristine: Path, first: int, count: int, seeds: Path) -> None:
    """Try the seeds `first` to `first + count`."""
    for _ in range(2):
        fxopt.load(pristine)
    transformers.AutoConfig.for_model("bert")  # imported once, whatever a folder holds
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + _ROOM, resource.RLIM_INFINITY))
    summary: dict[str, object] = {}
    outcomes: dict[str, int] = {}
    wrong, memory, seconds = [], (0, 0), (0.0, 0)
    for seed in range(first, first + count):
        seeds.write_text(str(seed))
        folder = pristine.with_name("hostile")
        hostile_folder(pristine, folder, seed)
        outcome, taken, took = tried(folder)
        shutil.rmtree(folder)
        kind = outcome if outcome in ("loaded", "refused") else "wrong"
        outcomes[kind] = outcomes.get(kind, 0) + 1
        memory, seconds = max(memory, (taken, seed)), max(seconds, (took, seed))
        if kind == "wrong" or taken > 64 << 20 or took > 1:
            wrong.append((seed, outcome[:300], taken >> 20, round(took, 2)))
    summary.update(outcomes=outcomes, wrong=wrong, memory=memory, seconds=seconds)
    print(json.dumps(summary))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
