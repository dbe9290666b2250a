"""Where values lose precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.program import Program

_ROUNDING = {
    torch.ops.fxopt.quantize_per_token.default,
    torch.ops.fxopt.quantize_per_token_affine.default,
    torch.ops.fxopt.quantize.default,
}


_HALF = (torch.bfloat16, torch.float16)


def rounds_activations(program: Program) -> bool:
    """Whether the program rounds values that depend on its inputs: to integers, or to half."""
    return any(node.target in _ROUNDING or _is_cast_to_half(node) for node in program.graph.nodes)


def _is_cast_to_half(node: fx.Node) -> bool:
    if node.target is not torch.ops.aten.to.dtype or node.args[1] not in _HALF:
        return False
    source: Any = node.args[0]
    value = source.meta["val"]
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
