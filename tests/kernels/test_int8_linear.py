import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.claim import sqnr
from fxopt.errors import KernelError
from fxopt.kernels import quantize_weight

pytestmark = pytest.mark.usefixtures("served_by")

ops = torch.ops.fxopt
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(5, 16), (1, 16), (0, 16), (16,), (2, 3, 17), (2, 1, 3, 7), (100, 33), (4, 1), (3, 64)]


@st.composite
def products(draw):
    rows, inner, outputs = (draw(st.sampled_from([0, 1, 2]) | st.integers(3, 70)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    low, high = draw(st.sampled_from([(-127, 128), (127, 128), (-128, -127), (0, 1)]))
    q = torch.randint(low, high, (rows, inner), dtype=torch.int8, generator=generator)
    weight = torch.randint(-128, 128, (outputs, inner), dtype=torch.int8, generator=generator)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    return (q.repeat(2, 1)[::2] if draw(st.booleans()) else q), weight


@given(products())
def test_product_is_exact(drawn):
    q, weight = drawn
    y = ops.int8_product(q, weight)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), q.long() @ weight.long().t())


def test_product_of_a_long_saturated_row_is_exact():
    q = torch.full((3, 20_001), 127, dtype=torch.int8)
    weight = torch.full((5, 20_001), -128, dtype=torch.int8)
    assert (ops.int8_product(q, weight) == -127 * 128 * 20_001).all()


@given(products(), st.integers(0, 2**31))
def test_int8_linear_takes_zero_points_out_exactly(drawn, seed):
    q, weight = drawn
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(-128, 128, (q.shape[0], 1), dtype=torch.int8, generator=generator)
    scale, ones = torch.full((q.shape[0], 1), 0.5), torch.ones(weight.shape[0], 1)
    sums = weight.sum(-1, dtype=torch.int32)
    y = ops.int8_linear(q, scale, weight, ones, None, torch.float64, zero, sums)
    assert torch.equal(y * 2, ((q.long() - zero.long()) @ weight.long().t()).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_linear_of_affine_tokens_is_the_dequantized_product(shape, dtype):
    x = (torch.randn(shape) + 1.0).to(dtype)
    weight, weight_scale = quantize_weight(torch.randn(9, shape[-1]))
    bias = torch.randn(9).to(dtype)
    q, scale, zero = ops.quantize_per_token_affine(x)
    sums = weight.sum(-1, dtype=torch.int32)
    y = ops.int8_linear(q, scale, weight, weight_scale, bias, dtype, zero, sums)
    rows = (q.double() - zero.double()) * scale.double()
    exact = rows @ (weight.double() * weight_scale.double()).t() + bias.double()
    torch.testing.assert_close(y, exact.to(dtype))


def reference(x, weight, weight_scale, bias, dtype):
    q, scale = ops.quantize_per_token(x)
    exact = (q.double() * scale.double()) @ (weight.double() * weight_scale.double()).t()
    return (exact if bias is None else exact + bias.double()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8_linear_is_the_dequantized_product(shape, dtype, with_bias):
    x = torch.randn(shape).to(dtype)
    weight, weight_scale = quantize_weight(torch.randn(9, shape[-1]))
    bias = torch.randn(9).to(dtype) if with_bias else None
    q, scale = ops.quantize_per_token(x)
    y = ops.int8_linear(q, scale, weight, weight_scale, bias, dtype)
    assert y.dtype == dtype
    expected = reference(x, weight, weight_scale, bias, dtype)
    torch.testing.assert_close(y, expected)


def test_int8_linear_hides_neither_nan_nor_infinity():
    x = torch.ones(3, 8)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    weight, weight_scale = quantize_weight(torch.randn(4, 8))
    q, scale = ops.quantize_per_token(x)
    y = ops.int8_linear(q, scale, weight, weight_scale, None, torch.float32)
    assert not y[:2].isfinite().any()
    assert y[2].isfinite().all()


def test_signal_to_noise_is_that_of_exact_arithmetic():
    x, dense = torch.randn(64, 768), torch.randn(96, 768)
    weight, weight_scale = quantize_weight(dense)
    q, scale = ops.quantize_per_token(x)
    y = ops.int8_linear(q, scale, weight, weight_scale, None, torch.float32)
    truth = x.double() @ dense.double().t()
    ideal = sqnr(truth, reference(x, weight, weight_scale, None, torch.float64))
    assert abs(sqnr(truth, y.double()) - ideal) < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_only_is_the_dequantized_linear(shape, dtype):
    x = torch.randn(shape).to(dtype)
    weight, weight_scale = quantize_weight(torch.randn(9, shape[-1]))
    for bias in (None, torch.randn(9).to(dtype)):
        y = ops.int8_weight_only_linear(x, weight, weight_scale, bias)
        dense = ops.dequantize(weight, weight_scale, dtype)
        exact = torch.nn.functional.linear(
            x.double(), dense.double(), None if bias is None else bias.double()
        )
        assert y.dtype == dtype
        tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(dtype, 1e-5)
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance)


def test_weight_only_of_a_strided_input_trains_its_input_and_bias():
    x = torch.randn(6, 4, dtype=torch.float64).t().requires_grad_()
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    weight, weight_scale = quantize_weight(torch.randn(5, 6))
    ops.int8_weight_only_linear(x, weight, weight_scale, bias).square().sum().backward()
    got = x.grad, bias.grad
    x2, bias2 = x.detach().requires_grad_(), bias.detach().requires_grad_()
    dense = ops.dequantize(weight, weight_scale, torch.float64)
    torch.nn.functional.linear(x2, dense, bias2).square().sum().backward()
    for grad, expected in zip(got, (x2.grad, bias2.grad), strict=True):
        torch.testing.assert_close(grad, expected)


def test_wrong_inputs_say_what_is_needed():
    q, weight = torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 5, dtype=torch.int8)
    with pytest.raises(KernelError, match=r"needs \[..., K\] and a weight \[N, K\], not \(2, 3\)"):
        ops.int8_product(q, weight)
    with pytest.raises(KernelError, match=r"needs int8 on both sides, not torch.float32"):
        ops.int8_product(q.float(), weight)
    with pytest.raises(KernelError, match=r"needs float x and int8 weight, not torch.int8"):
        ops.int8_weight_only_linear(q, weight, torch.ones(4), None)
    with pytest.raises(KernelError, match="one scale for each of the weight's 4 rows"):
        ops.int8_weight_only_linear(torch.ones(2, 5), weight, torch.ones(3), None)
    zero, scale = torch.zeros(2, 1, dtype=torch.int8), torch.ones(2, 1)
    with pytest.raises(KernelError, match="int8_linear takes zero_point and weight_sums together"):
        ops.int8_linear(q, scale, weight[:, :3], torch.ones(4), None, torch.float32, zero)


