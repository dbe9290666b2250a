"""Where values lose precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.claim import Sqnr
from fxopt.program import Program

_ROUNDING = {
    torch.ops.fxopt.quantize_per_token.default,
    torch.ops.fxopt.quantize_per_token_affine.default,
    torch.ops.fxopt.quantize.default,
    torch.ops.fxopt.round_groups.default,
    torch.ops.fxopt.int8_grouped_linear.default,
    torch.ops.fxopt.int4_grouped_linear.default,
}


_HALF = {torch.bfloat16, torch.float16}
_WIDE = {torch.float32, torch.float64}


INT8_ACTIVATIONS = Sqnr(16.0)
"""What int8 activations are held to, end to end, where nobody says otherwise."""
MIXED_PRECISION = Sqnr(30.0)
"""What half precision beside float32 is held to, end to end, where nobody says otherwise."""


def rounding_claim(program: Program) -> Sqnr | None:
    """What a program may differ by where others decide its ties; None where it rounds nothing."""
    if not rounds_activations(program):
        return None
    return INT8_ACTIVATIONS if rounds_to_integers(program) else MIXED_PRECISION


def rounds_activations(program: Program) -> bool:
    """Whether the program rounds values that depend on its inputs more coarsely than they are kept:
    to integers, to half, or in half what is float32 later on."""
    return rounds_to_integers(program) or any(
        _is_cast_of_half(node) for node in program.graph.nodes
    )


def rounds_to_integers(program: Program) -> bool:
    """Whether the program quantizes values that depend on its inputs."""
    return any(node.target in _ROUNDING for node in program.graph.nodes)


def _is_cast_of_half(node: fx.Node) -> bool:
    """Between float16 or bfloat16 and a wider floating-point type, either way."""
    if node.target is not torch.ops.aten.to.dtype:
        return False
    source: Any = node.args[0]
    value = source.meta["val"]
    if not isinstance(value, Tensor):
        return False
    kinds = {value.dtype, node.args[1]}
    return bool(kinds & _HALF) and bool(kinds & _WIDE)
