"""One figure of two models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """One figure of the reference and of the candidate."""

    reference: float
    candidate: float

    def __str__(self) -> str:
        return f"{self.candidate:.4g} (reference {self.reference:.4g})"

    @staticmethod
    def of(reference: float | None, candidate: float | None) -> Pair | None:
        """None where either has no figure."""
        if reference is None or candidate is None:
            return None
        return Pair(reference, candidate)
