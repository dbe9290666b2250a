"""Linear layers in listings: few rows and many, whatever the storage of the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxopt.executor import Executor
from fxopt.kernels import pack_int4
from tests.executor.graphs import Built, drawn, run

ops = torch.ops.fxopt


def stored(built: Built, kind: str, weight: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """The operator of a kind of weight, and what it takes of it ahead of the bias."""
    outputs, inner = weight.shape
    storage, *groups = kind.split()
    if storage in ("int8", "int4"):
        dtype = torch.float16 if "half" in groups else torch.float32
        count = 1 if "whole" in groups else inner // 32
        each = (outputs, count, 1) if "groups" in groups else (outputs, 1)
        scale = built.constant((torch.rand(each) + 0.1).to(dtype))
        rounds = "grouped" if "rounded" in groups else "weight_only"
        if storage == "int8":
            q = (weight * 40).clamp(-127, 127).to(torch.int8)
            return getattr(ops, f"int8_{rounds}_linear").default, (built.constant(q), scale)
        packed = pack_int4((weight * 3).clamp(-8, 7).to(torch.int8))
        return getattr(ops, f"int4_{rounds}_linear").default, (built.constant(packed), scale)
    if storage == "packed":
        return ops.packed_linear.default, (built.constant(weight),)
    half = weight.to(getattr(torch, storage))
    return ops.half_weight_only_linear.default, (built.constant(half),)


KINDS = [
    "packed",
    "bfloat16",
    "float16",
    "int8",
    "int8 groups",
    "int8 groups half",
    "int4 groups",
    "int4 groups half",
    "int8 groups rounded",
    "int8 groups whole rounded",
    "int4 groups half rounded",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 40])
@pytest.mark.parametrize("affine", [False, True])
def test_few_rows_and_many(kind: str, rows: int, affine: bool) -> None:
    built = Built()
    x = built.input(drawn(1, rows, 64))
    target, weight = stored(built, kind, drawn(24, 64, seed=1))
    bias = built.constant(drawn(24, seed=2))
    more: tuple[Any, ...] = ("silu", None) if kind == "packed" else ()
    if affine:
        if not kind.startswith("int4"):
            return
        scale = weight[1].meta["val"]
        more = (built.constant(torch.randn(scale.shape).to(scale.dtype)),)
    y = built.call(target, x, *weight, bias, *more)
    z = built.call(torch.ops.aten.add.Tensor, y, 1.0)
    for found, wanted in zip(*run(built, z), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "inner", "groups", "text"),
    [
        ("int8_weight_only_linear", 24, 3, "groups of 8 columns, no multiple of 16"),
        (
            "int8_grouped_linear",
            96,
            1,
            "rounded groups of 96 columns: not 32, 64 or a multiple of 128",
        ),
    ],
)
def test_groups_that_the_kernels_lack_are_refused(
    name: str, inner: int, groups: int, text: str
) -> None:
    built = Built()
    x = built.input(drawn(1, 3, inner))
    q = built.constant((drawn(4, inner) * 9).to(torch.int8))
    scale = built.constant(torch.rand(4, groups, 1) + 0.1)
    y = built.call(getattr(ops, name).default, x, q, scale, None)
    assert text in str(Executor(built.module(y)).refusal(built.inputs))


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
