"""What Int4Linear learns from calibration: scales that fold exactly, and integers that decode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt import Int4Linear, PassError
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.choices import Choices
from fxopt.interpreter import evaluate
from fxopt.observation import SecondMoment
from fxopt.passes.quantization import int4_rounding
from fxopt.passes.quantization.int4_rounding import scaled
from fxopt.program import Program
from tests.sweeps import in_parts


class Block(nn.Module):
    """A norm that two linears read, a gate, and what comes back: as in a Llama's MLP."""

    def __init__(self, seed: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(32)
        self.gate, self.up = (nn.Linear(32, 64, bias=bias) for _ in range(2))
        self.down = nn.Linear(64, 32, bias=bias)
        with torch.no_grad():
            by = torch.randn(32).mul(0.7).exp()
            self.norm.weight.mul_(by)
            for one in (self.gate, self.up):
                one.weight.div_(by)
            by = torch.randn(64).mul(0.7).exp()
            self.up.weight.mul_(by[:, None])
            self.down.weight.div_(by)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def calibrated(model: nn.Module, batches: list[Tensor]) -> Program:
    program = capture(model.eval(), (batches[0],))
    return replace(program, calibration=Calibration(batches, program.signature))


def inputs(seed: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=generator) / 4
    return [torch.randn(60, 32, generator=generator) @ mixing for _ in range(count)]


@torch.no_grad()
def moments(model: Block, batches: list[Tensor]) -> dict[str, Tensor]:
    """Of the inputs of each linear, by its name."""
    found = {}
    x = torch.cat(batches)
    y = model.norm(x)
    for name, value in (
        ("gate", y),
        ("up", y),
        ("down", nn.functional.silu(model.gate(y)) * model.up(y)),
    ):
        seen = SecondMoment()
        seen.update(value)
        found[name] = seen.matrix
    return found


def decoded(program: Program, name: str) -> Tensor:
    """The weight [N, K] that stands in the state under `name`, as a reader in eager mode has it."""
    q, s, z = (program.tensor(f"{name}_{role}") for role in ("int4", "scale", "zero_point"))
    values = torch.ops.fxopt.unpack_int4(q).view(*s.shape[:2], -1).double()
    return ((values - z.double()) * s.double()).flatten(1)


def names_of(program: Program) -> dict[str, str]:
    """The name of each packed weight, without its role, by its layer."""
    packed = [str(name) for name in program.state if name.endswith("_int4")]
    return {name.split("_weight")[0].split(".")[0]: name.removesuffix("_int4") for name in packed}


@in_parts(15)
@given(
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from(["weighted", "gptq", "awq", "awq-gptq"]),
)
def test_outputs_of_every_layer_err_no_more_than_by_the_nearest(
    seed: int, bias: bool, weights: Any
) -> None:
    """On the calibration's inputs of each linear, scales undone: Σ (w - w') H (w - w')ᵀ."""
    model, batches = Block(seed, bias), inputs(seed)
    program = calibrated(model, batches)
    seen = moments(model, batches)
    errors = {}
    for method in ("nearest", weights):
        pass_ = Int4Linear(scheme="affine", weights=method)
        plan = pass_.plan(program)
        result = pass_.apply(program, plan)
        columns, rows = factors(plan, model)
        for layer, name in names_of(result).items():
            exact = getattr(model, layer).weight.detach().double()
            back = decoded(result, name) / columns[layer] / rows[layer][:, None]
            off = exact - back
            errors[layer, method] = float(((off @ seen[layer].double()) * off).sum())
    assert len(errors) == 6
    for layer in ("gate", "up", "down"):
        # float16 holds scaled numbers to 11 bits, each way.
        assert errors[layer, weights] <= errors[layer, "nearest"] * 1.02


def factors(plan: Any, model: Block) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the columns and the rows of each layer's weight were multiplied by."""
    columns = {
        name: torch.ones(one.in_features) for name, one in model.named_children() if name != "norm"
    }
    rows = {name: torch.ones(getattr(model, name).out_features) for name in columns}
    order = {"linear": "gate", "linear_1": "up", "linear_2": "down"}
    for group in plan.scales:
        layers = [order[name] for name in group.linears]
        for layer in layers:
            columns[layer] = group.inverse.reciprocal().double()
        if layers == ["down"]:
            assert group.absorbed
            # The gate is silu of one and the other: the other takes the scale.
            rows["up"] = group.inverse.double()
    return columns, rows


@in_parts(15)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_scales_alone_change_nothing(seed: int, bias: bool, elsewhere: bool) -> None:
    """Folded into a norm and a linear, or as a multiply where another reads the input too."""
    block, batches = Block(seed, bias), inputs(seed)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) if elsewhere else block
    program = calibrated(model, batches)
    plan = Int4Linear(scheme="affine", weights="awq").plan(program)
    result, renamed = scaled(program, plan.scales)
    assert len(renamed) == (2 if elsewhere else 3)
    (before,), (after,) = evaluate(program, (batches[0],)), evaluate(result, (batches[0],))
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    multiplies = sum("_smoothing" in str(name) for name in result.state)
    assert multiplies == sum(not group.absorbed for group in plan.scales)
    assert not (multiplies and not elsewhere)


