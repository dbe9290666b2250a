"""written_attention against softmax attention in float64, and the exponential in it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.written_attention import _exponential

ops = torch.ops.fxopt
HALF = torch.bfloat16
UNIT = 2.0**-8
MASKS = ["none", "bool", "keys", "float", "infinite", "causal", "causal and float"]


def exact(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """softmax(s q kᵀ + bias) v in float64; 0 where all is hidden."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ wide_k.transpose(-1, -2) * scale
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if bias is not None:
        scores = scores + bias.double()
    return scores.softmax(-1).nan_to_num(0.0) @ wide_v


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    is_causal: bool
    scale: float

    @property
    def args(self) -> tuple[object, ...]:
        return tuple(vars(self).values())

    @property
    def bound(self) -> float:
        """How far the result may be from the exact one; the sums of products are in float32."""
        group = self.q.shape[1] // self.k.shape[1]
        keys = self.k.double().repeat_interleave(group, 1)
        largest = (self.q.double() @ keys.transpose(-1, -2)).abs().max().item() * self.scale
        weights = math.expm1(largest * UNIT / 2) + 0.004 + UNIT
        rounding = 3 * UNIT + 3e-6 * self.k.shape[2]
        return (2 * weights + rounding) * self.v.double().abs().max().item()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, groups = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 3]))
    queries, keys = (draw(st.sampled_from([1, 2, 7, 33])) for _ in range(2))
    size = draw(st.sampled_from([1, 8, 16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q = normal(batch, heads, queries, size)
    k, v = normal(batch, groups, keys, size), normal(batch, groups, keys, size)
    scale = size**-0.5
    if draw(st.booleans()):  # integers, whose products are exact: scores up to 80 and beyond
        q, k, scale = q.sign(), k.sign(), draw(st.sampled_from([10.0, 80.0]))
        assert size <= 256
    kind = draw(st.sampled_from(MASKS))
    shape = (batch, 1, 1 if kind == "keys" else queries, keys)
    visible = torch.rand(shape, generator=generator) < 0.6
    masks = {
        "bool": visible,
        "keys": visible,
        "float": normal(*shape) * 3,
        "causal and float": normal(*shape),
        "infinite": normal(*shape).masked_fill(~visible, -math.inf),
    }
    mask = masks.get(kind)
    bias = None if mask is None else ops.attention_bias(mask)
    return Case(q.to(HALF), k.to(HALF), v.to(HALF), bias, "causal" in kind, scale)


@settings(max_examples=150)
@given(cases())
def test_it_is_attention_within_the_rounding_of_bfloat16(case: Case) -> None:
    y = ops.written_attention(*case.args)
    assert (y.dtype, y.shape) == (HALF, (*case.q.shape[:3], case.v.shape[3]))
    expected = exact(case.q, case.k, case.v, case.bias, case.is_causal, case.scale)
    bound = case.bound
    if torch.equal(case.q.abs(), torch.ones_like(case.q)):
        bound = (2 * (0.004 + UNIT) + 3 * UNIT + 3e-6 * case.k.shape[2]) * float(case.v.abs().max())
    assert float((y.double() - expected).abs().max()) <= bound


@given(cases())
def test_a_query_that_may_see_nothing_gives_zeros(case: Case) -> None:
    hidden = torch.zeros(case.q.shape[0], 1, case.q.shape[2], case.k.shape[2], dtype=torch.bool)
    hidden[:, :, 1:] = True
    y = ops.written_attention(case.q, case.k, case.v, ops.attention_bias(hidden), False, case.scale)
    assert bool((y[:, :, 0] == 0).all())
    assert bool(y.isfinite().all())
    seen = exact(case.q, case.k, case.v, None, False, case.scale)[:, :, 1:]
    assert y[:, :, 1:].numel() == 0 or float((y[:, :, 1:] - seen).abs().max()) <= case.bound


def test_the_typical_error_is_that_of_bfloat16() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 64, 32).to(HALF) for _ in range(3))
    y = ops.written_attention(q, k, v, None, False, 32**-0.5).double()
    expected = exact(q, k, v, None, False, 32**-0.5)
    assert float((y - expected).norm() / expected.norm()) < 0.006


def test_the_exponential_keeps_its_bounds() -> None:
    x = torch.linspace(-12.0, 0.0, 100_001)
    relative = (_exponential(x).double() / x.double().exp() - 1).abs()
    assert float(relative.max()) < 0.0042
    x = torch.linspace(-200.0, 0.0, 100_001)
    assert float((_exponential(x).double() - x.double().exp()).abs().max()) < 2e-3
    far = x[x < -12.0]
    assert float((_exponential(far).double() - far.double().exp()).abs().max()) < 3e-6
    ends = _exponential(torch.tensor([0.0, -math.inf, torch.finfo(torch.float32).min, -99.3]))
    assert ends.tolist() == [1.0, 0.0, 0.0, 0.0]


@given(st.floats(-64.0, 0.0, width=32), st.floats(-64.0, 0.0, width=32))
def test_the_exponential_never_falls(one: float, other: float) -> None:
    low, high = _exponential(torch.tensor(sorted((one, other))))
    assert 0.0 <= low <= high * (1 + 1e-5)


def test_the_bias_of_a_mask() -> None:
    mask = torch.tensor([True, False])
    assert ops.attention_bias(mask).tolist() == [0.0, -math.inf]
    floats = torch.tensor([1.5, -math.inf], dtype=HALF)
    bias = ops.attention_bias(floats)
    assert (bias.dtype, bias.tolist()) == (torch.float32, [1.5, -math.inf])
    same = torch.tensor([1.0])
    assert ops.attention_bias(same).data_ptr() != same.data_ptr()


def test_the_operators_pass_the_schema_checks_of_torch() -> None:
    q, k = torch.randn(2, 4, 5, 8).to(HALF), torch.randn(2, 2, 7, 8).to(HALF)
    bias = torch.zeros(2, 1, 5, 7)
    torch.library.opcheck(ops.written_attention.default, (q, k, k, bias, False, 0.3))
    torch.library.opcheck(ops.attention_bias.default, (torch.rand(3, 4) < 0.5,))
    torch.library.opcheck(ops.attention_bias.default, (torch.rand(3, 4),))


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        bias = ops.attention_bias(mask)
        return ops.written_attention(q, k, k.sin(), bias, False, 0.25)  # type: ignore[no-any-return]


def test_survives_compile_and_export() -> None:
    torch.compiler.reset()
    module = Attention()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (9, 16):
        q, k = (torch.randn(2, 3, length, 16).to(HALF) for _ in range(2))
        mask = torch.rand(2, 1, 1, length) < 0.5
        expected = module(q, k, mask)
        torch.testing.assert_close(compiled(q, k, mask), expected, rtol=2e-2, atol=2e-2)
    exported = torch.export.export(module, (q, k, mask), strict=False)
    torch.testing.assert_close(exported.module()(q, k, mask), expected)


def test_another_rank_is_named() -> None:
    flat = torch.ones(3, 4)
    with pytest.raises(KernelError, match=r"of rank 4 \[batch, heads, length, size\], not \(3, 4"):
        ops.written_attention(flat, flat, flat, None, False, 1.0)
