"""What passes leave for one another to recognise is told by origins, not by names."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt import (
    FoldPruned,
    HalfLinear,
    Int8Linear,
    ShiftChannels,
    SmoothQuant,
    Sparsify24,
    SplitOutliers,
)
from fxopt.capture import capture
from fxopt.nodes import origins
from fxopt.pass_list import PASSES
from fxopt.passes.pruning.sparsify24 import SPARSE24
from fxopt.passes.quantization.shift_channels import SHIFT
from fxopt.passes.quantization.smoothing_rule import SMOOTHED
from fxopt.passes.quantization.split_outliers import MAIN, OUTLIERS
from fxopt.program import Changes, Mode, Origin, Program
from fxopt.rewriting import Pass, Plan

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
SUFFIXES = ("", "_main", "_outliers", "_shift", "_smoothed", "_sparse24", "_absorbed", "_scaled")
MARKING: dict[Pass, set[Origin]] = {
    SplitOutliers(2): {MAIN, OUTLIERS},
    ShiftChannels(): {SHIFT},
    SmoothQuant(): {SMOOTHED},
    Sparsify24(force=True): {SPARSE24},
}
PASSING = (*MARKING, FoldPruned())


class Named(nn.Module):
    """down(gelu(up(x - centre))) on parameters of any names, with channels that stick out, are off
    centre, and constant."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        centre, up, bias, down = (
            torch.randn(*shape, generator=draw) for shape in ((16,), (64, 16), (64,), (16, 64))
        )
        centre *= 30
        up[[3, 40]] = -20 * centre
        up[5] = 0.0
        self.names = tuple(names)
        for name, value in zip(names, (centre, up, bias, down), strict=True):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        centre, up, bias, down = (self.get_parameter(name) for name in self.names)
        return functional.linear(functional.gelu(functional.linear(x - centre, up, bias)), down)


PLAIN = ("qa", "qb", "qc", "qd")


def planned(pass_: Pass, names: Sequence[str]) -> tuple[Program, Plan]:
    program = capture(Named(names), (X,))
    return program, pass_.plan(program)


def applied(program: Program, *passes: Pass) -> Program:
    for pass_ in passes:
        program = pass_.apply(program, pass_.plan(program))
    return replace(program, changes=Changes())


def transformed(model: nn.Module, pass_: Pass, mode: Mode = "eval") -> fxopt.Optimized:
    return fxopt.transform(
        model,
        [pass_],
        example_inputs=(X,),
        calibration=[X],
        mode=mode,
        verify=False,
        measure_cost=False,
    )


def made(program: Program) -> set[Origin]:
    return set(itertools.chain(*program.origins.values()))


@pytest.mark.parametrize("pass_", PASSING, ids=lambda pass_: pass_.name)
@given(st.lists(st.sampled_from(SUFFIXES), min_size=4, max_size=4), st.sampled_from(("", "_1")))
@example(["_shift", "_main", "_outliers", "_smoothed"], "")
@example(["_shift", "_smoothed", "_main", "_sparse24"], "")
@example(["_shift", "_absorbed", "_absorbed", "_absorbed"], "")
def test_names_of_parameters_mean_nothing(pass_: Pass, suffixes: list[str], number: str) -> None:
    names = [name + suffix + number for name, suffix in zip(PLAIN, suffixes, strict=True)]

    def plain(text: object) -> str:
        for given_name, name in zip(names, PLAIN, strict=True):
            text = str(text).replace(given_name, name)
        return str(text)

    (program, plan), (other, expected) = planned(pass_, names), planned(pass_, PLAIN)
    assert expected.sites, "a test of nothing"
    assert plain(plan) == str(expected)
    result, rewritten = pass_.apply(program, plan), pass_.apply(other, expected)
    assert plain(result.graph) == str(rewritten.graph)
    assert {plain(name): one for name, one in result.origins.items()} == rewritten.origins
    assert result.changes.fired == rewritten.changes.fired


