"""Before and after in words: what got faster or smaller, by how much, what was not measured."""

from __future__ import annotations

from fxopt.measure import Latency, Memory
from fxopt.report.units import duration, size

SLOWER = (
    "the transformed model is slower than the original on this machine at these shapes; leave out "
    "the pass that costs the time, or lower it with Lower()"
)


def speedup(before: Latency | None, after: Latency | None) -> float | None:
    """How many times as fast it has become; None unless both were measured."""
    return before.median / after.median if before and after and after.median > 0 else None


def is_slower(before: Latency | None, after: Latency | None) -> bool:
    """Whether it is slower by the medians, beyond a hundredth, which no one can measure here."""
    factor = speedup(before, after)
    return factor is not None and factor < 0.99


def latency_change(before: Latency | None, after: Latency | None) -> str:
    """Median with 5th and 95th percentile, before and after, and the factor between them."""
    factor = speedup(before, after)
    text = f"{latency_text(before)} -> {latency_text(after)}"
    if factor is None:
        return "not measured" if before is None and after is None else text
    return f"{text}: {factor_text(factor)}"


def factor_text(factor: float) -> str:
    """`2.31x as fast`, or `1.20x as slow` for a factor below 1."""
    return f"{factor:.2f}x as fast" if factor >= 0.995 else f"{1 / factor:.2f}x as slow"


def latency_text(latency: Latency | None) -> str:
    """`12.3 ms (11.9 ms to 14.0 ms, 10 runs)`."""
    if latency is None:
        return "not measured"
    low, high = duration(latency.p5), duration(latency.p95)
    return f"{duration(latency.median)} ({low} to {high}, {latency.runs} runs)"


def memory_change(before: Memory | None, after: Memory | None) -> str:
    """Extra bytes of one call at its peak, before and after, and who counted them."""
    if before is None and after is None:
        return "not measured, or not measurable here"
    source = (before or after).source  # type: ignore[union-attr]
    return f"{memory_text(before)} -> {memory_text(after)} beyond the model itself ({source})"


def memory_text(memory: Memory | None) -> str:
    """`12.3 MB`, or why there is no figure."""
    return size(memory.bytes) if memory else "not measurable here"
