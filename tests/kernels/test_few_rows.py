"""Linears with a narrow weight, of few rows that read it as it lies and of many, whoever computes
them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.errors import KernelError
from fxopt.kernels import half_linear, pack_int4

pytestmark = pytest.mark.usefixtures("decoded_by", "threads")

ops = torch.ops.fxopt
# Of the sum of the magnitudes of a result's terms.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
KINDS = ("int8", "int8 groups", "int4", "int4 affine", "bfloat16", "float16")
IN_GROUPS = ("int8 groups", "int4", "int4 affine")


def stored(
    kind: str,
    outputs: int,
    inner: int,
    group: int,
    generator: torch.Generator,
    scales: torch.dtype = torch.float32,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A weight [N, K] as the operator of that kind takes it, and as it is in float64."""
    if not kind.startswith("int"):
        weight = torch.randn(outputs, inner, generator=generator).to(getattr(torch, kind))
        return (weight,), weight.double()
    low, high = (-8, 8) if kind.startswith("int4") else (-128, 128)
    q = torch.randint(low, high, (outputs, inner), dtype=torch.int8, generator=generator)
    groups = inner // group if kind in IN_GROUPS else 1
    scale = (torch.rand(outputs, groups, 1, generator=generator) + 0.01).to(scales)
    dense = q.view(outputs, groups, -1).double()
    if kind == "int4 affine":
        zero = (16 * torch.rand(outputs, groups, 1, generator=generator) - 8).to(scales)
        dense = ((dense - zero.double()) * scale.double()).view(outputs, inner)
        return (pack_int4(q), scale, zero), dense
    dense = (dense * scale.double()).view(outputs, inner)
    return (q if kind != "int4" else pack_int4(q), scale), dense


