"""The fused int8 layer as an operator: its definition, its fake, its gradient, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.errors import KernelError
from fxopt.kernels import quantize_weight
from fxopt.kernels.int8_linear_fused import EPILOGUES, row_sums

pytestmark = pytest.mark.usefixtures("served_by")

ops = torch.ops.fxopt
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
}


def _int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def _call(**changed: Any) -> Tensor:
    torch.manual_seed(0)
    named = {
        "q": _int8(2, 3, 8),
        "scale": torch.rand(2, 3, 1) / 100,
        "zero_point": _int8(2, 3, 1),
        "weight": _int8(5, 8),
        "weight_scale": torch.rand(5, 1) / 100,
        "weight_sums": None,
        "bias": torch.randn(5),
        "dtype": torch.float32,
        "post_op": "gelu",
    }
    result: Tensor = ops.int8_linear_fused(**{**named, **changed})
    return result


# Around the most weights whose sum two numbers of 16 bits hold.
@pytest.mark.parametrize("inner", [32764, 32768])
@pytest.mark.parametrize("filled", [-128, 127])
@pytest.mark.parametrize("zero", [-128, 127])
def test_the_longest_rows_are_exact(inner: int, filled: int, zero: int) -> None:
    q = torch.full((1, inner), 126 if zero > 0 else -126, dtype=torch.int8)
    weight = torch.full((1, inner), filled, dtype=torch.int8)
    one, zero_point = torch.ones(1, 1), torch.full((1, 1), zero, dtype=torch.int8)
    y = ops.int8_linear_fused(q, one, zero_point, weight, one, None, None, torch.float32, "none")
    expected = (q.long() - zero) @ weight.long().t()
    assert y.double().item() == pytest.approx(expected.item(), rel=1e-7)


@given(
    sizes=st.tuples(*[st.sampled_from([0, 1, 7, 64])] * 3),
    dtype=st.sampled_from(DTYPES),
    post_op=st.sampled_from(sorted(EPILOGUES)),
    affine=st.booleans(),
    given_sums=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_dequantized_linear(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    post_op: str,
    affine: bool,
    given_sums: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rows, inner, outputs = sizes
    x, dense = torch.randn(2, rows, inner) + 1, torch.randn(outputs, inner)
    weight, weight_scale = quantize_weight(dense)
    bias = torch.randn(outputs).to(dtype)
    q, scale, *zero = (ops.quantize_per_token_affine if affine else ops.quantize_per_token)(x)
    zero_point = zero[0] if zero else None
    sums = row_sums(weight) if given_sums else None
    y = ops.int8_linear_fused(
        q, scale, zero_point, weight, weight_scale, sums, bias, dtype, post_op
    )
    wide = ops.dequantize(q, scale, torch.float64, zero_point)
    truth = nn.functional.linear(
        wide, ops.dequantize(weight, weight_scale, torch.float64), bias.double()
    )
    assert y.dtype == dtype
    torch.testing.assert_close(y, ACTIVATIONS[post_op](truth).to(dtype), check_stride=True)


def test_codes_may_come_plus_128() -> None:
    q = _int8(2, 3, 8)
    for zero_point in (None, _int8(2, 3, 1)):
        shifted = _call(q=ops.shift_to_unsigned(q), zero_point=zero_point)
        assert torch.equal(shifted, _call(q=q, zero_point=zero_point))


def test_one_scale_serves_all_rows() -> None:
    scale, zero_point = torch.tensor(0.01), torch.tensor(3, dtype=torch.int8)
    torch.testing.assert_close(
        _call(scale=scale, zero_point=zero_point),
        _call(scale=scale.expand(2, 3, 1), zero_point=zero_point.expand(2, 3, 1)),
        rtol=0,
        atol=0,
    )


def test_it_survives_torch_compile_and_fake_tensors() -> None:
    q, weight = _int8(2, 3, 8), _int8(5, 8)
    scale, weight_scale = torch.rand(2, 3, 1), torch.rand(5, 1)
    bias = torch.randn(5, requires_grad=True)
    arguments = (q, scale, None, weight, weight_scale, None, bias, torch.float32, "silu")
    torch.library.opcheck(ops.int8_linear_fused.default, arguments)
    compiled = torch.compile(ops.int8_linear_fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), ops.int8_linear_fused(*arguments))


@pytest.mark.parametrize("post_op", sorted(EPILOGUES))
def test_its_bias_trains(post_op: str) -> None:
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    by_definition = bias.detach().clone().requires_grad_()
    _call(bias=bias, dtype=torch.float64, post_op=post_op).sum().backward()
    z = _call(bias=None, dtype=torch.float64, post_op="none") + by_definition
    ACTIVATIONS[post_op](z).sum().backward()
    torch.testing.assert_close(bias.grad, by_definition.grad)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"q": torch.zeros(2, 3, 8, dtype=torch.int16)},
            "int8_linear_fused needs 8-bit q, int8 weight and zero point and a floating-point "
            "result, not torch.int16, torch.int8, torch.int8 and torch.float32",
        ),
        ({"dtype": torch.int32}, "int8_linear_fused needs 8-bit q, int8 weight and zero point"),
        (
            {"weight": _int8(5, 7)},
            "int8_linear_fused needs [..., K] and a weight [N, K], not (2, 3, 8) and (5, 7)",
        ),
        (
            {"scale": torch.ones(6, 1)},
            "int8_linear_fused needs one scale or one a row, (2, 3, 1), not (6, 1)",
        ),
        (
            {"bias": torch.ones(4)},
            "int8_linear_fused needs one bias for each of the weight's 5 rows, not (4,)",
        ),
        (
            {"post_op": "tanh"},
            "int8_linear_fused has no post_op 'tanh'; one of ['gelu', 'gelu_tanh', 'none', 'relu', "
            "'silu']",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError) as caught:
        _call(**changed)
    assert str(caught.value).startswith(message)
