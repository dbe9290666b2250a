"""What rewriting one candidate costs at the outputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effect:
    """What one candidate costs: decibels alone, and together with all cheaper ones (None where that
    was not measured), and its share of the sum of all candidates' noise powers; `paths` are the
    modules that it rewrites (a node's name where it has none)."""

    name: str
    alone_db: float
    cumulative_db: float | None
    share: float
    paths: tuple[str, ...] = ()
