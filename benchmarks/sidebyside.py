"""Prepares systems, checks their outputs against eager, times them in turns, gives the figures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.systems import EAGER, Call, System, Workload
from fxopt.claim import sqnr
from fxopt.timing import Latency, latency, ratio

# Longer than the thread pools of OpenMP, TBB and ONNX Runtime spin after a call.
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Comparison:
    """What was measured: callables and latencies by name, and decibels of each system's outputs."""

    calls: Mapping[str, Call]
    times: Mapping[str, Latency]
    sqnr: Mapping[str, float]

    def systems(self) -> dict[str, dict[str, Any]]:
        """Milliseconds with spread and, where outputs are compared, their error against eager fp32.

        `relative_error` is ||out - ref|| / ||ref||, `sqnr_db` the same in decibels.
        """
        rows: dict[str, dict[str, Any]] = {name: timing(self.times[name]) for name in self.times}
        for name, value in self.sqnr.items():
            rows[name] |= {"sqnr_db": round(value, 1), "relative_error": _relative_error(value)}
        return rows

    def ratios(self, against: Mapping[str, Iterable[str]]) -> dict[str, dict[str, float]]:
        """Each name's time over that of each it is compared with: below 1 means faster."""
        return {
            f"{name} / {other}": spread(ratio(self.times[name], self.times[other]))
            for name, others in against.items()
            for other in others
        }

    def fastest(self, names: Iterable[str]) -> str:
        """The one of `names` with the lowest median."""
        return min(names, key=lambda name: self.times[name].median)


def compare(
    workload: Workload,
    systems: Sequence[System],
    *,
    floor_db: float,
    repeats: int = 10,
    seconds: float = 5.0,
    alongside: Mapping[str, Callable[[], object]] | None = None,
) -> Comparison:
    """Latency of each system, and of the callables `alongside`, in turns; SQNR against eager.

    Fails where a system's output is further than `floor_db` decibels from eager's: a fast wrong
    answer isn't a figure. Skips where a peer isn't installed.
    """
    for system in systems:
        if system.missing:
            pytest.skip(f"{system.name} needs {', '.join(system.missing)}: see requirements.txt")
    # What an earlier comparison left in Dynamo's tables would slow these systems' guards down.
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = EAGER.prepare(workload)(workload.inputs).clone()
        calls: dict[str, Call] = {}
        measured: dict[str, float] = {}
        for system in systems:
            call = calls[system.name] = system.prepare(workload)
            output = call(workload.inputs)
            measured[system.name] = _checked(system.name, reference, output, floor_db)
        runs = {name: partial(call, workload.inputs) for name, call in calls.items()}
        times = in_turns({**runs, **(alongside or {})}, repeats, seconds)
    return Comparison(calls, times, measured)


def in_turns(
    runs: Mapping[str, Callable[[], object]], repeats: int, seconds: float
) -> dict[str, Latency]:
    """`fxopt.timing.latency`, where no system pays for the one before it.

    Before each sample comes a pause, in which the other's threads go to sleep, and a call that
    isn't timed, which fetches the system's own weights into the caches.
    """
    turns: dict[str, Callable[[], object]] = {}
    for name, run in runs.items():
        turns[f"before {name}"] = partial(_settle, run)
        turns[name] = run
    times = latency(turns, repeats=repeats, seconds=seconds)
    return {name: times[name] for name in runs}


def timing(value: Latency) -> dict[str, Any]:
    """A latency as figures: median, 5th and 95th percentile in milliseconds, and the rounds."""
    return {
        "median_ms": round(value.median, 3),
        "p5_ms": round(value.p5, 3),
        "p95_ms": round(value.p95, 3),
        "rounds": value.runs,
    }


def spread(value: Any) -> dict[str, float]:
    """A ratio as figures: median, 5th and 95th percentile over the rounds."""
    return {
        "median": round(value.median, 3),
        "p5": round(value.p5, 3),
        "p95": round(value.p95, 3),
    }


def against_all(ours: Iterable[System], peers: Iterable[System]) -> dict[str, list[str]]:
    """Each of ours against each peer, by name."""
    names = [peer.name for peer in peers]
    return {system.name: names for system in ours}


def _relative_error(db: float) -> float:
    return float(f"{10 ** (-db / 20):.3g}")


def _settle(run: Callable[[], object]) -> None:
    time.sleep(_PAUSE_SECONDS)
    run()


def _checked(name: str, reference: Tensor, output: Tensor, floor_db: float) -> float:
    value = sqnr(reference, output)
    if not value >= floor_db:
        pytest.fail(f"{name} is {value:.1f} dB from eager, below {floor_db:g} dB")
    return min(value, 200.0)
