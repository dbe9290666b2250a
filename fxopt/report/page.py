"""The report as one self-contained HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from fxopt.program import Refusal
from fxopt.rendering.units import duration, size, span
from fxopt.report import before_after
from fxopt.report.fields import ReportFields, Step
from fxopt.report.graph_picture.drawing import draw
from fxopt.report.graph_picture.picture import GraphPicture
from fxopt.report.grouping import Group, group

_COLUMNS = ("pass", "fired", "operations", "parameters", "time", "claim", "measured")
_MOST_NODES = 12
_MOST_TEXT = 200_000
# Pictures that need more pixels than this stand one above the other.
_WIDEST_BESIDE = 580


def render(report: ReportFields) -> str:
    """The page; every name and text of the model is escaped, and a policy forbids all loading."""
    style = files("fxopt.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = [
        _header(report),
        _cards(report),
        _measurements(report),
        _domains(report),
        _passes(report.steps),
        _pictures(report),
        _graph_text(report.steps),
        _machine(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fxopt report: {escape(report.model)}</title>"
        f"<style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _header(report: ReportFields) -> str:
    names = " → ".join(step.name for step in report.steps) or "captured as it is, no passes"
    alarms = [f"{step.name} broke its claim." for step in report.steps if not step.holds]
    if before_after.is_slower(report.latency_before, report.latency_after):
        alarms.append(f"{before_after.SLOWER[0].upper()}{before_after.SLOWER[1:]}.")
    alarms += [f"{step.name}: {warning}" for step in report.steps for warning in step.warnings]
    busy = before_after.crowded(report)
    alarms += [f"{busy[0].upper()}{busy[1:]}."] if busy else []
    return (
        f'<header><p class="soft">fxopt report</p><h1>{escape(report.model)}</h1>'
        f'<p class="soft">{escape(names)}</p>'
        + "".join(f'<p class="alarm">{escape(alarm)}</p>' for alarm in alarms)
        + "".join(f'<p class="soft">Note: {escape(note)}</p>' for note in report.notes)
        + "</header>"
    )


def _cards(report: ReportFields) -> str:
    cards = []
    factor = before_after.speedup(report.latency_before, report.latency_after)
    if factor is not None and report.latency_before and report.latency_after:
        change = span(duration(report.latency_before.median), duration(report.latency_after.median))
        style = "bad" if factor < 0.99 else "good" if factor > 1.01 else ""
        cards.append((before_after.factor_text(factor), f"latency {change}", style))
    if report.steps:
        first, last = report.steps[0], report.steps[-1]
        held = sum(step.holds and bool(step.measured) for step in report.steps)
        cards += [
            _share(first.bytes_before, last.bytes_after, "parameters"),
            (span(str(first.nodes_before), str(last.nodes_after)), "operations in the graph", ""),
            (
                f"{held} of {len(report.steps)}",
                "claims measured and held",
                "bad" if any(not step.holds for step in report.steps) else "",
            ),
        ]
    if report.memory_before and report.memory_after:
        cards.append(
            _share(report.memory_before.bytes, report.memory_after.bytes, "peak extra memory")
        )
    boxes = "".join(
        f'<div class="card"><b class="{style}">{_text(figure)}</b>'
        f"<small>{_text(name)}</small></div>"
        for figure, name, style in cards
    )
    claim = f"<p>End to end: {escape(report.end_to_end)}</p>" if report.end_to_end else ""
    return f'<section><div class="cards">{boxes}</div>{claim}</section>'


def _share(before: int, after: int, name: str) -> tuple[str, str, str]:
    """A card on bytes: by how many percent they have shrunk or grown."""
    change = f"{name} {span(size(before), size(after))}"
    if before == after or not before:
        return size(after), f"{name}, as before" if before == after else change, ""
    percent = 100 * (after - before) / before
    return f"{percent:+.0f} %".replace("-", "−"), change, "good" if after < before else ""


def _measurements(report: ReportFields) -> str:
    latencies = (report.latency_before, report.latency_after)
    memories = (report.memory_before, report.memory_after)
    times = [
        (latency.median, latency.p5, latency.p95) if latency else None for latency in latencies
    ]
    peaks = [(float(m.bytes),) * 3 if m else None for m in memories]
    source = next((memory.source for memory in memories if memory), "")
    return (
        '<h2>Measured on this machine</h2><div class="two">'
        + _bars(
            "Latency of one call (median, 5th to 95th percentile)",
            times,
            [before_after.latency_text(latency) for latency in latencies],
        )
        + _bars(
            "Peak extra memory of one call" + (f" ({source})" if source else ""),
            peaks,
            [before_after.memory_text(memory) for memory in memories],
        )
        + "</div>"
    )


def _bars(
    title: str, values: Sequence[tuple[float, float, float] | None], texts: Sequence[str]
) -> str:
    top = max((max(value) for value in values if value), default=0.0) or 1.0
    rows = []
    for name, value, text in zip(("before", "after"), values, texts, strict=True):
        track = ""
        if value:
            middle, low, high = (100 * part / top for part in value)
            track = f'<div class="fill" style="width:{middle:.1f}%"></div>'
            if high > low:
                track += (
                    f'<div class="spread" style="left:{low:.1f}%;width:{high - low:.1f}%"></div>'
                )
        style = "bar was" if name == "before" else "bar"
        rows.append(
            f'<div class="{style}"><span>{name}</span><div class="track">{track}</div>'
            f"<span>{_text(text)}</span></div>"
        )
    return f'<div class="bars"><h3>{_text(title)}</h3>{"".join(rows)}</div>'


def _passes(steps: Sequence[Step]) -> str:
    if not steps:
        return ""
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    rows = "".join(_row(number, step) for number, step in enumerate(steps, start=1))
    return (
        f'<h2>Passes</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>" + "".join(map(_pass, steps))
    )


def _row(number: int, step: Step) -> str:
    outcome = ("holds", "good") if step.holds else ("broken", "bad")
    measured = (
        f'{_text(step.measured)} <b class="{outcome[1]}">{outcome[0]}</b>'
        if step.measured
        else '<span class="soft">not judged</span>'
    )
    cells = (
        f"{number}  {step.name}",
        before_after.firings_text(step),
        span(str(step.nodes_before), str(step.nodes_after)),
        span(size(step.bytes_before), size(step.bytes_after)),
        duration(step.milliseconds),
        step.claim,
    )
    named = [*map(_text, cells), f"<span>{measured}</span>"]
    return (
        "<tr>"
        + "".join(
            f'<td data-name="{name}">{cell}</td>'
            for name, cell in zip(_COLUMNS, named, strict=True)
        )
        + "</tr>"
    )


def _pass(step: Step) -> str:
    counts = [f"{rule} {count}" for rule, count in step.fired.items() if count]
    fired = ", ".join(counts) or f"fired {before_after.firings_text(step)}"
    refused = f", refused {len(step.refused)}" if step.refused else ""
    reverted = f", reverted {len(step.reverted)}" if step.reverted else ""
    lists = _refusals("Refused", step.refused) + _refusals("Reverted", step.reverted)
    lines = "\n".join(step.details)
    planned = f"<pre>{escape(lines)}</pre>" if lines else ""
    empty = "" if lists else "<p class='soft'>Nothing was refused.</p>"
    is_open = " open" if step.refused or step.reverted or step.details else ""
    return (
        f'<details class="pass"{is_open}><summary><b>{escape(step.name)}</b> '
        f'<span class="soft">{escape(fired + refused + reverted)}</span></summary>'
        f'<p class="spec mono">{escape(step.spec)}</p>{planned}{lists}{empty}</details>'
    )


def _refusals(title: str, refusals: Sequence[Refusal]) -> str:
    if not refusals:
        return ""
    items = "".join(f"<li>{_group(found)}</li>" for found in group(refusals))
    return f"<p>{title}, and why:</p><ul>{items}</ul>"


def _group(found: Group) -> str:
    names = ", ".join(f"<code>{escape(node)}</code>" for node in found.nodes[:_MOST_NODES])
    more = len(found.nodes) - _MOST_NODES
    names += f" and {more} more" if more > 0 else ""
    vary = " (figures vary)" if found.varies else ""
    return f"<b>{len(found.nodes)} ×</b> {escape(found.reason)}{vary}: {names}"


def _domains(report: ReportFields) -> str:
    """For which calls each program answers."""
    if not report.domains:
        return ""
    items = []
    for domain in report.domains:
        inputs = "".join(f"<li><code>{escape(text)}</code></li>" for text in domain.inputs)
        constants = "".join(f"<li><code>{escape(text)}</code></li>" for text in domain.constants)
        where = "".join(f"<li>where {escape(text)}</li>" for text in domain.relations)
        judged = escape("; ".join(domain.judged) or "no size: judging was off")
        items.append(f"<li><ul>{inputs}{constants}{where}<li>judged at {judged}</li></ul></li>")
    return (
        f"<section><h2>Holds for</h2><ol>{''.join(items)}</ol>"
        f'<p class="soft">Other calls are {escape(before_after.other_calls(report))}.</p></section>'
    )


def _pictures(report: ReportFields) -> str:
    pictures = [
        ("Before", report.picture_before, "marked: replaced or removed"),
        ("After", report.picture_after, "marked: new or rewritten"),
    ]
    panels = [_panel(name, shown, marked) for name, shown, marked in pictures if shown is not None]
    if not panels:
        return ""
    layout = "two" if max(width for _, width in panels) <= _WIDEST_BESIDE else "one"
    body = "".join(panel for panel, _ in panels)
    return f'<h2>The graph</h2>{_LEGEND}<div class="{layout}">{body}</div>'


def _panel(title: str, picture: GraphPicture, marked: str) -> tuple[str, int]:
    operations = sum(node.kind == "op" for node in picture.nodes)
    changed = sum(node.changed for node in picture.nodes)
    facts = f"{operations} operations" + (f", {changed} {marked}" if changed else "")
    if picture.sizes:
        facts += f"; {picture.sizes} computations of sizes are left out"
    svg, width = draw(picture)
    return (
        f'<div class="panel"><h3>{title}</h3><p class="soft">{_text(facts)}</p>'
        f'<div class="wide">{svg}</div></div>',
        width,
    )


_LEGEND = (
    '<p class="legend"><span><i class="heavy"></i>matrix product, attention, convolution, look-up'
    '</span><span><i></i>other operation</span><span><i class="folded"></i>several of them'
    '</span><span><i class="io"></i>input or output</span>'
    '<span><i class="changed"></i>changed</span><span><i class="times"></i>equal layers, drawn '
    "once</span><span>Point at a node or wire for shapes, weights and source lines.</span></p>"
)


def _graph_text(steps: Sequence[Step]) -> str:
    graph = next((step.graph for step in reversed(steps) if step.graph), "")
    if not graph:
        return ""
    left_out = len(graph) - _MOST_TEXT
    text = graph[:_MOST_TEXT] + (f"\n… {left_out} characters more" if left_out > 0 else "")
    return (
        '<details class="pass"><summary>The rewritten graph as text</summary>'
        f'<div class="panel"><pre>{escape(text)}</pre></div></details>'
    )


def _machine(report: ReportFields) -> str:
    facts = [f"captured in {duration(report.capture_ms)}"]
    facts += [f"{name} {value}" for name, value in report.fingerprint.items() if value is not None]
    return f'<h2>Machine</h2><p class="soft">{escape("; ".join(facts))}</p>'


def _text(content: str) -> str:
    return escape(content).replace("-&gt;", "→")
