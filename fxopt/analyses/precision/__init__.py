"""Where values lose precision, where casts go, and what they move."""

from fxopt.analyses.precision.cast_placement import (
    CastGraph,
    Placement,
    Reading,
    Value,
    cheapest_placement,
    sure_high,
)
from fxopt.analyses.precision.casts import Casts, autocast_casts, counted_casts, graph_casts
from fxopt.analyses.precision.operators import UNLISTED, OperatorPrecision, Side, operator_precision
from fxopt.analyses.precision.rounding import (
    INT8_ACTIVATIONS,
    MIXED_PRECISION,
    rounding_claim,
    rounds_activations,
    rounds_to_integers,
)

__all__ = [
    "INT8_ACTIVATIONS",
    "MIXED_PRECISION",
    "UNLISTED",
    "CastGraph",
    "Casts",
    "OperatorPrecision",
    "Placement",
    "Reading",
    "Side",
    "Value",
    "autocast_casts",
    "cheapest_placement",
    "counted_casts",
    "graph_casts",
    "operator_precision",
    "rounding_claim",
    "rounds_activations",
    "rounds_to_integers",
    "sure_high",
]
