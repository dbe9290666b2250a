"""quantize_tokens against the operators that it stands for, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.int8_linear_fused import EPILOGUES

pytestmark = pytest.mark.usefixtures("served_by")

ops = torch.ops.fxopt


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, Tensor | None]:
    leading = draw(st.sampled_from([(), (1,), (3,), (2, 5), (0,)]))
    size = draw(st.integers(0, 70))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(*leading, size) * draw(st.sampled_from([0.0, 1e-42, 1e-3, 50.0, 1e38]))
    x = x + draw(st.sampled_from([0.0, 7.0, -7.0]))
    if draw(st.booleans()):
        x = x.repeat_interleave(2, -1)[..., ::2]
    if x.numel() and draw(st.booleans()):
        x[..., 0] = draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    if dtype == torch.bfloat16:
        return x.to(dtype), None, None
    factor, shift = (torch.randn(size) if draw(st.booleans()) else None for _ in range(2))
    return x, factor, shift


@given(rows(), st.booleans())
def test_it_is_the_quantized_result(
    drawn: tuple[Tensor, Tensor | None, Tensor | None], affine: bool
) -> None:
    x, factor, shift = drawn
    q, scale, zero_point = ops.quantize_tokens(x, factor, shift, affine)
    y = x if factor is None else x * factor
    y = y if shift is None else y - shift
    if affine:
        expected = ops.quantize_per_token_affine(y)
    else:
        expected = (*ops.quantize_per_token(y), torch.empty(0, dtype=torch.int8))
    assert q.dtype == torch.uint8
    q = (q.to(torch.int16) - 128).to(torch.int8)
    assert [t.shape for t in (q, scale, zero_point)] == [t.shape for t in expected]
    assert [t.dtype for t in (q, scale, zero_point)] == [t.dtype for t in expected]
    # What a row that isn't finite is rounded to doesn't matter, nor does 1e-38 with a flush to 0.
    finite = expected[1].isfinite()
    assert torch.equal(scale.isfinite(), finite)
    assert torch.equal(scale[finite], expected[1][finite])
    kept = finite.expand(q.shape)
    assert torch.equal(q[kept], expected[0][kept])
    if affine:
        assert torch.equal(zero_point[finite], expected[2][finite])


@st.composite
def products(draw: st.DrawFn) -> tuple[object, ...]:
    """The arguments of int8_linear_fused, but for the dtype and the post-operation."""
    leading = draw(st.sampled_from([(), (1,), (77,), (2, 5), (0,)]))
    k, n = draw(st.sampled_from([1, 4, 33, 64])), draw(st.sampled_from([1, 16, 50, 96]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randint(-128, 128, (*leading, k), dtype=torch.int8)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale = torch.rand(*leading, 1) + 0.5
    zero_point = torch.randint(-128, 128, (*leading, 1), dtype=torch.int8)
    given_zero = zero_point if draw(st.booleans()) else None
    bias = torch.randn(n) if draw(st.booleans()) else None
    spread = (torch.rand(n, 1) + 0.5) * draw(st.sampled_from([1e-1, 1e-4, 1e-20]))
    return q, scale, given_zero, weight, spread, None, bias


@given(products(), st.sampled_from(sorted(EPILOGUES)), st.booleans())
def test_rows_of_a_linear_are_its_rows_to_half_a_step(
    arguments: tuple[object, ...], post_op: str, affine: bool
) -> None:
    y = ops.int8_linear_fused(*arguments, torch.float32, post_op)
    expected = ops.quantize_tokens(y, None, None, affine)
    q, scale, zero_point = ops.int8_linear_fused_tokens(*arguments, post_op, affine)
    for got, wanted in zip((q, scale, zero_point), expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    # Functions that are curved are taken to 16 bits where 8 come out.
    torch.testing.assert_close(scale, expected[1], rtol=1e-4, atol=1e-38)
    zero = zero_point.float() if affine else 0.0
    meant = (q.float() - 128.0 - zero) * scale
    # A zero point is whole: the ends of a row may be cut by half a step besides.
    assert bool(((meant - y).abs() <= ((1.0 if affine else 0.5) + 0.01) * scale).all())


def test_a_column_too_many_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="size of tensor"):
        ops.quantize_tokens(torch.ones(2, 3), torch.ones(4), None, False)


def test_integers_are_an_error() -> None:
    message = "quantize_tokens needs a floating-point tensor, not torch.int64"
    with pytest.raises(KernelError, match=message):
        ops.quantize_tokens(torch.ones(2, 3, dtype=torch.int64), None, None, False)


@pytest.mark.parametrize("affine", [False, True])
def test_the_operator_passes_the_schema_checks_of_torch(affine: bool) -> None:
    x = torch.randn(2, 3, 8)
    for constants in ((None, None), (torch.ones(8), torch.ones(8))):
        torch.library.opcheck(ops.quantize_tokens.default, (x, *constants, affine))


@pytest.mark.parametrize("affine", [False, True])
def test_the_operator_of_a_linear_passes_the_schema_checks_of_torch(affine: bool) -> None:
    q, weight = torch.ones(2, 8, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8)
    inputs = (q, torch.ones(2, 1), None, weight, torch.ones(16, 1), None, None)
    torch.library.opcheck(ops.int8_linear_fused_tokens.default, (*inputs, "gelu", affine))
