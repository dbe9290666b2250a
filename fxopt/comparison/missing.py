"""What a comparison doesn't hold, and why: a number that is missing is never left to guess."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxopt.comparison.fields import ComparisonFields
from fxopt.measurement.counters import Unmeasured

_NAMES = {
    "parameter_bytes": "parameters",
    "peak_bytes": "peak memory",
    "resident_bytes": "resident memory",
    "device_bytes": "device memory",
    "flops": "operations",
    "bytes_moved": "bytes moved",
    "generation": "writing text",
    "ceilings": "the machine's ceilings",
}


@dataclass(frozen=True)
class Gap:
    """Something that wasn't measured, of which models, and the reason."""

    what: str
    models: tuple[str, ...]
    reason: str


def gaps(comparison: ComparisonFields) -> tuple[Gap, ...]:
    """Every gap, those with the same reason as one; models that failed come first."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for what, model, reason in _each(comparison):
        kinds, models = found.setdefault(reason, ([], []))
        kinds += [what] if what not in kinds else []
        models += [model] if model not in models else []
    return tuple(
        Gap(" and ".join(kinds), tuple(models), reason) for reason, (kinds, models) in found.items()
    )


def of_whom(gap: Gap, comparison: ComparisonFields) -> str:
    """The models of a gap in words."""
    every = len(comparison.rows) > 1 and set(gap.models) >= {row.name for row in comparison.rows}
    return "all models" if every else ", ".join(gap.models)


def _each(comparison: ComparisonFields) -> Iterator[tuple[str, str, str]]:
    for failure in comparison.failures:
        measured = any(row.name == failure.name for row in comparison.rows)
        yield "fidelity" if measured else "anything", failure.name, failure.reason
    for row in comparison.rows:
        energy = row.measurement.energy
        if isinstance(energy, Unmeasured):
            yield "energy", row.name, energy.reason
        for name, reason in row.measurement.reasons.items():
            yield _NAMES.get(name, name), row.name, reason
        for note in row.fidelity.notes if row.fidelity else ():
            yield "part of the fidelity", row.name, note
