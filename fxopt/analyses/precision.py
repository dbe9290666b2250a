"""Where values lose precision."""

from __future__ import annotations

import torch

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.program import Program

_ROUNDING = {
    torch.ops.fxopt.quantize_per_token.default,
    torch.ops.fxopt.quantize_per_token_affine.default,
    torch.ops.fxopt.quantize.default,
}


def rounds_activations(program: Program) -> bool:
    """Whether the program rounds values that depend on its inputs to integers."""
    return any(node.target in _ROUNDING for node in program.graph.nodes)
