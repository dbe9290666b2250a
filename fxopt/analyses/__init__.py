"""Facts about a program as frozen values; nothing is changed here."""

from fxopt.analyses.cast_placement import (
    CastGraph,
    Placement,
    Reading,
    Value,
    cheapest_placement,
    sure_high,
)
from fxopt.analyses.casts import Casts, autocast_casts, counted_casts, graph_casts
from fxopt.analyses.constant_expressions import is_computed_constant, stored
from fxopt.analyses.extremes import Extremes, extremes, past_range
from fxopt.analyses.histogram import RangeMethod
from fxopt.analyses.linears import (
    LINEAR_TARGETS,
    Linear,
    as_linear,
    reads_as_linear,
    refuse_shared_weight,
)
from fxopt.analyses.observation import Observation, calibration_warnings, observe
from fxopt.analyses.observers import (
    ChannelMagnitude,
    ChannelRange,
    Histogram,
    MinMax,
    Observer,
    Rows,
    SecondMoment,
)
from fxopt.analyses.operator_precision import (
    UNLISTED,
    OperatorPrecision,
    Side,
    operator_precision,
)
from fxopt.analyses.precision import rounds_activations, rounds_to_integers
from fxopt.analyses.products import PRODUCT_TARGETS, why_no_linear
from fxopt.analyses.sensitivity import Candidate, Sensitivity, measure_sensitivity, measured_batches
from fxopt.analyses.speed import ROWS, BreakEven, linear_speeds
from fxopt.analyses.weights import quantize_rows

__all__ = [
    "LINEAR_TARGETS",
    "PRODUCT_TARGETS",
    "ROWS",
    "UNLISTED",
    "BreakEven",
    "Candidate",
    "CastGraph",
    "Casts",
    "ChannelMagnitude",
    "ChannelRange",
    "Extremes",
    "Histogram",
    "Linear",
    "MinMax",
    "Observation",
    "Observer",
    "OperatorPrecision",
    "Placement",
    "RangeMethod",
    "Reading",
    "Rows",
    "SecondMoment",
    "Sensitivity",
    "Side",
    "Value",
    "as_linear",
    "autocast_casts",
    "calibration_warnings",
    "cheapest_placement",
    "counted_casts",
    "extremes",
    "graph_casts",
    "is_computed_constant",
    "linear_speeds",
    "measure_sensitivity",
    "measured_batches",
    "observe",
    "operator_precision",
    "past_range",
    "quantize_rows",
    "reads_as_linear",
    "refuse_shared_weight",
    "rounds_activations",
    "rounds_to_integers",
    "stored",
    "sure_high",
    "why_no_linear",
]
