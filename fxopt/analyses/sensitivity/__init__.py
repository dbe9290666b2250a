"""What rewriting each layer costs at the outputs, measured and drawn."""

from fxopt.analyses.sensitivity.measuring import (
    Candidate,
    Sensitivity,
    measure_sensitivity,
    measured_batches,
)

__all__ = [
    "Candidate",
    "Sensitivity",
    "measure_sensitivity",
    "measured_batches",
]