def test_a_scale_put_in_the_wrong_way_round_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = inputs(0)
    program = calibrated(Block(0, True), batches)
    plan = Int4Linear(scheme="affine", weights="awq").plan(program)
    assert plan.scales
    monkeypatch.setattr(
        int4_rounding.Smoothing, "factors", lambda self, channels: torch.ones(len(channels))
    )
    result, _ = scaled(program, plan.scales)
    (before,), (after,) = evaluate(program, (batches[0],)), evaluate(result, (batches[0],))
    assert float((after - before).abs().max()) > 1e-2 * float(before.abs().max())


def test_a_plan_says_what_became_of_each_scale() -> None:
    printed = str(
        Int4Linear(scheme="affine", weights="awq").plan(calibrated(Block(0, True), inputs(0)))
    )
    assert "gate (linear) and 1 more: alpha" in printed
    assert "absorbed by norm (layer_norm)" in printed
    assert "absorbed by up (linear_1)" in printed
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))
    printed = str(Int4Linear(scheme="affine", weights="awq").plan(calibrated(model, inputs(0))))
    assert "a multiply stays, since" in printed


def test_spared_layers_stay_float_beside_scales() -> None:
    batches = inputs(0)
    program = calibrated(Block(0, True), batches)
    pass_ = Int4Linear(scheme="affine", weights="awq-gptq")
    plan = pass_.plan(program)
    for spared in ("linear", "linear_1", "linear_2"):
        result = pass_.apply(program, plan.without([spared]))
        assert result.changes.fired["QuantizeInt4Linear"] == 2
        (before,), (after,) = evaluate(program, (batches[0],)), evaluate(result, (batches[0],))
        assert float((after - before).norm()) < 0.1 * float(before.norm())
    everything = plan.without(["linear", "linear_1", "linear_2"])
    assert pass_.apply(program, everything).state.keys() == program.state.keys()


def test_choices_of_another_program_are_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    choices, batches = Choices(), inputs(0)
    program = replace(calibrated(Block(0, True), batches), choices=choices)
    pass_ = Int4Linear(scheme="affine", weights="awq-gptq")
    first = pass_.plan(program)
    asked: list[int] = []
    watch = int4_rounding.watch_moments
    monkeypatch.setattr(
        int4_rounding,
        "watch_moments",
        lambda program, linears, *rest: (
            asked.append(len(linears)) or watch(program, linears, *rest)
        ),
    )
    second = pass_.plan(replace(calibrated(Block(0, True), inputs(1)), choices=choices))
    assert asked == [0, 0]
    assert first.weights.keys() == second.weights.keys()
    for key, packed in first.weights.items():
        assert all(one is other for one, other in zip(packed, second.weights[key], strict=True))
    assert all(
        torch.equal(one.inverse, other.inverse)
        for one, other in zip(first.scales, second.scales, strict=True)
    )
    # Another option, or another weight, is another choice.
    replace(pass_, group=16).plan(replace(program, choices=choices))
    pass_.plan(replace(calibrated(Block(1, True), batches), choices=choices))
    assert asked[2:] == [3, 3, 3, 3]


def test_a_plan_of_another_program_is_refused() -> None:
    """Rounded to the nearest it would be worse than promised, without a word."""
    pass_ = Int4Linear(scheme="affine", weights="gptq")
    plan = pass_.plan(calibrated(Block(0, True), inputs(0)))
    other = calibrated(nn.Linear(32, 32), inputs(0))
    with pytest.raises(
        PassError, match=r"linear isn't among the weights that Int4Linear\(.*planned"
    ):
        pass_.apply(other, plan)
