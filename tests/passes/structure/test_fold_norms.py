"""FoldNorms: a norm's weight and bias move into linears, unless something else reads the norm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import fxopt
from fxopt import EquivalenceError, FoldNorms
from fxopt.capture import capture
from fxopt.program import Program
from fxopt.recipe import Recipe, materialize
from tests.architectures import randomize
from tests.captured import canonicalized, case
from tests.check import assert_close_to_model, check
from tests.models import Drawn, sequence_models

aten = torch.ops.aten

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class WrittenOut(nn.Module):
    """The RMS norm of transformers: in float32, then weighted in the input's dtype."""

    def __init__(self, width: int, *, offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        if self.offset:
            return (y * (1.0 + self.weight.float())).type_as(x)
        return self.weight * y.to(x.dtype)


class Read(nn.Module):
    """Linears behind a norm, with and without bias; `behind` is what lies between."""

    def __init__(self, norm: nn.Module, behind: Any = lambda y: y) -> None:
        super().__init__()
        self.norm, self.behind = norm, behind
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.behind(self.norm(x))
        return self.a(y), self.b(y)


def norms() -> dict[str, nn.Module]:
    return {
        "layer norm": nn.LayerNorm(8),
        "layer norm without bias": nn.LayerNorm(8, bias=False),
        "rms norm": nn.RMSNorm(8),
        "rms norm written out": WrittenOut(8),
        "rms norm of 1 + weight": WrittenOut(8, offset=True),
    }


def refusal_of(model: nn.Module, x: Tensor = X) -> str:
    (refusal,) = check(FoldNorms(), randomize(model), (x,), 0).changes.refused
    return refusal.reason


def weights_of(result: Program) -> list[fx.Node]:
    """The norms of a program that still have a weight."""
    kinds = (aten.layer_norm.default, aten.rms_norm.default)
    found = [node for node in result.graph.nodes if node.target in kinds]
    return [node for node in found if any(isinstance(one, fx.Node) for one in node.args[2:])]


@pytest.mark.parametrize("name", norms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_each_norm_folds_into_the_linears_behind_it(name: str, dtype: torch.dtype) -> None:
    model = randomize(Read(norms()[name])).to(dtype)
    if dtype == torch.float64 and "of 1 + weight" in name:
        check(FoldNorms(), model, (X.to(dtype),), 0)  # it rounds to float32, for float64 to see
        return
    result = check(FoldNorms(), model, (X.to(dtype),), {"FoldNorm": 1})
    shifted = {"a.bias_folded", "b.bias_folded"} if name == "layer norm" else {"a.bias"}
    assert set(result.state) == {"a.weight_folded", "b.weight_folded", *shifted}
    assert not weights_of(result)


@pytest.mark.parametrize(
    "behind",
    [
        lambda y: y.reshape(-1, 8),
        lambda y: y[:, -1],
        lambda y: y[:, 1:].transpose(0, 1).contiguous(),
        lambda y: y.unsqueeze(1).expand(-1, 2, -1, -1),
        lambda y: y.flatten(0, 1).unsqueeze(0),
    ],
    ids=["reshape", "select", "transpose", "expand", "flatten"],
)
def test_views_that_keep_the_channels_are_seen_through(behind: Any) -> None:
    check(FoldNorms(), randomize(Read(nn.LayerNorm(8), behind)), (X,), {"FoldNorm": 1})


@pytest.mark.parametrize(
    "behind",
    [
        lambda y: y.transpose(1, 2).reshape(y.shape[0], -1, 8),
        lambda y: functional.pad(y[..., :4], (0, 4)),
        lambda y: y.flip(-1),
        lambda y: y.relu(),
    ],
    ids=["transpose", "slice", "flip", "relu"],
)
def test_what_moves_channels_or_computes_is_refused(behind: Any) -> None:
    reason = refusal_of(Read(nn.LayerNorm(8), behind))
    assert "reads it too, at" in reason
    assert reason.endswith(": only linears can take its weight")


def test_every_spelling_of_a_linear_takes_a_weight() -> None:
    class Spellings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv1d = nn.LayerNorm(8), Conv1D(6, 8)
            self.right = nn.Parameter(torch.randn(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            flat: Tensor = self.conv1d(y) + y @ self.right + functional.linear(y, self.right.t())
            return flat

    result = check(FoldNorms(), randomize(Spellings()), (X,), {"FoldNorm": 1})
    assert all(tuple(t.shape) in ((6, 8), (6,)) for t in result.state.values())


def test_folding_computes_nothing_before_it_is_needed() -> None:
    program = capture(Read(nn.LayerNorm(8)), (X,))
    result = FoldNorms().apply(program, FoldNorms().plan(program))
    weight = result.state["a.weight_folded"]
    assert isinstance(weight, Recipe)
    assert weight.sources[0] is program.state["a.weight"]


def test_a_weight_that_two_readers_share_is_folded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            result: Tensor = self.linear(y) * self.linear(y[:, :1])
            return result

    result = check(FoldNorms(), randomize(Twice()), (X,), 1)
    assert set(result.state) == {"linear.weight_folded", "linear.bias_folded"}


def test_a_residual_that_reads_the_norm_is_refused() -> None:
    class PostNorm(Read):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return y + self.a(y).sum(), self.b(y)

    reason = refusal_of(PostNorm(nn.LayerNorm(8)))
    assert reason == "add reads it too, at add: only linears can take its weight"


def test_an_output_is_refused() -> None:
    class Hidden(Read):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return self.a(y), y

    reason = refusal_of(Hidden(nn.RMSNorm(8)))
    assert reason == "it is an output of the model, which has its weight in it"


def test_a_product_of_two_activations_is_refused() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) @ x.transpose(1, 2)

    assert refusal_of(Scores()).endswith(": both of its sides are computed from the inputs")


def test_a_weight_that_something_else_reads_is_refused() -> None:
    class Tied(Read):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.norm(x)
            return self.a(y), self.a(x)

    reason = refusal_of(Tied(nn.LayerNorm(8)))
    assert (
        reason
        == "a (linear) can't take its weight: its weight a.weight is tied: linear reads it too"
    )


def test_norms_over_other_axes_are_left_alone() -> None:
    check(FoldNorms(), randomize(Read(nn.LayerNorm((5, 8)))), (X,), 0)
    check(FoldNorms(), randomize(Read(nn.LayerNorm(8, elementwise_affine=False))), (X,), 0)


def test_a_weight_from_the_inputs_is_refused() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.layer_norm(x, (8,), weight=x.mean((0, 1)))
            result: Tensor = self.linear(y)
            return result

    assert refusal_of(Modulated()) == "its weight is computed, not constant"


def test_what_trains_is_refused() -> None:
    program = capture(Read(nn.LayerNorm(8)), (X,), mode="train")
    (refusal,) = FoldNorms().plan(program).refusals
    assert refusal.reason == "its weight is trained, and would take other steps folded"
    frozen = Read(nn.LayerNorm(8).requires_grad_(False))
    (refusal,) = FoldNorms().plan(capture(frozen, (X,), mode="train")).refusals
    assert (
        refusal.reason == "the weight of a (linear) is trained, and would take other steps folded"
    )
    program = capture(frozen.requires_grad_(False), (X,), mode="train")
    assert len(FoldNorms().plan(program).sites) == 1


def test_mixed_dtypes_that_would_round_the_norm_are_refused() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.linear = nn.Parameter(torch.ones(8)), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.rms_norm(x, (8,), self.weight)
            result: Tensor = self.linear(y)
            return result

    (refusal,) = FoldNorms().plan(capture(randomize(Mixed()), (X.bfloat16(),))).refusals
    assert refusal.reason == (
        "its weight is torch.float32 and its input torch.bfloat16, to which it would round"
    )


def test_a_cast_that_shows_how_the_norm_was_rounded_is_refused() -> None:
    model = Read(nn.LayerNorm(8), lambda y: y.bfloat16().float())
    assert refusal_of(model).endswith(": torch.float32 shows how its value was rounded")
    check(FoldNorms(), randomize(Read(nn.LayerNorm(8), lambda y: y.float())), (X,), 1)


FIRES = {"bert": 0, "bert-sequence-classification": 1, "gpt2": 4, "llama": 5, "gemma": 4, "phi": 3}


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", FIRES)
def test_pre_norm_architectures_fold_and_post_norm_ones_say_why_not(name: str) -> None:
    shared = case(name)
    result = check(FoldNorms(), shared.model, shared.example, FIRES[name], others=shared.others)
    reasons = {refusal.reason for refusal in result.changes.refused}
    if name == "bert":
        assert any(reason.startswith("add reads it too, at encoder.layer.0") for reason in reasons)
    if name == "gpt2":
        assert reasons == {
            "lm_head (linear) can't take its weight: its weight transformer.wte.weight is tied: "
            "embedding reads it too"
        }


def test_llama_is_folded_fused_rounded_and_saved(tmp_path: Any) -> None:
    passes = "canonicalize, fold-norms, fuse-linears, smooth-quant, int8-linear{where=always}"
    opt = fxopt.transform(canonicalized("llama"), passes)
    assert opt.report.steps[2].fired == {"FoldNorm": 5}
    opt.save(tmp_path / "llama")
    loaded = fxopt.load(tmp_path / "llama")
    call = case("llama").others[0]
    torch.testing.assert_close(loaded(**call).logits, opt(**call).logits)


@settings(max_examples=20)
@given(
    sequence_models(last=lambda width: nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)))
)
def test_drawn_models_keep_the_claim(drawn: Drawn) -> None:
    pass_ = FoldNorms()
    program = capture(drawn.model, drawn.example)
    plan = pass_.plan(program)
    result = pass_.apply(program, plan).materialized()
    assert result.changes.fired.get("FoldNorm", 0) == len(plan.sites)
    assert plan.sites or plan.refusals
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(pass_.claim, drawn.model, result, call)


class Faulty(FoldNorms):
    """The pass with a fault in it: what it folded is that of the next channel."""

    def apply(self, program: Program, plan: fxopt.Plan) -> Program:
        result = super().apply(program, plan)
        state = {name: materialize(tensor) for name, tensor in result.state.items()}
        moved = {name: one.roll(1, -1) for name, one in state.items() if name.endswith("_folded")}
        return replace(result, state={**state, **moved})


@pytest.mark.parametrize("name", norms())
def test_a_fault_is_caught_and_reverted(name: str) -> None:
    model = randomize(Read(norms()[name]))
    with pytest.raises(EquivalenceError, match="broke its claim"):
        fxopt.transform(model, [Faulty()], example_inputs=(X,))
    opt = fxopt.transform(model, [Faulty()], example_inputs=(X,), on_violation="revert")
    torch.testing.assert_close(opt(X), model(X))
