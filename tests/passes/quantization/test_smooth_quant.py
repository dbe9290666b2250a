"""SmoothQuant: the same numbers, scales where nobody pays for them, refusals where it can't."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fxopt import FuseLinears, HalfAttention, Int8Linear, SmoothQuant, transform, wellformed
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.claim import Close, sqnr
from fxopt.errors import PassError
from fxopt.interpreter import evaluate
from fxopt.pass_list import parse_passes
from fxopt.passes.quantization import smooth_quant, smoothing_rule
from fxopt.program import Changes, Origin, Program
from fxopt.rewriting import Plan
from fxopt.weights.smoothing import ALPHAS, smoothing_scale
from tests.architectures import randomize
from tests.captured import canonicalized, case
from tests.check import assert_close_to_model, assert_unchanged, check, grown
from tests.models import Attention, Drawn, GatedMlp, SharedLinear, models
from tests.sweeps import in_parts

aten = torch.ops.aten


class PreNorm(nn.Module):
    """x + down(act(up(norm(x))))"""

    def __init__(self, act: nn.Module, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=affine)
        self.up, self.act, self.down = nn.Linear(8, 24), act, nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class PostNorm(nn.Module):
    """The norm's output feeds a linear and the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + torch.tanh(self.linear(x))


class Heads(nn.Module):
    """Grouped-query attention by `enable_gqa`, or written out as a product of matrices."""

    def __init__(self, spelled_out: bool) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.spelled_out = spelled_out

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        if self.spelled_out:
            k, v = k.repeat_interleave(2, 1), v[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(10, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(ids)))


class Twice(nn.Module):
    """One weight for one input, read twice, beside another linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.one(x) + self.one(x).relu() + self.two(x)


class Outliers(nn.Module):
    """Channels of the norm that are far larger than the others, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


