"""Int4Linear: every spelling of a linear, what it must leave alone, feedback, and its kernel."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import Close, Int4Linear, PassError, Sqnr
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.graph_text import text
from fxopt.interpreter import evaluate
from fxopt.pass_list import resolve_passes
from fxopt.passes.linear_layers import weight_inputs
from fxopt.passes.quantization.int4_linear import SelectGroupedInt4Linear, SelectInt4Linear
from fxopt.program import Changes, Program
from fxopt.rewriting import SingleRule, rewrite
from fxopt.saving import load, save
from tests.check import check
from tests.models import TiedHead
from tests.sweeps import in_parts

ops = torch.ops.fxopt
X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Spellings(nn.Module):
    """linear, addmm (Conv1D), matmul and x.mm(W.t()), one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.conv1d = Conv1D(64, 64)
        nn.init.normal_(self.conv1d.weight, std=0.12)
        nn.init.normal_(self.conv1d.bias)
        self.right = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1d(self.linear(x))
        x = x @ self.right
        return x.reshape(-1, 64).mm(self.right.t())


class Shared(nn.Module):
    """One layer that two inputs meet, and one input that two layers meet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.a(x.relu())


def mixed(rows: int, seed: int = 0) -> Tensor:
    """Inputs [rows, 64] that are correlated and of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(-1, 0.5, 64)
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) @ mixing / 8


def calibrated(model: nn.Module, batches: list[Tensor]) -> Program:
    program = capture(model.eval(), (batches[0],))
    return replace(program, calibration=Calibration(batches, program.signature))


