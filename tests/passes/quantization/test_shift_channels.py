"""ShiftChannels: the same numbers out of inputs whose channels are centred."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import EquivalenceError, PassError, ShiftChannels
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.interpreter import evaluate
from fxopt.pass_list import parse_passes
from fxopt.passes.quantization import shift_channels
from fxopt.program import Changes, Program
from tests.check import check
from tests.models import Drawn, models
from tests.sweeps import in_parts

aten = torch.ops.aten


class Norms(nn.Module):
    """A post-norm layer: the norm, of one-sided channels, feeds a linear and the residual."""

    def __init__(self, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            self.norm.bias.copy_(torch.linspace(-30.0, 30.0, 8))
        self.linear = nn.Linear(8, 8) if linear is None else linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + torch.tanh(self.linear(x))


X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "linear",
    [nn.Linear(8, 8), nn.Linear(8, 8, bias=False), Conv1D(8, 8)],
    ids=["bias", "no bias", "Conv1D"],
)
def test_a_linear_of_any_spelling_is_shifted(linear: nn.Module) -> None:
    torch.manual_seed(0)
    check(ShiftChannels(), Norms(linear), (X,), {"ShiftLinear": 1})


def test_a_product_without_bias_gets_one_added() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x + torch.linspace(-9.0, 9.0, 8)) @ self.weight

    check(ShiftChannels(), Product(), (X,), {"ShiftLinear": 1})


def test_linears_of_one_input_share_what_is_subtracted() -> None:
    class Two(Norms):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.linear(x).sum(-1, keepdim=True) + self.other(x)

    result = check(ShiftChannels(), Two(), (X,), {"ShiftLinear": 2})
    assert [node.target for node in result.graph.nodes].count(aten.sub.Tensor) == 1


def test_what_is_centred_is_left_alone() -> None:
    x = torch.cat([X, -X])
    result = check(ShiftChannels(), nn.Linear(8, 8), (x,), 0)
    assert "centred, its range is 1.00 of what it was, above 0.9" in str(result.changes.refused)


def test_int8_gets_truer_where_channels_are_one_sided() -> None:
    torch.manual_seed(0)
    layer = Norms()
    model = nn.Sequential(layer.norm, layer.linear).eval()
    passes = "int8-linear{mode=static, where=always}"
    before, after = (
        sqnr(
            model(X).detach(),
            fxopt.transform(model, spec, example_inputs=(X,), calibration=[(X,)])(X),
        )
        for spec in (passes, f"shift-channels, {passes}")
    )
    assert after > before + 10.0


@in_parts(25)
@given(models(), st.floats(0.01, 0.99))
def test_any_model_keeps_its_outputs(drawn: Drawn, gain: float) -> None:
    pass_ = ShiftChannels(gain=gain)
    sites = pass_.plan(capture(drawn.model, drawn.example)).sites
    check(pass_, drawn.model, drawn.example, len(sites))


def test_a_second_run_changes_nothing() -> None:
    program = _run(Norms())
    again = ShiftChannels().plan(program)
    assert not again.sites


def test_middles_come_from_calibration_and_the_example_is_warned_of() -> None:
    program = capture(Norms(), (X[:1],))
    plan = ShiftChannels().plan(program)
    assert "give calibration=" in plan.warnings[0]
    (detail,) = plan.details
    assert detail.startswith("linear: centred, its range is 0.")


def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(shift_channels._ShiftedBias):
        def __call__(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
            return super().__call__(rows * 0.99, bias)

    monkeypatch.setattr(shift_channels, "_ShiftedBias", Forgetful)
    model = Norms()
    with torch.no_grad():
        model.linear.weight.mul_(0.05)  # the tanh of larger values would hide the fault
    with pytest.raises(EquivalenceError, match="ShiftChannels"):
        fxopt.transform(model, [ShiftChannels()], example_inputs=(X,))


def test_weights_that_a_pass_cannot_shift_are_refused() -> None:
    result = check(ShiftChannels(exclude="linear"), Norms(), (X,), 0)
    assert "in exclude=('linear',)" in str(result.changes.refused)


def test_what_trains_is_refused() -> None:
    opt = fxopt.transform(Norms(), [ShiftChannels()], example_inputs=(X,), mode="train")
    assert "it trains, and the weight's part in the new bias" in str(opt.report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gain": 0.0}, "ShiftChannels(gain=0.0): give a number between 0 and 1, both excluded"),
        ({"gain": 1}, "ShiftChannels(gain=1): give a number between 0 and 1, both excluded"),
        ({"include": (3,)}, "ShiftChannels(include=(3,)): give globs over module paths"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError) as caught:
        ShiftChannels(**options)
    assert str(caught.value) == message


def test_options_are_parsed() -> None:
    spec = "shift-channels{gain=0.2, exclude=*.output.dense}"
    assert parse_passes(spec) == (ShiftChannels(gain=0.2, exclude="*.output.dense"),)


def test_coming_after_int8_is_an_error() -> None:
    with pytest.raises(PassError, match="move it before Int8Linear"):
        fxopt.transform(Norms(), "int8-linear{where=always}, shift-channels", example_inputs=(X,))


def _run(model: nn.Module) -> Program:
    program = capture(model, (X,))
    result = ShiftChannels().apply(program, ShiftChannels().plan(program)).materialized()
    (before,), (after,) = evaluate(program, (X,)), evaluate(result, (X,))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    return replace(result, changes=Changes())