def linear(kind: str, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    name = kind[:4] if kind.startswith("int") else "half"
    matrix, *scales = weight
    operator = getattr(ops, f"{name}_weight_only_linear")
    return operator(x, matrix, *scales[:1], bias, *scales[1:])  # type: ignore[no-any-return]


def assert_is_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    exact = nn.functional.linear(x.double(), dense, None if bias is None else bias.double())
    size = x.double().abs() @ dense.abs().t() + (0.0 if bias is None else bias.double().abs())
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.is_contiguous()
    error = (y.double() - exact).abs()
    assert bool((error <= TOLERANCE[x.dtype] * size + 1e-30).all()), (error / size).max()


Drawn = tuple[str, Tensor, tuple[Tensor, ...], Tensor, Tensor | None]


@st.composite
def layers(draw: st.DrawFn) -> Drawn:
    kind = draw(st.sampled_from(KINDS))
    group = draw(st.sampled_from([2, 16, 32, 64, 96]))
    # At 1,500 columns and more, x of several rows overflows the first cache.
    if kind in IN_GROUPS:
        inner = group * draw(st.integers(1, 9) | st.just(47))
    else:
        inner = draw(st.integers(1, 200) | st.sampled_from([1500, 4103]))
    outputs = draw(st.integers(1, 9) | st.sampled_from([16, 63, 640]))
    few = [(1,), (), (2,), (3, 1), (4,), (5,), (1, 2, 3), (7,), (8,)]
    many = [(9,), (13,), (2, 8), (17,), (3, 11), (40,), (515,)]
    shape = draw(st.sampled_from(few) | st.sampled_from(many))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scales = draw(st.sampled_from([torch.float32, torch.float16]))
    weight, dense = stored(kind, outputs, inner, group, generator, scales)
    x = torch.randn(*shape, inner, 2, generator=generator).to(dtype)
    x = x[..., 0] if draw(st.booleans()) else x[..., 0].contiguous()
    bias = torch.randn(outputs, generator=generator).to(dtype) if draw(st.booleans()) else None
    return kind, x, weight, dense, bias


@settings(max_examples=250)
@given(layers())
def test_is_the_product_with_the_weight_that_is_stored(drawn: Drawn) -> None:
    kind, x, weight, dense, bias = drawn
    assert_is_product(linear(kind, x, weight, bias), x, dense, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["row", "column", "bias"])
@pytest.mark.parametrize("rows", [3, 20])
def test_faults_would_be_caught(kind: str, fault: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, dense = stored(kind, 24, 64, 32, generator)
    x, bias = torch.randn(rows, 64, generator=generator), torch.randn(24, generator=generator)
    y = linear(kind, x, weight, bias)
    assert_is_product(y, x, dense, bias)
    wrong = {
        "row": (x, dense.roll(1, 0), bias),
        "column": (x, dense.view(24, 32, 2).flip(-1).reshape(24, 64), bias),
        "bias": (x, dense, None),
    }[fault]
    with pytest.raises(AssertionError):
        assert_is_product(y, *wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [3, 20])
def test_not_a_number_stays_in_its_row(kind: str, rows: int) -> None:
    weight, _ = stored(kind, 24, 64, 32, torch.Generator().manual_seed(3))
    x = torch.ones(rows, 64)
    x[1, 5] = math.nan
    y = linear(kind, x, weight, None)
    assert y.isnan().any(1).tolist() == [row == 1 for row in range(rows)]
    assert bool(y[1].isnan().all())


def test_a_weight_that_is_strided_or_empty() -> None:
    x, weight = torch.randn(2, 16), torch.randn(16, 6).to(torch.bfloat16).t()
    assert_is_product(ops.half_weight_only_linear(x, weight, None), x, weight.double(), None)
    assert ops.half_weight_only_linear(x[:0], weight, None).shape == (0, 6)
    assert ops.half_weight_only_linear(x, weight[:0], None).shape == (2, 0)


def test_gradients_are_those_of_the_reference() -> None:
    def run(function: Any) -> list[Tensor | None]:
        torch.manual_seed(0)
        x, bias = torch.randn(2, 3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
        weight = torch.randn(6, 16).to(torch.bfloat16).requires_grad_()
        function(x, weight, bias).square().sum().backward()
        return [x.grad, weight.grad, bias.grad]

    got = run(ops.half_weight_only_linear)
    torch.testing.assert_close(got, run(half_linear._reference), rtol=1e-2, atol=1e-2)


def test_operator_passes_the_schema_checks_of_torch() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8).to(torch.bfloat16), torch.randn(6)
    torch.library.opcheck(ops.half_weight_only_linear.default, (x, weight, bias))
    x.requires_grad_()
    torch.library.opcheck(ops.half_weight_only_linear.default, (x, weight, None))


def test_wrong_inputs_say_what_is_needed() -> None:
    weight = torch.ones(4, 6, dtype=torch.bfloat16)
    for x, wrong in ((torch.ones(2, 6), weight.float()), (torch.ones(2, 6).int(), weight)):
        with pytest.raises(KernelError, match="needs float x and a bfloat16 or float16 weight"):
            ops.half_weight_only_linear(x, wrong, None)
    with pytest.raises(KernelError, match=r"\[..., K\] and a weight \[N, K\], not \(2, 5\)"):
        ops.half_weight_only_linear(torch.ones(2, 5), weight, None)


def test_scales_that_fit_no_groups_say_what_is_needed() -> None:
    x, weight = torch.ones(2, 8), torch.ones(4, 8, dtype=torch.int8)
    with pytest.raises(KernelError, match=r"groups of its 8 columns \[N, K/g\], not \(4, 3\)"):
        ops.int8_weight_only_linear(x, weight, torch.ones(4, 3), None)
    packed, scale = pack_int4(weight), torch.ones(4, 2)
    for zero in (torch.ones(4, 1), torch.ones(4, 2).half()):
        with pytest.raises(KernelError, match="as many zero points as scales, of their dtype"):
            ops.int4_weight_only_linear(x, packed, scale, None, zero)


@pytest.mark.parametrize("kind", IN_GROUPS)
def test_a_weight_in_groups_passes_the_schema_checks_and_has_gradients(kind: str) -> None:
    weight, dense = stored(kind, 6, 64, 32, torch.Generator().manual_seed(3))
    x, bias = torch.randn(2, 64, requires_grad=True), torch.randn(6, requires_grad=True)
    matrix, *scales = weight
    operator = getattr(ops, f"{kind[:4]}_weight_only_linear")
    torch.library.opcheck(operator.default, (x, matrix, scales[0], bias, *scales[1:]))
    linear(kind, x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).float().expand(2, 64))
    torch.testing.assert_close(bias.grad, torch.full((6,), 2.0))


def test_a_bias_of_another_length_is_refused() -> None:
    weight, _ = stored("int8", 4, 8, 1, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        ops.int8_weight_only_linear(torch.ones(2, 8), *weight, torch.ones(3))
