"""packed_int8_linear against integer arithmetic in int64 and an epilogue in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels import quantize_weight
from fxopt.kernels.packed_int8_linear import POST_OPS

pytestmark = pytest.mark.usefixtures("served_by")

ops = torch.ops.fxopt
TINY = torch.finfo(torch.float32).tiny
EPILOGUES = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}
LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


@dataclass(frozen=True)
class Case:
    q: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    post_op: str = "none"
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @property
    def args(self) -> tuple[object, ...]:
        return tuple(vars(self).values())

    def run(self) -> Tensor:
        y: Tensor = ops.packed_int8_linear(*self.args)
        return y

    def exact(self) -> tuple[Tensor, Tensor]:
        """y in float64, and how far float32 may be from it."""
        product = (self.q.long() - self.zero_point.long()) @ self.weight.long().t()
        scales = self.scale.double() * self.weight_scale.double().reshape(-1)
        y, slack = product * scales, TINY * (product.abs() + 1.0)
        reach = y.abs() + (0.0 if self.bias is None else self.bias.double().abs())
        y = y if self.bias is None else y + self.bias.double()
        # For 8 bits the compiled kernels compute these to 16.
        coarse = self.dtype in LIMITS and self.post_op in ("gelu", "gelu_tanh", "silu")
        return EPILOGUES[self.post_op](y), (2e-5 if coarse else 2e-6) * reach + slack


def _filled(kind: str, shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(low, high + 1, shape, generator=generator)
    if kind == "alternating":
        return torch.where(drawn > (low + high) / 2, high, low)
    if kind == "outlier":
        outlier = torch.full(shape, max(low, min(high, 1)))
        outlier.reshape(-1)[:1] = high
        return outlier
    return {"lowest": torch.full(shape, low), "highest": torch.full(shape, high)}.get(kind, drawn)


KINDS = st.sampled_from(["random", "random", "alternating", "lowest", "highest", "outlier"])
SEEDS = st.integers(0, 2**31)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    leading = draw(st.sampled_from([(), (0,), (1,), (5,), (77,), (2, 3), (2, 1, 3), (2, 0)]))
    k = draw(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 129]))
    n = draw(st.sampled_from([1, 2, 5, 16, 33]))
    dtype = draw(st.sampled_from([torch.uint8, torch.uint8, torch.int8]))
    low, high = LIMITS[dtype]
    q = _filled(draw(KINDS), (*leading, k), low, high, draw(SEEDS)).to(dtype)
    weight = _filled(draw(KINDS), (n, k), -127, 127, draw(SEEDS)).to(torch.int8)
    if draw(st.booleans()):
        q = q.repeat_interleave(2, -1)[..., ::2]
        weight = weight.t().contiguous().t()
    generator = torch.Generator().manual_seed(draw(SEEDS))
    spread = torch.rand(n, 1, generator=generator) + 0.5
    bias = torch.randn(n, generator=generator) if draw(st.booleans()) else None
    return Case(
        q,
        torch.tensor(draw(st.sampled_from([0.02, 1.0, 1e-30, 1e-40, TINY]))),
        torch.tensor(draw(st.sampled_from([low, high, (low + high + 1) // 2, 3])), dtype=dtype),
        weight,
        spread * draw(st.sampled_from([0.01, 1e-4, 1e-39])),
        bias,
        draw(st.sampled_from(sorted(POST_OPS))),
    )


@settings(max_examples=150)
@given(cases())
def test_float32_is_the_exact_sum_and_one_rounding(case: Case) -> None:
    y = case.run()
    assert y.dtype == torch.float32
    assert y.shape == (*case.q.shape[:-1], case.weight.shape[0])
    expected, slack = case.exact()
    assert bool(((y.double() - expected).abs() <= slack).all())


@settings(max_examples=75)
@given(cases())
def test_bfloat16_is_that_rounded_to_it(case: Case) -> None:
    y = replace(case, dtype=torch.bfloat16).run()
    assert y.dtype == torch.bfloat16
    expected, slack = case.exact()
    assert bool(((y.double() - expected).abs() <= slack + expected.abs() / 256).all())


@settings(max_examples=150)
@given(cases(), st.sampled_from([0.003, 0.1, 2.0]), st.integers(0, 255), st.booleans())
def test_integers_out_are_those_of_the_exact_sum_but_for_ties(
    case: Case, out_scale: float, zero: int, signed: bool
) -> None:
    dtype = torch.int8 if signed else torch.uint8
    low, high = LIMITS[dtype]
    scale, zero_point = torch.tensor(out_scale), torch.tensor(zero + low, dtype=dtype)
    case = replace(case, out_scale=scale, out_zero_point=zero_point, dtype=dtype)
    y = case.run()
    assert y.dtype == dtype
    expected, slack = case.exact()
    steps = expected / scale.double()
    codes = (steps.round() + zero_point.long()).clamp(low, high)
    beyond = (steps - steps.floor() - 0.5).abs() > slack / out_scale + 1e-6 * (steps.abs() + 1)
    off = (y.double() - codes).abs()
    assert bool((off <= 1).all())
    assert bool((off[beyond] == 0).all())


def test_a_long_saturated_row_is_exact() -> None:
    q = torch.full((3, 20_001), 255, dtype=torch.uint8)
    weight = torch.full((5, 20_001), -127, dtype=torch.int8)
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8)
    y = Case(q, one, zero, weight, torch.ones(5, 1), None).run()
    assert (y == float(-255 * 127 * 20_001)).all()


def test_a_changed_weight_is_packed_anew() -> None:
    case = _case()
    before = case.run()
    case.weight.neg_()
    assert not torch.equal(case.run(), before)
    expected, slack = case.exact()
    assert bool(((case.run().double() - expected).abs() <= slack).all())


@given(st.integers(0, 255))
def test_shifting_to_unsigned_adds_128(first: int) -> None:
    q = (torch.arange(256) - 128).to(torch.int8).roll(first)
    assert torch.equal(ops.shift_to_unsigned(q).long(), q.long() + 128)
    assert ops.shift_to_unsigned(q).dtype == torch.uint8


def test_signed_and_shifted_give_the_same() -> None:
    case = _case(torch.int8)
    shifted = replace(
        case,
        q=ops.shift_to_unsigned(case.q),
        zero_point=ops.shift_to_unsigned(case.zero_point),
    )
    torch.testing.assert_close(shifted.run(), case.run(), rtol=1e-6, atol=1e-6)


def _case(codes: torch.dtype = torch.uint8, **options: object) -> Case:
    generator = torch.Generator().manual_seed(7)
    low, high = LIMITS[codes]
    q = torch.randint(low, high + 1, (2, 3, 32), generator=generator).to(codes)
    weight, weight_scale = quantize_weight(torch.randn(16, 32, generator=generator))
    bias = torch.randn(16, generator=generator)
    zero = torch.tensor(low + 11, dtype=codes)
    case = Case(q, torch.tensor(0.05), zero, weight, weight_scale, bias, "gelu")
    return replace(case, **options)  # type: ignore[arg-type]


OUTPUTS: list[dict[str, object]] = [
    {},
    {"dtype": torch.bfloat16, "post_op": "none"},
    {
        "out_scale": torch.tensor(0.1),
        "out_zero_point": torch.tensor(9, dtype=torch.uint8),
        "dtype": torch.uint8,
    },
]


@settings(max_examples=150)
@given(cases(), st.booleans())
def test_rows_out_stand_for_the_exact_sum_to_half_a_step(case: Case, affine: bool) -> None:
    q, scale, zero_point = ops.packed_int8_linear_tokens(*_before_output(case), affine)
    by_row = (*case.q.shape[:-1], 1)
    assert (q.dtype, q.shape) == (torch.uint8, (*case.q.shape[:-1], case.weight.shape[0]))
    assert (scale.dtype, scale.shape) == (torch.float32, by_row)
    assert (zero_point.dtype, zero_point.shape) == (torch.int8, by_row if affine else (0,))
    exact, slack = replace(case, dtype=torch.uint8).exact()
    low, high = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    span = (high.clamp_min(0) - low.clamp_max(0)) / 255
    step = span if affine else exact.abs().amax(-1, keepdim=True) / 127
    most = slack.amax(-1, keepdim=True) if slack.numel() else slack[..., :1]
    assert bool(((scale.double() - step).abs() <= 1e-6 * step + most + TINY).all())
    zero = zero_point.double() if affine else torch.zeros(())
    meant = (q.double() - 128 - zero) * scale.double()
    # A zero point is whole: the ends of a row may be cut by half a step besides.
    steps = 1.0 if affine else 0.5
    assert bool(((meant - exact).abs() <= (steps + 1e-4) * step + 2 * slack + 2 * TINY).all())


def _before_output(case: Case) -> tuple[object, ...]:
    """The arguments up to the post-operation."""
    return case.args[:7]


@pytest.mark.parametrize("affine", [False, True])
def test_the_operator_with_rows_out_passes_the_schema_checks_of_torch(affine: bool) -> None:
    arguments = (*_before_output(_case()), affine)
    torch.library.opcheck(ops.packed_int8_linear_tokens.default, arguments)


def test_the_operator_with_rows_out_says_what_it_cannot_take() -> None:
    wrong = _before_output(_case(weight=torch.ones(16, 32)))
    with pytest.raises(KernelError) as caught:
        ops.packed_int8_linear_tokens(*wrong, True)
    message = "packed_int8_linear needs 8-bit q and int8 weight, not torch.uint8, torch.float32"
    assert str(caught.value) == message


@pytest.mark.parametrize("options", OUTPUTS, ids=["float32", "bfloat16", "uint8"])
def test_the_operator_passes_the_schema_checks_of_torch(options: dict[str, object]) -> None:
    torch.library.opcheck(ops.packed_int8_linear.default, _case(**options).args)


class Int8Module(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        for name, value in vars(case).items():
            if isinstance(value, Tensor) and name != "q":
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        q = ops.quantize(x, self.scale, self.zero_point)
        names = ("scale", "zero_point", "weight", "weight_scale", "bias", "post_op")
        more = ("out_scale", "out_zero_point", "dtype")
        y = ops.packed_int8_linear(q, *(getattr(self, name) for name in (*names, *more)))
        return y.to(torch.float32) * 2


@pytest.mark.parametrize("options", OUTPUTS, ids=["float32", "bfloat16", "uint8"])
def test_survives_compile_export_and_state_dict(options: dict[str, object]) -> None:
    torch.compiler.reset()
    module = Int8Module(_case(**options))
    x = torch.randn(2, 3, 32)
    expected = module(x)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for shape in ((2, 3, 32), (5, 4, 32)):
        y = torch.randn(shape)
        torch.testing.assert_close(compiled(y), module(y), rtol=1e-5, atol=1e-5)
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(module, (x,), dynamic_shapes=(sizes,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected)
    other = Int8Module(replace(_case(**options), weight=torch.zeros(16, 32, dtype=torch.int8)))
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(x), expected)


BYTE = torch.tensor(0, dtype=torch.uint8)
WRONG: list[tuple[dict[str, object], str]] = [
    ({"q": torch.ones(2, 32)}, "needs 8-bit q and int8 weight, not torch.float32, torch.int8"),
    (
        {"weight": torch.ones(16, 32)},
        "needs 8-bit q and int8 weight, not torch.uint8, torch.float32",
    ),
    (
        {"q": torch.ones(2, 31, dtype=torch.uint8)},
        "needs [..., K] and a weight [N, K], not (2, 31) and (16, 32)",
    ),
    (
        {"scale": torch.ones(2)},
        "needs one scale, one zero point and 16 weight scales, not 2, 1 and 16",
    ),
    (
        {"weight_scale": torch.ones(3)},
        "needs one scale, one zero point and 16 weight scales, not 1, 1 and 3",
    ),
    (
        {"post_op": "tanh"},
        "has no post_op 'tanh'; one of ['gelu', 'gelu_tanh', 'none', 'relu', 'silu']",
    ),
    ({"out_scale": torch.tensor(0.1)}, "takes out_scale and out_zero_point together"),
    (
        {"dtype": torch.float64},
        "gives float32, bfloat16 or its output zero point's dtype, not torch.float64",
    ),
    (
        {"out_scale": torch.tensor(0.1), "out_zero_point": BYTE},
        "gives float32, bfloat16 or its output zero point's dtype, not torch.float32",
    ),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[text[:40] for _, text in WRONG])
def test_wrong_arguments_say_what_is_needed(options: dict[str, object], text: str) -> None:
    with pytest.raises(KernelError) as caught:
        _case(**options).run()
    assert str(caught.value) == f"packed_int8_linear {text}"
