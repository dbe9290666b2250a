"""Latency of callables measured side by side, so that a busy machine is unfair to all alike.

Every round times each system once, in the same order (A B A B), after warm-up rounds that are
thrown away until the times have settled. A drift of the machine then hits all systems of a round,
and the ratio of two systems, taken round by round, hardly feels it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from torch import Tensor

System = Callable[[], object]

# One sample lasts at least this long, so that the clock and the loop around it don't count.
_SAMPLE_SECONDS = 0.005
_FEWEST_ROUNDS = 3
_MOST_WARM_UP_ROUNDS = 20
_SETTLED = 0.1


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: median, 5th and 95th percentile of `runs` timed samples.

    `samples` are the times themselves, in the order they were taken.
    """

    median: float
    p5: float
    p95: float
    runs: int
    samples: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.p5:.2f} to {self.p95:.2f}, {self.runs} runs)"


@dataclass(frozen=True)
class Ratio:
    """How many times as long one system takes as another: median, 5th and 95th percentile."""

    median: float
    p5: float
    p95: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.p5:.2f} to {self.p95:.2f}, {self.pairs} pairs)"


def latency(
    systems: Mapping[str, System], repeats: int = 10, seconds: float = 2.0
) -> dict[str, Latency]:
    """The latency of each system, measured in turns.

    Takes `repeats` rounds, fewer once the timed rounds have used up `seconds` for each system, but
    never fewer than 3. Warm-up has the same budget of its own, after the first call of each system,
    which may compile. A system that takes less than 5 ms is called several times per sample. Where
    a system works on CUDA, its devices are synchronised before and after each sample. Whether
    gradients are recorded is up to the caller.

    Raises `ValueError` for no systems, `repeats` below 1 or `seconds` not above 0.
    """
    if not systems:
        raise ValueError("latency() got no systems; give it {name: callable}")
    if repeats < 1 or not seconds > 0:
        raise ValueError(
            f"latency(repeats={repeats!r}, seconds={seconds!r}): repeats must be at least 1 and "
            "seconds above 0"
        )
    devices = {name: _cuda_devices(call()) for name, call in systems.items()}
    samples: dict[str, list[float]] = {name: [] for name in systems}
    with collector_off():
        calls = _warm_up(systems, devices, seconds)
        started = time.perf_counter()
        for done in range(max(repeats, _FEWEST_ROUNDS)):
            spent = time.perf_counter() - started
            if done >= _FEWEST_ROUNDS and spent > seconds * len(systems):
                break
            for name, system in systems.items():
                samples[name].append(_sample(system, calls[name], devices[name]))
    return {name: summarize(times) for name, times in samples.items()}


def summarize(milliseconds: Sequence[float]) -> Latency:
    """The `Latency` of the given samples; percentiles are interpolated between neighbours."""
    median, p5, p95 = _percentiles(milliseconds)
    return Latency(median, p5, p95, len(milliseconds), tuple(milliseconds))


def ratio(a: Latency, b: Latency) -> Ratio:
    """`a / b` round by round, so above 1 means that `a` is slower.

    Both must come from one call of `latency`; raises `ValueError` where samples don't pair up.
    """
    if not a.samples or len(a.samples) != len(b.samples):
        raise ValueError(
            f"ratio() pairs samples taken in the same rounds, but got {len(a.samples)} and "
            f"{len(b.samples)} of them; measure both systems in one call of latency()"
        )
    ratios = [x / y for x, y in zip(a.samples, b.samples, strict=True)]
    return Ratio(*_percentiles(ratios), len(ratios))


def _warm_up(
    systems: Mapping[str, System], devices: Mapping[str, Sequence[torch.device]], seconds: float
) -> dict[str, int]:
    """Run until no system still gets faster; returns how often each is called per sample."""
    started = time.perf_counter()
    best: dict[str, float] = {}
    for _ in range(_MOST_WARM_UP_ROUNDS):
        settled = bool(best)
        for name, system in systems.items():
            latest = _sample(system, 1, devices[name])
            settled &= latest >= best.get(name, 0.0) * (1 - _SETTLED)
            best[name] = min(latest, best.get(name, latest))
        if settled or time.perf_counter() - started > seconds * len(systems):
            break
    return {name: max(1, round(_SAMPLE_SECONDS * 1e3 / best[name])) for name in systems}


def _sample(system: System, calls: int, devices: Sequence[torch.device]) -> float:
    """Milliseconds per call over `calls` calls."""
    _synchronize(devices)
    started = time.perf_counter_ns()
    for _ in range(calls):
        system()
    _synchronize(devices)
    return max(time.perf_counter_ns() - started, 1) / 1e6 / calls


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    median, low, high = torch.quantile(
        tensor, torch.tensor([0.5, 0.05, 0.95], dtype=torch.float64)
    ).tolist()
    return median, low, high


def _cuda_devices(result: object) -> tuple[torch.device, ...]:
    """Where the work ran: the devices of the result, and the current one if CUDA is in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return ()
    found = {
        leaf.device
        for leaf in pytree.tree_leaves(result)
        if isinstance(leaf, Tensor) and leaf.device.type == "cuda"
    }
    current = torch.device("cuda", torch.cuda.current_device())
    return tuple(sorted(found | {current}, key=str))


def _synchronize(devices: Sequence[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)


@contextmanager
def collector_off() -> Iterator[None]:
    """Inside, Python's garbage collector, which has run just before, doesn't run."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
