"""layer_norm in two passes against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError

ops = torch.ops.fxopt


def exact(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    return torch.nn.functional.layer_norm(wide[0], x.shape[-1:], *wide[1:], eps)  # type: ignore[arg-type]


@settings(max_examples=100)
@given(
    st.sampled_from([(), (0,), (1,), (7,), (2, 3), (2, 1, 3)]),
    st.sampled_from([1, 2, 3, 16, 33, 768]),
    st.sampled_from([0.0, 1.0, -1e4, 1e4]),
    st.sampled_from([1.0, 1e-3, 1e3]),
    st.sampled_from([1e-12, 1e-5, 1e-2]),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
)
def test_it_is_layer_norm(
    leading: tuple[int, ...],
    k: int,
    mean: float,
    spread: float,
    eps: float,
    seed: int,
    with_weight: bool,
    strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*leading, k, generator=generator) * spread + mean
    if strided:
        x = x.repeat_interleave(2, -1)[..., ::2]
    weight = torch.randn(k, generator=generator) if with_weight else None
    bias = torch.randn(k, generator=generator) if with_weight else None
    y = ops.layer_norm(x, weight, bias, eps)
    assert y.dtype == torch.float32
    # The mean is known to an ulp of the largest value, and the spread divides that.
    variance = x.double().sub(x.double().mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    slack = 4e-7 * (x.double().abs().amax(-1, keepdim=True) if x.numel() else 0.0)
    bound = slack / (variance + eps).sqrt() * 2 + 1e-5
    largest = 1.0 if weight is None else max(weight.abs().max().item(), 1.0)
    expected = exact(x, weight, bias, eps)
    reach = largest * (1.0 + (expected.abs() if x.numel() else 0.0))
    assert bool(((y.double() - expected).abs() <= bound * reach).all())


def test_it_is_as_exact_as_torch_for_a_large_mean() -> None:
    x = torch.randn(64, 768) + 1e4
    weight, bias = torch.randn(768), torch.randn(768)
    expected = exact(x, weight, bias, 1e-5)
    ours = (ops.layer_norm(x, weight, bias, 1e-5).double() - expected).abs().max()
    theirs = torch.nn.functional.layer_norm(x, (768,), weight, bias, 1e-5)
    assert ours <= 2 * (theirs.double() - expected).abs().max() + 1e-3


@pytest.mark.parametrize("value", [0.0, 3.0, -1e4])
def test_constant_rows_give_the_bias(value: float) -> None:
    bias = torch.randn(32)
    y = ops.layer_norm(torch.full((3, 32), value), torch.randn(32), bias, 1e-5)
    torch.testing.assert_close(y, bias.expand(3, 32), rtol=1e-3, atol=1e-3)


def test_it_trains() -> None:
    x = torch.randn(5, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    seed = torch.randn(5, 16)
    found = torch.autograd.grad(ops.layer_norm(x, weight, bias, 1e-5), (x, weight, bias), seed)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    y = torch.nn.functional.layer_norm(wide[0], (16,), *wide[1:], 1e-5)
    expected = torch.autograd.grad(y, wide, seed.double())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_it_passes_the_schema_checks_of_torch() -> None:
    torch.library.opcheck(
        ops.layer_norm.default, (torch.randn(3, 8), torch.randn(8), torch.randn(8), 1e-5)
    )


def test_other_dtypes_and_ranks_are_named() -> None:
    with pytest.raises(KernelError, match=r"needs float32 rows, not torch.float64 of rank 2"):
        ops.layer_norm(torch.ones(2, 3, dtype=torch.float64), None, None, 1e-5)
    with pytest.raises(KernelError, match=r"needs float32 rows, not torch.float32 of rank 0"):
        ops.layer_norm(torch.tensor(1.0), None, None, 1e-5)
    with pytest.raises(KernelError, match="a row without elements"):
        ops.layer_norm(torch.ones(2, 0), None, None, 1e-5)
