"""What listings compute is what the graph computes, for every operator that has an instruction."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from fxopt.executor.arrays import Array
from fxopt.executor.rules import RULES
from fxopt.kernels import pack_int4
from tests.executor.graphs import Built, drawn, rms_norm, run

aten, ops = torch.ops.aten, torch.ops.fxopt


@pytest.fixture(scope="module", params=[1, 3], ids=["1 thread", "3 threads"], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_close(found: list[Tensor], wanted: list[Tensor], size: float = 1e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert one.is_contiguous()
        torch.testing.assert_close(one, other.float(), rtol=size, atol=size)


UNARY: tuple[Callable[[Built, fx.Node], fx.Node], ...] = (
    *(
        lambda b, x, target=target: b.call(target, x)
        for target in (
            aten.neg.default,
            aten.tanh.default,
            aten.sigmoid.default,
            aten.silu.default,
            aten.relu.default,
            aten.cos.default,
            aten.sin.default,
            aten.clone.default,
            aten.gelu.default,
            ops.gelu.default,
        )
    ),
    lambda b, x: b.call(aten.contiguous.default, b.call(aten.transpose.int, x, 0, -1)),
    lambda b, x: b.call(aten.gelu.default, x, approximate="tanh"),
    lambda b, x: b.call(aten.exp.default, b.call(aten.clamp.default, x, -3, 2.5)),
    lambda b, x: b.call(aten.clamp.default, x, None, 0.5),
    lambda b, x: b.call(aten.sqrt.default, b.call(aten.pow.Tensor_Scalar, x, 2)),
    lambda b, x: b.call(
        aten.rsqrt.default, b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, x), 0.5)
    ),
    lambda b, x: b.call(
        aten.pow.Tensor_Scalar, b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, x), 1), -0.5
    ),
    lambda b, x: b.call(
        aten.reciprocal.default, b.call(aten.add.Tensor, b.call(aten.mul.Tensor, x, x), 1.0)
    ),
    lambda b, x: b.call(aten.pow.Tensor_Scalar, b.call(aten.tanh.default, x), 3),
    lambda b, x: b.call(aten.add.Tensor, x, x, alpha=-2),
    lambda b, x: b.call(aten.sub.Tensor, x, 1.5),
    lambda b, x: b.call(aten.div.Tensor, x, 4),
)


def axis_of(draw: st.DrawFn, value: Tensor) -> int:
    axis = draw(st.integers(0, value.dim() - 1))
    return axis if draw(st.booleans()) else axis - value.dim()


def moved(draw: st.DrawFn, built: Built, x: fx.Node) -> fx.Node:
    """Another view of x, or a part of it."""
    value = x.meta["val"]
    kind = draw(st.sampled_from(["reshape", "transpose", "permute", "slice", "select", "parts"]))
    axis = axis_of(draw, value)
    size = value.shape[axis]
    if kind == "reshape":
        sizes = draw(st.sampled_from([[-1], [1, -1, value.shape[-1]], [value.numel(), 1]]))
        if draw(st.booleans()):
            return built.call(aten.squeeze.default, built.call(aten.unsqueeze.default, x, 1))
        return built.call(aten.reshape.default, x, sizes)
    if kind == "transpose":
        return built.call(aten.transpose.int, x, axis, axis_of(draw, value))
    if kind == "permute" and draw(st.booleans()):
        return built.call(aten.movedim.int, x, axis, axis_of(draw, value))
    if kind == "permute":
        return built.call(aten.permute.default, x, draw(st.permutations(range(value.dim()))))
    if kind == "slice":
        start = draw(st.integers(-size, size - 1))
        end = draw(st.sampled_from([2**63 - 1, size]))
        return built.call(aten.slice.Tensor, x, axis, start, end, draw(st.integers(1, 2)))
    if kind == "select" and value.dim() > 1:
        return built.call(aten.select.int, x, axis, draw(st.integers(-size, size - 1)))
    target, how = draw(
        st.sampled_from([(aten.chunk.default, 2), (aten.split.Tensor, max(1, size // 2))])
    )
    parts = built.call(target, x, how, axis)
    index = draw(st.integers(0, len(parts.meta["val"]) - 1))
    return built.call(operator.getitem, parts, index)


def joined(draw: st.DrawFn, built: Built, x: fx.Node) -> fx.Node:
    """x with something else of its sizes, or broadcast to them."""
    value = x.meta["val"]
    sizes = [size if draw(st.booleans()) else 1 for size in value.shape]
    cut = draw(st.integers(0, value.dim()))
    other = built.constant(drawn(*sizes[cut:], seed=draw(st.integers(0, 99))) + 0.1)
    target = draw(
        st.sampled_from([aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.maximum.default])
    )
    if draw(st.booleans()):
        return built.call(target, x, other)
    whole = built.call(aten.expand.default, other, list(value.shape))
    return built.call(aten.cat.default, [x, whole, x], axis_of(draw, value))


def reduced(draw: st.DrawFn, built: Built, x: fx.Node) -> fx.Node:
    """A norm of rows, or a mean."""
    value = x.meta["val"]
    size = value.shape[-1]
    weight, bias = (built.constant(drawn(size, seed=seed)) for seed in (1, 2))
    kind = draw(st.sampled_from(["mean", "layer_norm", "ours", "rms"]))
    if kind == "mean":
        mean = built.call(aten.mean.dim, x, [-1], draw(st.booleans()))
        return mean if mean.meta["val"].dim() else x
    given = draw(st.sampled_from([(None, None), (weight, None), (weight, bias)]))
    if kind == "layer_norm":
        return built.call(aten.layer_norm.default, x, [size], *given, 1e-2)
    if kind == "ours":
        return built.call(ops.layer_norm.default, x, *given, 1e-2)
    return rms_norm(built, x, given[0])


def multiplied(draw: st.DrawFn, built: Built, x: fx.Node) -> fx.Node:
    """A linear layer of x, of few rows or of many."""
    inner = x.meta["val"].shape[-1]
    outputs = draw(st.sampled_from([1, 5, 16]))
    weight = drawn(outputs, inner, seed=3)
    bias = built.constant(drawn(outputs, seed=4)) if draw(st.booleans()) else None
    kind = draw(st.sampled_from(["linear", "packed", "half", "int8", "int4"]))
    if kind == "linear":
        return built.call(aten.linear.default, x, built.constant(weight), bias)
    if kind == "half":
        half = weight.to(draw(st.sampled_from([torch.bfloat16, torch.float16])))
        return built.call(ops.half_weight_only_linear.default, x, built.constant(half), bias)
    if kind == "int8":
        q = built.constant((weight * 40).clamp(-127, 127).to(torch.int8))
        scale = built.constant(torch.rand(outputs, 1) + 0.1)
        return built.call(ops.int8_weight_only_linear.default, x, q, scale, bias)
    if kind == "int4" and inner % 32 == 0:
        q = built.constant(pack_int4((weight * 3).clamp(-8, 7).to(torch.int8)))
        scale = built.constant(torch.rand(outputs, inner // 32, 1) + 0.1)
        return built.call(ops.int4_weight_only_linear.default, x, q, scale, bias)
    post_op = draw(st.sampled_from(["none", "relu", "gelu", "gelu_tanh", "silu", "add"]))
    other = None
    if post_op == "add":
        other = built.constant(drawn(*x.meta["val"].shape[:-1], outputs, seed=5))
    packed = built.constant(weight)
    return built.call(ops.packed_linear.default, x, packed, bias, post_op, other)


def looked_up(draw: st.DrawFn, built: Built, x: fx.Node) -> fx.Node:
    """Rows of x by indices, or of a table."""
    value = x.meta["val"]
    axis = draw(st.integers(0, value.dim() - 1))
    size = value.shape[axis]
    some = [draw(st.integers(-size, size - 1)) for _ in range(draw(st.integers(1, 3)))]
    indices = torch.tensor(some)
    index = built.constant(indices if draw(st.booleans()) else indices.view(-1, 1))
    return built.call(aten.index.Tensor, x, [*[None] * axis, index])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Built, list[fx.Node]]:
    """Up to eight operators on one input of three axes."""
    built = Built()
    sizes = [draw(st.sampled_from(options)) for options in ([1, 2, 9], [1, 3, 4], [1, 7, 32, 70])]
    values = [built.input(drawn(*sizes, seed=draw(st.integers(0, 9))))]
    for _ in range(draw(st.integers(1, 8))):
        x = values[draw(st.integers(0, len(values) - 1))]
        if x.meta["val"].numel() > 60_000 or not x.meta["val"].dim():
            continue
        kind = draw(st.integers(0, 5))
        if kind == 0:
            values.append(draw(st.sampled_from(UNARY))(built, x))
        else:
            values.append((moved, joined, reduced, multiplied, looked_up)[kind - 1](draw, built, x))
    chosen = [v for v in values[1:] if v.meta["val"].numel()]
    return built, chosen[-3:]


def check(graph: tuple[Built, list[fx.Node]]) -> None:
    built, outputs = graph
    copies = [built.call(aten.clone.default, one) for one in outputs]
    if copies:
        assert_close(*run(built, *copies), size=2e-3)


@settings(max_examples=300)
@given(graphs())
def test_drawn_graphs(graph: tuple[Built, list[fx.Node]]) -> None:
    check(graph)


def elsewhere(array: Array) -> Array:
    """The array an entry further on, where it has memory for that."""
    return array if array.count < 2 else replace(array, offset=array.offset + 1)


@pytest.mark.parametrize(
    "target",
    [
        aten.slice.Tensor,
        aten.transpose.int,
        aten.layer_norm.default,
        aten.index.Tensor,
        aten.cat.default,
        ops.packed_linear.default,
    ],
    ids=str,
)
def test_a_fault_in_any_rule_is_caught(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    rule = RULES[target]
    monkeypatch.setitem(RULES, target, lambda layout, node: elsewhere(rule(layout, node)))
    with pytest.raises(AssertionError):
        settings(max_examples=200)(given(graphs())(check))()


def test_wholes() -> None:
    built = Built()
    positions = built.input(torch.arange(6).view(2, 3))
    moved_on = built.call(aten.add.Tensor, positions, 2)
    twice = built.call(aten.mul.Tensor, moved_on, built.constant(torch.tensor([2])))
    back = built.call(aten.sub.Tensor, twice, positions)
    real = built.call(aten.to.dtype, back, torch.float32)
    table = built.constant(drawn(40, 5))
    rows = built.call(aten.embedding.default, table, back)
    assert_close(*run(built, real, rows), size=0.0)


def test_what_depends_on_no_input() -> None:
    built = Built()
    x = built.input(drawn(3, 5))
    slots = built.call(aten.arange.default, 4)
    later = built.call(aten.arange.start, 2, 6)
    even = built.call(aten.arange.start_step, 0, 8, 2)
    real = [built.call(aten.to.dtype, one, torch.float32) for one in (slots, later, even)]
    nothing = built.call(aten.zeros_like.default, x)
    more = built.call(aten.add.Tensor, nothing, built.call(aten.zeros.default, [3, 1]))
    assert_close(*run(built, *real, nothing, more), size=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_tables_in_half(dtype: torch.dtype) -> None:
    built = Built()
    ids = built.input(torch.tensor([[3, 0, 7]]))
    rows = built.call(aten.embedding.default, built.constant(drawn(8, 33).to(dtype)), ids)
    assert_close(*run(built, built.call(aten.to.dtype, rows, torch.float32)), size=0.0)


@pytest.mark.parametrize("groups", [1, 4])
def test_rows_of_tables_in_int8(groups: int) -> None:
    built = Built()
    ids = built.input(torch.tensor([[3, 0, 7]]))
    table = built.constant((drawn(8, 64) * 40).to(torch.int8))
    scales = built.constant(torch.rand(8, groups, 1) + 0.1)
    scales = built.call(aten.view.default, scales, [8, groups])
    q, scale = (built.call(aten.embedding.default, one, ids) for one in (table, scales))
    if groups > 1:
        scale = built.call(aten.repeat_interleave.self_int, scale, 64 // groups, -1)
    assert_close(*run(built, built.call(ops.dequantize.default, q, scale, torch.float32)), size=0.0)
