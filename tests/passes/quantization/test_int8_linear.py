"""Int8Linear: every spelling of a linear, all modes, and everything it must leave alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import Close, Int8Linear, PassError, Sqnr
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.interpreter import evaluate
from fxopt.program import Program
from fxopt.rewriting import rewrite
from tests.check import check
from tests.models import IntegerLinear, TiedHead

ops = torch.ops.fxopt


class Spellings(nn.Module):
    """linear, addmm (Conv1D), mm, matmul and x @ W.t(), one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv1d = Conv1D(8, 8)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        nn.init.normal_(self.conv1d.bias)
        self.right = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1d(self.linear(x))
        x = x @ self.right
        return x.reshape(-1, 8).mm(self.right.t())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.a(x.relu())


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_spelling_of_a_linear(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Spellings().to(dtype)
    x = torch.randn(3, 4, 8, dtype=dtype)
    result = check(Int8Linear(mode=mode), model, (x,), {"QuantizeLinear": 4})  # type: ignore[arg-type]
    kinds = {tensor.dtype for name, tensor in result.state.items() if name.endswith("_int8")}
    assert kinds == {torch.int8}


def test_shared_inputs_are_rounded_once_and_shared_weights_kept_once() -> None:
    result = check(Int8Linear(), Shared(), (torch.randn(3, 8),), 3)
    rounded = [n for n in result.graph.nodes if "quantize_per_token" in str(n.target)]
    assert len(rounded) == 2
    assert sorted(name for name in result.state if name.endswith("_int8")) == [
        "a.weight_int8",
        "b.weight_int8",
    ]


def test_a_tied_head_is_left_out_and_said_so() -> None:
    model, ids = TiedHead(), torch.randint(0, 20, (3, 5))
    result = check(Int8Linear(), model, (ids,), 1)
    (refusal,) = result.changes.refused
    assert refusal.node.startswith("head")
    assert "embedding.weight is tied: embedding reads it too" in refusal.reason
    assert result.state["embedding.weight"] is model.embedding.weight


def test_a_tied_head_can_be_asked_for() -> None:
    check(Int8Linear(tied=True), TiedHead(), (torch.randint(0, 20, (3, 5)),), 2)


def test_include_and_exclude_are_globs_over_module_paths() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    x = (torch.randn(3, 8),)
    result = check(Int8Linear(exclude="3"), model, x, 2)
    assert "in exclude=('3',)" in result.changes.refused[0].reason
    result = check(Int8Linear(include=["0", "2"]), model, x, 2)  # type: ignore[arg-type]
    assert "not in include=('0', '2')" in result.changes.refused[0].reason


def test_integer_weights_are_refused() -> None:
    result = check(Int8Linear(), IntegerLinear(), (torch.randint(-5, 5, (3, 8)),), 0)
    assert "torch.int64, not floating point" in result.changes.refused[0].reason


def test_a_computed_weight_is_no_linear_layer() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    check(Int8Linear(), Product(), (torch.randn(3, 4), torch.randn(1, 4, 5)), 0)


def test_one_input_feature_works() -> None:
    check(Int8Linear(), nn.Linear(1, 5), (torch.randn(3, 1),), 1)


Options = dict[str, Any]
CALIBRATION = [(torch.randn(8, 8, generator=torch.Generator().manual_seed(n)),) for n in range(5)]
WRONG: list[tuple[Options, str]] = [
    (
        {"mode": "int4"},
        "(mode='int4'): give one of 'dynamic', 'static', 'weight_only'",
    ),
    (
        {"activations": "ternary"},
        "(activations='ternary'): give one of 'symmetric', 'affine'",
    ),
    (
        {"observer": "median"},
        "(observer='median'): give one of 'minmax', 'percentile', 'mse'",
    ),
    ({"weights": "awq"}, "(weights='awq'): give one of 'nearest', 'gptq'"),
    ({"where": "never"}, "(where='never'): give one of 'faster', 'always'"),
    ({"group": 0, "mode": "weight_only"}, "(group=0): give a whole number from 1 on, or None"),
    ({"max_layers": -1}, "(max_layers=-1): give a whole number from 0 on, or None"),
    ({"max_layers": 1.5}, "(max_layers=1.5): give a whole number from 0 on, or None"),
    ({"budget": 30}, "(budget=30): give decibels, as Sqnr(30.0), or None"),
    (
        {"group": 8, "mode": "static"},
        "(group=8, mode='static'): a static input has one scale; give mode='weight_only' or "
        "'dynamic' with group",
    ),
    (
        {"group": 8, "activations": "affine"},
        "(group=8, activations='affine'): groups have no zero points; give "
        "activations='symmetric' with group",
    ),
    (
        {"include": (3,)},
        "(include=(3,)): give globs over module paths, or functions of a module path",
    ),
]


@pytest.mark.parametrize(("options", "text"), WRONG, ids=[text[:24] for _, text in WRONG])
def test_options_that_cannot_be_say_what_there_is(options: Options, text: str) -> None:
    with pytest.raises(PassError) as caught:
        Int8Linear(**options)
    assert str(caught.value) == f"Int8Linear{text}"


def _targets(program: Program, target: Any) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def _planned(pass_: Int8Linear, model: nn.Module, inputs: Any, calibration: Any = None) -> Program:
    program = capture(model, inputs)
    if calibration is not None:
        program = replace(program, calibration=Calibration(calibration, program.signature))
    return pass_.apply(program, pass_.plan(program))


@pytest.mark.parametrize("activations", ["affine", "symmetric"])
@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_static_scales_come_from_calibration(activations: Any, observer: Any) -> None:
    pass_ = Int8Linear(mode="static", activations=activations, observer=observer)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4))
    result = check(pass_, model, CALIBRATION[0], 3, calibration=CALIBRATION)
    rounded = _targets(result, ops.quantize.default)
    assert len(rounded) == 3
    for node in rounded:
        scale, zero = (result.tensor(str(operand.target)) for operand in node.args[1:])  # type: ignore[union-attr]
        assert scale.dtype == torch.float32
        assert scale.ndim == zero.ndim == 0
        assert zero.dtype == (torch.uint8 if activations == "affine" else torch.int8)
        assert activations == "affine" or int(zero) == 0


