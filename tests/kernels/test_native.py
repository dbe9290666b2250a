"""The compiled kernels where they are cut into tiles, panels, blocks and threads."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.device import Device, pretending
from fxopt.kernels import PACKED_WEIGHTS, native
from fxopt.kernels.native import building
from fxopt.kernels.native.kernel_sets import PRODUCTS
from fxopt.kernels.packed_linear import activate
from fxopt.timing import Latency, summarize, timings_in

ops = torch.ops.fxopt
pytestmark = pytest.mark.usefixtures("compiled_kernels", "threads")

# Of the largest magnitude of a result: float32's sums, and one rounding to bfloat16 besides.
ERROR = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
POST_OPS = ("none", "relu", "gelu", "gelu_tanh", "silu", "add")


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, slack: float = 0.0) -> None:
    assert got.dtype == dtype
    assert got.shape == expected.shape
    largest = expected.abs().max().clamp_min(1e-30)
    assert float((got.double() - expected).abs().max() / largest) <= ERROR[dtype] + slack


@st.composite
def linears(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, str, Tensor]:
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 170))
    dtype = draw(st.sampled_from(list(ERROR)))
    inner = draw(st.integers(1, 70)) * (2 if dtype == torch.bfloat16 else 1)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner) / math.sqrt(inner)
    bias = torch.randn(columns).to(dtype) if draw(st.booleans()) else None
    other = torch.randn(rows, columns).to(dtype)
    return x.to(dtype), weight.to(dtype), bias, draw(st.sampled_from(POST_OPS)), other


@settings(max_examples=150)
@given(linears())
def test_a_linear_is_right_in_every_tile(
    drawn: tuple[Tensor, Tensor, Tensor | None, str, Tensor],
) -> None:
    x, weight, bias, post_op, other = drawn
    got = ops.packed_linear(x, weight, bias, post_op, other if post_op == "add" else None)
    exact_bias = None if bias is None else bias.double()
    exact = torch.nn.functional.linear(x.double(), weight.double(), exact_bias)
    assert_close(got, activate(exact, post_op, other.double()), x.dtype)


@settings(max_examples=60)
@given(st.integers(1, 40), st.integers(1, 170), st.integers(1, 70), st.integers(0, 2**31))
def test_an_int8_product_is_exact_in_every_tile(n: int, m: int, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = {"dtype": torch.int8, "generator": generator}
    q = torch.randint(-128, 128, (n, 4 * steps), **shape)  # type: ignore[call-overload]
    weight = torch.randint(-128, 128, (m, 4 * steps), **shape)  # type: ignore[call-overload]
    assert torch.equal(ops.int8_product(q, weight).long(), q.long() @ weight.long().t())


@st.composite
def attentions(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Keys over several blocks of 384, grouped heads, every kind of mask."""
    dtype = draw(st.sampled_from(list(ERROR)))
    batch, groups, each = (draw(st.integers(1, 2)) for _ in range(3))
    queries = draw(st.integers(1, 150))
    keys = draw(st.sampled_from([1, 47, 48, 49, 383, 384, 385, 900]) | st.integers(1, 100))
    size, value_size = 2 * draw(st.integers(1, 33)), draw(st.integers(1, 70))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(batch, queries, groups * each, size).transpose(1, 2)
    k = torch.randn(batch, keys, groups, size).transpose(1, 2)
    v = torch.randn(batch, groups, keys, value_size)
    spread = draw(st.sampled_from([1.0, 30.0]))
    mask, causal = _mask(draw, batch, groups * each, queries, keys)
    return (q * spread).to(dtype), k.to(dtype), v.to(dtype), mask, causal


def _mask(
    draw: st.DrawFn, batch: int, heads: int, queries: int, keys: int
) -> tuple[Tensor | None, bool]:
    kind = draw(st.sampled_from(["none", "causal", "keys", "heads", "floats", "strided", "rank 2"]))
    seen = torch.rand(batch, heads, queries, keys) < 0.5
    return {
        "none": (None, False),
        "causal": (None, True),
        "keys": (seen[:, :1, :1], False),
        "heads": (seen, False),
        "floats": (
            torch.randn(batch, 1, queries, keys).masked_fill(~seen[:, :1], -math.inf),
            False,
        ),
        "strided": (seen.transpose(-1, -2).contiguous().transpose(-1, -2), False),
        "rank 2": (seen[0, 0], False),
    }[kind]


