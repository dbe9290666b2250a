"""The rational GELU is GELU, everywhere, and trains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import KernelError

gelu = torch.ops.fxopt.gelu


def exact(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x.double()).float()


def test_the_whole_line() -> None:
    x = torch.linspace(-30, 30, 1_000_001)
    assert (gelu(x) - exact(x)).abs().max() < 1.5e-6
    far = torch.tensor([-1e30, -1e3, -6.0, 6.0, 1e3, 1e30, 0.0, 1e-40])
    torch.testing.assert_close(gelu(far), exact(far), rtol=1e-6, atol=1e-8)
    assert gelu(torch.tensor([float("nan")])).isnan().all()


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40))
def test_is_gelu(values: list[float]) -> None:
    x = torch.tensor(values)
    torch.testing.assert_close(gelu(x), exact(x), rtol=2e-6, atol=1.5e-6)


def test_trains() -> None:
    x = torch.linspace(-7, 7, 501).requires_grad_()
    (ours,) = torch.autograd.grad(gelu(x).sum(), x)
    (theirs,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_compiles_as_one_graph_and_takes_odd_shapes() -> None:
    compiled = torch.compile(lambda x: gelu(x), fullgraph=True)
    for x in (torch.randn(3, 5), torch.randn(4, 6).t(), torch.randn(0, 3), torch.randn(())):
        torch.testing.assert_close(compiled(x), exact(x), rtol=1e-5, atol=2e-6)


def test_other_dtypes_are_a_clear_error() -> None:
    with pytest.raises(KernelError, match=r"gelu needs float32, not torch\.float64; aten\.gelu"):
        gelu(torch.randn(3, dtype=torch.float64))
