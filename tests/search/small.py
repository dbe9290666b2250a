"""A tiny model, its metric, and measurements that no clock decides."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.search import Measured

INPUTS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

SPACE = [
    ["canonicalize"],
    ["", "prune-channels{ratio=0.25}", "prune-channels{ratio=0.5}"],
    ["", "int8-linear{where=always}", "int8-linear{mode=weight_only, where=always}"],
    ["", "autocast{dtype=bfloat16, force=True}"],
]
"""Nothing in it is compiled."""


class Mlp(nn.Module):
    """Two linears whose hidden channels can be cut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def mlp() -> Mlp:
    return Mlp().eval()


REFERENCE = mlp()


def closeness(model: Any, data: Any) -> float:
    """1 less the relative error of the outputs."""
    with torch.no_grad():
        wanted = torch.cat([REFERENCE(x) for x in data])
    found = torch.cat([model(x) for x in data])
    return float(1 - (found - wanted).norm() / wanted.norm())


def constant(model: Any, data: Any) -> float:
    """A metric that everything keeps."""
    return 1.0


def by_graph(original: Any, candidate: Any, inputs: Any, objectives: tuple[str, ...]) -> Measured:
    """As if a call took a millisecond for each operation, and memory were the parameters."""
    program = candidate.program
    ratios = {
        "latency": program.node_count() / 10,
        "memory": program.parameter_bytes() / 1000,
        "energy": program.node_count() / 7,
    }
    units = {"latency": "latency_ms", "memory": "memory_bytes", "energy": "energy_j"}
    return Measured(
        {units[name]: ratios[name] for name in objectives},
        {units[name]: 1.0 for name in objectives},
        {name: ratios[name] for name in objectives},
    )


def slow_by_graph(
    original: Any, candidate: Any, inputs: Any, objectives: tuple[str, ...]
) -> Measured:
    """The same, taking a while, so that there is something to interrupt."""
    time.sleep(0.4)
    return by_graph(original, candidate, inputs, objectives)


class KillsItself:
    """A metric whose process gets SIGKILL at a certain call, once in the life of `folder`."""

    def __init__(self, folder: Path, call: int) -> None:
        self.folder, self.call, self.calls = folder, call, 0

    def __call__(self, model: Any, data: Any) -> float:
        self.calls += 1
        if self.calls == self.call and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0
