"""Comparisons made of figures, without running a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fxopt.comparison import Comparison, Failure, Front, Quality, Row, pareto_front
from fxopt.measurement import Ceilings, Energy, Fidelity, Layer, Measurement, Spread, Unmeasured
from fxopt.measurement import Throughput as Rate
from fxopt.timing import ratio, summarize

CEILINGS = Ceilings(
    "cpu", {"float32": 2.0e11, "bfloat16": 9e11, "int8": 1.84e12}, 4e10, {"float16": "no unit"}
)
NO_COUNTER = "RAPL can't be read: /sys/class/powercap does not exist"


def made_layer(path: str, kind: str, flops: int, size: int, total: float) -> Layer:
    product = flops / CEILINGS.flops["float32"]
    seconds = max(product, size / CEILINGS.bandwidth)
    return Layer(path, kind, flops, size, seconds, product, seconds / total)


def made_layers(count: int = 4) -> tuple[Layer, ...]:
    layers = []
    for index in range(count):
        name = f"encoder.layer.{index}"
        layers += [
            made_layer(f"{name}.attention.self.query", "Linear", 120_000_000, 1_200_000, 0.05),
            made_layer(f"{name}.intermediate.dense", "Linear", 480_000_000, 4_100_000, 0.05),
            made_layer(f"{name}.output.LayerNorm", "LayerNorm", 0, 900_000, 0.05),
        ]
    return tuple(layers)


def made_measurement(
    name: str, milliseconds: float, size: int | None = 90_000_000, joules: float | None = None
) -> Measurement:
    samples = [milliseconds * (1 + 0.03 * math.sin(7 * i)) for i in range(9)]
    energy: Energy | Unmeasured = Unmeasured(NO_COUNTER)
    if joules is not None:
        spread = Spread(joules, 0.95 * joules, 1.08 * joules, (joules,))
        energy = Energy(spread, 45.0, "RAPL (package-0)", 0.5)
    layers = made_layers()
    return Measurement(
        name,
        "cpu",
        summarize(samples),
        1.25,
        Rate(1e3 / milliseconds, 8e3 / milliseconds),
        energy,
        parameter_bytes=size,
        peak_bytes=12_000_000,
        peak_source="resident memory",
        resident_bytes=900_000_000,
        flops=sum(layer.flops for layer in layers),
        bytes_moved=sum(layer.bytes for layer in layers),
        ceilings=CEILINGS,
        layers=layers,
        reasons={} if size is not None else {"parameter_bytes": "a plain callable doesn't show"},
    )


def made_comparison(
    points: Sequence[tuple[str, float, float]],
    *,
    joules: bool = False,
    failures: tuple[Failure, ...] = (),
    quality: str = "SQNR",
) -> Comparison:
    """Of `(name, milliseconds, quality)`, the first of which is the reference."""
    rows = []
    for number, (name, milliseconds, value) in enumerate(points, start=1):
        size = 90_000_000 // number
        found = made_measurement(name, milliseconds, size, milliseconds / 30 if joules else None)
        basis = rows[0].measurement.latency if rows else found.latency
        db = value if quality == "SQNR" else 30.0 + number
        fidelity = Fidelity("last_hidden_state", 4, 320, db, 0.998, 0.99)
        rows.append(Row(number, name, found, ratio(found.latency, basis), fidelity))
    values = {name: value for name, _, value in points}
    fronts = []
    for kind in ("latency", "energy", "memory"):
        costs = {row.name: row.cost(kind) for row in rows}
        known = {n: (c, -values[n]) for n, c in costs.items() if c is not None}
        if known:
            fronts.append(Front(kind, pareto_front(known)))
    unit = "dB" if quality == "SQNR" else ""
    machine = {"cpu": "Made CPU <b>", "cores": 2, "gpu": None, "torch": "2.13"}
    judged = Quality(quality, unit, "higher", values)
    return Comparison(points[0][0], tuple(rows), judged, tuple(fronts), failures, machine)
