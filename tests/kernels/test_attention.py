"""fxopt::attention: aten's attention, whichever library computes it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.errors import KernelError
from fxopt.kernels import attention as kernel
from fxopt.kernels import native

pytestmark = pytest.mark.usefixtures("served_by")

attention = torch.ops.fxopt.attention
quantized_attention = torch.ops.fxopt.quantized_attention
sdpa = nn.functional.scaled_dot_product_attention
MASKS = [
    "none",
    "keys",
    "strided_keys",
    "queries",
    "float_keys",
    "float_queries",
    "causal",
    "rank2",
]
BY_QUERY = ("queries", "float_queries", "causal", "rank2")


@pytest.fixture(autouse=True)
def by_convolution(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the convolutions wherever they fit, however small, on any CPU; counts their runs."""
    runs: list[int] = []
    products = kernel._products

    def counted(*args: Tensor) -> Tensor:
        runs.append(1)
        return products(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "_pays", lambda q, k: torch.backends.mkldnn.is_available())
    monkeypatch.setattr(kernel, "_products", counted)
    return runs


def mask_of(kind: str, batch: int, queries: int, keys: int) -> Tensor | None:
    lengths = torch.randint(1, keys + 1, (batch, 1, 1, 1))
    by_key = torch.arange(keys) < lengths
    by_query = torch.rand(batch, 1, queries, keys) < 0.7
    by_query[..., 0] = True
    return {
        "keys": by_key,
        "strided_keys": by_key.expand(batch, 1, queries, keys).contiguous(),
        "queries": by_query,
        "float_keys": torch.zeros(by_key.shape).masked_fill(~by_key, torch.finfo().min),
        "float_queries": torch.randn(1, 1, queries, keys).masked_fill(~by_query[:1], -math.inf),
        "rank2": by_query[0, 0],
    }.get(kind)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> None:
    got = attention(q, k, v, mask, causal, scale)
    floating = mask is not None and mask.is_floating_point()
    exact = mask.double() if floating and mask is not None else mask
    expected = sdpa(q.double(), k.double(), v.double(), exact, 0.0, causal, scale=scale)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert got.dtype == q.dtype
    assert got.transpose(1, 2).is_contiguous()


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float]:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    size, values = (16 * draw(st.integers(1, 3)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((queries, size), (keys, size), (keys, values))
    if draw(st.booleans()):
        q, k, v = (torch.randn(batch, n, heads, d).transpose(1, 2) for n, d in shapes)
    else:
        q, k, v = (torch.randn(heads, batch, d, n).permute(1, 0, 3, 2) for n, d in shapes)
    kind = draw(st.sampled_from(MASKS))
    scale = draw(st.sampled_from([size**-0.5, 1.0, -0.3]))
    return q, k, v, mask_of(kind, batch, queries, keys), kind == "causal", scale


@given(drawn())
def test_is_attention(drawn: tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float]) -> None:
    check(*drawn)


@given(drawn(), st.booleans(), st.booleans())
def test_quantized_attention_is_the_quantized_result(
    drawn: tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float], half: bool, signed: bool
) -> None:
    q, k, v = (t.to(torch.bfloat16) if half else t for t in drawn[:3])
    scale = torch.tensor(0.013)
    zero_point = (
        torch.tensor(-5, dtype=torch.int8) if signed else torch.tensor(9, dtype=torch.uint8)
    )
    got = quantized_attention(q, k, v, *drawn[3:], scale, zero_point)
    expected = torch.ops.fxopt.quantize(attention(q, k, v, *drawn[3:]), scale, zero_point)
    assert torch.equal(got, expected)
    assert got.dtype == zero_point.dtype
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("scores", [1, 3 * 20 * 20, 2 * 4 * 20 * 20], ids=["1", "3", "8"])
def test_rows_and_heads_may_go_in_parts(
    kind: str,
    scores: int,
    monkeypatch: pytest.MonkeyPatch,
    by_convolution: list[int],
    served_by: str,
) -> None:
    monkeypatch.setattr(kernel, "_SCORES_BYTES", 4 * scores)
    q, k, v = (torch.randn(3, 4, 20, 16) for _ in range(3))
    check(q, k, v, mask_of(kind, 3, 20, 20), kind == "causal", 0.25)
    # A mask that depends on the query is left to aten, which is as fast there.
    whole = kind in BY_QUERY or served_by == "native"
    assert len(by_convolution) == (0 if whole else {1: 12, 1200: 6, 3200: 2}[scores])


