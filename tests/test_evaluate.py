"""The evaluator computes what the model computes, and touches nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.claim import Exact
from fxopt.evaluate import evaluate
from tests.architectures import ARCHITECTURES, Mlp, Stateful, randomize
from tests.check import assert_close_to_model, assert_state_equal
from tests.models import Drawn, models


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluates_to_the_models_own_outputs(name: str) -> None:
    case = ARCHITECTURES[name]()
    program = capture(case.model, case.example)
    for call in (case.example, *case.others):
        assert_close_to_model(Exact(), case.model, program, call)


@settings(max_examples=15)
@given(models())
def test_evaluates_drawn_models_at_every_size(drawn: Drawn) -> None:
    program = capture(drawn.model, drawn.example)
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(Exact(), drawn.model, program, call)


def test_buffers_that_the_model_writes_stay_as_they_are() -> None:
    model = randomize(Stateful())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 8)
    program = capture(model, (x,))
    first, second = evaluate(program, [x]), evaluate(program, [x])
    assert torch.equal(first[0], second[0])
    assert_state_equal(model, before)


def test_the_observer_sees_each_value_and_may_replace_it() -> None:
    model = randomize(Mlp())
    x = torch.randn(3, 8)
    program = capture(model, (x,))
    seen = []

    def observe(node: torch.fx.Node, value: Tensor) -> Tensor:
        seen.append(node.name)
        return torch.zeros_like(value) if "gelu" in str(node.target) else value

    (out,) = evaluate(program, [x], observe)
    assert sorted(seen) == sorted(n.name for n in program.graph.nodes if n.op != "output")
    assert torch.equal(out, model.down.bias.expand(3, 8))


def test_a_value_is_freed_after_its_last_use() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    x = torch.randn(3, 8)
    program = capture(model, (x,))
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def observe(node: torch.fx.Node, value: Tensor) -> Tensor:
        nonlocal most
        if node.op == "call_function":
            gc.collect()
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
        return value

    evaluate(program, [x], observe)
    assert most == 2


def test_gradients_are_recorded_in_train_mode_only() -> None:
    model = Mlp()
    x = torch.randn(3, 8)
    assert not evaluate(capture(model.eval(), (x,)), [x])[0].requires_grad
    assert evaluate(capture(model, (x,), mode="train"), [x])[0].requires_grad
