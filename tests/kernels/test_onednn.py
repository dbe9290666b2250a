"""dense_linear is the linear layer of aten, whatever the shape and the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.kernels.onednn import dense_linear, has_onednn


@given(
    rows=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(0, 40), st.integers(0, 20)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    least_rows=st.integers(0, 64),
    strided=st.booleans(),
    has_bias=st.booleans(),
)
def test_equals_atens_linear(
    rows: list[int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
    least_rows: int,
    strided: bool,
    has_bias: bool,
) -> None:
    inner, outer = sizes
    step = 2 if strided else 1
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, inner * step, generator=generator, dtype=dtype)[..., ::step]
    weight = torch.randn(outer, inner * step, generator=generator, dtype=dtype)[:, ::step]
    bias = torch.randn(outer * step, generator=generator, dtype=dtype)[::step]
    given_bias = bias if has_bias else None
    found = dense_linear(x, weight, given_bias, least_rows=least_rows)
    wanted = torch.nn.functional.linear(x, weight, given_bias)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_onednn(), reason="torch was built without oneDNN")
def test_onednn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.kernels.onednn.has_onednn", lambda: False)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    assert torch.equal(dense_linear(x, weight), torch.nn.functional.linear(x, weight))