class Int8Model(torch.nn.Module):
    def __init__(self, weight_only):
        super().__init__()
        weight, scale = quantize_weight(torch.randn(12, 12))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", torch.randn(12))
        self.weight_only = weight_only

    def forward(self, x):
        if self.weight_only:
            y = ops.int8_weight_only_linear(x, self.weight, self.scale, self.bias)
        else:
            q, s = ops.quantize_per_token(x)
            y = ops.int8_linear(q, s, self.weight, self.scale, self.bias, torch.float32)
        return torch.nn.functional.gelu(y) + x


@pytest.mark.parametrize("weight_only", [True, False])
def test_survives_compile_export_and_state_dict(weight_only):
    model = Int8Model(weight_only).eval()
    x = torch.randn(3, 5, 12)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
        for shape in ((2, 9, 12), (1, 1, 12)):
            y = torch.randn(shape)
            torch.testing.assert_close(compiled(y), model(y))
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,), strict=False)
    module = torch.export.export(exported.module(), (x,), strict=False).module()
    torch.testing.assert_close(module(x), expected)
    other = Int8Model(weight_only).eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), expected)


def test_operators_pass_the_schema_checks_of_torch():
    weight, scale = quantize_weight(torch.randn(6, 8))
    q, s = ops.quantize_per_token(torch.randn(5, 8))
    torch.library.opcheck(ops.int8_product.default, (q, weight))
    torch.library.opcheck(ops.int8_linear.default, (q, s, weight, scale, None, torch.float32))
    more = torch.zeros(5, 1, dtype=torch.int8), weight.sum(-1, dtype=torch.int32)
    torch.library.opcheck(
        ops.int8_linear.default, (q, s, weight, scale, None, torch.float32, *more)
    )
    x = torch.randn(5, 8, requires_grad=True)
    torch.library.opcheck(ops.int8_weight_only_linear.default, (x, weight, scale, torch.randn(6)))
