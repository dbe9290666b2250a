import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.errors import KernelError
from fxopt.kernels import quantization, quantize_weight

ops = torch.ops.fxopt
SHAPES = [(3, 8), (1, 1), (2, 3, 5), (2, 1, 3, 7), (0, 4), (4,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@st.composite
def rows(draw):
    """Rows of hostile magnitudes: zeros, denormals, outliers, all equal, saturating."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    number = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from(
        [0.0, 1e-45, -1e-40, 1e-38, 127.0]
    )
    values = draw(st.lists(number, min_size=count * width, max_size=count * width))
    x = torch.tensor(values, dtype=torch.float32).view(count, width)
    if draw(st.booleans()):
        x[0] = x[0, 0]
    if draw(st.booleans()):
        x[-1, -1] = 1e30
    return x


@given(rows())
def test_error_is_at_most_half_a_step(x):
    q, scale = ops.quantize_per_token(x)
    assert q.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (*x.shape[:-1], 1)
    assert q.abs().int().max() <= 127
    error = (x.double() - q.double() * scale.double()).abs()
    assert (error <= scale.double() * 0.5001).all()


@given(rows())
def test_largest_magnitude_uses_the_whole_range(x):
    q, _ = ops.quantize_per_token(x)
    largest = x.abs().amax(-1)
    normal = largest > 1e-35
    assert (q.int().abs().amax(-1)[normal] == 127).all()
    assert (q[largest == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_restores_shape_and_dtype(shape, dtype):
    x = torch.randn(shape).to(dtype)
    q, scale = ops.quantize_per_token(x)
    y = ops.dequantize(q, scale, dtype)
    assert y.shape == x.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y, x, rtol=0.02, atol=0.02)


def test_zero_rows_come_back_as_exact_zeros():
    q, scale = ops.quantize_per_token(torch.zeros(2, 4))
    assert torch.equal(ops.dequantize(q, scale, torch.float32), torch.zeros(2, 4))


def test_a_row_without_elements():
    q, scale = ops.quantize_per_token(torch.zeros(3, 0))
    assert q.shape == (3, 0)
    assert scale.shape == (3, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_and_infinity_are_not_hidden(bad):
    x = torch.ones(2, 4)
    x[0, 1] = bad
    q, scale = ops.quantize_per_token(x)
    assert not scale[0].isfinite().any()
    y = ops.dequantize(q, scale, torch.float32)
    assert not y[0, 1].isfinite()
    assert y[1].isfinite().all()


def test_integers_are_refused():
    with pytest.raises(KernelError, match=r"needs a floating-point tensor, not torch.int64"):
        ops.quantize_per_token(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_is_quantized_row_by_row(dtype):
    weight = torch.randn(37, 19).to(dtype)
    q, scale = quantize_weight(weight)
    expected_q, expected_scale = ops.quantize_per_token(weight)
    assert torch.equal(q, expected_q)
    assert torch.equal(scale, expected_scale)
    assert q.is_contiguous()


def test_weight_chunks_agree_with_the_whole(monkeypatch):
    weight = torch.randn(50, 33)
    whole = quantize_weight(weight)
    monkeypatch.setattr("fxopt.kernels.quantization._CHUNK_ELEMENTS", 100)
    for chunked, expected in zip(quantize_weight(weight.t().contiguous().t()), whole, strict=True):
        assert torch.equal(chunked, expected)


def test_weight_with_nan_is_refused():
    weight = torch.ones(4, 4)
    weight[2, 1] = float("nan")
    with pytest.raises(KernelError, match="output channel 2 holds NaN or infinity"):
        quantize_weight(weight)
    with pytest.raises(KernelError, match=r"needs a float matrix, not torch.float32"):
        quantize_weight(torch.ones(3))


def test_compiles_into_fused_code_and_exports_as_one_node():
    class Model(torch.nn.Module):
        def forward(self, x):
            q, scale = ops.quantize_per_token(x)
            return ops.dequantize(q, scale, torch.float32)

    x = torch.randn(4, 8)
    compiled = torch.compile(Model(), fullgraph=True, dynamic=True)
    for size in (4, 7, 1):
        y = torch.randn(size, 8)
        torch.testing.assert_close(compiled(y), Model()(y))
    exported = torch.export.export(Model(), (x,), strict=False)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert ops.quantize_per_token.default in targets
    assert ops.dequantize.default in targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 7), (0, 4)])
def test_the_shape_rule_is_what_the_operator_gives(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    for real, rule in zip(
        torch.ops.fxopt.quantize_per_token(x), quantization.type_of_quantized(x), strict=True
    ):
        assert real.shape == rule.shape
        assert real.dtype == rule.dtype
        assert real.stride() == rule.stride()


@given(rows())
def test_affine_rows_err_by_at_most_half_a_step(x):
    q, scale, zero_point = ops.quantize_per_token_affine(x)
    assert q.dtype == zero_point.dtype == torch.int8
    assert scale.shape == zero_point.shape == (*x.shape[:-1], 1)
    y = (q.double() - zero_point.double()) * scale.double()
    # The zero point is rounded too, so the ends of the range may fall half a step outside of it.
    assert ((x.double() - y).abs() <= scale.double() * 1.001).all()
    assert (y[x == 0] == 0).all()


def test_affine_rows_of_one_sign_use_all_steps():
    x = torch.rand(3, 64)
    q, scale, zero_point = ops.quantize_per_token_affine(x)
    assert (zero_point == -128).all()
    assert (q.amax(-1) == 127).all()
    symmetric, coarse = ops.quantize_per_token(x)
    fine = (ops.dequantize(q, scale, torch.float32, zero_point) - x).square().mean()
    assert fine < (ops.dequantize(symmetric, coarse, torch.float32) - x).square().mean() / 3


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,)])
def test_affine_rows_of_odd_shapes(shape):
    q, scale, zero_point = ops.quantize_per_token_affine(torch.ones(shape))
    assert q.shape == shape
    assert scale.shape == zero_point.shape == (*shape[:-1], 1)


@given(rows(), st.sampled_from([torch.int8, torch.uint8]), st.integers(-128, 127))
def test_given_scales_round_to_the_nearest_step_and_saturate(x, dtype, zero):
    zero_point = torch.tensor(zero + 128 * (dtype == torch.uint8)).to(dtype)
    scale = torch.tensor(0.25)
    q = ops.quantize(x, scale, zero_point)
    limits = torch.iinfo(dtype)
    exact = ((x.double() / 0.25).round() + zero_point.double()).clamp(limits.min, limits.max)
    assert q.dtype == dtype
    assert torch.equal(q.double(), exact)


def test_given_scales_need_an_integer_zero_point():
    with pytest.raises(KernelError, match="int8 or uint8 zero point"):
        ops.quantize(torch.ones(2), torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(KernelError, match="floating-point"):
        ops.quantize_per_token_affine(torch.ones(2, dtype=torch.int64))
