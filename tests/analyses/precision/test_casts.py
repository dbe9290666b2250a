"""Casts counted in three ways: in the graph, as torch.autocast would do them, as they happen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import fxopt
from fxopt.analyses.precision import Casts, autocast_casts, counted_casts, graph_casts
from fxopt.capture import capture
from fxopt.errors import FxoptError, PassError
from fxopt.interpreter import evaluate
from fxopt.program import Program
from fxopt.recipe import Recipe
from tests.captured import captured, case
from tests.models import Drawn, ParallelLinears, models
from tests.rewriting.functions import program_of
from tests.sweeps import in_parts

X = torch.randn(2, 6, 16)
_HALF = torch.bfloat16


def _eager(model: nn.Module, call: dict[str, object], dtype: torch.dtype) -> Casts:
    """What torch.autocast casts in one call of the model."""

    def run() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype):
            model(**call)

    return counted_casts(run, [*model.parameters(), *model.buffers()])


def _evaluated(program: Program) -> Casts:
    """What evaluating the program on its example casts."""
    return counted_casts(lambda: evaluate(program, program.example), _tensors(program))


def _tensors(program: Program) -> list[Tensor]:
    return [program.tensor(name) for name in program.state]


def test_they_add_up_and_print_in_one_line() -> None:
    found = Casts(2, 600_000, 1, 1_536) + Casts(activations=1, activation_bytes=464)
    assert found == Casts(2, 600_000, 2, 2_000)
    assert (found.count, found.bytes) == (4, 602_000)
    assert str(found) == "4 casts, 0.6 MB: 2 of weights (0.6 MB), 2 of activations (2.0 kB)"
    assert str(Casts(1, 96)) == ("1 cast, 0.1 kB: 1 of weights (0.1 kB), 0 of activations (0.0 kB)")
    assert str(Casts()) == "no casts"


@pytest.mark.parametrize(
    ("function", "casts", "bytes_each"),
    [
        (lambda x: x.to(_HALF), 1, 6),
        (lambda x: x.to(torch.float64), 1, 12),
        (lambda x: x.to(_HALF).to(torch.float16), 2, 5),
        (lambda x: x.type_as(x.new_zeros(1, dtype=_HALF)), 1, 6),
        (lambda x: x.to(torch.float32), 0, 0),
        (lambda x: x.to(torch.int64), 0, 0),
        (lambda x: (x > 0).to(_HALF), 0, 0),
        (lambda x: x.clone(), 0, 0),
    ],
)
def test_a_graph_counts_what_changes_from_float_to_float(
    function: Callable[[Tensor], Tensor], casts: int, bytes_each: int
) -> None:
    program = program_of(function, X)
    found = graph_casts(program)
    assert found == Casts(activations=casts, activation_bytes=casts * bytes_each * X.numel())
    assert _evaluated(program) == found


class _CastWeights(nn.Module):
    """A weight, a view of it, and a value computed from it, each cast."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4))
        self.register_buffer("scale", torch.randn(3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        doubled = (self.weight * 2).to(_HALF)
        head = self.weight.split(2, 1)[0].to(_HALF)
        return x @ self.weight.t().to(_HALF).t().float(), doubled, head, self.scale.to(_HALF)


def test_weights_are_told_from_activations() -> None:
    program = capture(_CastWeights().eval(), (X,))
    # The weight and its view down, half of it, the buffer; up again, and the product of a weight.
    expected = Casts(3, 6 * (64 + 32 + 6), 2, 6 * (64 + 64))
    assert graph_casts(program) == expected
    assert _evaluated(program) == expected


def test_a_size_that_depends_on_values_is_no_number() -> None:
    program = program_of(lambda x: x[x > 0].to(_HALF) * 2, X)
    found = graph_casts(program)
    assert found == Casts(activations=1, unsized=1)
    assert str(found).endswith("1 of activations (0.0 kB); without 1 whose size is data")
    assert _evaluated(program).activation_bytes == 6 * int((X > 0).sum())


@in_parts(25)
@given(drawn=models())
def test_autocast_on_fake_tensors_casts_what_autocast_casts(drawn: Drawn) -> None:
    program = capture(drawn.model, drawn.example)

    def run() -> None:
        with torch.autocast("cpu", _HALF):
            evaluate(program, program.example)

    predicted = autocast_casts(program, _HALF)
    assert predicted == counted_casts(run, _tensors(program))
    assert predicted == _eager(drawn.model, drawn.example, _HALF)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "distilbert"])
