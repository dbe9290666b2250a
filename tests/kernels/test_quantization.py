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