def test_a_mask_that_hides_all_keys_gives_what_aten_gives(by_convolution: list[int]) -> None:
    q, k, v = (torch.randn(2, 2, 16, 16) for _ in range(3))
    for hidden in (torch.zeros(2, 1, 1, 16), torch.rand(2, 1, 16, 16).round()):
        visible = hidden.bool()
        visible[1] = False
        for mask in (visible, torch.zeros(visible.shape).masked_fill(~visible, -math.inf)):
            got = attention(q, k, v, mask, False, 0.25)
            expected = sdpa(q, k, v, mask, scale=0.25)
            torch.testing.assert_close(got, expected, equal_nan=True)
    assert not by_convolution


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_what_does_not_fit_is_left_to_aten(dtype: torch.dtype, by_convolution: list[int]) -> None:
    size = 10 if dtype == torch.float32 else 16
    q, k, v = (torch.randn(2, 4, 5, size).to(dtype) for _ in range(3))
    torch.testing.assert_close(attention(q, k, v, None, False, 0.5), sdpa(q, k, v, scale=0.5))
    grouped = sdpa(q, k[:, :2], v[:, :2], scale=0.5, enable_gqa=True)
    got = attention(q, k[:, :2], v[:, :2], None, False, 0.5)
    torch.testing.assert_close(got, grouped)
    assert attention(q[:0], k[:0], v[:0], None, False, 0.5).shape == (0, 4, 5, size)
    assert attention(q[:, :, :0], k, v, None, False, 0.5).shape == (2, 4, 0, size)
    assert not by_convolution


def test_a_wrong_scale_would_be_caught() -> None:
    q, k, v = (torch.randn(2, 2, 16, 16) for _ in range(3))
    products = kernel._products
    with native.without(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_products", lambda q, k, v, b, s: products(q, k, v, b, s * 1.01))
        with pytest.raises(AssertionError, match="not close"):
            check(q, k, v, None, False, 0.5)


@pytest.mark.parametrize("kind", ["none", "queries", "float_queries", "causal"])
def test_gradients_are_those_of_aten(kind: str) -> None:
    causal, mask = kind == "causal", mask_of(kind, 2, 9, 9)
    learned = mask is not None and mask.is_floating_point()

    def run(function: object) -> list[Tensor | None]:
        torch.manual_seed(0)
        leaves = [torch.randn(2, 2, 9, 16, requires_grad=True) for _ in range(3)]
        added = mask.clone().requires_grad_() if learned and mask is not None else mask
        function(*leaves, added, causal).square().sum().backward()  # type: ignore[operator]
        return [leaf.grad for leaf in leaves] + (
            [added.grad] if learned and added is not None else []
        )

    got = run(lambda q, k, v, m, c: attention(q, k, v, m, c, 0.25))
    expected = run(lambda q, k, v, m, c: sdpa(q, k, v, m, 0.0, c, scale=0.25))
    compiled = torch.compile(lambda q, k, v, m, c: attention(q, k, v, m, c, 0.25), fullgraph=True)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(compiled), expected, rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def forward(self, qkv: Tensor, mask: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind()
        y = attention(q, k, v, mask[:, None, None, :], False, 0.25)
        return y.transpose(1, 2).flatten(2)


def test_survives_compile_and_export_with_any_length() -> None:
    model = Attention()
    qkv, mask = torch.randn(3, 24, 96), torch.arange(24).expand(3, 24) < 20
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch, length in ((3, 24), (2, 17), (1, 5)):
        inputs = (qkv[:batch, :length], mask[:batch, :length])
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (qkv, mask), dynamic_shapes=(sizes, sizes), strict=False)
    module = exported.module()
    torch.testing.assert_close(module(qkv, mask), model(qkv, mask))
    torch.testing.assert_close(module(qkv[:2, :9], mask[:2, :9]), model(qkv[:2, :9], mask[:2, :9]))


def test_operator_passes_the_schema_checks_of_torch() -> None:
    q, k, v = (torch.randn(2, 2, 8, 16, requires_grad=True) for _ in range(3))
    torch.library.opcheck(attention.default, (q, k, v, None, True, 0.25))
    codes = torch.tensor(0.1), torch.tensor(3, dtype=torch.uint8)
    inputs = (q.detach(), k.detach(), v.detach(), None, True, 0.25)
    torch.library.opcheck(quantized_attention.default, (*inputs, *codes))


def test_wrong_ranks_say_what_is_needed() -> None:
    with pytest.raises(KernelError, match=r"rank 4 \[batch, heads, length, size\], not \(2, 3\)"):
        attention(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), None, False, 1.0)
