"""Four bits in affine groups: no worse than the range of a group, and exact on a grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxopt.claim import sqnr
from fxopt.errors import KernelError
from fxopt.weights import affine
from fxopt.weights.affine import AffineWeight, affine_groups


def dense(found: AffineWeight) -> Tensor:
    """What it stands for, [N, K] in float64."""
    rows, groups = found.scale.shape
    values = found.values.view(rows, groups, -1).double() - found.zero_point.double().unsqueeze(2)
    return (values * found.scale.double().unsqueeze(2)).view(rows, -1)


def by_range(weight: Tensor, group: int) -> Tensor:
    """Each group in 15 equal steps from its least to its largest value, in float64."""
    x = weight.double().view(len(weight), -1, group)
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-300)
    return (((x - low) / scale).round() * scale + low).view(weight.shape)


@given(
    st.integers(1, 5),
    st.sampled_from([2, 16, 32, 100]),
    st.integers(1, 4),
    st.sampled_from(["normal", "uniform", "outlier", "one-sided", "equal", "zeros"]),
    st.sampled_from([1e-42, 1e-30, 1e-6, 1.0, 1e6, 1e30]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_is_no_worse_than_the_range_of_each_group(
    rows: int, group: int, groups: int, kind: str, size: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, group * groups, generator=generator)
    if kind == "uniform":
        weight = torch.rand(weight.shape, generator=generator) - 0.5
    elif kind == "outlier":
        weight[:, 0] = 30.0
    elif kind == "one-sided":
        weight = weight.abs() + 3.0
    elif kind in ("equal", "zeros"):
        weight.fill_(0.3 if kind == "equal" else 0.0)
    weight = (weight * size).to(dtype)
    found = affine_groups(weight, group)
    assert found.values.dtype == torch.int8
    assert found.values.shape == weight.shape
    assert found.scale.shape == found.zero_point.shape == (rows, groups)
    assert found.scale.dtype == found.zero_point.dtype
    assert int(found.values.min()) >= -8
    assert int(found.values.max()) <= 7
    got, exact = dense(found), weight.double()
    assert bool(got.isfinite().all())
    error, least = (
        (one - exact).view(rows, groups, group).square().sum(2)
        for one in (got, by_range(weight, group))
    )
    # float16 holds scales and zero points to 11 bits, and float32 the smallest to fewer.
    rounding = (2e-3 * exact.view(rows, groups, group)).square().sum(2)
    assert bool((error <= 1.02 * least + rounding + group * (2e-44) ** 2).all())


def test_clipping_pays() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    gained = sqnr(weight, dense(affine_groups(weight, 32))) - sqnr(weight, by_range(weight, 32))
    assert gained > 0.9


def test_a_grid_of_sixteen_comes_back() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 16, (16, 4, 32), generator=generator)
    steps[..., 0], steps[..., 1] = 0, 15
    scale = torch.rand(16, 4, 1, generator=generator).half().float()
    low = -scale * (4 + 8 * torch.rand(16, 4, 1, generator=generator))
    weight = (steps * scale + low).view(16, 128)
    found = affine_groups(weight, 32)
    assert torch.equal(found.values + 8, steps.view(16, 128).to(torch.int8))
    assert sqnr(weight, dense(found)) > 60.0


def test_a_worse_search_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affine, "_STRETCHED", (6.0,))
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert sqnr(weight, dense(affine_groups(weight, 32))) < sqnr(weight, by_range(weight, 32))


def test_what_integers_cannot_express_names_its_row() -> None:
    weight = torch.ones(4, 32)
    weight[2, 5] = float("nan")
    with pytest.raises(KernelError, match="affine_groups: output channel 2 holds NaN or infinity"):
        affine_groups(weight, 32)