@settings(max_examples=150)
@given(attentions())
def test_attention_is_right_in_every_block(
    drawn: tuple[Tensor, Tensor, Tensor, Tensor | None, bool],
) -> None:
    check_attention(*drawn)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("keys", [385, 900])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_grow_from_block_to_block(dtype: torch.dtype, keys: int, causal: bool) -> None:
    torch.manual_seed(keys)
    q, k, v = (torch.randn(2, 3, keys, 16) for _ in range(3))
    k = k * torch.linspace(0.1, 3.0, keys)[:, None]
    check_attention(q.to(dtype), k.to(dtype), v.to(dtype), None, causal)


def check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> None:
    scale = q.shape[-1] ** -0.5
    got = ops.attention(q, k, v, mask, causal, scale)
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), exact_mask, 0.0, causal, scale=scale, enable_gqa=True
    )
    # A query that may see no key.
    expected = expected.nan_to_num(nan=0.0)
    # What float32 rounds off a score, the exponential makes a share of a weight.
    scores = q.double().abs().amax() * k.double().abs().sum(-1).amax() * scale
    assert_close(got, expected, q.dtype, float(scores) * 2**-24)


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("at", [0, 5, 500])
def test_not_a_number_and_infinity_reach_the_result(dtype: torch.dtype, at: int) -> None:
    for bad in (math.nan, math.inf):
        q, k, v = torch.ones(1, 1, 9, 16), torch.ones(1, 1, 600, 16), torch.ones(1, 1, 600, 16)
        k[0, 0, at, 0] = bad
        y = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), None, False, 1.0)
        assert bool(y.isnan().all())
        x = torch.ones(3, 16)
        x[1, 0] = bad
        z = ops.packed_linear(x.to(dtype), torch.ones(50, 16, dtype=dtype), None, "none", None)
        assert not bool(z[1].isfinite().any())
        assert bool((z[0] == 16).all())


def test_a_weight_is_laid_out_once_and_again_when_it_changes() -> None:
    PACKED_WEIGHTS.clear()
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    for _ in range(2):
        ops.packed_linear(x, weight, None, "none", None)
        ops.packed_linear(x, weight.detach(), None, "none", None)
    assert len(PACKED_WEIGHTS) == 1
    weight.data[0, 0] += 1.0
    y = ops.packed_linear(x, weight, None, "none", None)
    torch.testing.assert_close(y, x @ weight.t())
    PACKED_WEIGHTS.clear()
    torch.testing.assert_close(ops.packed_linear(x, weight, None, "none", None), x @ weight.t())
    assert len(PACKED_WEIGHTS) == 1


def test_libraries_run_everything_when_switched_off() -> None:
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    with native.without():
        assert native.load().reason == "the kernels for this CPU are switched off"
        PACKED_WEIGHTS.clear()
        torch.testing.assert_close(ops.packed_linear(x, weight, None, "none", None), x @ weight.t())
    assert native.load()
    torch.testing.assert_close(ops.packed_linear(x, weight, None, "none", None), x @ weight.t())


def test_what_the_machine_lacks_is_said() -> None:
    with pretending(Device("cpu", "Old", frozenset())):
        answer = native.load()
    assert not answer
    assert answer.reason.startswith("Old lacks avx512f, avx512bw")


def test_a_cpu_with_matrix_units_is_left_to_onednn() -> None:
    has = frozenset({*PRODUCTS.needed, "amx_bf16", "amx_int8"})
    with pretending(Device("cpu", "New", has)):
        answer = native.load()
    assert not answer
    assert answer.reason == "New has amx_bf16, amx_int8, which oneDNN multiplies by"


def test_slower_than_libraries_they_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_slower", building._slower.__wrapped__)

    def clock(key: Hashable, systems: Mapping[str, object]) -> dict[str, Latency]:
        return {name: summarize([1.0 if name == "libraries" else 1.5] * 9) for name in systems}

    with timings_in(None, clock):
        answer = native.load()
    assert not answer
    assert answer.reason.startswith("libraries are faster here than the kernels compiled for this")
    assert "compiled 1.50x" in answer.reason
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    torch.testing.assert_close(ops.packed_linear(x, weight, None, "none", None), x @ weight.t())
    monkeypatch.undo()
    assert native.load()


@pytest.mark.parametrize("failure", ["missing", "broken"])
def test_a_compiler_that_is_missing_or_fails_is_said(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    def fail(source: str) -> None:
        raise InvalidCxxCompiler if failure == "missing" else CppCompileError(["g++"], "no header")

    monkeypatch.setattr(building, "build", fail)
    kernels, answer = building._compile(PRODUCTS, Device.describe("cpu"))
    assert kernels is None
    expected = {
        "missing": "no C++ compiler was found to build the kernels for this CPU",
        "broken": "the kernels for this CPU could not be built: ",
    }[failure]
    assert answer.reason.startswith(expected)
