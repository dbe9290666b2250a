"""Joules by the counters of the hardware, in the shape that the benchmarks record."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fxopt import measurement
from fxopt.measurement import Energy, EnergyCounter, Unmeasured, measure_energy


def joules(
    runs: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 2.0
) -> dict[str, dict[str, float]]:
    """Joules of the whole board for one call of each, in turns: median, 5th and 95th percentile.

    Each sample calls for `seconds`; what the board draws at rest is in it. Raises `OSError` where
    there is no counter, or none that moves.
    """
    board = torch.device("cuda", torch.cuda.current_device())
    spent = measure_energy(
        runs,
        _counter(board),
        seconds=seconds,
        windows=rounds,
        synchronize=torch.cuda.synchronize,
    )
    return {name: _figures(value) for name, value in spent.items()}


def energy_counter(device: torch.device | str) -> Callable[[], float]:
    """Joules so far, to be read before and after: of the board on CUDA, of all packages on a CPU.

    Whatever else runs there is in it. Raises `OSError`, with the reason, where there is no counter.
    """
    # An epoch can outlast a turn of RAPL's counters; the scripts that ask guard their main part.
    counter = _counter(device, watched=True)
    return lambda: sum(counter.read())


def _counter(device: torch.device | str, watched: bool = False) -> EnergyCounter:
    counter = measurement.energy_counter(device, watched)
    if isinstance(counter, Unmeasured):
        raise OSError(counter.reason)
    return counter


def _figures(value: Energy | Unmeasured) -> dict[str, float]:
    if isinstance(value, Unmeasured):
        raise OSError(value.reason)
    return {
        "median_j": round(value.joules.median, 4),
        "p5_j": round(value.joules.p5, 4),
        "p95_j": round(value.joules.p95, 4),
    }
