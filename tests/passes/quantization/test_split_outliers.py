"""SplitOutliers: what is split, what is refused, and that static int8 gains by it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt import Close, Int8Linear, PassError, SelectKernels, SplitOutliers
from fxopt.capture import capture
from fxopt.claim import sqnr
from fxopt.program import Program
from fxopt.rewriting import Pass
from tests.check import check

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


class FeedForward(nn.Module):
    """up, activation, down; some channels between are far larger than the others."""

    def __init__(self, activation: nn.Module | None = None, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(16, 64, bias=bias), nn.Linear(64, 16, bias=bias)
        self.activation = activation or nn.GELU()
        with torch.no_grad():
            self.up.weight[[3, 40]] *= 60

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Norm(nn.Module):
    """A norm with one huge channel, read by two linears and by a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(16, 16)
        with torch.no_grad():
            self.norm.weight[5] = 50.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.a(y), self.b(y) + y


def after(model: nn.Module, *passes: Pass) -> Program:
    program = capture(model, (X,))
    for pass_ in passes:
        program = pass_.apply(program, pass_.plan(program))
    return program.materialized()


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "activation", [nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh()]
)
@pytest.mark.parametrize("bias", [True, False])
def test_outliers_are_computed_anew_from_a_few_rows(activation: nn.Module, bias: bool) -> None:
    model = FeedForward(activation, bias)
    if isinstance(activation, nn.Tanh):
        check(SplitOutliers(2), model, (X,), 0)
        return
    result = check(SplitOutliers(2), model, (X,), {"SplitLinear": 1})
    assert "aten.index_select.default" not in targets(result)
    assert result.state["down.weight_outliers"].shape == (16, 2)
    assert result.state["up.weight_outliers"].shape == (2, 16)
    assert not result.tensor("down.weight_main")[:, [3, 40]].any()


def test_outliers_of_a_norm_are_selected_once_for_all_readers() -> None:
    result = check(SplitOutliers(1), Norm(), (X,), {"SplitLinear": 2})
    assert targets(result).count("aten.index_select.default") == 1
    assert targets(result).count("aten.mul.Tensor") == 1


def test_even_channels_are_refused_with_the_figure() -> None:
    result = check(SplitOutliers(2), nn.Sequential(nn.Linear(16, 8)), (X,), 0)
    assert "times the rest, below 2" in result.changes.refused[0].reason


def test_narrow_integer_and_shared_linears_are_refused() -> None:
    narrow = check(SplitOutliers(16), nn.Sequential(nn.Linear(16, 8)), (X,), 0)
    assert "no more than would be split off" in narrow.changes.refused[0].reason
    excluded = check(SplitOutliers(2, exclude="down"), FeedForward(), (X,), 0)
    assert any("in exclude=('down',)" in one.reason for one in excluded.changes.refused)


def test_a_weight_met_by_two_inputs_keeps_its_mark_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)
            with torch.no_grad():
                self.norm.weight[5] = 50.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.linear(y) + self.linear(y.abs())

    result = check(SplitOutliers(1), Twice(), (X,), {"SplitLinear": 2})
    assert {name for name in result.state if "_outliers" in name} == {
        "linear.weight_outliers",
        "linear.weight_outliers_1",
    }
    plan = Int8Linear(where="always").plan(result)
    assert sum("outliers that SplitOutliers keeps" in one.reason for one in plan.refusals) == 2


def test_the_plan_says_how_far_the_outliers_stand_out() -> None:
    plan = SplitOutliers(2).plan(capture(FeedForward(), (X,)))
    assert any(line.startswith("down: 2 channels of up to ") for line in plan.details)
    assert "calibrated on the example alone" in plan.warnings[0]


def test_static_int8_gains_by_it_and_leaves_the_outliers_in_float() -> None:
    model = FeedForward()
    truth = model(X).detach()

    def db(*passes: Pass) -> float:
        opt = fxopt.transform(model, passes, example_inputs=(X,), calibration=[X], verify=False)
        return sqnr(truth, opt(X).detach())

    static = Int8Linear(mode="static", where="always")
    assert db(SplitOutliers(2), static) > db(static) + 6
    program = after(model, SplitOutliers(2), static)
    assert program.tensor("down.weight_outliers").dtype == torch.float32


def test_the_mask_leaves_the_chain_once_scales_are_known() -> None:
    static = Int8Linear(mode="static", where="always")
    program = after(FeedForward(), SplitOutliers(2), static, SelectKernels())
    found = targets(program)
    assert "aten.mul.Tensor" not in found
    assert found.count("fxopt.packed_int8_linear.default") == 2
    model = FeedForward()
    opt = fxopt.transform(model, [SplitOutliers(2), static, SelectKernels()], example_inputs=(X,))
    assert opt.steps[-1].record.holds


def test_a_mask_stays_where_the_weight_is_not_zero() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", (torch.arange(16) % 2).float())
            self.linear = nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x * self.mask)

    static = Int8Linear(mode="static", where="always")
    program = after(Masked(), static, SelectKernels())
    assert "aten.mul.Tensor" in targets(program)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 0}, "channels=0): give a whole number from 1 on"),
        ({"ratio": 1.0}, "ratio=1.0): give a number above 1"),
        ({"include": (3,)}, "give globs over module paths"),
    ],
)
def test_bad_options(options: dict[str, object], text: str) -> None:
    with pytest.raises(PassError) as raised:
        SplitOutliers(**options)  # type: ignore[arg-type]
    assert text in str(raised.value)


def _columns() -> Iterator[int]:
    yield from (1, 3, 7)


@given(
    st.integers(0, 2**16),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(list(_columns())),
    st.booleans(),
)
def test_any_split_is_exact_up_to_rounding(
    seed: int, dtype: torch.dtype, count: int, norm: bool
) -> None:
    torch.manual_seed(seed)
    model = (Norm() if norm else FeedForward()).to(dtype)
    x = torch.randn(3, 16, dtype=dtype)
    pass_ = SplitOutliers(count, ratio=1.01)
    assert pass_.claim == Close()
    program = capture(model, (x,))
    plan = pass_.plan(program)
    check(pass_, model, (x,), len(plan.sites))