def applied(pass_: fxopt.Pass, program: Program) -> Program:
    return replace(pass_.apply(program, pass_.plan(program)), changes=Changes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_spelling_of_a_linear(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 64, dtype=dtype)
    result = check(Int4Linear(), Spellings().to(dtype), (x,), {"QuantizeInt4Linear": 4})
    packed = {name: t for name, t in result.state.items() if t.dtype == torch.uint8}
    assert [(t.dtype, tuple(t.shape)) for t in packed.values()] == [(torch.uint8, (64, 32))] * 4
    assert {tuple(t.shape) for n, t in result.state.items() if "_scale" in n} == {(64, 1, 1)}


@st.composite
def stacks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Int4Linear, int]:
    """Linears of drawn widths, a pass, and how many of them it takes."""
    widths = draw(st.lists(st.sampled_from([1, 5, 32, 40, 64, 96, 128]), min_size=2, max_size=4))
    group = draw(st.sampled_from([None, 2, 8, 32]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers = [nn.Linear(*pair, bias=draw(st.booleans())) for pair in itertools.pairwise(widths)]
    for layer in layers:
        kind = draw(st.sampled_from(["plain", "equal", "outlier", "denormal", "zeros"]))
        with torch.no_grad():
            if kind == "equal":
                layer.weight.fill_(0.1)
            elif kind == "outlier":
                layer.weight[0, 0] = 30.0
            elif kind in ("denormal", "zeros"):
                layer.weight[1:] *= 1e-42 if kind == "denormal" else 0.0
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    fits = [width % (group or 32) == 0 for width in widths[:-1]]
    model = nn.Sequential(*layers).to(dtype)
    # Hostile weights leave no signal for a decibel claim to be sure of; numbers must stay finite.
    claim = Close(2.0, atol=1.0)
    pass_ = Int4Linear(
        group,
        claim=claim,
        scheme=draw(st.sampled_from(["symmetric", "affine"])),
        activations=draw(st.sampled_from(["float", "int8"])),
    )
    return model, torch.randn(3, widths[0]).to(dtype), pass_, sum(fits)


@in_parts(25)
@given(stacks())
def test_drawn_stacks_of_linears(drawn: Any) -> None:
    model, x, pass_, count = drawn
    result = check(pass_, model, (x,), count)
    assert len(result.changes.refused) == len(model) - count


@in_parts(25)
@given(stacks())
def test_the_kernel_computes_what_the_numerics_say(drawn: Any) -> None:
    model, x, pass_, count = drawn
    program = applied(pass_, capture(model, (x,)))
    fused = rewrite(program, (SelectGroupedInt4Linear(), SelectInt4Linear()))
    grouped = pass_.activations == "int8"
    rule = "SelectGroupedInt4Linear" if grouped else "SelectInt4Linear"
    assert fused.changes.fired == ({rule: count} if count else {})
    (before,), (after,) = evaluate(program, (x,)), evaluate(fused, (x,))
    # Behind the first layer, what differs by rounding may round to the next int8.
    close = 6e-2 if x.dtype == torch.bfloat16 else 2e-2 if grouped and count > 1 else 1e-5
    assert Close(close).measure(before, after).holds


def test_activations_in_int8_are_rounded_once_for_layers_that_share_them() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    pass_ = Int4Linear(activations="int8")
    result = check(pass_, Shared(), (x,), 3)
    rounded = [node for node in result.graph.nodes if node.target is ops.round_groups.default]
    assert [node.args[1] for node in rounded] == [64, 64]
    fused = rewrite(replace(result, changes=Changes()), (SelectGroupedInt4Linear(),))
    assert fused.changes.fired == {"SelectGroupedInt4Linear": 3}
    assert not any(node.target is ops.round_groups.default for node in fused.graph.nodes)


def test_an_input_in_other_groups_than_the_weight_is_left_to_the_operators() -> None:
    program = applied(Int4Linear(group=32, activations="int8"), capture(nn.Linear(64, 8), (X,)))
    (node,) = [node for node in program.graph.nodes if node.target is ops.round_groups.default]
    node.args = (node.args[0], 16)
    fused = rewrite(program, (SelectGroupedInt4Linear(), SelectInt4Linear()))
    assert fused.changes.fired == {"SelectInt4Linear": 1}
    torch.testing.assert_close(evaluate(fused, (X,)), evaluate(program, (X,)))


@pytest.mark.parametrize("group", [None, 64])
def test_affine_groups_have_a_zero_point_and_are_truer(group: int | None) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(128, 64, bias=False), torch.randn(90, 128)
    nn.init.normal_(model.weight)
    pass_ = Int4Linear(group, scheme="affine")
    assert pass_.claim == Sqnr(7.0)
    result = check(pass_, model, (x,), 1)
    shape = (64, 128 // (group or 32), 1)
    assert {(t.dtype, tuple(t.shape)) for t in result.state.values()} == {
        (torch.uint8, (64, 64)),
        (torch.float16, shape),
    }
    assert set(result.state) == {"weight_int4", "weight_scale", "weight_zero_point"}
    symmetric = applied(Int4Linear(group or 32), capture(model, (x,)))
    errors = [sqnr(model(x).detach(), evaluate(one, (x,))[0]) for one in (symmetric, result)]
    assert errors[1] > errors[0] + 1.5


@pytest.mark.parametrize(
    ("inner", "group"), [(256, 128), (192, 64), (96, 32), (32, 32), (384, 128)]
)
def test_the_group_is_the_largest_that_fits(inner: int, group: int) -> None:
    result = check(Int4Linear(), nn.Linear(inner, 8), (torch.randn(3, inner),), 1)
    assert tuple(result.state["weight_scale"].shape) == (8, inner // group, 1)


def test_layers_that_no_group_fits_are_refused() -> None:
    result = check(Int4Linear(), nn.Linear(40, 8), (torch.randn(3, 40),), 0)
    assert "its K = 40 is no multiple of 32 or 64 or 128" in result.changes.refused[0].reason
    result = check(Int4Linear(group=64), nn.Linear(96, 8), (torch.randn(3, 96),), 0)
    assert "its K = 96 is no multiple of 64" in result.changes.refused[0].reason


def test_shared_weights_are_kept_once() -> None:
    result = check(Int4Linear(), Shared(), (torch.randn(3, 64),), 3)
    packed = sorted(name for name in result.state if name.endswith("_int4"))
    assert packed == ["a.weight_int4", "b.weight_int4"]


def test_a_tied_head_is_left_out_unless_asked_for() -> None:
    model, ids = TiedHead(32), torch.randint(0, 20, (3, 5))
    result = check(Int4Linear(), model, (ids,), 1)
    (refusal,) = result.changes.refused
    assert "embedding.weight is tied: embedding reads it too" in refusal.reason
    assert result.state["embedding.weight"] is model.embedding.weight
    check(Int4Linear(tied=True), model, (ids,), 2)


def test_include_and_exclude_are_globs_or_functions_of_the_path() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    x = (torch.randn(3, 32),)
    result = check(Int4Linear(exclude="3"), model, x, 2)  # type: ignore[arg-type]
    assert "in exclude=('3',)" in result.changes.refused[0].reason
    check(Int4Linear(include=(lambda path: path != "2",)), model, x, 2)


def test_the_state_shrinks_to_four_bits_and_a_scale() -> None:
    program = capture(nn.Linear(1024, 256, bias=False), (torch.randn(2, 1024),))
    result = applied(Int4Linear(), program)
    assert result.parameter_bytes() == 256 * 1024 // 2 + 4 * 256 * 8


def test_feedback_from_calibration_is_truer_than_the_nearest() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    program = calibrated(model, [mixed(200, seed) for seed in range(4)])
    x = mixed(300, 9)
    expected = model(x).detach()
    ratios = []
    for weights in ("nearest", "gptq"):
        pass_ = Int4Linear(weights=weights)  # type: ignore[arg-type]
        plan = pass_.plan(program)
        assert not plan.warnings
        (output,) = evaluate(pass_.apply(program, plan), (x,))
        ratios.append(sqnr(expected, output))
    assert ratios[1] > ratios[0] + 3.0


def test_feedback_keeps_what_every_pass_owes() -> None:
    torch.manual_seed(0)
    check(Int4Linear(weights="gptq"), Spellings(), (torch.randn(30, 4, 64),), 4)
    check(Int4Linear(weights="gptq"), Shared(), (torch.randn(90, 64),), 3)


LEARNT = [
    ("symmetric", "gptq"),
    ("symmetric", "awq"),
    ("symmetric", "awq-gptq"),
    ("affine", "weighted"),
    ("affine", "gptq"),
    ("affine", "awq"),
    ("affine", "awq-gptq"),
]


@pytest.mark.parametrize(("scheme", "weights"), LEARNT)
def test_what_learns_from_calibration_keeps_what_every_pass_owes(scheme: Any, weights: Any) -> None:
    torch.manual_seed(0)
    pass_ = Int4Linear(weights=weights, scheme=scheme)
    # A weight that two inputs meet has no scale, nor one that is read transposed too; one that
    # doesn't gain isn't put in.
    gains = {"symmetric": 1, "affine": 2}[scheme] if weights.startswith("awq") else 0
    fired = {"QuantizeInt4Linear": 4, "SmoothLinear": gains}
    check(pass_, Spellings(), (torch.randn(30, 4, 64),), fired)
    fired = {"QuantizeInt4Linear": 3, "SmoothLinear": int(gains > 0)}
    check(pass_, Shared(), (torch.randn(90, 64),), fired)


@pytest.mark.parametrize(("scheme", "weights"), LEARNT)
def test_from_too_little_is_warned_of(scheme: Any, weights: Any) -> None:
    program = capture(nn.Linear(64, 8), (torch.randn(3, 64),))
    printed = str(Int4Linear(weights=weights, scheme=scheme).plan(program))
    assert "calibrated on the example alone (3 x 64), since calibration= was left out" in printed
    assert "give calibration= at least 32 samples of real inputs" in printed
    assert "was fitted to 3 rows of 64 channels, and can be worse than the nearest" in printed
    assert "give calibration= more inputs, or weights='nearest'" in printed
    assert printed.count("warning") == 2


def test_what_needs_no_data_asks_for_none() -> None:
    program = capture(nn.Linear(64, 8), (torch.randn(3, 64),))
    assert "warning" not in str(Int4Linear().plan(program))
    assert "warning" not in str(Int4Linear(scheme="affine", weights="hqq").plan(program))


@pytest.mark.parametrize("weights", ["weighted", "gptq", "awq", "awq-gptq"])
def test_affine_groups_learn_from_calibration(weights: Any) -> None:
    """Outputs on calibration are truer than by the nearest, by as much as each method promises."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    model.weight.data *= torch.randn(64).mul(0.5).exp()
    program = calibrated(model, [mixed(200, seed) for seed in range(4)])
    x = torch.cat([mixed(200, seed) for seed in range(4)])
    expected = model(x).detach()

    def decibels(one: Any) -> float:
        pass_ = Int4Linear(scheme="affine", weights=one)
        return sqnr(expected, evaluate(pass_.apply(program, pass_.plan(program)), (x,))[0])

    gained = decibels(weights) - decibels("nearest")
    assert gained > {"weighted": 0.7, "gptq": 4.0, "awq": 1.0, "awq-gptq": 4.0}[weights]


def test_moments_are_learnt_in_as_many_passes_as_memory_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    program = calibrated(Shared(), [mixed(100, 0), mixed(100, 1)])
    pass_ = Int4Linear(weights="gptq")
    whole = applied(pass_, program)
    monkeypatch.setattr(weight_inputs, "_MOST_BYTES", 1)
    passes = []
    monkeypatch.setattr(
        weight_inputs, "observe", lambda *args: passes.append(1) or fxopt.observation.observe(*args)
    )
    parts = applied(pass_, program)
    assert len(passes) == 2
    assert all(torch.equal(parts.tensor(name), whole.tensor(name)) for name in whole.state)


def test_spared_sites_stay_as_they_are_with_feedback_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    program = calibrated(model, [mixed(100)])
    pass_ = Int4Linear(weights="gptq")
    plan = pass_.plan(program)
    result = pass_.apply(program, plan.without([plan.sites[0].node]))
    assert "0.weight" in result.state
    assert "1.weight_int4" in result.state


def test_a_weight_that_is_not_finite_names_layer_and_row() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    model[1].weight.data[2, 5] = float("inf")
    program = capture(model, (torch.randn(3, 32),))
    with pytest.raises(PassError, match=r"1 \(linear_1\): .*output channel 2 holds NaN or inf"):
        applied(Int4Linear(), program)
    applied(Int4Linear(exclude="1"), program)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, r"group=3\): give an even number of input channels, such as 128, 64 or 32"),
        ({"group": "big"}, r"group='big'\): give an even number"),
        (
            {"weights": "best"},
            r"weights='best'\): give one of 'nearest', 'hqq', 'weighted', 'gptq'",
        ),
        ({"include": (3,)}, r"include=\(3,\)\): give globs over module paths, or functions of"),
    ],
)
def test_wrong_options_say_what_to_give(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        Int4Linear(**options)


@pytest.mark.parametrize("weights", ["hqq", "weighted"])
def test_what_fits_zero_points_needs_affine_groups(weights: Any) -> None:
    with pytest.raises(PassError, match="give scheme='affine', or weights='nearest', 'gptq'"):
        Int4Linear(weights=weights)
    assert Int4Linear(weights=weights, scheme="affine").weights == weights


def test_it_has_a_textual_form_and_a_repr() -> None:
    (parsed,) = resolve_passes("int4-linear{group=64, weights=gptq, exclude=head, claim=sqnr(9)}")
    assert parsed == Int4Linear(64, "gptq", exclude=("head",), claim=Sqnr(9.0))
    assert repr(parsed) == (
        "Int4Linear(group=64, weights='gptq', exclude=('head',), claim=Sqnr(db=9.0))"
    )
    assert resolve_passes(parsed.spec) == (parsed,)


def test_regions_of_other_shapes_are_not_selected() -> None:
    x = torch.randn(3, 64)
    program = applied(Int4Linear(), capture(nn.Linear(64, 8), (x,)))
    assert SingleRule(SelectInt4Linear()).plan(program).sites
    scale = torch.nn.functional.pad(program.tensor("weight_scale"), (0, 63)) + 1
    wide = replace(program, state={**program.state, "weight_scale": scale})
    for node in wide.graph.nodes:
        if node.target == "weight_scale":
            with program.fake_mode:
                node.meta["val"] = torch.empty(scale.shape)
    plan = SingleRule(SelectInt4Linear()).plan(wide)
    assert not plan.sites
    assert "its scales are not one for each group of columns" in str(plan)


@pytest.mark.parametrize("weights", ["nearest", "awq-gptq"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("fused", [False, True])
def test_it_is_saved_and_loaded(fused: bool, scheme: Any, weights: Any, tmp_path: Path) -> None:
    x = torch.randn(3, 4, 64)
    program = applied(Int4Linear(scheme=scheme, weights=weights), capture(Spellings(), (x,)))
    if fused:
        program = replace(rewrite(program, (SelectInt4Linear(),)), changes=Changes())
    save(program.materialized(), tmp_path / "saved")
    loaded = load(tmp_path / "saved").program
    assert text(loaded) == text(program)
    for one, other in zip(evaluate(program, (x,)), evaluate(loaded, (x,)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowered_it_calls_the_kernel(dtype: torch.dtype, scheme: Any) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64), nn.Linear(64, 16))
    model, x = model.to(dtype).eval(), torch.randn(5, 64).to(dtype)
    passes = [Int4Linear(group=16, scheme=scheme), SelectInt4Linear(), fxopt.Lower(strict=True)]
    opt = fxopt.transform(model, passes, example_inputs=(x,), measure_cost=False)
    for batch in (5, 1, 9):
        y = torch.randn(batch, 64).to(dtype)
        assert Sqnr(8.0).measure(model(y).detach(), opt(y).detach()).holds
