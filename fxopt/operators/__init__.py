"""What the operators of the dialect are: tables and readings, each once."""

from fxopt.operators.linears import (
    LINEAR_TARGETS,
    Linear,
    as_linear,
    reads_as_linear,
    refuse_shared_weight,
)
from fxopt.operators.products import PRODUCT_TARGETS, why_no_linear

__all__ = [
    "LINEAR_TARGETS",
    "PRODUCT_TARGETS",
    "Linear",
    "as_linear",
    "reads_as_linear",
    "refuse_shared_weight",
    "why_no_linear",
]