def x(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers() -> nn.Module:
    model = randomize(Outliers())
    with torch.no_grad():
        model.norm.weight[[3, 17]] *= 80.0  # type: ignore[operator, index]
        model.up.weight[:, [3, 17]] /= 80.0  # type: ignore[index, operator]
    return model


def applied(pass_: SmoothQuant, model: nn.Module, inputs: Any, calibration: Any = None) -> Program:
    program = capture(model, inputs)
    if calibration is not None:
        program = replace(program, calibration=Calibration(calibration, program.signature))
    return pass_.apply(program, pass_.plan(program))


def multiplies(program: Program) -> int:
    return sum(name.endswith("_smoothing") for name in program.state)


def reasons(program: Program) -> str:
    return "\n".join(map(str, program.changes.refused))


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize(
    ("name", "linears", "multiplied"),
    [
        ("bert", 13, 7),  # residuals read the norms; GELU is not homogeneous
        ("gpt2", 8, 2),
        ("llama", 15, 0),
        ("opt", 12, 0),
        ("t5-encoder", 12, 0),
        ("gemma", 14, 0),
        ("mixtral", 11, 2),  # the experts read the router's input too
        ("deberta-v2", 8, 8),
        ("clip-vision", 12, 2),
    ],
)
def test_architectures_keep_their_outputs(name: str, linears: int, multiplied: int) -> None:
    shared = case(name)
    result = check(SmoothQuant(), shared.model, shared.example, linears, others=shared.others)
    assert multiplies(result) == multiplied


def test_a_norm_takes_the_scale_and_nothing_is_added() -> None:
    model = randomize(PreNorm(nn.ReLU()))
    before = capture(model, (x(3, 8),)).node_count()
    result = check(SmoothQuant(), model, (x(3, 8),), {"SmoothLinear": 2})
    assert result.node_count() == before
    assert {"norm.weight_scaled", "up.weight_smoothed_1", "down.weight_smoothed"} <= {*result.state}


def test_a_norm_without_weight_gets_one() -> None:
    result = check(SmoothQuant(), randomize(PreNorm(nn.ReLU(), affine=False)), (x(3, 8),), 2)
    assert not multiplies(result)


def test_an_activation_that_is_not_homogeneous_keeps_a_multiply() -> None:
    model = randomize(PreNorm(nn.GELU()))
    result = check(SmoothQuant(), model, (x(3, 8),), 2)
    assert multiplies(result) == 1
    plan = str(SmoothQuant().plan(capture(model, (x(3, 8),))))
    assert "down (linear_1): alpha 0.5" in plan
    assert "a multiply stays, since gelu can't take a scale per channel (act (gelu))" in plan
    assert "absorbed by norm (layer_norm)" in plan


def test_a_residual_of_the_norm_keeps_a_multiply() -> None:
    model = randomize(PostNorm())
    result = check(SmoothQuant(), model, (x(3, 8),), 1)
    assert multiplies(result) == 1
    assert "since add reads norm (layer_norm) too" in str(
        SmoothQuant().plan(capture(model, (x(3, 8),)))
    )


@pytest.mark.parametrize("fused", [False, True])
def test_attention_passes_the_scale_to_the_value_projection(fused: bool) -> None:
    model = randomize(Attention(8, 2, causal=True, bias=True))
    program = capture(model, (x(2, 5, 8),))
    if fused:
        program = FuseLinears().apply(program, FuseLinears().plan(program))
        program = replace(program, changes=Changes())
    result = SmoothQuant().apply(program, SmoothQuant().plan(program))
    assert multiplies(result) == 1  # before q, k and v: their input is the model's
    assert result.node_count() == program.node_count() + 1
    wellformed.check(result)
    assert_close_to_model(Close(), model, result, (x(4, 7, 8),))
    assert_unchanged(SmoothQuant(), result)


@pytest.mark.parametrize("spelled_out", [False, True])
def test_repeated_heads_share_their_scales(spelled_out: bool) -> None:
    model = randomize(Heads(spelled_out))
    program = capture(model, (x(2, 5, 8),))
    plan = SmoothQuant().plan(program)
    inverse = plan.groups[-1].inverse.reshape(2, 2, 4)
    assert torch.equal(inverse[:, 0], inverse[:, 1])
    assert not torch.equal(inverse[0], inverse[1])
    result = check(SmoothQuant(), model, (x(2, 5, 8),), 3)
    assert multiplies(result) == 1
    assert result.node_count() == program.node_count() + 1


def test_a_gate_passes_the_scale_to_the_other_factor() -> None:
    result = check(SmoothQuant(), randomize(GatedMlp(8, 20, True)), (x(2, 3, 8),), 3)
    assert multiplies(result) == 1  # the input of gate and up is the model's
    assert "up.bias_scaled" in result.state
    assert "gate.bias_scaled" not in result.state


def test_linears_that_share_an_input_share_one_scale() -> None:
    program = capture(randomize(Twice()), (x(3, 8),))
    (group,) = SmoothQuant().plan(program).groups
    assert len(group.linears) == 3
    check(SmoothQuant(), randomize(Twice()), (x(3, 8),), 3)


def test_a_linear_left_out_keeps_its_input() -> None:
    result = check(SmoothQuant(exclude=("two",)), randomize(Twice()), (x(3, 8),), 2)
    assert multiplies(result) == 1
    assert "two (linear_2): in exclude=('two',)" in reasons(result)
    result = check(SmoothQuant(include="two"), randomize(Twice()), (x(3, 8),), 1)
    assert "not in include=('two',)" in reasons(result)


def test_one_weight_with_two_inputs_is_refused() -> None:
    result = check(SmoothQuant(), randomize(SharedLinear(8)), (x(3, 8),), 0)
    assert "its weight linear.weight is tied: linear reads it too" in reasons(result)


def test_a_tied_head_is_refused() -> None:
    result = check(SmoothQuant(), randomize(Tied()), (torch.randint(0, 10, (3, 4)),), 0)
    assert "head (linear): its weight embedding.weight is tied: embedding reads it too" in reasons(
        result
    )


def test_dead_channels_and_weights_are_left_alone() -> None:
    model = randomize(PreNorm(nn.ReLU()))
    with torch.no_grad():
        model.norm.weight[1] = model.norm.bias[1] = 0.0  # type: ignore[index, operator]
        model.up.weight[:, 2] = 0.0  # type: ignore[index, operator]
        model.up.weight[:, 3] = 1e-42  # type: ignore[index, operator]
    plan = SmoothQuant().plan(capture(model, (x(3, 8),)))
    assert plan.groups[0].inverse[1:4].tolist() == [1.0, 1.0, 1.0]
    check(SmoothQuant(), model, (x(3, 8),), 2)


def test_weights_that_hold_infinity_are_refused() -> None:
    model = randomize(PreNorm(nn.ReLU()))
    with torch.no_grad():
        model.up.weight[0, 0] = float("inf")  # type: ignore[index, operator]
    plan = SmoothQuant().plan(capture(model, (x(3, 8),)))
    assert "up (linear): its weight holds NaN or infinity" in str(plan)


def test_inputs_without_any_magnitude_give_nothing_to_level() -> None:
    result = check(SmoothQuant(), randomize(GatedMlp(8, 20, False)), (torch.zeros(2, 3, 8),), 0)
    assert "calibration gives its channels no difference to level" in reasons(result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_their_precision(dtype: torch.dtype) -> None:
    model = randomize(PreNorm(nn.ReLU())).to(dtype)
    result = check(SmoothQuant(), model, (x(3, 8).to(dtype),), 2)
    assert result.tensor("down.weight_smoothed").dtype == dtype


def test_weights_are_computed_when_they_are_needed() -> None:
    program = capture(PreNorm(nn.ReLU()), (x(3, 8),))
    result = SmoothQuant().apply(program, SmoothQuant().plan(program))
    recipe = result.state["down.weight_smoothed"]
    assert not isinstance(recipe, Tensor)
    assert recipe.sources[0] is program.state["down.weight"]


def test_without_a_linear_its_group_is_spared() -> None:
    program = capture(randomize(Twice()), (x(3, 8),))
    plan = SmoothQuant().plan(program)
    result = SmoothQuant().apply(program, plan.without([plan.sites[1].node]))
    assert not result.changes.fired


def test_scales_come_from_calibration_and_the_example_is_warned_of() -> None:
    model = randomize(PreNorm(nn.ReLU()))
    program = capture(model, (x(3, 8),))
    assert "calibrated on the example alone" in str(SmoothQuant().plan(program))
    calibration = Calibration([x(40, 8, seed=s) for s in range(2)], program.signature)
    calibrated = SmoothQuant().plan(replace(program, calibration=calibration))
    assert not calibrated.warnings
    assert str(calibrated) != str(SmoothQuant().plan(program))


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_int8_gets_truer_where_channels_stick_out(alpha: Any) -> None:
    model, data = outliers(), [x(64, 32, seed=seed) for seed in range(3)]
    smoothed = applied(SmoothQuant(alpha), model, (data[0],), data[:2])
    plain = capture(model, (data[0],))
    reference = model(data[2])

    def noise(program: Program) -> float:
        int8 = Int8Linear(mode="dynamic", where="always")
        rounded = int8.apply(program, int8.plan(program)).materialized()
        return sqnr(reference, evaluate(rounded, [data[2]])[0])

    assert noise(smoothed) > noise(plain) + 6.0


@settings(max_examples=8)
@given(st.integers(0, 99), st.floats(0.0, 3.0))
def test_auto_takes_the_alpha_that_static_int8_loses_least_by(seed: int, spread: float) -> None:
    channels, tokens, weights = (x(n, seed=seed + n).mul(spread).exp() for n in (32, 48, 24))
    model = nn.Linear(32, 24)
    with torch.no_grad():
        model.weight.copy_(x(24, 32, seed=seed) * weights[:, None])
    rows = x(48, 32, seed=seed + 1) * channels * tokens[:, None]
    reference = model(rows)
    int8 = Int8Linear(mode="static", activations="symmetric", where="always")

    def noise(pass_: SmoothQuant) -> float:
        program = applied(pass_, model, (rows,), [rows])
        rounded = int8.apply(program, int8.plan(program)).materialized()
        return sqnr(reference, evaluate(rounded, [rows])[0])

    best = max(noise(SmoothQuant(alpha)) for alpha in ALPHAS)
    # What gains less than 1 % is left alone: 0.04 dB.
    assert noise(SmoothQuant("auto", mode="static")) > best - 0.1


def test_auto_leaves_alone_what_does_not_gain() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.sign() * 0.5)

    with torch.no_grad():
        model = Flat()
        model.linear.weight.copy_(x(64, 32).sign())
    result = check(SmoothQuant("auto"), model, (x(40, 32),), 0)
    assert "no alpha makes its int8 product truer on calibration" in reasons(result)


@in_parts(12)
@given(models(), st.sampled_from([0.0, 0.5, 0.85, 1.0, "auto"]))
def test_any_model_keeps_its_outputs(drawn: Drawn, alpha: Any) -> None:
    pass_ = SmoothQuant(alpha)
    program = capture(drawn.model, drawn.example)
    result = pass_.apply(program, pass_.plan(program))
    wellformed.check(result)
    assert_unchanged(pass_, result)
    computed = result.materialized()
    for call in (drawn.example, grown(drawn.example), *drawn.others):
        assert_close_to_model(Close(), drawn.model, computed, call)


@given(st.integers(0, 2**16), st.floats(0.0, 1.0), st.integers(-40, 40))
def test_smoothing_is_a_fixed_point(seed: int, alpha: float, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, w = torch.rand(2, 12, generator=generator, dtype=torch.float64) + 0.01
    a = a * 2.0**power
    ties = torch.arange(12) // 3
    scale = smoothing_scale(a, w, ties, alpha)
    assert torch.equal(scale, scale[ties * 3])
    again = smoothing_scale(a / scale, w * scale, ties, alpha)
    assert torch.allclose(again, torch.ones_like(again))


def _forget(edit: Any, constant: Any, factor: Tensor) -> Any:
    return constant


def _swap(group: Any, channels: Tensor) -> Tensor:
    return _factors(group, channels).roll(1)


_factors = smoothing_rule.Smoothing.factors


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (smoothing_rule, "_scaled_constant", _forget),
        (smoothing_rule.Smoothing, "factors", _swap),
    ],
)
def test_a_planted_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch, place: Any, name: str, fault: Any
) -> None:
    monkeypatch.setattr(place, name, fault)
    with pytest.raises(AssertionError, match="relative error"):
        check(SmoothQuant(), randomize(PreNorm(nn.ReLU())), (x(3, 8),), 2)


