"""A search in a process of its own, which a signal ends: killed.py STORAGE FOLDER CALL WORKERS."""

from __future__ import annotations

import sys
from pathlib import Path

from fxopt.search import search
from tests.search.small import INPUTS, SPACE, KillsItself, mlp, slow_by_graph

if __name__ == "__main__":
    storage, folder, call, workers = sys.argv[1:]
    found = search(
        mlp(), INPUTS, metric=KillsItself(Path(folder), int(call)), tolerance=1.0, trials=12,
        space=SPACE, measure=slow_by_graph, storage=storage, workers=int(workers),
        progress=lambda line: print(line, flush=True),
    )  # fmt: skip
    print(f"interrupted: {found.interrupted}, on the front: {len(found.pareto)}", flush=True)
