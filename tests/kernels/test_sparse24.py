"""2:4 sparse weights: the pattern, its compressed form, and the product against its definition."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from fxopt.device import Device, pretending
from fxopt.errors import KernelError
from fxopt.kernels import PACKED_WEIGHTS, sparse24
from fxopt.kernels.sparse24 import (
    compress24,
    cutlass_metadata,
    decompress24,
    is_sparse24,
    refuse_sparse24,
    two_of_four,
)

linear_sparse24 = torch.ops.fxopt.linear_sparse24
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
_NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5]) | st.floats(-9, 9, width=32)

needs_sparse_cores = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not Device.describe("cuda").sparse24(), reason=Device.describe("cuda").sparse24().reason
    ),
]


@st.composite
def weights(draw: st.DrawFn, multiple: int = 8) -> Tensor:
    """A matrix with ties and zeros, in any dtype, laid out by rows or by columns."""
    rows, columns = draw(st.integers(1, 5)), multiple * draw(st.integers(1, 4))
    size = rows * columns
    numbers = draw(st.lists(_NUMBERS, min_size=size, max_size=size))
    weight = torch.tensor(numbers).view(rows, columns).to(draw(st.sampled_from(DTYPES)))
    return weight.t().contiguous().t() if draw(st.booleans()) else weight


def sparse(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(*shape)
    return (weight * two_of_four(weight.abs())).to(dtype)


@given(weights(multiple=4))
def test_two_of_four_are_kept_and_they_are_the_best(weight: Tensor) -> None:
    kept = two_of_four(weight.abs())
    for four, mask in zip(weight.abs().reshape(-1, 4), kept.reshape(-1, 4), strict=True):
        best = sorted(range(4), key=lambda at: (-float(four[at]), at))[:2]
        assert [at for at in range(4) if mask[at]] == sorted(best)


def test_a_tie_goes_by_the_second_score_and_then_to_the_lower_column() -> None:
    score, tie = torch.tensor([[1.0, 1.0, 1.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert two_of_four(score).tolist() == [[True, False, False, True]]
    assert two_of_four(score, tie).tolist() == [[False, True, False, True]]


def test_every_pattern_of_zeros_is_judged_and_kept() -> None:
    for zeros in itertools.product([0.0, 1.0], repeat=8):
        weight = torch.tensor([zeros]) * torch.arange(1.0, 9.0)
        fits = sum(zeros[:4]) <= 2 and sum(zeros[4:]) <= 2
        assert is_sparse24(weight) == fits
        if fits:
            assert torch.equal(decompress24(*compress24(weight)), weight)


@given(weights())
def test_decompressing_gives_back_what_was_compressed(weight: Tensor) -> None:
    masked = weight * two_of_four(weight.abs().float())
    values, places = compress24(masked)
    (rows, columns), dtype = weight.shape, weight.dtype
    assert (values.shape, values.dtype) == ((rows, columns // 2), dtype)
    assert (places.shape, places.dtype) == ((rows, columns // 8), torch.uint8)
    assert torch.equal(decompress24(values, places), masked)
    again = compress24(decompress24(values, places))
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], places)


def test_large_weights_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sparse(9, 16)
    whole = compress24(weight)
    monkeypatch.setattr(sparse24, "_CHUNK_ELEMENTS", 40)
    for part, one in zip(compress24(weight), whole, strict=True):
        assert torch.equal(part, one)
    assert is_sparse24(weight)
    weight[8, :4] = 1.0
    assert not is_sparse24(weight)


def test_nan_and_infinity_are_kept() -> None:
    weight = sparse(2, 8)
    weight[0, :4] = torch.tensor([0.0, float("nan"), 0.0, float("inf")])
    dense = decompress24(*compress24(weight))
    assert torch.equal(dense.isnan(), weight.isnan())
    assert dense[0, 3] == float("inf")


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (64, 768)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cutlass_reads_the_same_weight(rows: int, columns: int, dtype: torch.dtype) -> None:
    # torch's own conversion runs on the CPU too. Without a zero more there is one way to write it.
    weight = (torch.randn(rows, columns).sign() * (1 + torch.rand(rows, columns))).to(dtype)
    weight *= two_of_four(torch.rand(rows, columns))
    values, places = compress24(weight)
    packed, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(values, packed)
    assert torch.equal(cutlass_metadata(places), metadata)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 16), (16,), (0, 16), (2, 3, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_dense_weight(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    weight, x = sparse(7, 16, dtype=dtype), torch.randn(shape).to(dtype)
    b = torch.randn(7).to(dtype) if bias else None
    y = linear_sparse24(x, *compress24(weight), b)
    assert torch.equal(y, nn.functional.linear(x, weight, b))


def test_it_survives_torch_compile_and_fake_tensors() -> None:
    values, places = compress24(sparse(6, 16))
    x, bias = torch.randn(2, 3, 16, requires_grad=True), torch.randn(6, requires_grad=True)
    arguments = (x, values.requires_grad_(), places, bias)
    torch.library.opcheck(linear_sparse24.default, arguments)
    compiled = torch.compile(linear_sparse24, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), linear_sparse24(*arguments))


def test_gradients_are_those_of_the_dense_linear_at_what_is_kept() -> None:
    weight = sparse(6, 16, dtype=torch.float64).requires_grad_()
    values, places = compress24(weight)
    leaves = [torch.randn(4, 16, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]
    x, bias = (leaf.requires_grad_() for leaf in leaves)
    ours = torch.autograd.grad(
        linear_sparse24(x, values.requires_grad_(), places, bias).square().sum(), (x, values, bias)
    )
    dx, dense, db = torch.autograd.grad(
        nn.functional.linear(x, weight, bias).square().sum(), (x, weight, bias)
    )
    torch.testing.assert_close(ours[0], dx)
    torch.testing.assert_close(decompress24(ours[1], places), dense * (weight != 0))
    torch.testing.assert_close(ours[2], db)


@pytest.mark.parametrize(
    ("values", "places", "text"),
    [
        (
            torch.zeros(4, 4).half(),
            torch.zeros(4, 1, dtype=torch.uint8),
            "linear_sparse24 needs x and values of one float dtype and uint8 places, not "
            "torch.float32, torch.float16, torch.uint8",
        ),
        (
            torch.zeros(4, 4),
            torch.zeros(4, 2, dtype=torch.uint8),
            "linear_sparse24 needs x [..., K], values [N, K/2] and places [N, K/8], not (2, 8), "
            "(4, 4) and (4, 2)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(values: Tensor, places: Tensor, text: str) -> None:
    with pytest.raises(KernelError) as caught:
        linear_sparse24(torch.zeros(2, 8), values, places, None)
    assert str(caught.value) == text


def test_what_cannot_be_compressed_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"K a multiple of 8, not torch\.float32 of \(2, 12\)"):
        compress24(torch.zeros(2, 12))
    weight = sparse(4, 8)
    weight[2, :3] = 1.0
    with pytest.raises(KernelError, match="row 2 holds four neighbours of which more than two"):
        compress24(weight)


def test_a_weight_without_rows_or_columns_is_compressed_to_nothing() -> None:
    for shape in ((0, 16), (3, 0)):
        values, places = compress24(torch.zeros(shape))
        assert decompress24(values, places).shape == shape


def _answer(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], library: bool) -> Any:
    """What a GPU of this capability says of a weight [rows, columns] of `dtype`."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: library)

    def refuse(rows: int = 64, columns: int = 128, dtype: torch.dtype = torch.float16) -> Any:
        with pretending(Device("cuda", "GPU", capability=capability)):
            return refuse_sparse24(rows, columns, dtype, torch.device("cpu"))

    return refuse


