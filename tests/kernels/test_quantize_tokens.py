"""quantize_tokens against the operators that it stands for, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError

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