def test_a_static_range_is_that_of_the_calibration_inputs() -> None:
    inputs = [(torch.full((4, 8), float(value)),) for value in (-3, 1, 7)]
    pass_ = Int8Linear(mode="static", observer="minmax")
    result = _planned(pass_, nn.Linear(8, 8), inputs[1], inputs)
    (node,) = _targets(result, ops.quantize.default)
    scale, zero = (result.tensor(str(operand.target)) for operand in node.args[1:])  # type: ignore[union-attr]
    assert float(scale) == pytest.approx(10 / 255)
    assert int(zero) == round(3 / (10 / 255))


def test_values_beyond_the_range_saturate() -> None:
    inputs = [(torch.full((4, 8), value),) for value in (-1.0, 1.0)]
    pass_ = Int8Linear(mode="static", observer="minmax")
    model = nn.Linear(8, 8)
    result = _planned(pass_, model, inputs[0], inputs).materialized()
    (far,) = evaluate(result, (torch.full((4, 8), 100.0),))
    (edge,) = evaluate(result, (torch.full((4, 8), 1.0),))
    torch.testing.assert_close(far, edge, rtol=1e-2, atol=1e-2)


def test_static_inputs_that_are_shared_are_rounded_once() -> None:
    result = check(Int8Linear(mode="static"), Shared(), CALIBRATION[0], 3, calibration=CALIBRATION)
    assert len(_targets(result, ops.quantize.default)) == 2


def test_affine_tokens_have_a_zero_point_each() -> None:
    pass_ = Int8Linear(activations="affine")
    result = check(pass_, Shared(), (torch.randn(3, 8) + 2.0,), 3)
    assert len(_targets(result, ops.quantize_per_token_affine.default)) == 2


@pytest.mark.parametrize("group", [1, 4, 16])
def test_groups_of_input_channels_have_their_own_scale(group: int) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    pass_ = Int8Linear(mode="weight_only", group=group)
    result = check(pass_, model, (torch.randn(3, 16),), 2 if group < 16 else 1)
    assert tuple(result.state["0.weight_scale"].shape) == (8, 16 // group, 1)
    if group == 16:
        assert "its K = 8 is no multiple of group=16" in result.changes.refused[0].reason


@pytest.mark.parametrize("group", [4, 32])
def test_dynamic_groups_round_the_input_in_those_of_the_weight(group: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(3, 64)
    pass_ = Int8Linear(group=group, where="always")
    result = check(pass_, model, (x,), 2)
    rounded = _targets(result, ops.round_groups.default)
    assert [node.args[1] for node in rounded] == [group, group]
    fused = rewrite(result, fxopt.SelectKernels().rules(result))
    assert len(_targets(fused, ops.int8_grouped_linear.default)) == 2
    assert not _targets(fused, ops.round_groups.default)
    torch.testing.assert_close(evaluate(fused, (x,)), evaluate(result, (x,)), rtol=1e-2, atol=1e-2)


def test_dynamic_groups_have_all_eight_bits_on_every_cpu(monkeypatch: Any) -> None:
    monkeypatch.setattr("fxopt.passes.quantization.int8_planning.saturates", lambda device: True)
    monkeypatch.setattr("fxopt.passes.quantization.quantize_linear.saturates", lambda device: True)
    model, x = nn.Linear(64, 32), torch.randn(3, 64)
    result = check(Int8Linear(group=32), model, (x,), 1)
    assert int(result.state["weight_int8"].abs().max()) == 127


def test_groups_stay_truer_where_channels_differ() -> None:
    model, x = nn.Linear(64, 16), torch.randn(32, 64)
    with torch.no_grad():
        model.weight[:, :8] *= 50.0
        x[:, :8] /= 50.0
        truth = model(x)
    noise = [
        sqnr(truth, evaluate(_planned(pass_, model, (x,)).materialized(), (x,))[0])
        for pass_ in (Int8Linear(mode="weight_only"), Int8Linear(mode="weight_only", group=8))
    ]
    assert noise[1] > noise[0] + 10.0


def test_feedback_is_truer_than_the_nearest() -> None:
    torch.manual_seed(0)
    model, mix = nn.Linear(32, 16), torch.randn(32, 32) / 3
    batches = [(torch.randn(64, 8) @ mix[:8],) for _ in range(8)]
    x = torch.randn(256, 8) @ mix[:8]
    noise = {}
    for weights in ("nearest", "gptq"):
        pass_ = Int8Linear(mode="weight_only", weights=weights)  # type: ignore[arg-type]
        program = _planned(pass_, model, batches[0], batches).materialized()
        noise[weights] = sqnr(model(x), evaluate(program, (x,))[0])
    assert noise["gptq"] > noise["nearest"] + 2.0


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_feedback_goes_with_every_mode_and_spelling(mode: Any) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(3, 4, 8),) for _ in range(4)]
    check(Int8Linear(mode=mode, weights="gptq"), Spellings(), batches[0], 4, calibration=batches)


