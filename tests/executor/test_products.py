"""Linear layers in listings: few rows and many, whatever the storage of the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.kernels import pack_int4
from tests.executor.graphs import Built, drawn, run

ops = torch.ops.fxopt


def stored(built: Built, kind: str, weight: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a kind of weight, and what it takes of it."""
    outputs, inner = weight.shape
    if kind == "int8":
        scale = torch.rand(outputs, 1) + 0.1
        q = (weight * 40).clamp(-127, 127).to(torch.int8)
        return ops.int8_weight_only_linear.default, (built.constant(q), built.constant(scale))
    if kind == "int4":
        scale = torch.rand(outputs, inner // 32, 1) + 0.1
        q = pack_int4((weight * 3).clamp(-8, 7).to(torch.int8))
        return ops.int4_weight_only_linear.default, (built.constant(q), built.constant(scale))
    if kind == "packed":
        return ops.packed_linear.default, (built.constant(weight),)
    half = weight.to(getattr(torch, kind))
    return ops.half_weight_only_linear.default, (built.constant(half),)


@pytest.mark.parametrize("kind", ["packed", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
def test_few_rows_and_many(kind: str, rows: int) -> None:
    built = Built()
    x = built.input(drawn(1, rows, 64))
    target, weight = stored(built, kind, drawn(24, 64, seed=1))
    bias = built.constant(drawn(24, seed=2))
    more = ("silu", None) if kind == "packed" else ()
    y = built.call(target, x, *weight, bias, *more)
    z = built.call(torch.ops.aten.add.Tensor, y, 1.0)
    for found, wanted in zip(*run(built, z), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_results_of_operators_are_kept_while_they_are_read() -> None:
    built = Built()
    x = built.input(drawn(20, 16))
    values = [x]
    for seed in range(6):
        weight = built.constant(drawn(16, 16, seed=seed) / 4)
        values.append(built.call(ops.packed_linear.default, values[-1], weight, None, "none", None))
    total = values[1]
    for value in values[2:]:
        total = built.call(torch.ops.aten.add.Tensor, total, value)
    for found, wanted in zip(*run(built, total), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
