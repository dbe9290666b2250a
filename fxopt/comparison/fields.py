"""A comparison as plain values: a row for each model, ratios, Pareto fronts, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxopt.measurement.energy import Energy
from fxopt.measurement.fidelity import Fidelity
from fxopt.measurement.measurement import Measurement
from fxopt.timing import Ratio


@dataclass(frozen=True)
class Row:
    """One model: its number in tables and plots, its cost, its worth.

    `ratio` is its time over the reference's, round by round; `fidelity` is None where the model
    failed on the data.
    """

    number: int
    name: str
    measurement: Measurement
    ratio: Ratio
    fidelity: Fidelity | None = None

    def cost(self, kind: str) -> float | None:
        """Of one call: "latency" in ms, "energy" in J, or "memory", bytes of parameters."""
        found = self.measurement
        if kind == "latency":
            return found.latency.median
        if kind == "energy":
            return found.energy.joules.median if isinstance(found.energy, Energy) else None
        return None if found.parameter_bytes is None else float(found.parameter_bytes)


@dataclass(frozen=True)
class Quality:
    """What the models are judged by: a metric's name and unit, which way is better ("higher",
    "lower"), and the figure of each model that has one."""

    name: str
    unit: str
    better: str
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Front:
    """The models for which none other is both cheaper and better; `cost` as in `Row.cost`.

    `names` go from the cheapest to the best.
    """

    cost: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """A model that couldn't be compared, or not on the data, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ComparisonFields:
    """What a `Comparison` holds, and how its rows and fronts are found."""

    reference: str
    rows: tuple[Row, ...]
    quality: Quality
    fronts: tuple[Front, ...]
    failures: tuple[Failure, ...] = ()
    fingerprint: Mapping[str, str | int | float | None] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        """The row of a model; raises `KeyError` that names those there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; compared were {', '.join(row.name for row in self.rows)}")

    def front(self, cost: str = "latency") -> tuple[str, ...]:
        """The Pareto front of `cost` ("latency", "energy", "memory"), empty where unknown."""
        return next((front.names for front in self.fronts if front.cost == cost), ())
