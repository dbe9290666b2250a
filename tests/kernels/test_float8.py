"""float8 kernels: bounds of the rounding, hostile rows, and the product against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.claim import sqnr
from fxopt.errors import KernelError
from fxopt.kernels import float8
from fxopt.kernels.float8 import FLOAT8, quantize_weight_float8

ops = torch.ops.fxopt
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 16), (1, 16), (0, 16), (16,), (2, 3, 17), (2, 1, 3, 7), (100, 33), (4, 1), (3, 0)]


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """Rows of hostile magnitudes: zeros, denormals, outliers, all equal, saturating."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    number = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from(
        [0.0, 1e-45, -1e-40, 1e-38, 448.0, 464.0, -500.0]
    )
    values = draw(st.lists(number, min_size=count * width, max_size=count * width))
    x = torch.tensor(values, dtype=torch.float32).view(count, width)
    if draw(st.booleans()):
        x[0] = x[0, 0]
    return x


@given(rows())
def test_the_relative_error_is_at_most_a_sixteenth(x: Tensor) -> None:
    q, scale = ops.quantize_float8(x)
    assert q.dtype == FLOAT8
    assert scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], 1)
    step = scale.double() * 2.0**-9
    error = (x.double() - q.double() * scale.double()).abs()
    # Below 2^-6 of the scale numbers are subnormal: their error is half a step, not relative.
    bound = (x.double().abs() * 2.0**-4).maximum(step / 2)
    assert (error <= bound * 1.0001).all()