def test_why_sparse_tensor_cores_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = _answer(monkeypatch, (9, 0), library=True)
    assert refuse() is None
    assert refuse(dtype=torch.bfloat16) is None
    assert refuse(dtype=torch.float32) == (
        "its weight is torch.float32: torch multiplies 2:4 in float16 and bfloat16, so put "
        "HalfLinear() after the mask"
    )
    assert refuse(rows=48) == (
        "its weight of 48 x 128 is no multiple of 32 x 64, which sparse tensor cores take"
    )
    assert _answer(monkeypatch, (8, 6), library=False)() is None
    text = _answer(monkeypatch, (9, 0), library=False)()
    assert (
        "is built without cuSPARSELt, and its CUTLASS kernels run on capability 8.x alone" in text
    )
    text = _answer(monkeypatch, (7, 5), library=True)()
    assert text == "GPU has no sparse tensor cores: capability 7.5, needs 8.0"


@pytest.mark.parametrize("library", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (16, 64)])
def test_what_cuda_is_given_is_what_it_wants(
    monkeypatch: pytest.MonkeyPatch, library: str, bias: bool, shape: tuple[int, ...]
) -> None:
    # The libraries are stood in for; padding, layouts and the copies kept are those of CUDA.
    weight, x = sparse(32, 64, dtype=torch.float16), torch.randn(shape).half()
    b = torch.randn(32).half() if bias else None
    refuse = _answer(monkeypatch, (8, 0), library == "cusparselt")
    assert refuse(32, 64) is None

    def product(dense: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
        assert columns.shape[1] % 8 == 0
        assert columns.t().is_contiguous()
        y = dense.float() @ columns.float()
        return (y if bias is None else y + bias.float()[:, None]).half()

    def by_cslt(packed: Tensor, columns: Tensor, bias: Any, transpose_result: bool) -> Tensor:
        assert transpose_result
        return product(packed, columns, bias).t().contiguous()

    def by_cutlass(values: Tensor, metadata: Tensor, columns: Tensor) -> Tensor:
        assert torch.equal(metadata, sparse_semi_structured_from_dense_cutlass(weight)[1])
        return product(weight, columns)

    monkeypatch.setattr(torch, "_cslt_compress", lambda dense: dense)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", by_cslt)
    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", by_cutlass)
    monkeypatch.setattr(
        torch,
        "_sparse_semi_structured_addmm",
        lambda bias, *rest: by_cutlass(*rest) + bias[:, None],
    )
    PACKED_WEIGHTS.clear()
    with pretending(Device("cuda", "GPU", capability=(8, 0))):
        y = sparse24._on_cuda(x, *compress24(weight), b)
    assert y.is_contiguous()
    torch.testing.assert_close(y, nn.functional.linear(x, weight, b), rtol=1e-2, atol=1e-2)
    PACKED_WEIGHTS.clear()


class TestOnGpu:
    pytestmark = needs_sparse_cores

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(1, 64), (3, 5, 128), (300, 1024), (17, 48)])
    def test_the_product_agrees_with_its_definition(
        self, shape: tuple[int, ...], bias: bool, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        weight, x = sparse(96, shape[-1], dtype=dtype), torch.randn(shape).to(dtype)
        b = torch.randn(96).to(dtype) if bias else None
        operands = (x, *compress24(weight), b)
        there = [None if one is None else one.cuda() for one in operands]
        for _ in range(2):  # the second call finds the packed copy
            y = linear_sparse24(*there).cpu().double()
        truth = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
        limit = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype] * truth.abs().max().item()
        torch.testing.assert_close(y, truth, rtol=0, atol=limit)

    def test_a_weight_that_was_written_is_packed_anew(self) -> None:
        values, places = (part.cuda() for part in compress24(sparse(64, 64, dtype=torch.float16)))
        x = torch.randn(16, 64, device="cuda", dtype=torch.float16)
        before = linear_sparse24(x, values, places, None)
        values.mul_(2)
        after = linear_sparse24(x, values, places, None)
        torch.testing.assert_close(after, before * 2, rtol=1e-2, atol=1e-2)

    def test_it_survives_torch_compile(self) -> None:
        values, places = (part.cuda() for part in compress24(sparse(64, 64, dtype=torch.float16)))
        x = torch.randn(16, 64, device="cuda", dtype=torch.float16)
        layer = torch.compile(lambda x: linear_sparse24(x, values, places, None) * 2)
        truth = linear_sparse24(x, values, places, None) * 2
        torch.testing.assert_close(layer(x), truth, rtol=1e-2, atol=1e-2)
