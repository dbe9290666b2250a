"""A measurement as plain text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from fxopt.measurement.counters import Unmeasured
from fxopt.measurement.energy import Energy
from fxopt.measurement.fields import MeasurementFields
from fxopt.measurement.generation import Generation
from fxopt.measurement.roofline import Layer
from fxopt.rendering.alignment import aligned
from fxopt.rendering.units import duration, size

_WIDTH = 100
_LABEL = 15
_MOST_LAYERS = 8
_LAYER_COLUMNS = ("layer", "FLOP", "moved", "FLOP/B", "at least", "share", "bound by")


def render(measurement: MeasurementFields) -> str:
    """The whole measurement; ends without a line break."""
    lines = [f"fxopt measurement: {measurement.name} on {measurement.device}"]
    lines += _line("machine", _machine(measurement))
    for label, content in _facts(measurement):
        lines += _line(label, content)
    lines += _layers(measurement.layers)
    return "\n".join(line.rstrip() for line in lines)


def _machine(measurement: MeasurementFields) -> str:
    facts = measurement.fingerprint
    known = [
        str(facts["gpu"]) if facts.get("gpu") else "",
        f"{facts['cpu']}, {facts.get('threads', '?')} threads" if facts.get("cpu") else "",
        f"torch {facts['torch']}" if facts.get("torch") else "",
    ]
    return " | ".join(filter(None, known)) or "unknown"


def _facts(m: MeasurementFields) -> Iterator[tuple[str, str]]:
    yield "latency", f"{m.latency}; first call {duration(m.first_call_seconds * 1e3)}"
    yield "throughput", _throughput(m)
    yield "parameters", _or_reason(m, "parameter_bytes")
    source = f" beyond what was held ({m.peak_source})" if m.peak_source else ""
    yield "peak of a call", _or_reason(m, "peak_bytes", source)
    yield "resident", _or_reason(m, "resident_bytes", " in the whole process")
    if m.device_bytes is not None:
        yield "on the device", f"{size(m.device_bytes)} held by torch"
    if m.flops is None or m.bytes_moved is None:
        yield "work", _unknown(m, "flops")
    else:
        yield "work", f"{amount(m.flops)}FLOP, {size(m.bytes_moved)} moved if nothing is fused"
    yield "ceilings", str(m.ceilings) if m.ceilings is not None else _unknown(m, "ceilings")
    if m.bound_ms is not None and m.share_of_bound is not None:
        yield (
            "bound",
            f"{duration(m.bound_ms)} unfused; runs at {m.share_of_bound:.0%} of its bound",
        )
    yield "energy", str(m.energy)
    if m.generation is not None:
        yield from _generation(m.generation)
    elif "generation" in m.reasons:
        yield "generation", _unknown(m, "generation")


def _generation(g: Generation) -> Iterator[tuple[str, str]]:
    texts = f"{g.rows} x {g.prompt_tokens} tokens"
    rate = amount(g.prompt_tokens_per_second)
    yield "first token", f"{g.first_token} of {texts}; {rate}tokens/s"
    for one in g.decoding:
        rate = amount(one.tokens_per_second)
        yield f"behind {one.context}", f"{rate}tokens/s, {one.latency} a step{_joules(one.energy)}"
    yield "generate", f"{g.whole} for {g.new_tokens} tokens"
    yield "cache", f"{size(round(g.cache_bytes_per_token))} a token"


def _joules(energy: Energy | Unmeasured) -> str:
    if isinstance(energy, Unmeasured):
        return ""
    return f"; {'ESTIMATED ' * energy.estimated}{energy.joules_per_token:.3g} J a token"


def _throughput(m: MeasurementFields) -> str:
    rates = {"calls": m.throughput.calls, "rows": m.throughput.rows, "tokens": m.throughput.tokens}
    return ", ".join(f"{amount(v)}{name}/s" for name, v in rates.items() if v is not None)


def amount(value: float) -> str:
    """A count with three digits and a decimal prefix: `1.24 G`, `512 `; the unit follows."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


def _or_reason(m: MeasurementFields, field: str, more: str = "") -> str:
    value = getattr(m, field)
    return _unknown(m, field) if value is None else size(value) + more


def _unknown(m: MeasurementFields, field: str) -> str:
    return f"not measured: {m.reasons.get(field, 'the reason is not known')}"


def _layers(layers: Sequence[Layer]) -> Iterator[str]:
    if not layers:
        return
    longest = sorted(layers, key=lambda layer: layer.seconds, reverse=True)[:_MOST_LAYERS]
    rows = [_LAYER_COLUMNS, *map(_row, longest)]
    yield ""
    yield from aligned(rows, "<", "   ")
    hidden = len(layers) - len(longest)
    if hidden:
        share = 1.0 - sum(layer.share for layer in longest)
        yield f"{hidden} further layers, {share:.0%} of the bound, in the JSON"


def _row(layer: Layer) -> tuple[str, ...]:
    name = f"{layer.path or '(model)'} {layer.kind}".strip()
    return (
        name if len(name) <= 40 else f"…{name[-39:]}",
        amount(layer.flops).strip(),
        size(layer.bytes),
        f"{layer.intensity:.1f}",
        duration(layer.seconds * 1e3),
        f"{layer.share:.1%}",
        layer.limit,
    )


def _line(label: str, content: str) -> list[str]:
    indent = " " * (_LABEL + 3)
    return textwrap.wrap(
        content,
        _WIDTH,
        initial_indent=f"   {label.ljust(_LABEL)}",
        subsequent_indent=indent,
        break_on_hyphens=False,
    )