def test_include_and_exclude_may_be_functions_of_the_path() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    x = (torch.randn(3, 8),)

    def early(path: str) -> bool:
        return int(path) < 2

    assert check(Int8Linear(include=early), model, x, 1).state.keys() >= {"0.weight_int8"}  # type: ignore[arg-type]
    result = check(Int8Linear(exclude=(early, "3")), model, x, 1)
    assert "2.weight_int8" in result.state


def test_without_calibration_the_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = fxopt.transform(model, "int8-linear{mode=static}", example_inputs=(torch.randn(3, 8),))
    (warning,) = opt.report.steps[-1].warnings
    assert warning.startswith(
        "calibrated on the example alone (3 x 8), since calibration= was left out; the ranges of "
        "0, 2 come from it"
    )


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
def test_models_at_the_edge_are_handled(mode: Any) -> None:
    wide = Int8Linear(mode=mode, tied=True)
    check(wide, nn.Linear(1, 5), (torch.randn(3, 1),), 1)
    check(wide, nn.Linear(5, 1), (torch.randn(3, 5),), 1)
    check(wide, nn.Linear(8, 4), (torch.zeros(3, 8),), 1)
    check(wide, TiedHead(), (torch.randint(0, 20, (3, 5)),), 2)
    check(wide, IntegerLinear(), (torch.randint(-5, 5, (3, 8)),), 0)
    check(wide, nn.Sequential(nn.ReLU(), nn.LayerNorm(8)), (torch.randn(3, 8),), 0)
    check(wide, nn.Linear(8, 4), (torch.randn(2, 3, 5, 8),), 1)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("kernels", ["", ", select-kernels"])
def test_an_empty_batch_goes_through(mode: str, kernels: str) -> None:
    spec = f"int8-linear{{mode={mode}}}{kernels}"
    batches = [(torch.randn(0, 8),), *CALIBRATION]
    opt = fxopt.transform(nn.Linear(8, 4), spec, example_inputs=CALIBRATION[0], calibration=batches)
    assert opt(torch.randn(0, 8)).shape == (0, 4)


def test_a_layer_that_no_value_reached_is_named() -> None:
    opt = fxopt.transform(
        nn.Linear(8, 4),
        "int8-linear{mode=static}",
        example_inputs=CALIBRATION[0],
        calibration=[(torch.randn(0, 8),)],
        on_violation="revert",
    )
    warnings = opt.report.steps[1].warnings
    assert any("no value at all reached linear" in warning for warning in warnings), warnings


def test_a_second_pass_takes_what_the_first_left() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    passes = [Int8Linear(mode="static", max_layers=1), Int8Linear()]
    opt = fxopt.transform(model, passes, example_inputs=CALIBRATION[0], calibration=CALIBRATION)
    assert [step.fired for step in opt.report.steps[1:]] == [
        {"QuantizeLinear": 2},
        {"QuantizeLinear": 1},
    ]
    assert len(_targets(opt.program, ops.quantize.default)) == 2
    assert len(_targets(opt.program, ops.quantize_per_token.default)) == 1


def test_the_claim_depends_on_the_mode_and_can_be_replaced() -> None:
    assert Int8Linear().claim == Sqnr(16.0)
    assert Int8Linear(mode="weight_only").claim == Sqnr(26.0)
    assert Int8Linear(mode="static").claim == Sqnr(10.0)
    assert Int8Linear(budget=Sqnr(30.0)).claim == Sqnr(27.0)
    assert Int8Linear(claim=Close(0.1)).claim == Close(0.1)
    assert repr(Int8Linear(mode="weight_only")) == "Int8Linear(mode='weight_only')"


def test_quantizing_needs_no_copy_of_the_float_weight() -> None:
    model = nn.Linear(8, 8)
    program = capture(model, (torch.randn(3, 8),))
    result = Int8Linear().apply(program, Int8Linear().plan(program))
    assert set(result.state) == {"weight_int8", "weight_scale", "bias"}
    assert result.state["bias"] is model.bias
