"""fxopt, one system for each list of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fxopt
from benchmarks.systems.system import Call, Inputs, System, Workload, first

_STATIC = "int8-linear{mode=static}"
_DYNAMIC = "int8-linear{mode=dynamic}"
_CAREFUL = "int8-linear{mode=dynamic, budget=sqnr(36)}"
_WEIGHT_ONLY = "int8-linear{mode=weight_only}"

LISTS: dict[str, str | tuple[Any, ...]] = {
    "fp32": "canonicalize, fuse-linears, prepack, lower",
    "int8 static": f"canonicalize, fuse-linears, {_STATIC}, half-attention, prepack, lower",
    "int8 dynamic": f"canonicalize, smooth-quant, {_DYNAMIC}, half-attention, prepack, lower",
    "int8 careful": f"canonicalize, smooth-quant, {_CAREFUL}, half-attention, prepack, lower",
    "int8 weight-only": f"canonicalize, fuse-linears, {_WEIGHT_ONLY}, prepack, lower",
}
"""The lists of passes that are timed: textual, or tuples of passes."""


@dataclass(frozen=True)
class Transformed:
    """A transformed model as a system's callable."""

    optimized: fxopt.Optimized

    def __call__(self, inputs: Inputs) -> Tensor:
        return first(self.optimized(**inputs))


def transformed(passes: str | Iterable[Any]) -> Callable[[Workload], Call]:
    """`fxopt.transform` with a list of passes, calibrated where the workload has the batches."""

    def prepare(workload: Workload) -> Call:
        batches = [dict(batch) for batch in workload.calibration]
        # The benchmark checks the outputs and takes the times itself.
        optimized = fxopt.transform(
            workload.model,
            passes,
            example_inputs=dict(workload.inputs),
            verify=False,
            measure_cost=False,
            **({"calibration": batches} if batches else {}),
        )
        return Transformed(optimized)

    return prepare


OURS = {name: System(f"fxopt {name}", transformed(passes)) for name, passes in LISTS.items()}

FXOPT_FP32 = OURS["fp32"]
FXOPT_STATIC = OURS["int8 static"]
FXOPT_DYNAMIC = OURS["int8 dynamic"]
FXOPT_CAREFUL = OURS["int8 careful"]
FXOPT_WEIGHT_ONLY = OURS["int8 weight-only"]
