"""Which of several kernels is faster on this machine: timed in turns once, then remembered."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fxopt.errors import FxoptError
from fxopt.timing.latency import Latency, System, latency, summarize
from fxopt.timing.timing_cache import TimingStore

Clock = Callable[[Hashable, Mapping[str, System]], Mapping[str, Latency]]

# A kernel that isn't faster by this much isn't worth a change of the model.
_MARGIN = 0.05
# A timing less sure than this is forgotten with the process: the machine was too busy.
_STEADY = 0.5
_REPEATS, _SECONDS = 21, 0.25
# A kernel that takes so many times as long as the baseline at each of a few glances has lost.
_HOPELESS = 2.5
_GLANCES, _GLANCE_SECONDS = 3, 0.01
# Half the width, in standard deviations of the median's rank, of a 95 % interval.
_RANKS = 0.98


@dataclass(frozen=True)
class MedianRatio:
    """How many times as long as the baseline: the median of the rounds and its 95 % interval."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """The width of the interval."""
        return self.high - self.low

    def __str__(self) -> str:
        return f"{self.median:.2f}x"


@dataclass(frozen=True)
class Timing:
    """The outcome of a contest: milliseconds a call, and ratios to the `baseline`, by kernel.

    `failed` says why a kernel couldn't run at all.
    """

    baseline: str
    medians: Mapping[str, float]
    ratios: Mapping[str, MedianRatio]
    failed: Mapping[str, str]

    def pays(self, name: str) -> bool:
        """Whether `name` beats the baseline by 5 % and by more than the noise."""
        ratio = self.ratios.get(name)
        return ratio is not None and ratio.median <= 1 - _MARGIN and ratio.high < 1.0

    @property
    def verdict(self) -> str:
        """The fastest of the kernels that pay; the baseline where none does."""
        paying = [name for name in self.ratios if self.pays(name)]
        return min(paying, key=lambda name: self.ratios[name].median, default=self.baseline)

    @property
    def spread(self) -> float:
        """The widest interval of a ratio that may be near 1: how sure this timing is."""
        close = (ratio.spread for ratio in self.ratios.values() if ratio.low < _HOPELESS)
        return max(close, default=0.0)

    def __str__(self) -> str:
        parts = [f"{self.baseline} {self.medians[self.baseline]:.3g} ms"]
        parts += [
            f"{name} {ratio} ({ratio.low:.2f} to {ratio.high:.2f})"
            for name, ratio in self.ratios.items()
            if name != self.baseline
        ]
        parts += [f"{name} can't run: {reason}" for name, reason in self.failed.items()]
        return ", ".join(parts) + f"; {self.verdict} it is"


def compare_kernels(kernels: Mapping[str, System], key: Hashable) -> Timing:
    """Time `kernels` in turns, the first being the baseline, or recall what that gave before.

    `key` tells what is compared (operator, shapes, dtypes, device): its `repr` must say all that
    the times depend on besides the machine, and be the same in every process. Calls record no
    gradients. What a kernel needs is best made in its first call, which isn't timed and which a
    recalled answer spares. A kernel other than the baseline whose first call raises
    `RuntimeError` or an `FxoptError` is left out, with the reason.

    Raises `ValueError` for no kernels.
    """
    if not kernels:
        raise ValueError(f"compare_kernels(key={key!r}) got no kernels; give it {{name: callable}}")
    bench = _BENCH.get() or _default_bench()
    question = repr((key, tuple(kernels)))
    known = _parsed(bench.store.get(question), tuple(kernels))
    if known is not None:
        return known
    with torch.no_grad():
        timing = _time(bench.clock, key, kernels)
    bench.store.put(question, asdict(timing), keep=timing.spread <= _STEADY)
    return timing


@contextmanager
def timings_in(folder: Path | None, clock: Clock | None = None) -> Iterator[None]:
    """Inside, timings are kept in `folder` (None: in memory) instead of `~/.cache/fxopt/timings`,
    beginning with an empty memory; `clock(key, kernels)` gives the latencies in place of a
    measurement."""
    token = _BENCH.set(_Bench(TimingStore(folder), clock or _measured))
    try:
        yield
    finally:
        _BENCH.reset(token)


@dataclass(frozen=True)
class _Bench:
    store: TimingStore
    clock: Clock


_BENCH: ContextVar[_Bench | None] = ContextVar("bench", default=None)


@functools.cache
def _default_bench() -> _Bench:
    try:
        folder = Path.home() / ".cache" / "fxopt" / "timings"
    except RuntimeError:
        return _Bench(TimingStore(None), _measured)
    return _Bench(TimingStore(folder), _measured)


def _measured(key: Hashable, kernels: Mapping[str, System]) -> dict[str, Latency]:
    """Glanced at first: what is far slower than the baseline is timed no further."""
    seen = latency(kernels, repeats=_GLANCES, seconds=_GLANCE_SECONDS)
    limit = _HOPELESS * max(seen[next(iter(kernels))].samples)
    close = {name: kernels[name] for name, time in seen.items() if min(time.samples) <= limit}
    timed = latency(close, repeats=_REPEATS, seconds=_SECONDS)
    later = {name: time.samples for name, time in timed.items()}
    return {name: summarize((*seen[name].samples, *later.get(name, ()))) for name in kernels}


def _time(clock: Clock, key: Hashable, kernels: Mapping[str, System]) -> Timing:
    baseline = next(iter(kernels))
    runnable, failed = {}, {}
    for name, kernel in kernels.items():
        try:
            kernel()
            runnable[name] = kernel
        except (RuntimeError, FxoptError) as error:
            if name == baseline:
                raise
            failed[name] = (str(error).splitlines() or [type(error).__name__])[0]
    times = clock(key, runnable)
    ratios = {name: _ratio(times[name], times[baseline]) for name in runnable}
    return Timing(baseline, {name: times[name].median for name in runnable}, ratios, failed)


def _ratio(time: Latency, baseline: Latency) -> MedianRatio:
    """Over the rounds that both were in. The interval is that of order statistics, which needs no
    distribution."""
    rounds = [a / b for a, b in zip(time.samples, baseline.samples, strict=False)]
    half = min(0.5, _RANKS / math.sqrt(len(rounds)))
    ranks = torch.tensor([0.5, 0.5 - half, 0.5 + half], dtype=torch.float64)
    return MedianRatio(*torch.quantile(torch.tensor(rounds, dtype=torch.float64), ranks).tolist())


def _parsed(answer: Mapping[str, Any] | None, names: tuple[str, ...]) -> Timing | None:
    """The timing that a stored answer holds, or None where it holds none of these kernels."""
    if answer is None:
        return None
    try:
        timing = Timing(
            str(answer["baseline"]),
            {str(name): float(ms) for name, ms in answer["medians"].items()},
            {
                str(name): MedianRatio(*(float(ratio[part]) for part in ("median", "low", "high")))
                for name, ratio in answer["ratios"].items()
            },
            {str(name): str(reason) for name, reason in answer["failed"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    complete = set(timing.medians) == set(timing.ratios) and timing.baseline in timing.ratios
    return timing if complete and {*timing.medians, *timing.failed} == set(names) else None
