"""Energy of a call, by windows: read the counter, call for a while, read it again.

    joules of a call  =  (joules of the window  -  idle watts · its seconds)  /  calls in it

The windows of several systems take turns, so that a machine that warms up is unfair to all alike.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxopt.measurement.counters import EnergyCounter, Unmeasured
from fxopt.timing import summarize

_WINDOWS = 5
# After work the clocks and the fans need a moment to come down to rest.
_SETTLE_SECONDS = 1.0
_JOULES_A_KWH = 3.6e6
_ESTIMATE_WINDOW = 0.5

System = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Median, 5th and 95th percentile of `samples`."""

    median: float
    p5: float
    p95: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Energy:
    """Joules of one call.

    `joules` is spread over windows of `window_seconds` each; `watts` is the mean power while
    calls ran, with what is drawn at rest, `idle_watts` that at rest where it was subtracted (else
    None); `tokens` are those of a call, `carbon` grams of CO2 a kWh, where they are known; `source`
    says what counted, and `estimated` that nothing did: then it is utilisation times stated power.
    """

    joules: Spread
    watts: float
    source: str
    window_seconds: float
    idle_watts: float | None = None
    tokens: int | None = None
    carbon: float | None = None
    estimated: bool = False

    @property
    def joules_per_token(self) -> float | None:
        """The median of a call, shared by its tokens."""
        return self.joules.median / self.tokens if self.tokens else None

    @property
    def co2_grams(self) -> float | None:
        """Grams of CO2 of the median call."""
        return None if self.carbon is None else self.joules.median / _JOULES_A_KWH * self.carbon

    def __str__(self) -> str:
        spread, count = self.joules, len(self.joules.samples)
        parts = [
            f"{'ESTIMATED ' * self.estimated}{_figure(spread.median)} J "
            f"({_figure(spread.p5)} to {_figure(spread.p95)}, {count} windows of "
            f"{self.window_seconds:g} s, {self.watts:.1f} W"
            + (
                f", {self.idle_watts:.1f} W at rest subtracted)"
                if self.idle_watts is not None
                else ")"
            )
        ]
        if self.joules_per_token is not None:
            parts.append(f"{_figure(self.joules_per_token)} J a token")
        if self.co2_grams is not None:
            parts.append(f"{_figure(self.co2_grams)} g CO2 at {self.carbon:g} g/kWh")
        return ", ".join(parts) + f"; {self.source}"