def test_autocast_of_a_transformer_is_told_to_the_byte(name: str, dtype: torch.dtype) -> None:
    shared, program = case(name), captured(name)
    predicted = autocast_casts(program, dtype)
    assert predicted.weights
    assert predicted.activations
    assert predicted == _eager(shared.model, shared.example, dtype)


def test_a_model_that_asks_for_dtypes_casts_more_activations_than_its_graph() -> None:
    shared = case("t5-encoder")
    predicted = autocast_casts(captured("t5-encoder"), _HALF)
    measured = _eager(shared.model, shared.example, _HALF)
    assert (predicted.weights, predicted.weight_bytes) == (
        measured.weights,
        measured.weight_bytes,
    )
    assert predicted.activation_bytes < measured.activation_bytes


class _TwoProducts(nn.Module):
    """The same weight in two products; as it is, or as a view."""

    def __init__(self, view: bool = False) -> None:
        super().__init__()
        self.weight, self.view = nn.Parameter(torch.randn(16, 16)), view

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weight.t() if self.view else self.weight for _ in range(2)]
        return (x @ weights[0]) + (x * 2 @ weights[1])


@pytest.mark.parametrize(
    ("trainable", "view", "mode", "casts"),
    [
        (True, False, torch.no_grad, 1),
        (True, False, torch.enable_grad, 1),
        (True, False, torch.inference_mode, 2),
        (False, False, torch.no_grad, 2),
        (True, True, torch.no_grad, 2),
    ],
)
def test_autocast_keeps_the_cast_of_a_trainable_leaf_alone(
    trainable: bool, view: bool, mode: Callable[[], AbstractContextManager[None]], casts: int
) -> None:
    model = _TwoProducts(view).eval().requires_grad_(trainable)

    def run() -> None:
        with mode(), torch.autocast("cpu", _HALF):
            model(X)

    measured = counted_casts(run, model.parameters())
    assert (measured.weights, measured.activations) == (casts, 2)
    if mode is torch.no_grad:
        assert autocast_casts(capture(model, (X,)), _HALF) == measured


def test_a_region_held_open_casts_weights_once() -> None:
    model = _TwoProducts().eval()
    with torch.no_grad(), torch.autocast("cpu", _HALF):
        found = [counted_casts(lambda: model(X), model.parameters()).weights for _ in range(3)]
    assert found == [1, 0, 0]


def test_a_transformed_program_counts_with_weights_that_are_not_computed_yet() -> None:
    model = ParallelLinears(16, [(8, True), (4, True)]).eval()
    program = capture(model, (X,))
    fuse = fxopt.FuseLinears()
    fused = fuse.apply(program, fuse.plan(program))
    assert any(isinstance(tensor, Recipe) for tensor in fused.state.values())

    computed = fused.materialized()

    def run() -> None:
        with torch.autocast("cpu", _HALF), torch.no_grad():
            evaluate(computed, [X])

    found = autocast_casts(fused, _HALF)
    assert found == counted_casts(run, map(computed.tensor, computed.state))
    assert (found.weights, found.activations) == (4, 1)


def test_a_program_that_trains_counts_its_forward() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 4)).train()
    program = capture(model, (X,), mode="train")
    state = torch.get_rng_state()
    found = autocast_casts(program, _HALF)
    assert (found.weights, found.activations) == (4, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_values_and_dynamic_sizes_of_a_program_stay_as_they_are() -> None:
    program = capture(_CastWeights().eval(), (X,))
    before = str(program.graph), program.fake_mode.shape_env.format_guards()
    tensors = [tensor.clone() for tensor in _tensors(program)]
    graph_casts(program)
    autocast_casts(program, _HALF)
    assert (str(program.graph), program.fake_mode.shape_env.format_guards()) == before
    assert all(map(torch.equal, tensors, _tensors(program)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_no_other_dtype_is_asked_for(dtype: torch.dtype) -> None:
    with pytest.raises(PassError, match=r"lowers to torch\.bfloat16 or torch\.float16; ask"):
        autocast_casts(program_of(torch.relu, X), dtype)


class _Mixed(nn.Module):
    """An operator that wants its operands in one dtype, which autocast parts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.linear(x), 0.5)


def test_a_graph_that_autocast_breaks_is_named() -> None:
    model = _Mixed().eval()
    with pytest.raises(RuntimeError), torch.autocast("cpu", _HALF):
        model(X)
    with pytest.raises(FxoptError, match=r"_Mixed, captured in float32, can't run under") as at:
        autocast_casts(capture(model, (X,)), _HALF)
    assert str(at.value).endswith("if the model can, measure it with counted_casts")
