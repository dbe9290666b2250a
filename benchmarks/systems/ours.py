"""fxopt, one system for each list of passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fxopt
from benchmarks.systems.system import Call, Inputs, System, Workload, first

_START = "canonicalize, fuse-linears"
# What int8 leaves, attention and costly layers, in bfloat16; then the CPU's fastest kernels, called
# from C++: seconds of compiling, of 30 layers minutes, for tens of microseconds a call.
_LEAN = "lower{mode=reduce-overhead}"
_END = f"autocast, prepack, {_LEAN}"
# The second linear of a BERT layer's feed-forward net. Its input comes out of a GELU, with a few
# huge channels in a few tokens: a scale for each token spares the others, smoothing spares none.
_DOWN = "encoder.layer.?.output.dense"
# Attention rounds its own result where one scale holds for all tokens, and nothing stands between.
_ATTENDED = "*.attention.output.dense"
_SMOOTH = f"shift-channels{{exclude={_ATTENDED}}}, smooth-quant{{alpha=auto, exclude={_DOWN}}}"
_STATIC = f"int8-linear{{mode=static, weights=gptq, include={_ATTENDED}}}"
_TOKENS = "int8-linear{mode=dynamic, activations=affine, weights=gptq"

LISTS: dict[str, str | tuple[Any, ...]] = {
    "fp32": f"{_START}, prepack, {_LEAN}",
    "autocast bf16": f"{_START}, autocast, lower",
    "half": f"{_START}, autocast{{mode=half}}, prepack, lower",
    "half-linear": f"{_START}, half-linear, prepack, lower",
    "int8 static": f"{_START}, int8-linear{{mode=static}}, {_END}",
    "int8 dynamic": f"{_START}, {_SMOOTH}, {_TOKENS}}}, {_END}",
    "int8 mixed": f"{_START}, {_SMOOTH}, {_STATIC}, {_TOKENS}}}, {_END}",
    "int8 careful": f"{_START}, {_SMOOTH}, {_STATIC}, {_TOKENS}, budget=sqnr(29.5)}}, {_END}",
    # The down projections hold a quarter of the products and more than half of the divergence.
    "int8 language": f"{_START}, smooth-quant{{alpha=auto}}, {_TOKENS}, exclude=*.down_proj}}, "
    f"{_END}",
    "int8 weight-only": f"{_START}, int8-linear{{mode=weight_only}}, prepack, {_LEAN}",
}
"""The lists of passes that are timed: textual, or tuples of passes."""

_GROUPS = "int8-linear{mode=weight_only, group=32, tied=true, where=always"
_ROUNDED = "int8-linear{mode=dynamic, group=32, tied=true, where=always"

WRITING: dict[str, str | tuple[Any, ...]] = {
    "fp32": f"{_START}, lower",
    "half": f"{_START}, half-linear{{weight_only=true, lossless=false}}, lower",
    "int8": f"{_START}, {_GROUPS}}}, int8-embedding, lower",
    "int4": f"{_START}, {_GROUPS}, include=lm_head}}, int8-embedding, "
    "int4-linear{scheme=affine}, lower",
    "int8 by int8": f"{_START}, {_ROUNDED}}}, int8-embedding, lower",
    "int4 by int8": f"{_START}, {_ROUNDED}, include=lm_head}}, int8-embedding, "
    "int4-linear{scheme=affine, activations=int8}, lower",
}
"""The lists of passes with which text is written."""


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
FXOPT_AUTOCAST = OURS["autocast bf16"]
FXOPT_HALF = OURS["half"]
FXOPT_HALF_LINEAR = OURS["half-linear"]
FXOPT_STATIC = OURS["int8 static"]
FXOPT_MIXED = OURS["int8 mixed"]
FXOPT_DYNAMIC = OURS["int8 dynamic"]
FXOPT_CAREFUL = OURS["int8 careful"]
FXOPT_LANGUAGE = OURS["int8 language"]
FXOPT_WEIGHT_ONLY = OURS["int8 weight-only"]