@dataclass(frozen=True)
class Stopwatch:
    """Seconds by `now`, waiting by `sleep`, processor seconds of this process by `busy`."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    busy: Callable[[], float] = time.process_time


@dataclass(frozen=True)
class _Window:
    spent: float
    seconds: float
    calls: int


def measure_energy(
    systems: Mapping[str, System],
    counter: EnergyCounter,
    *,
    seconds: float = 0.0,
    windows: int = _WINDOWS,
    subtract_idle: bool = False,
    tokens: int | None = None,
    carbon: float | None = None,
    synchronize: System = lambda: None,
    watch: Stopwatch | None = None,
) -> dict[str, Energy | Unmeasured]:
    """The energy of a call of each system, in `windows` rounds; a window lasts `seconds`, at least
    as long as the counter's resolution needs.

    With `subtract_idle` the power at rest is measured before, in a window of its own, and taken
    away. `synchronize` waits until the device has done what was asked of it. `Unmeasured` where the
    counter fails, doesn't move, as in many containers, or shows no more than the power at rest.
    """
    watch = watch or Stopwatch()
    length = max(seconds, counter.window_seconds)
    taken: dict[str, list[_Window]] = {name: [] for name in systems}
    try:
        idle = _idle_watts(counter, length, synchronize, watch) if subtract_idle else None
        for _ in range(windows):
            for name, system in systems.items():
                taken[name].append(_window(system, counter, length, synchronize, watch))
    except OSError as error:
        return dict.fromkeys(systems, Unmeasured(f"{counter.source}: {error}"))
    return {
        name: _summary(found, counter.source, length, idle, tokens, carbon)
        for name, found in taken.items()
    }


def estimate_energy(
    systems: Mapping[str, System],
    watts: float,
    *,
    windows: int = _WINDOWS,
    tokens: int | None = None,
    carbon: float | None = None,
    watch: Stopwatch | None = None,
    processors: int | None = None,
) -> dict[str, Energy]:
    """Joules by the stated power: `watts` of the whole processor at full load, times the share of
    its `processors` (left out: of this machine's logical ones) that the calls kept busy.

    It knows no idle power, no memory and no clock that changes: an order of magnitude.
    """
    watch = watch or Stopwatch()
    count = processors or os.cpu_count() or 1
    taken: dict[str, list[_Window]] = {name: [] for name in systems}
    for _ in range(windows):
        for name, system in systems.items():
            taken[name].append(_busy_window(system, watts / count, watch))
    return {
        name: _energy(
            found,
            _utilisation(found, watts, count),
            _ESTIMATE_WINDOW,
            tokens=tokens,
            carbon=carbon,
            estimated=True,
        )
        for name, found in taken.items()
    }


def _window(
    system: System,
    counter: EnergyCounter,
    length: float,
    synchronize: System,
    watch: Stopwatch,
) -> _Window:
    system()
    synchronize()
    calls, before, started = 0, counter.read(), watch.now()
    while not calls or watch.now() - started < length:
        system()
        # Without it the loop would queue calls for minutes ahead of the device.
        synchronize()
        calls += 1
    ended, after = watch.now(), counter.read()
    if ended - started > counter.longest_seconds:
        raise OSError(
            f"one call takes {ended - started:.0f} s, in which the counter may turn over twice; "
            "measure fewer rows at a time"
        )
    return _Window(counter.joules(before, after), ended - started, calls)


def _busy_window(system: System, watts: float, watch: Stopwatch) -> _Window:
    calls, before, started = 0, watch.busy(), watch.now()
    while not calls or watch.now() - started < _ESTIMATE_WINDOW:
        system()
        calls += 1
    return _Window(watts * (watch.busy() - before), watch.now() - started, calls)


def _idle_watts(
    counter: EnergyCounter, length: float, synchronize: System, watch: Stopwatch
) -> float:
    synchronize()
    watch.sleep(_SETTLE_SECONDS)
    before, started = counter.read(), watch.now()
    watch.sleep(length)
    ended, after = watch.now(), counter.read()
    return counter.joules(before, after) / (ended - started)


def _summary(
    windows: Sequence[_Window],
    source: str,
    length: float,
    idle: float | None,
    tokens: int | None,
    carbon: float | None,
) -> Energy | Unmeasured:
    still = sum(window.spent <= 0 for window in windows)
    if still:
        return Unmeasured(
            f"{source}: the counter stood still in {still} of {len(windows)} windows of "
            f"{length:g} s while the model ran, as in containers and virtual machines that show a "
            "counter but not the hardware's"
        )
    energy = _energy(windows, source, length, idle=idle, tokens=tokens, carbon=carbon)
    if energy.joules.median <= 0:
        return Unmeasured(
            f"{source}: the calls drew {energy.watts:.1f} W, no more than the {idle:.1f} W at rest "
            "before them; something else was running then. Measure on a quiet machine, or without "
            "subtract_idle"
        )
    return energy


def _energy(
    windows: Sequence[_Window],
    source: str,
    length: float,
    *,
    idle: float | None = None,
    tokens: int | None = None,
    carbon: float | None = None,
    estimated: bool = False,
) -> Energy:
    rest = idle or 0.0
    spread = summarize([(w.spent - rest * w.seconds) / w.calls for w in windows])
    watts = math.fsum(w.spent for w in windows) / math.fsum(w.seconds for w in windows)
    joules = Spread(spread.median, spread.p5, spread.p95, spread.samples)
    return Energy(joules, watts, source, length, idle, tokens, carbon, estimated)


def _utilisation(windows: Sequence[_Window], watts: float, processors: int) -> str:
    share = math.fsum(w.spent for w in windows) / watts / math.fsum(w.seconds for w in windows)
    return (
        f"an estimate, no counter: {share:.0%} of {processors} logical processors busy (processor "
        f"time of this process) times {watts:g} W, as stated by the caller"
    )


def _figure(value: float) -> str:
    return f"{value:.3g}"