def test_a_name_that_a_pass_would_give_is_taken() -> None:
    result = applied(capture(Named(("qa", "down_main", "qc", "down")), (X,)), SplitOutliers(2))
    assert result.origins["down_main_1"] == (MAIN,)
    assert "down_main" not in result.origins


@pytest.mark.parametrize("pass_", MARKING, ids=lambda pass_: pass_.name)
def test_a_pass_marks_what_it_makes(pass_: Pass) -> None:
    program = capture(Named(PLAIN), (X,))
    assert not program.origins
    result = applied(program, pass_)
    assert made(result) == MARKING[pass_]
    assert all(PASSES[origin.pass_name] is type(pass_) for origin in MARKING[pass_])
    assert set(result.origins) <= set(result.state)
    assert not program.origins


@pytest.mark.parametrize(
    "between", [*MARKING, FoldPruned(), None], ids=lambda one: one.name if one else "none"
)
@pytest.mark.parametrize("pass_", MARKING, ids=lambda pass_: pass_.name)
def test_a_pass_recognises_what_it_made(pass_: Pass, between: Pass | None) -> None:
    """Whatever another pass has made of it since."""
    once = applied(capture(Named(PLAIN), (X,)), pass_)
    program = once if between is None else applied(once, between)
    assert MARKING[pass_] <= made(program)
    assert not pass_.plan(program).sites


def _saved(opt: fxopt.Optimized, folder: Path) -> nn.Module:
    opt.save(folder / "opt")
    return fxopt.load(folder / "opt")


def _reloaded(opt: fxopt.Optimized, folder: Path) -> nn.Module:
    opt = copy.deepcopy(opt)
    opt.load_state_dict({name: tensor * 1.01 for name, tensor in opt.state_dict().items()})
    return opt


LATER: dict[str, Callable[[fxopt.Optimized, Path], nn.Module]] = {
    "itself": lambda opt, folder: opt,
    "saved and loaded": _saved,
    "pickled": lambda opt, folder: pickle.loads(pickle.dumps(opt)),
    "copied": lambda opt, folder: copy.deepcopy(opt),
    "over other weights": _reloaded,
    "within another": lambda opt, folder: nn.Sequential(nn.Identity(), opt, nn.Softmax(-1)),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("pass_", MARKING, ids=lambda pass_: pass_.name)
def test_it_is_recognised_later(pass_: Pass, later: str, tmp_path: Path) -> None:
    opt = transformed(Named(PLAIN), pass_)
    again = transformed(LATER[later](opt, tmp_path), pass_)
    assert made(again.program) == MARKING[pass_]
    assert len(again.program.origins) == len(opt.program.origins)
    assert not again.steps[-1].record.fired


@pytest.mark.parametrize("pass_", [SplitOutliers(2), SmoothQuant()], ids=repr)
@pytest.mark.parametrize("trains", [True, False])
def test_it_is_recognised_after_training(pass_: Pass, trains: bool) -> None:
    opt = transformed(Named(PLAIN), pass_, "train")
    step = torch.optim.SGD(opt.parameters(), lr=1e-12)
    opt(X).square().mean().backward()
    step.step()
    mode: Any = "train" if trains else "eval"
    again = transformed(opt.train(trains), pass_, mode)
    assert again.program.mode == mode
    assert made(again.program) == made(opt.program) == MARKING[pass_]
    assert not again.steps[-1].record.fired


@pytest.mark.parametrize("between", [SmoothQuant(), HalfLinear(), Sparsify24(force=True)], ids=repr)
def test_outliers_stay_in_float_whatever_comes_between(between: Pass) -> None:
    program = applied(capture(Named(PLAIN), (X,)), SplitOutliers(2), between)
    result = applied(program, Int8Linear(mode="static", where="always"))
    kept = [n for n in result.graph.nodes if n.op == "get_attr" and OUTLIERS in origins(n)]
    assert len(kept) == 2
    assert all(node.meta["val"].dtype.is_floating_point for node in kept)
