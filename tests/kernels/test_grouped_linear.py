"""Linears whose input is rounded in the groups of their weight, whoever computes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels import grouped_linear, pack_int4
from tests.kernels.test_few_rows import assert_is_product, stored

pytestmark = pytest.mark.usefixtures("decoded_by", "threads")

ops = torch.ops.fxopt
KINDS = ("int8 groups", "int4", "int4 affine")


def linear(kind: str, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    matrix, scale, *zero = weight
    operator = getattr(ops, f"{kind[:4]}_grouped_linear")
    return operator(x, matrix, scale, bias, *zero)  # type: ignore[no-any-return]


def rounded(x: Tensor, group: int) -> Tensor:
    """By the definition, in float32, so that no second rounding blurs it."""
    rows = x.float().unflatten(-1, (-1, group))
    q, scale = ops.quantize_per_token(rows)
    return (q.double() * scale.double()).flatten(-2)


Drawn = tuple[str, int, Tensor, tuple[Tensor, ...], Tensor, Tensor | None]


@st.composite
def layers(draw: st.DrawFn) -> Drawn:
    kind = draw(st.sampled_from(KINDS))
    # The last two are no groups of the compiled kernels.
    group = draw(st.sampled_from([32, 64, 128, 256, 384, 16, 96]))
    inner = group * draw(st.integers(1, 9) | st.just(47 if group < 64 else 5))
    outputs = draw(st.integers(1, 9) | st.sampled_from([16, 63, 640]))
    few = [(1,), (), (2,), (3, 1), (4,), (5,), (1, 2, 3), (7,), (8,)]
    shape = draw(st.sampled_from(few) | st.sampled_from([(9,), (2, 8), (17,), (3, 11), (515,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = draw(st.sampled_from([torch.float32, torch.float16]))
    weight, dense = stored(kind, outputs, inner, group, generator, scales)
    x = torch.randn(*shape, inner, 2, generator=generator)
    x = (x * draw(st.sampled_from([1.0, 1e-2]))).to(dtype)
    x = x[..., 0] if draw(st.booleans()) else x[..., 0].contiguous()
    if draw(st.booleans()):
        # Groups of zeros have a scale all the same.
        x = x * (torch.rand(inner // group, generator=generator) < 0.5).repeat_interleave(group)
    bias = torch.randn(outputs, generator=generator).to(dtype) if draw(st.booleans()) else None
    return kind, group, x, weight, dense, bias


@settings(max_examples=250)
@given(layers())
def test_is_the_product_of_what_is_rounded(drawn: Drawn) -> None:
    kind, group, x, weight, dense, bias = drawn
    y = linear(kind, x, weight, bias)
    # The definition rounds to x's dtype before the product, the kernels don't.
    assert_is_product(y, rounded(x, group).to(x.dtype), dense, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 20])
def test_rounding_is_that_of_the_definition_and_no_finer(kind: str, rows: int) -> None:
    weight, dense = stored(kind, 24, 128, 32, torch.Generator().manual_seed(3))
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(4))
    y = linear(kind, x, weight, None)
    assert_is_product(y, rounded(x, 32).float(), dense, None)
    for wrong in (x, rounded(x, 64).float(), rounded(x.roll(1, -1), 32).roll(-1, -1).float()):
        with pytest.raises(AssertionError):
            assert_is_product(y, wrong, dense, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 128])
def test_the_largest_values_are_exact(kind: str, group: int) -> None:
    """Products of bytes that are all as large as they get: sums of 16 bits would saturate."""
    low, high = (-128, 127) if kind.startswith("int8") else (-8, 7)
    q = torch.full((8, 256), high, dtype=torch.int8)
    q[1], q[2, ::2], q[3, 1::2] = low, low, low
    scale = torch.ones(8, 256 // group, 1)
    zero = (torch.full_like(scale, -7.5),) if kind == "int4 affine" else ()
    matrix = q if kind.startswith("int8") else pack_int4(q)
    dense = q.double() - (zero[0].double().mean() if zero else 0.0)
    x = torch.full((4, 256), 127.0)
    x[1], x[2, ::2], x[3, ::4] = -127.0, -127.0, -127.0
    y = linear(kind, x, (matrix, scale, *zero), None)
    assert torch.equal(y.double(), x.double() @ dense.t())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(kind: str, rows: int, value: float) -> None:
    weight, _ = stored(kind, 24, 64, 32, torch.Generator().manual_seed(3))
    x = torch.ones(rows, 64)
    x[1, 5] = value
    y = linear(kind, x, weight, None)
    assert y.isfinite().all(1).tolist() == [row != 1 for row in range(rows)]
    assert not bool(y[1].isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_not_finite_stays_in_its_row_of_the_weight(kind: str) -> None:
    weight, _ = stored(kind, 24, 160, 32, torch.Generator().manual_seed(3))
    weight[1][7, 0] = math.nan
    y = linear(kind, torch.randn(2, 160), weight, None)
    assert y.isnan().any(0).tolist() == [column == 7 for column in range(24)]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_the_schema_checks_and_gives_no_gradient_but_the_bias(kind: str) -> None:
    weight, _ = stored(kind, 6, 64, 32, torch.Generator().manual_seed(3))
    x, bias = torch.randn(2, 64, requires_grad=True), torch.randn(6, requires_grad=True)
    matrix, scale, *zero = weight
    operator: Any = getattr(ops, f"{kind[:4]}_grouped_linear").default
    torch.library.opcheck(operator, (x.detach(), matrix, scale, bias.detach(), *zero))
    linear(kind, x, weight, bias).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(bias.grad, torch.full((6,), 2.0))


def test_rounded_groups_are_the_definition() -> None:
    x = torch.randn(3, 2, 96)
    torch.testing.assert_close(ops.round_groups(x, 32), rounded(x, 32).float())
    assert not bool(
        ops.round_groups(torch.tensor([[math.nan, 1.0, 2.0, 3.0]]), 2)[0, :2].isfinite().any()
    )
    found = grouped_linear.type_of_rounded(x, 32)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    x.requires_grad_()
    assert not ops.round_groups(x, 32).requires_grad


def test_wrong_inputs_say_what_is_needed() -> None:
    for x, group in ((torch.ones(2, 6), 4), (torch.ones(2, 6).int(), 3), (torch.ones(()), 1)):
        with pytest.raises(KernelError, match=r"floating-point tensor \[..., K\] and a group that"):
            ops.round_groups(x, group)
    int8 = torch.ones(4, 64, dtype=torch.int8)
    with pytest.raises(KernelError, match="int8_grouped_linear needs float x and int8 weight"):
        ops.int8_grouped_linear(torch.ones(2, 64).int(), int8, torch.ones(4, 2), None)
    with pytest.raises(KernelError, match=r"equal groups of its 64 columns .* not \(4, 3\)"):
        ops.int8_grouped_linear(torch.ones(2, 64), int8, torch.ones(4, 3), None)
    scale = torch.ones(4, 2)
    with pytest.raises(KernelError, match="int4_grouped_linear needs as many zero points"):
        ops.int4_grouped_linear(torch.ones(2, 64), pack_int4(int8), scale, None, scale.half())
