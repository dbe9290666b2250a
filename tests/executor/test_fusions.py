"""Several nodes that are one instruction: which are, and that it computes what they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxopt.executor import Executor
from fxopt.executor.fusions import fusions_of
from tests.executor.graphs import Built, drawn

aten, ops = torch.ops.aten, torch.ops.fxopt


def assert_equal(built: Built, module: fx.GraphModule) -> None:
    executor = Executor(module)
    assert executor.refusal(built.inputs) is None, executor.refusal(built.inputs)
    found = executor(built.inputs)
    assert found is not None
    for one, other in zip(found, module(*built.inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def rotation(
    built: Built, x: fx.Node, cosine: fx.Node, sine: fx.Node, of: fx.Node, cut: int
) -> tuple[fx.Node, ...]:
    """The nodes of x cos + [-right, left] sin, where the halves are of `of`, cut at `cut`."""
    left = built.call(aten.slice.Tensor, of, 3, 0, cut)
    right = built.call(aten.slice.Tensor, of, 3, cut, 2**63 - 1)
    turned = built.call(aten.cat.default, [built.call(aten.neg.default, right), left], -1)
    straight = built.call(aten.mul.Tensor, x, cosine)
    across = built.call(aten.mul.Tensor, turned, sine)
    return built.call(aten.add.Tensor, straight, across), turned


@given(
    st.sampled_from([(1, 1), (2, 3), (3, 9)]), st.sampled_from([2, 8, 32, 70]), st.integers(1, 4)
)
def test_rotations(rows: tuple[int, int], size: int, heads: int) -> None:
    batch, length = rows
    built = Built()
    whole = built.input(drawn(batch, length, heads * size + 6))
    part = built.call(aten.slice.Tensor, whole, 2, 6, 2**63 - 1)
    split = built.call(aten.reshape.default, part, [batch, length, heads, size])
    x = built.call(aten.transpose.int, split, 1, 2)
    cosine, sine = (built.input(drawn(batch, 1, length, size, seed=seed)) for seed in (1, 2))
    root, turned = rotation(built, x, cosine, sine, x, size // 2)
    module = built.module(root)
    fused = fusions_of(module.graph)
    assert fused[root] is not None
    assert fused[turned] is None
    assert_equal(built, module)


Change = Callable[[Built], tuple[fx.Node, ...]]


def _other_source(built: Built) -> tuple[fx.Node, ...]:
    x, other = built.input(drawn(2, 1, 3, 8)), built.input(drawn(2, 1, 3, 8, seed=1))
    return rotation(built, x, x, x, other, 4)[:1]


def _uneven_halves(built: Built) -> tuple[fx.Node, ...]:
    x = built.input(drawn(2, 1, 3, 8))
    return rotation(built, x, x, x, x, 3)[:1]


def _read_elsewhere(built: Built) -> tuple[fx.Node, ...]:
    x = built.input(drawn(2, 1, 3, 8))
    return rotation(built, x, x, x, x, 4)


def _norm(built: Built, **changes: Any) -> tuple[fx.Node, ...]:
    x = built.input(drawn(3, 5))
    squares = built.call(aten.pow.Tensor_Scalar, x, changes.get("power", 2))
    mean = built.call(aten.mean.dim, squares, [-1], True)
    unit = built.call(aten.rsqrt.default, built.call(aten.add.Tensor, mean, 3.0))
    scaled = changes.get("scaled", lambda x: x)(x)
    normed = built.call(aten.mul.Tensor, scaled, unit)
    weight = built.constant(drawn(*changes.get("weight", (5,)), seed=1))
    return built.call(aten.mul.Tensor, weight, normed), *([unit] if changes.get("read") else [])


@pytest.mark.parametrize(
    "make",
    [
        _other_source,
        _uneven_halves,
        _read_elsewhere,
        lambda b: _norm(b, power=3),
        lambda b: _norm(b, read=True),
        lambda b: _norm(b, scaled=lambda x: b.call(aten.neg.default, x)),
    ],
)
def test_what_only_looks_like_one_is_left_as_it_is(make: Change) -> None:
    built = Built()
    module = built.module(*make(built))
    assert not fusions_of(module.graph)
    assert_equal(built, module)


@pytest.mark.parametrize("weight", [(5,), (1,), (3, 5)])
def test_norms(weight: tuple[int, ...]) -> None:
    built = Built()
    (root,) = _norm(built, weight=weight)
    module = built.module(root)
    fused = fusions_of(module.graph)
    assert (fused.get(root) is not None) == (weight == (5,))
    assert any(value is None for value in fused.values())
    assert_equal(built, module)


@pytest.mark.parametrize("options", [{}, {"approximate": "tanh"}])
@pytest.mark.parametrize("target", [aten.silu.default, aten.gelu.default])
def test_gates(target: Any, options: dict[str, str]) -> None:
    if target is aten.silu.default and options:
        return
    built = Built()
    x, y = built.input(drawn(2, 40)), built.input(drawn(3, 2, 40, seed=1))
    gate = built.call(target, x, **options)
    root = built.call(aten.mul.Tensor, y, gate)
    module = built.module(root)
    assert fusions_of(module.graph)[root] is not None
    assert_equal(built, module)
