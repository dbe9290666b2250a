"""Linears of one to eight rows with a narrow weight, read as it lies, whoever computes them."""

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
KINDS = ("int8", "int4", "bfloat16", "float16")


def stored(
    kind: str, outputs: int, inner: int, group: int, generator: torch.Generator
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A weight [N, K] as the operator of that kind takes it, and as it is in float64."""
    if kind == "int4":
        q = torch.randint(-8, 8, (outputs, inner), dtype=torch.int8, generator=generator)
        scale = torch.rand(outputs, inner // group, 1, generator=generator) + 0.01
        dense = (q.view(outputs, -1, group).double() * scale.double()).view(outputs, inner)
        return (pack_int4(q), scale), dense
    if kind == "int8":
        q = torch.randint(-128, 128, (outputs, inner), dtype=torch.int8, generator=generator)
        scale = torch.rand(outputs, 1, generator=generator) + 0.01
        return (q, scale), q.double() * scale.double()
    weight = torch.randn(outputs, inner, generator=generator).to(getattr(torch, kind))
    return (weight,), weight.double()


def linear(kind: str, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    name = kind if kind in ("int8", "int4") else "half"
    return getattr(ops, f"{name}_weight_only_linear")(x, *weight, bias)  # type: ignore[no-any-return]


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
    if kind == "int4":
        inner = group * draw(st.integers(1, 9) | st.just(47))
    else:
        inner = draw(st.integers(1, 200) | st.sampled_from([1500, 4103]))
    outputs = draw(st.integers(1, 9) | st.sampled_from([16, 63, 640]))
    shape = draw(st.sampled_from([(1,), (), (2,), (3, 1), (4,), (5,), (1, 2, 3), (7,), (8,), (9,)]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight, dense = stored(kind, outputs, inner, group, generator)
    x = torch.randn(*shape, inner, 2, generator=generator).to(dtype)
    x = x[..., 0] if draw(st.booleans()) else x[..., 0].contiguous()
    bias = torch.randn(outputs, generator=generator).to(dtype) if draw(st.booleans()) else None
    return kind, x, weight, dense, bias


@settings(max_examples=150)
@given(layers())
def test_is_the_product_with_the_weight_that_is_stored(drawn: Drawn) -> None:
    kind, x, weight, dense, bias = drawn
    assert_is_product(linear(kind, x, weight, bias), x, dense, bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["row", "column", "bias"])
def test_faults_would_be_caught(kind: str, fault: str) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, dense = stored(kind, 24, 64, 32, generator)
    x, bias = torch.randn(3, 64, generator=generator), torch.randn(24, generator=generator)
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
def test_not_a_number_stays_in_its_row(kind: str) -> None:
    weight, _ = stored(kind, 24, 64, 32, torch.Generator().manual_seed(3))
    x = torch.ones(3, 64)
    x[1, 5] = math.nan
    y = linear(kind, x, weight, None)
    assert y.isnan().any(1).tolist() == [False, True, False]
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


def test_a_bias_of_another_length_is_refused() -> None:
    weight, _ = stored("int8", 4, 8, 1, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        ops.int8_weight_only_linear(torch.ones(2, 8), *weight, torch.ones(3))
