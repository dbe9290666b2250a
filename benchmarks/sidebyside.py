"""Prepares systems, checks their outputs against eager, times them in turns, gives the figures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.systems import EAGER, Inputs, System
from fxopt.claim import sqnr
from fxopt.measure import latency, ratio


def compare(
    model: nn.Module,
    inputs: Inputs,
    systems: Sequence[System],
    against: Mapping[str, Sequence[str]],
    *,
    floor_db: float,
    repeats: int = 10,
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Latency of each system in milliseconds, SQNR against eager, and ratios with their spread.

    `against` maps a system's name to the peers that it is compared with; a ratio below 1 means that
    it is faster than the peer. Fails where a system's output is further than `floor_db` decibels
    from eager's: a fast wrong answer isn't a figure. Skips where a peer isn't installed.
    """
    for system in systems:
        if system.missing:
            pytest.skip(f"{system.name} needs {', '.join(system.missing)}: see requirements.txt")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = EAGER.prepare(model, inputs)().clone()
        runs = {system.name: system.prepare(model, inputs) for system in systems}
        fidelity = {name: _fidelity(name, reference, run(), floor_db) for name, run in runs.items()}
        times = latency(runs, repeats=repeats, seconds=seconds)
    return {
        "systems": {
            name: {
                "median_ms": round(time.median, 2),
                "p5_ms": round(time.p5, 2),
                "p95_ms": round(time.p95, 2),
                "rounds": time.runs,
                "sqnr_db": round(fidelity[name], 1),
            }
            for name, time in times.items()
        },
        "ratios": {
            f"{name} / {peer}": spread(ratio(times[name], times[peer]))
            for name, peers in against.items()
            for peer in peers
        },
    }


def spread(value: Any) -> dict[str, float]:
    """A ratio as figures: median, 5th and 95th percentile over the rounds."""
    return {
        "median": round(value.median, 3),
        "p5": round(value.p5, 3),
        "p95": round(value.p95, 3),
    }


def _fidelity(name: str, reference: Tensor, output: Tensor, floor_db: float) -> float:
    measured = sqnr(reference, output)
    if not measured >= floor_db:
        pytest.fail(f"{name} is {measured:.1f} dB from eager, below {floor_db:g} dB")
    return min(measured, 200.0)
