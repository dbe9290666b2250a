"""The evaluator computes what the model computes, and touches nothing."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.claim import Exact
from fxopt.interpreter import evaluate, evaluate_variants, same_draws
from tests.architectures import ARCHITECTURES, Mlp, Stateful, randomize
from tests.captured import captured, case
from tests.check import assert_close_to_model, assert_state_equal
from tests.models import Drawn, models
from tests.sweeps import in_parts


@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_evaluates_to_the_models_own_outputs(name: str) -> None:
    shared = case(name)
    for call in (shared.example, *shared.others):
        assert_close_to_model(Exact(), shared.model, captured(name), call)


@in_parts(15)
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


def test_an_overridden_node_is_computed_from_its_operands_instead() -> None:
    model = randomize(Mlp())
    x = torch.randn(3, 8)
    program = capture(model, (x,))
    node = next(n for n in program.graph.nodes if "gelu" in str(n.target))
    seen: list[Tensor] = []

    def half(value: Tensor, **options: object) -> Tensor:
        seen.append(value)
        return value / 2

    (out,) = evaluate(program, [x], override={node: half})
    assert torch.equal(seen[0], model.up(x))
    assert torch.equal(out, model.down(model.up(x) / 2))
    assert not torch.equal(out, evaluate(program, [x])[0])


class Draws(nn.Module):
    """Random numbers before and after a layer, and a buffer that is read twice, then written."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("total", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x + self.total + torch.rand_like(x)).relu()
        y = (x + torch.rand_like(x)).exp() * self.total
        self.total.add_(x.sum(0))
        return y


@in_parts(15)
@given(models(), st.data())
def test_a_variant_is_the_program_with_its_overrides(drawn: Drawn, data: st.DataObject) -> None:
    program = capture(drawn.model, drawn.example)
    inputs = program.example
    floats = [
        node
        for node in program.graph.nodes
        if node.op == "call_function"
        and isinstance(node.meta["val"], Tensor)
        and node.meta["val"].is_floating_point()
    ]
    subsets = st.sets(st.sampled_from(floats), max_size=3) if floats else st.just(set())
    variants = [
        {node: _scaled(node.target) for node in nodes}
        for nodes in data.draw(st.lists(subsets, max_size=4))
    ]
    seen = dict(evaluate_variants(program, inputs, variants))
    assert sorted(seen) == list(range(len(variants)))
    for index, variant in enumerate(variants):
        for got, expected in zip(
            seen[index], evaluate(program, inputs, override=variant), strict=True
        ):
            assert torch.equal(got, expected)


def test_variants_draw_and_write_as_the_program_does() -> None:
    model = Draws().eval()
    x = torch.randn(4, 8)
    program = capture(model, (x,))
    (relu,) = (n for n in program.graph.nodes if "relu" in str(n.target))
    (exp,) = (n for n in program.graph.nodes if "exp" in str(n.target))
    variants = [{exp: torch.sin}, {}, {relu: torch.tanh}, {relu: torch.tanh, exp: torch.sin}]

    def seeded(override: dict[torch.fx.Node, Any]) -> Tensor:
        torch.manual_seed(3)
        return evaluate(program, [x], override=override)[0]

    expected = [seeded(variant) for variant in variants]
    torch.manual_seed(3)
    order = []
    for index, (out,) in evaluate_variants(program, [x], variants):
        order.append(index)
        assert torch.equal(out, expected[index])
    assert order == [2, 3, 0, 1]
    assert torch.equal(model.total, torch.ones(8))


def test_what_variants_have_in_common_is_computed_once() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    program = capture(model, (torch.randn(3, 8),))
    linears = [node for node in program.graph.nodes if node.op == "call_function"]
    calls = 0

    def count(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.linear(*args)

    for node in linears:
        node.target = count
    for _ in evaluate_variants(program, program.example, [{n: count} for n in linears]):
        pass
    # Each variant from its place on, 6 + 5 + ... + 1, and the way to the last place.
    assert calls == 21 + 5


def _scaled(target: Any) -> Any:
    return lambda *args, **kwargs: target(*args, **kwargs) * 2


def test_runs_that_draw_the_same_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> Tensor:
        with same_draws():
            return torch.rand(3)

    first = drawn()
    torch.rand(5)
    before = torch.get_rng_state()
    # A seed kept for a device that sleeps would be that of the caller's draws on it.
    monkeypatch.setattr(
        torch.cuda.random, "_lazy_call", lambda *_, **__: pytest.fail("kept for later")
    )
    assert torch.equal(drawn(), first)
    assert torch.equal(torch.get_rng_state(), before)
