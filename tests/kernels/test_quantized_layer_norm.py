"""quantized_layer_norm: the norm against float64, its codes against those of the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("served_by")

ops = torch.ops.fxopt


@st.composite
def norms(draw: st.DrawFn) -> tuple[Any, ...]:
    shape = (*draw(st.sampled_from([(), (1,), (3,), (2, 5), (300,)])), draw(st.integers(1, 70)))
    torch.manual_seed(draw(st.integers(0, 2**31)))

    def perhaps(*sizes: int) -> Tensor | None:
        return torch.randn(*sizes) if draw(st.booleans()) else None

    x = torch.randn(shape) * draw(st.sampled_from([0.0, 1.0, 50.0])) + 1.0
    columns = [perhaps(shape[-1]) for _ in range(4)]
    eps = draw(st.sampled_from([1e-12, 1e-5]))
    kind = draw(st.sampled_from([None, None, torch.uint8, torch.int8]))
    given = (torch.tensor(0.02), torch.tensor(5, dtype=kind)) if kind else (None, None)
    affine = kind is None and draw(st.booleans())
    return (x, perhaps(*shape), *columns[:2], eps, *columns[2:], *given, affine)


@given(norms())
def test_a_quantized_norm_is_the_norm_and_its_codes(drawn: tuple[Any, ...]) -> None:
    x, other, weight, bias, eps, factor, shift, given_scale, given_zero, affine = drawn
    q, scale, zero_point, y = ops.quantized_layer_norm(*drawn)
    exact = (x if other is None else x + other).double()
    wide = [None if t is None else t.double() for t in (weight, bias)]
    expected = nn.functional.layer_norm(exact, x.shape[-1:], *wide, eps)
    if float(exact.var(-1, unbiased=False).min()) > 1e-3:
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    # The codes are those of the norm that came out beside them, but for the last bit.
    rounded = y if factor is None else y * factor
    rounded = rounded if shift is None else rounded - shift
    if given_scale is not None:
        codes = ops.quantize(rounded, given_scale, given_zero)
        assert scale.shape == zero_point.shape == (0,)
    else:
        codes, scales, zeros = ops.quantize_tokens(rounded, None, None, affine)
        torch.testing.assert_close(scale, scales, rtol=1e-5, atol=1e-30)
        assert zero_point.shape == zeros.shape
    assert q.dtype == codes.dtype
    assert int((q.int() - codes.int()).abs().max()) <= 1


@pytest.mark.parametrize("kind", ["tokens", "codes"])
def test_a_quantized_norm_passes_the_schema_checks_of_torch(kind: str) -> None:
    x, w = torch.randn(2, 3, 8), torch.ones(8)
    codes = (None, None, True)
    if kind == "codes":
        codes = (torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8), False)  # type: ignore[assignment]
    torch.library.opcheck(
        ops.quantized_layer_norm.default, (x, x.clone(), w, w, 1e-5, None, None, *codes)
    )
