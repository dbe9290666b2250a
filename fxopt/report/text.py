"""The report as plain text of at most 100 columns, for a terminal or a log."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from fxopt.program import Refusal
from fxopt.rendering.alignment import aligned
from fxopt.rendering.units import duration, size, span
from fxopt.report import before_after
from fxopt.report.fields import ReportFields, Step
from fxopt.report.grouping import group

_WIDTH = 100
_LABEL = 12
_MOST_GROUPS = 8
_MOST_DETAILS = 24
_MOST_RELATIONS = 12


def render(report: ReportFields) -> str:
    """The whole report; ends without a line break."""
    lines = [
        f"fxopt report: {report.model}",
        *_wrapped("", _machine_line(report)),
        "",
        *_table(report),
    ]
    for number, step in enumerate(report.steps, start=1):
        lines += ["", *_wrapped(f"{number}  ", step.spec), *_details(step)]
    lines += ["", "In all", *_totals(report), *_domains(report)]
    return "\n".join(line.rstrip() for line in lines)


def _machine_line(report: ReportFields) -> str:
    facts = report.fingerprint
    known = [
        f"captured in {duration(report.capture_ms)}",
        str(facts["gpu"]) if facts.get("gpu") else "",
        f"{facts['cpu']}, {facts.get('threads', '?')} threads" if facts.get("cpu") else "",
        f"torch {facts['torch']}" if facts.get("torch") else "",
    ]
    return " | ".join(filter(None, known))


def _table(report: ReportFields) -> Iterator[str]:
    if not report.steps:
        yield "No passes were given; the model is captured as it is."
        return
    rows: list[tuple[str, ...]] = [("pass", "fired", "nodes", "parameters", "time", "claim")]
    rows += [_row(number, step) for number, step in enumerate(report.steps, start=1)]
    lines = aligned(rows, "<", "   ")
    lines.insert(1, "-" * min(len(max(lines, key=len)), _WIDTH))
    yield from lines


def _row(number: int, step: Step) -> tuple[str, ...]:
    return (
        textwrap.shorten(f"{number}  {step.name}", 24, placeholder="…"),
        before_after.firings_text(step),
        span(str(step.nodes_before), str(step.nodes_after)),
        span(size(step.bytes_before), size(step.bytes_after)),
        duration(step.milliseconds),
        verdict(step),
    )


def verdict(step: Step) -> str:
    """The claim's outcome in a word or two."""
    if not step.holds:
        return "BROKEN"
    if step.reverted:
        return f"holds, {len(step.reverted)} reverted"
    return "holds" if step.measured else "not judged"


def _details(step: Step) -> Iterator[str]:
    fired = ", ".join(f"{rule} {count}" for rule, count in step.fired.items() if count)
    if fired:
        yield from _wrapped("fired", fired)
    elif before_after.is_uncounted(step):
        yield from _wrapped("fired", "the pass changed the graph without counting by rule")
    elif step.refused:
        yield from _wrapped("fired", "nowhere; every candidate was refused, see the reasons")
    else:
        yield from _wrapped("fired", "nowhere; the graph holds nothing that this pass rewrites")
    outcome = "holds" if step.holds else "BROKEN"
    judged = f"measured {step.measured}: {outcome}" if step.measured else "not judged"
    yield from _wrapped("claim", f"{step.claim}; {judged}")
    yield from _decisions(step.details)
    yield from _groups("refused", step.refused)
    yield from _groups("reverted", step.reverted)
    for warning in step.warnings:
        yield from _wrapped("warning", warning)


def _decisions(details: Sequence[str]) -> Iterator[str]:
    """The lines in one column, so that a table stays one; each is wrapped by itself."""
    for index, line in enumerate(details[:_MOST_DETAILS]):
        yield from _wrapped("planned" if index == 0 else " ", line)
    hidden = len(details) - _MOST_DETAILS
    if hidden > 0:
        yield from _wrapped(" ", f"{hidden} further lines, listed in the JSON and HTML")


def _groups(name: str, refusals: Sequence[Refusal]) -> Iterator[str]:
    groups = group(refusals)
    for index, found in enumerate(groups[:_MOST_GROUPS]):
        yield from _wrapped(name if index == 0 else " ", str(found))
    hidden = groups[_MOST_GROUPS:]
    if hidden:
        nodes = sum(len(found.nodes) for found in hidden)
        yield from _wrapped(
            " ", f"{nodes} x {len(hidden)} further reasons, listed in the JSON and HTML"
        )


def _totals(report: ReportFields) -> Iterator[str]:
    if report.end_to_end:
        yield from _wrapped("end to end", report.end_to_end)
    yield from _wrapped(
        "latency", before_after.latency_change(report.latency_before, report.latency_after)
    )
    if before_after.is_slower(report.latency_before, report.latency_after):
        yield from _wrapped("WARNING", before_after.SLOWER)
    busy = before_after.crowded(report)
    if busy:
        yield from _wrapped("warning", busy)
    yield from _wrapped(
        "peak memory", before_after.memory_change(report.memory_before, report.memory_after)
    )
    for note in report.notes:
        yield from _wrapped("note", note)


def _domains(report: ReportFields) -> Iterator[str]:
    """For which calls each program answers."""
    if not report.domains:
        return
    yield ""
    yield "Holds for"
    for number, domain in enumerate(report.domains, start=1):
        yield from _wrapped(f"{number}  ", "; ".join((*domain.inputs, *domain.constants)))
        for index, relation in enumerate(domain.relations[:_MOST_RELATIONS]):
            yield from _wrapped("where" if index == 0 else " ", relation)
        hidden = len(domain.relations) - _MOST_RELATIONS
        if hidden > 0:
            yield from _wrapped(" ", f"{hidden} further relations, listed in the JSON and HTML")
        yield from _wrapped("judged at", "; ".join(domain.judged) or "no size: judging was off")
    yield from _wrapped("others", before_after.other_calls(report))


def _wrapped(name: str, content: str) -> list[str]:
    """Lines of `content` with `name` in a column before the first; none is longer than allowed."""
    start = f"   {name}".ljust(_LABEL + 4) if name.strip() and not name[0].isdigit() else name
    start = " " * (_LABEL + 4) if name == " " else start
    return textwrap.wrap(
        content,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    ) or [start]
