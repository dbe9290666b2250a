"""Before and after in words: what got faster or smaller, by how much, what was not measured."""

from __future__ import annotations

from fxopt.rendering.units import duration, size
from fxopt.report.fields import ReportFields, Step
from fxopt.timing import Latency, Memory

SLOWER = (
    "the transformed model is slower than the original on this machine at these shapes; leave out "
    "the pass that costs the time, or lower it with Lower()"
)


def crowded(report: ReportFields) -> str | None:
    """What to say of latencies taken while others used the machine; None if it was quiet.

    The measurement itself may keep every core busy; half as much again is someone else.
    """
    load, cores = report.fingerprint.get("load"), report.fingerprint.get("cores")
    if report.latency_before is None and report.latency_after is None:
        return None
    if not isinstance(load, (int, float)) or not isinstance(cores, int) or load <= 1.5 * cores:
        return None
    return (
        f"other work ran on this machine (load {load:g} on {cores} cores): trust ratios more than "
        "times, and measure again when it is quiet"
    )


def speedup(before: Latency | None, after: Latency | None) -> float | None:
    """How many times as fast it has become; None unless both were measured."""
    return before.median / after.median if before and after and after.median > 0 else None


def is_slower(before: Latency | None, after: Latency | None) -> bool:
    """Whether it is slower by the medians, beyond a hundredth, which no one can measure here."""
    factor = speedup(before, after)
    return factor is not None and factor < 0.99


def latency_change(before: Latency | None, after: Latency | None) -> str:
    """The factor, then before and after as median with 5th and 95th percentile."""
    if before is None and after is None:
        return "not measured"
    factor = speedup(before, after)
    change = f"{latency_text(before)} -> {latency_text(after)}"
    return change if factor is None else f"{factor_text(factor)}: {change}"


def factor_text(factor: float) -> str:
    """`2.31x as fast`, or `1.20x as slow` for a factor below 1."""
    return f"{factor:.2f}x as fast" if factor >= 0.995 else f"{1 / factor:.2f}x as slow"


def latency_text(latency: Latency | None) -> str:
    """`12.3 ms (11.9 to 14.0 in 10 runs)`: median, 5th and 95th percentile."""
    if latency is None:
        return "not measured"
    low, high = (duration(part, like=latency.median) for part in (latency.p5, latency.p95))
    return f"{duration(latency.median)} ({low} to {high} in {latency.runs} runs)"


def firings_text(step: Step) -> str:
    """How often a pass changed something; a pass may change a graph and not count."""
    if step.firings:
        return str(step.firings)
    return "uncounted" if is_uncounted(step) else "nowhere"


def is_uncounted(step: Step) -> bool:
    """Whether the graph changed although no rule counted it."""
    sizes_differ = (step.nodes_before, step.bytes_before) != (step.nodes_after, step.bytes_after)
    return not step.firings and (sizes_differ or bool(step.changed))


def memory_change(before: Memory | None, after: Memory | None) -> str:
    """Extra bytes of one call at its peak, before and after, and who counted them."""
    if before is None and after is None:
        return "not measured, or not measurable here"
    source = (before or after).source  # type: ignore[union-attr]
    return f"{memory_text(before)} -> {memory_text(after)} beyond the model itself ({source})"


def memory_text(memory: Memory | None) -> str:
    """`12.3 MB`, or why there is no figure."""
    return size(memory.bytes) if memory else "not measurable here"


def other_calls(report: ReportFields) -> str:
    """What becomes of a call that none of the programs answers."""
    most, held = report.most_programs or 1, len(report.domains)
    if held < most:
        return (
            f"answered by a program captured at the first such call: {held} of at most {most} so "
            "far, while the original model is there and its weights are what they were"
        )
    return "refused by an InputError that names the relation"
