"""What Int8Linear leaves alone: what is no faster, what costs too much; and how it says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt import Close, EquivalenceError, Int8Linear, PassError, Sqnr
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.interpreter import evaluate
from fxopt.passes.quantization import int8_planning, quantize_linear
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.timing import Latency, summarize, timings_in
from fxopt.weights import quantize_rows
from tests.check import check
from tests.models import SharedLinear

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


def loses_when_wide(
    key: Hashable, systems: Mapping[str, Callable[[], object]]
) -> dict[str, Latency]:
    """int8 takes 1.5 of float's time where K is 32, else 0.5."""
    assert isinstance(key, tuple)
    other = 1.5 if key[2] == 32 else 0.5
    return {name: summarize([1.0 if name == "float" else other] * 9) for name in systems}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))


def outlier_mlp() -> nn.Sequential:
    """Linears on few distinct values, but for layer 2: one channel of its input drowns the rest."""
    model = mlp()
    with torch.no_grad():
        model[0].weight[0] = 300.0
        model[2].weight[:, 0] *= 1e-3
    return model


def planned(pass_: Int8Linear, model: nn.Module, calibration: Any = None) -> tuple[Program, Any]:
    program = capture(model, (X,))
    if calibration is not None:
        program = replace(program, calibration=Calibration(calibration, program.signature))
    return program, pass_.plan(program)


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_what_is_no_faster_stays_and_the_reason_has_the_figures(mode: Any) -> None:
    with timings_in(None, loses_when_wide):
        result = check(Int8Linear(mode=mode), mlp(), (X,), 2)
        _, plan = planned(Int8Linear(mode=mode), mlp())
    (refusal,) = result.changes.refused
    assert refusal.node.startswith("2 ")
    assert refusal.reason == (
        "no faster in int8 here: at M=6, K=32, N=8 it takes 1.50x the time of float "
        "(where='always' rewrites it all the same)"
    )
    assert "rewrites 2 of 3 linears; no faster: 1" in plan.details
    timed = [line for line in plan.details if line.startswith("timed: at K=")]
    assert len(timed) == 3
    assert f"refused 2 (linear_1): {refusal.reason}" in str(plan).replace("refused  ", "refused ")


