"""HalfLinear(weight_only=True): weights that half precision holds are stored in it, no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import Close, HalfLinear, PassError, Sqnr, wellformed
from fxopt.capture import capture
from fxopt.pass_list import parse_passes
from fxopt.passes.mixed_precision.half_linear import HalfPlan
from fxopt.program import Program
from fxopt.rewriting import rewrite
from tests.check import assert_close_to_model, assert_unchanged, check
from tests.generation.language_models import language_model
from tests.models import Drawn, TiedHead, models

aten, ops = torch.ops.aten, torch.ops.fxopt
DTYPES = (torch.bfloat16, torch.float16)
IDS = torch.tensor([[3, 7, 7, 0, 19], [1, 2, 7, 5, 19]])


def held(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model with float32 parameters that `dtype` holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def weight_only(**options: Any) -> HalfLinear:
    return HalfLinear(weight_only=True, **options)


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def reasons(result: Program) -> list[str]:
    return [refusal.reason for refusal in result.changes.refused]


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_weight_is_in_the_dtype_that_holds_it(dtype: torch.dtype) -> None:
    model = nn.Sequential(held(nn.Linear(8, 6), dtype), nn.ReLU(), nn.Linear(6, 4))
    result = check(weight_only(), model, (torch.randn(3, 8),), {"StoreInHalf": 1})
    assert {name: t.dtype for name, t in result.state.items()} == {
        f"0.weight_{str(dtype).removeprefix('torch.')}": dtype,
        "0.bias": torch.float32,
        "2.weight": torch.float32,
        "2.bias": torch.float32,
    }
    (reason,) = reasons(result)
    changed = [int((model[2].weight != model[2].weight.to(d).float()).sum()) for d in DTYPES]
    name = "torch.bfloat16" if changed[0] <= changed[1] else "torch.float16"
    assert reason == (
        f"{name} would round {min(changed)} of the 24 values of its weight; lossless=False does it "
        "all the same"
    )


def test_what_is_computed_is_what_was_computed() -> None:
    model, x = held(nn.Linear(64, 48)), torch.randn(3, 64)
    program = capture(model, (x,))
    result = check(weight_only(), model, (x,), 1).materialized()
    assert torch.equal(result.state["weight_bfloat16"].float(), program.state["weight"])


def test_every_spelling_of_a_linear() -> None:
    class Spellings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d, self.right = Conv1D(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = (self.conv1d(x) @ self.right).mm(self.right.t())
            return y

    result = check(weight_only(), held(Spellings()), (torch.randn(3, 8),), {"StoreInHalf": 3})
    assert targets(result).count(ops.half_weight_only_linear.default) == 3


def test_rounding_is_asked_for_and_told() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), held(nn.Linear(8, 8))), torch.randn(3, 8)
    pass_ = weight_only(dtype=torch.bfloat16, lossless=False)
    assert pass_.claim == Sqnr(30.0)
    check(pass_, model, (x,), 2)
    details = pass_.plan(capture(model, (x,))).details
    assert details == ("2 weights are stored in torch.bfloat16, 1 of them rounded",)
    exact = weight_only().plan(capture(model, (x,))).details
    assert exact == ("1 weights are stored in torch.bfloat16, each value as it was",)


@pytest.mark.parametrize("value", [float("inf"), 1e30])
def test_values_past_the_range_are_not_lost(value: float) -> None:
    layer = held(nn.Linear(8, 8))
    with torch.no_grad():
        layer.weight[0, 0] = value  # type: ignore[index, operator]
    program = capture(layer, (torch.randn(3, 8),))
    plan = weight_only(dtype=torch.float16).plan(program)
    assert len(plan.sites) == (value == float("inf"))


def test_a_table_that_a_head_shares_is_stored_once_for_both() -> None:
    model = held(TiedHead())
    result = check(weight_only(), model, (IDS,), {"LookUpInHalf": 1, "StoreInHalf": 2})
    shared = [name for name, tensor in result.state.items() if tensor.shape == (20, 8)]
    assert len(shared) == 1
    assert result.state[shared[0]].dtype == torch.bfloat16


def test_a_table_stays_where_its_head_does() -> None:
    result = check(weight_only(exclude="head"), held(TiedHead()), (IDS,), {"StoreInHalf": 1})
    assert {tuple(t.shape): t.dtype for t in result.state.values()}[20, 8] == torch.float32
    result = check(weight_only(), TiedHead(), (IDS,), 0)
    assert len(reasons(result)) == 2


class ReadTwice(TiedHead):
    """The tied weight is read by a norm too."""

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = super().forward(ids)
        return y + self.head.weight.sum()


def test_a_weight_that_something_else_reads_is_left_alone_unless_asked_for() -> None:
    model = held(ReadTwice())
    result = check(weight_only(), model, (IDS,), {"StoreInHalf": 1})
    assert reasons(result) == ["its weight embedding.weight is tied: sum reads it too"]
    check(weight_only(tied=True), model, (IDS,), {"LookUpInHalf": 1, "StoreInHalf": 2})


def test_other_floats_and_what_trains_are_left_alone() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    result = check(weight_only(), nn.Linear(8, 8).double(), (x,), 0)
    assert reasons(result) == [
        "its weight is torch.float64; only float32 is stored in half precision"
    ]
    program = capture(held(nn.Linear(8, 8)), (torch.randn(3, 8),), mode="train")
    (refusal,) = weight_only().plan(program).refusals
    assert refusal.reason == "it trains, and steps of training are lost in half precision"


def test_kernels_that_pack_floats_leave_them_alone() -> None:
    model, x = held(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), torch.randn(3, 8)
    opt = fxopt.transform(
        model,
        [weight_only(), fxopt.Canonicalize(), fxopt.SelectKernels(), fxopt.Prepack()],
        example_inputs=(x,),
    )
    assert targets(opt.program) == [ops.half_weight_only_linear.default, aten.relu.default]


@given(models(), st.sampled_from(DTYPES))
def test_any_model_is_well_formed_smaller_and_close(drawn: Drawn, dtype: torch.dtype) -> None:
    program = capture(held(drawn.model, dtype), drawn.example)
    pass_ = weight_only(dtype=dtype, tied=True)
    result = pass_.apply(program, pass_.plan(program)).materialized()
    wellformed.check(result)
    assert_unchanged(pass_, result)
    fired = result.changes.fired.get("StoreInHalf", 0)
    assert targets(result).count(ops.half_weight_only_linear.default) == fired
    assert bool(fired) == (result.parameter_bytes() < program.parameter_bytes())
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(pass_.claim, drawn.model, result, call)


def test_a_weight_that_was_rounded_unseen_breaks_the_claim() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(3, 64)
    program, pass_ = capture(layer, (x,)), weight_only(lossless=False)
    plan = pass_.plan(program)
    assert isinstance(plan, HalfPlan)
    assert plan.weights is not None
    wrong = rewrite(program, plan.weights.rules()).materialized()
    with pytest.raises(AssertionError):
        assert_close_to_model(Close(), layer, wrong, (x,))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_a_language_model_writes_what_it_wrote(name: str, tmp_path: Path) -> None:
    model = held(language_model(name))
    passes = [fxopt.Canonicalize(), fxopt.FuseLinears(), weight_only()]
    opt = fxopt.transform(model, passes)
    prompt = torch.tensor([[5, 17, 9]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    written = model.generate(prompt, **options)
    assert torch.equal(opt.generate(prompt, **options), written)
    before, after = capture(model, {"input_ids": prompt, "use_cache": False}), opt.program
    assert after.parameter_bytes() < 0.6 * before.parameter_bytes()
    opt.save(tmp_path / "writer.fxopt")
    loaded: Any = fxopt.load(tmp_path / "writer.fxopt")
    assert torch.equal(loaded.generate(prompt, **options), written)


def test_options_are_checked() -> None:
    assert weight_only().claim == Close()
    assert weight_only(lossless=False, dtype="float16").claim == Sqnr(45.0)
    assert repr(weight_only()) == "HalfLinear(weight_only=True)"
    pass_ = weight_only(lossless=False)
    assert parse_passes(pass_.spec) == (pass_,)
    with pytest.raises(PassError, match="give weight_only=True with it"):
        HalfLinear(lossless=False)
    with pytest.raises(PassError, match="leave device and force out"):
        weight_only(force=True)