class Square(nn.Module):
    """down(up(x)²): homogeneous, but not of degree one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y * y)


def test_a_value_that_is_read_twice_by_one_node_keeps_a_multiply() -> None:
    model = randomize(Square())
    assert multiplies(check(SmoothQuant(), model, (x(3, 8),), 2)) == 2
    plan = str(SmoothQuant().plan(capture(model, (x(3, 8),))))
    assert "a multiply stays, since mul reads up (linear) twice" in plan


def test_without_its_mark_a_smoothed_model_is_level_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scales that rows absorb are known before the columns of those rows are levelled."""
    result = check(SmoothQuant(), randomize(PreNorm(nn.ReLU())), (x(40, 8),), 2)
    monkeypatch.setattr(smooth_quant, "SMOOTHED", Origin("no pass", "nothing"))
    groups = SmoothQuant().plan(replace(result, changes=Changes())).groups
    assert len(groups) == 2
    for group in groups:
        assert torch.allclose(group.inverse, torch.ones_like(group.inverse), atol=1e-4)


def test_options_are_checked_and_parsed() -> None:
    for alpha in (-0.1, 1.5, "best", True):
        with pytest.raises(PassError, match=r"give a number from 0 to 1, or 'auto'"):
            SmoothQuant(alpha)  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"mode='half'\): give one of 'dynamic', 'static'"):
        SmoothQuant(mode="half")  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"SmoothQuant\(range=6\): give one of 'auto', 7, 8"):
        SmoothQuant(range=6)  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"SmoothQuant\(include=\(3,\)\): give globs"):
        SmoothQuant(include=(3,))  # type: ignore[arg-type]
    assert parse_passes("smooth-quant{alpha=auto, exclude=lm_head}") == (
        SmoothQuant("auto", exclude=("lm_head",)),
    )
    assert parse_passes("smooth-quant{alpha=auto, mode=static}") == (
        SmoothQuant("auto", mode="static"),
    )
    assert repr(SmoothQuant(alpha=0.7)) == "SmoothQuant(alpha=0.7)"


def test_coming_after_int8_is_an_error() -> None:
    program = capture(randomize(PreNorm(nn.ReLU())), (x(3, 8),))
    int8 = Int8Linear(mode="dynamic", where="always")
    rounded = int8.apply(program, int8.plan(program))
    with pytest.raises(PassError, match="move it before Int8Linear"):
        SmoothQuant().plan(rounded)
    with pytest.raises(PassError, match=r"can't apply this Plan: give the SmoothPlan"):
        SmoothQuant().apply(program, Plan("nothing"))


def test_no_scale_crosses_a_cast_to_half() -> None:
    """Scaled values round to other bits, by more than the claim allows."""
    passes = [FuseLinears(), HalfAttention(force=True), SmoothQuant()]
    opt = transform(canonicalized("bert"), passes)
    assert opt.steps[-1].record.fired["SmoothLinear"]
    assert opt.steps[-1].record.holds