def test_always_asks_no_clock() -> None:
    def never(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        raise AssertionError(f"timed {key}")

    with timings_in(None, never):
        result = check(Int8Linear(where="always"), mlp(), (X,), 3)
    assert not result.changes.refused


def test_each_shape_is_timed_once() -> None:
    asked = []

    def count(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        asked.append(key)
        return loses_when_wide(key, systems)

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    with timings_in(None, count):
        _, plan = planned(Int8Linear(), model)
    assert len(plan.sites) == 5
    assert len(asked) == len(set(asked))
    assert len([line for line in plan.details if line.startswith("timed: ")]) == 1


def test_max_layers_leaves_the_costliest() -> None:
    pass_ = Int8Linear(mode="static", observer="minmax", max_layers=1)
    program, plan = planned(pass_, outlier_mlp())
    kept = [refusal for refusal in plan.refusals if "alone" in refusal.reason]
    assert [refusal.node.split()[0] for refusal in kept] == ["2"]
    assert kept[0].reason.startswith("costs ")
    assert kept[0].reason.endswith(" dB alone: left in float by max_layers=1")
    left = next(line for line in plan.details if line.startswith("leaves "))
    assert left.startswith("leaves 1 of 3 groups in float; without them ")
    assert len(plan.sites) == 2
    assert pass_.apply(program, plan).changes.fired == {"QuantizeLinear": 2}


def test_a_budget_leaves_as_few_as_keep_it() -> None:
    free = Int8Linear(mode="static", observer="minmax", claim=Sqnr(1.0))
    model = outlier_mlp()
    noise = {}
    for pass_ in (free, replace(free, budget=Sqnr(32.0))):
        program, plan = planned(pass_, model)
        (output,) = evaluate(pass_.apply(program, plan).materialized(), (X,))
        noise[len(plan.sites)] = sqnr(model(X), output)
    assert noise[3] < 32.0
    assert noise[2] >= 32.0
    assert any(
        refusal.reason.endswith("left in float by budget=sqnr >= 32 dB")
        for refusal in plan.refusals
    )


def outlier_weight_mlp() -> nn.Sequential:
    """One weight of layer 2, for a channel that is idle, sets the step of a whole row, in which all
    others then round to 0; and the outputs are made of that row."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[5] = -100.0
        model[2].weight[0, 5] = 60.0
        model[4].weight[:, 0] *= 50.0
    return model


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
@pytest.mark.parametrize("bits", [7, 8])
def test_a_broken_claim_comes_with_the_budget_that_keeps_it(mode: Any, bits: Any) -> None:
    pass_ = Int8Linear(mode=mode, range=bits, where="always")
    model = outlier_weight_mlp()
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(model, [pass_], example_inputs=(X,), calibration=[(X,)])
    advised = caught.value.args[0].splitlines()[-1]
    bounded = replace(pass_, budget=Sqnr(pass_.claim.db + 3.0))  # type: ignore[attr-defined]
    assert advised == f"  {bounded!r} leaves in float the layers that cost the outputs most"
    pasted = eval(advised.partition(" leaves ")[0].strip(), vars(fxopt))
    opt = fxopt.transform(model, [pasted], example_inputs=(X,), calibration=[(X,)])
    assert pasted.claim == pass_.claim
    assert opt.steps[-1].record.firings > 0
    assert any(str(one).startswith("2 ") for one in opt.steps[-1].record.refused)


def test_a_broken_budget_has_no_such_advice() -> None:
    assert Int8Linear(budget=Sqnr(20.0)).advice() is None
    assert Int8Linear(claim=Close()).advice() is None


def test_a_budget_that_holds_leaves_nothing() -> None:
    _, plan = planned(Int8Linear(budget=Sqnr(5.0)), mlp())
    assert len(plan.sites) == 3
    assert any(line.startswith("leaves 0 of 3 groups in float; ") for line in plan.details)


def test_linears_that_share_an_input_are_left_together() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    result = check(Int8Linear(max_layers=1), Fork(), (X,), 0)
    assert len(result.changes.refused) == 2
    table = Int8Linear().sensitivity(capture(Fork(), (X,)))
    assert [row.name for row in table.rows] == ["{a,b}"]


def test_a_module_that_is_called_twice_is_two_groups() -> None:
    table = Int8Linear().sensitivity(capture(SharedLinear(8), (X,)))
    assert len(table.rows) == 2
    assert all(row.name.startswith("linear (linear") for row in table.rows)
    check(Int8Linear(max_layers=1), SharedLinear(8), (X,), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "dynamic"},
        {"mode": "dynamic", "activations": "affine"},
        {"mode": "static"},
        {"mode": "static", "activations": "symmetric"},
        {"mode": "weight_only", "group": 4},
        {"mode": "weight_only", "weights": "gptq"},
    ],
    ids=str,
)
def test_sensitivity_measures_what_the_pass_then_does(options: dict[str, Any]) -> None:
    model = mlp()
    pass_ = Int8Linear(**options)
    program, plan = planned(pass_, model)
    table = pass_.sensitivity(program)
    assert {row.name for row in table.rows} == {"0", "2", "4"}
    (output,) = evaluate(pass_.apply(program, plan).materialized(), (X,))
    together = table.rows[0].cumulative_db
    assert together is not None
    assert sqnr(model(X), output) == pytest.approx(together, abs=0.2)


@pytest.mark.parametrize("weights", ["nearest", "gptq"])
def test_each_weight_is_rounded_once(monkeypatch: pytest.MonkeyPatch, weights: Any) -> None:
    rounded = []

    def count(weight: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        rounded.append(tuple(weight.shape))
        return quantize_rows(weight, **options)

    for module in ("int8_planning", "quantize_linear"):
        monkeypatch.setattr(f"fxopt.passes.quantization.{module}.quantize_rows", count)
    pass_ = Int8Linear(weights=weights, max_layers=1, where="always")
    program, plan = planned(pass_, outlier_mlp())
    assert sorted(rounded) == [(4, 8), (8, 32), (32, 8)]
    assert len(plan.scheme.weights) == 2
    after = pass_.apply(program, plan)
    assert len(rounded) == 3
    held = {id(values) for values, _ in plan.scheme.weights.values()}
    assert {id(t) for name, t in after.state.items() if name.endswith("_int8")} == held


def test_plans_compare_and_print_without_their_weights() -> None:
    _, plan = planned(Int8Linear(max_layers=1), mlp())
    assert plan == planned(Int8Linear(max_layers=1), mlp())[1]
    assert "tensor" not in repr(plan)


def test_the_report_keeps_table_and_reasons() -> None:
    opt = fxopt.transform(outlier_mlp(), "int8-linear{max_layers=1}", example_inputs=(X,))
    printed = str(opt.report)
    assert "sensitivity of the outputs to 3 candidates" in printed
    assert "leaves 1 of 3 groups in float" in printed
    assert "dB alone: left in float by max_layers=1" in printed


# How many bits of an int8 the weights use


def weights_of(pass_: Int8Linear, model: nn.Module, calibration: Any = None) -> list[Tensor]:
    program, plan = planned(pass_, model, calibration)
    state = pass_.apply(program, plan).state
    return [materialize(tensor) for name, tensor in state.items() if name.endswith("_int8")]


@pytest.fixture(params=[True, False], ids=["saturating", "dot-product"])
def saturating(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is one without an int8 dot product."""
    for module in (int8_planning, quantize_linear):
        monkeypatch.setattr(module, "saturates", lambda device: request.param)
    return bool(request.param)


@pytest.mark.parametrize("weights", ["nearest", "gptq"])
@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_the_range_is_that_of_exact_products_on_the_device(
    saturating: bool, mode: Any, weights: Any
) -> None:
    bits = 7 if saturating and mode != "weight_only" else 8
    pass_ = Int8Linear(mode=mode, weights=weights)
    largest = {int(w.abs().max()) for w in weights_of(pass_, mlp(), [(X,)])}
    assert largest == {2 ** (bits - 1) - 1}
    _, plan = planned(pass_, mlp(), [(X,)])
    told = [line for line in plan.details if line.startswith("weights of 7 bits")]
    assert len(told) == (bits == 7)
    for line in told:
        assert line.startswith("weights of 7 bits (this CPU has no int8 dot product): rounding")
        seven, eight = map(float, re.findall(r"([\d.]+) dB", line))
        assert 4.0 < eight - seven < 8.0


@pytest.mark.parametrize("bits", [7, 8])
def test_a_given_range_is_kept(saturating: bool, bits: Any) -> None:
    pass_ = Int8Linear(range=bits, where="always")
    assert {int(w.abs().max()) for w in weights_of(pass_, mlp())} == {2 ** (bits - 1) - 1}
    check(pass_, mlp(), (X,), 3)


def test_eight_bits_are_refused_untimed_where_they_would_saturate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(key: Hashable, systems: Mapping[str, Callable[[], object]]) -> dict[str, Latency]:
        raise AssertionError(f"timed {key}")

    for module in (int8_planning, quantize_linear):
        monkeypatch.setattr(module, "saturates", lambda device: True)
    with timings_in(None, never):
        _, plan = planned(Int8Linear(range=8), mlp())
    assert not plan.sites
    assert {refusal.reason for refusal in plan.refusals} == {
        "no faster in int8 here: this CPU has no int8 dot product, so weights of 8 bits are "
        "multiplied in float32 (range=7 is exact and faster; where='always' rewrites it all the "
        "same)"
    }


@pytest.mark.parametrize("given", [6, 9, "7", None])
def test_a_range_that_there_is_not(given: Any) -> None:
    with pytest.raises(PassError) as caught:
        Int8Linear(range=given)
    assert str(caught.value) == (f"Int8Linear(range={given!r}): give one of 'auto', 7, 8")
