"""Facts about a program as frozen values; nothing is changed here."""

from fxopt.analyses.linears import LINEAR_TARGETS, Linear, as_linear, refuse_shared_weight
from fxopt.analyses.precision import rounds_activations

__all__ = ["LINEAR_TARGETS", "Linear", "as_linear", "refuse_shared_weight", "rounds_activations"]