@given(rows())
def test_the_largest_magnitude_uses_the_whole_range(x: Tensor) -> None:
    q, _ = ops.quantize_float8(x)
    largest = x.abs().amax(-1)
    assert (q.float().abs().amax(-1)[largest > 1e-35] == 448).all()
    assert (q.float()[largest == 0] == 0).all()
    assert q.float().isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_restores_shape_dtype_and_numbers(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    q, scale = ops.quantize_float8(x)
    y = ops.dequantize(q, scale, dtype)
    assert y.dtype == dtype
    torch.testing.assert_close(y, x, rtol=2**-4 + 0.01, atol=1e-4)
    for real, typed in zip((q, scale), float8.type_of_quantized_float8(x), strict=True):
        assert (real.shape, real.dtype) == (typed.shape, typed.dtype)


def test_nan_and_infinity_are_not_hidden() -> None:
    x = torch.ones(4, 8)
    x[0, 0], x[1, 0], x[2, 0] = float("nan"), float("inf"), -float("inf")
    q, scale = ops.quantize_float8(x)
    assert not ops.dequantize(q, scale, torch.float32)[:3].isfinite().any()
    weight, weight_scale = quantize_weight_float8(torch.randn(5, 8))
    y = ops.float8_linear(q, scale, weight, weight_scale, None, torch.float32)
    assert not y[:3].isfinite().any()
    assert y[3].isfinite().all()


def test_a_weight_is_rounded_as_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.kernels.quantization._CHUNK_ELEMENTS", 40)
    weight = torch.randn(9, 16)
    values, scale = quantize_weight_float8(weight.t().contiguous().t())
    rounded, scales = ops.quantize_float8(weight)
    assert torch.equal(values.view(torch.uint8), rounded.view(torch.uint8))
    assert torch.equal(scale, scales)
    assert values.is_contiguous()


def _drawn(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, scale = ops.quantize_float8(torch.randn(shape).to(dtype))
    weight, weight_scale = quantize_weight_float8(torch.randn(outputs, shape[-1]))
    return q, scale, weight, weight_scale, torch.randn(outputs).to(dtype)


def _truth(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    dense = ops.dequantize(weight, weight_scale, torch.float64)
    x = ops.dequantize(q, scale, torch.float64)
    return nn.functional.linear(x, dense, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_float8_linear_is_the_dequantized_linear(
    shape: tuple[int, ...], dtype: torch.dtype, with_bias: bool
) -> None:
    *operands, bias = _drawn(shape, 9, dtype)
    some = bias if with_bias else None
    y = ops.float8_linear(*operands, some, dtype)
    torch.testing.assert_close(y, _truth(*operands, some).to(dtype), rtol=None, atol=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 16), 16), ((2, 3, 17), 9), ((40, 64), 30522)])
def test_what_cuda_runs_agrees_with_the_definition(
    shape: tuple[int, ...], outputs: int, dtype: torch.dtype
) -> None:
    # torch._scaled_mm runs on the CPU too; padding, scales and slices are those of CUDA.
    *operands, bias = _drawn(shape, outputs, dtype)
    y = float8._by_scaled_mm(*operands, bias, dtype)
    assert y.is_contiguous()
    assert sqnr(_truth(*operands, bias), y.double()) > {
        torch.float32: 120.0, torch.float16: 65.0, torch.bfloat16: 45.0
    }[dtype]  # fmt: skip


def test_it_survives_torch_compile_and_fake_tensors() -> None:
    *operands, bias = _drawn((2, 3, 16), 9, torch.float32)
    arguments = (*operands, bias.requires_grad_(), torch.float32)
    # The check of the schema multiplies its arguments, which float8 tensors don't do.
    checks = ("test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.float8_linear.default, arguments, test_utils=checks)
    compiled = torch.compile(ops.float8_linear, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ops.float8_linear(*arguments))


def test_its_bias_trains() -> None:
    *operands, bias = _drawn((2, 3, 16), 9, torch.float32)
    bias.requires_grad_()
    (ops.float8_linear(*operands, bias, torch.float32) * 2).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((9,), 12.0))


def test_signal_to_noise_of_a_product() -> None:
    x, dense = torch.randn(64, 768), torch.randn(96, 768)
    q, scale = ops.quantize_float8(x)
    y = ops.float8_linear(q, scale, *quantize_weight_float8(dense), None, torch.float32)
    # Each side errs by 2^-4 / sqrt(3) of a number at most: some 31 dB, and both some 28.
    assert 27 < sqnr(x.double() @ dense.double().t(), y.double()) < 31


def _eights(*shape: int) -> Tensor:
    return torch.zeros(shape).to(FLOAT8)


@pytest.mark.parametrize(
    ("q", "scale", "weight", "message"),
    [
        (
            torch.zeros(2, 8),
            torch.ones(2, 1),
            _eights(4, 8),
            "float8_linear needs float8_e4m3fn on both sides, not torch.float32, "
            "torch.float8_e4m3fn",
        ),
        (
            _eights(2, 8),
            torch.ones(2, 1),
            _eights(4, 7),
            "float8_linear needs [..., K] and a weight [N, K], not (2, 8) and (4, 7)",
        ),
        (
            _eights(2, 8),
            torch.ones(2),
            _eights(4, 8),
            "float8_linear needs a scale for each row of (2, 8) and of (4, 8), not (2,) and (4, 1)",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(
    q: Tensor, scale: Tensor, weight: Tensor, message: str
) -> None:
    with pytest.raises(KernelError) as caught:
        ops.float8_linear(q, scale, weight, torch.ones(4, 1), None, torch.float32)
    assert str(caught.value) == message


def test_what_cannot_be_quantized_is_an_error() -> None:
    with pytest.raises(KernelError, match=r"needs a floating-point tensor, not torch\.int64"):
        ops.quantize_float8(torch.ones(3, dtype=torch.int64))
    with pytest.raises(KernelError, match=r"needs a float matrix, not torch\.float32 of \(3,\)"):
        quantize_weight_float8(torch.ones(3))
    weight = torch.ones(4, 8)
    weight[2, 3] = float("inf")
    with pytest.raises(KernelError, match="output channel 2 holds NaN or infinity; leave this"):
        quantize_weight_float8(weight)
