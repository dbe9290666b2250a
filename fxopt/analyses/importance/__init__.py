"""How much each channel matters, which channels to keep, and how many for a given cost."""

from fxopt.analyses.importance.ranking import (
    Normalization,
    Ranking,
    normalized,
    ratio_for,
    select,
)
from fxopt.analyses.importance.scores import KINDS, Importance, importance

__all__ = [
    "KINDS",
    "Importance",
    "Normalization",
    "Ranking",
    "importance",
    "normalized",
    "ratio_for",
    "select",
]
