"""Facts about a program as frozen values; nothing is changed here."""

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
    Histogram,
    MinMax,
    Observer,
    Rows,
    SecondMoment,
)
from fxopt.analyses.precision import rounds_activations
from fxopt.analyses.sensitivity import Candidate, Sensitivity, measure_sensitivity
from fxopt.analyses.speed import BreakEven, linear_speeds
from fxopt.analyses.weights import quantize_rows

__all__ = [
    "LINEAR_TARGETS",
    "BreakEven",
    "Candidate",
    "ChannelMagnitude",
    "Histogram",
    "Linear",
    "MinMax",
    "Observation",
    "Observer",
    "RangeMethod",
    "Rows",
    "SecondMoment",
    "Sensitivity",
    "as_linear",
    "calibration_warnings",
    "linear_speeds",
    "measure_sensitivity",
    "observe",
    "quantize_rows",
    "reads_as_linear",
    "refuse_shared_weight",
    "rounds_activations",
]
