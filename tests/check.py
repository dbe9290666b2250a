"""The one helper of every pass test: what must hold for each pass on each model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxopt import wellformed
from fxopt.calibration import Calibration
from fxopt.interpreter import evaluate
from fxopt.program import Changes, Program
from fxopt.rewriting import Pass
from tests.captured import program_of

Call: TypeAlias = tuple[Any, ...] | Mapping[str, Any]


def check(
    pass_: Pass,
    model: nn.Module,
    inputs: Call,
    fires: Mapping[str, int] | int,
    *,
    others: Sequence[Call] = (),
    calibration: Sequence[Call] | None = None,
) -> Program:
    """Run `pass_` on `model` and assert all that a pass owes; returns its result.

    `fires` is the exact number of firings, by rule or in all. The claim is judged against the eager
    model on `inputs`, on `inputs` with another batch size and on `others`; `calibration` is what
    `transform(calibration=)` takes. Asserted as well: a well-formed result, a plan that can be
    printed and repeated, a second run that changes nothing, and model, input program and untouched
    tensors left as they were.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = program_of(model, inputs)
    if calibration is not None:
        program = replace(program, calibration=Calibration(calibration, program.signature))
    text, state = str(program.graph), dict(program.state)

    plan = pass_.plan(program)
    assert str(pass_.plan(program)) == str(plan), "planning twice gives two plans"
    result = pass_.apply(program, plan)

    assert_fired(result, fires)
    wellformed.check(result)
    assert_unchanged(pass_, result)
    assert str(program.graph) == text, "the input program's graph was edited"
    assert list(program.state) == list(state), "the input program's state was edited"
    assert all(program.state[name] is tensor for name, tensor in state.items())
    kept = [name for name in state if name in result.state]
    assert all(result.state[name] is state[name] for name in kept), "untouched state was copied"
    computed = result.materialized()
    for call in (inputs, grown(inputs), *others):
        assert_close_to_model(pass_.claim, model, computed, call)
    assert_state_equal(model, before)
    return result


def assert_fired(result: Program, fires: Mapping[str, int] | int) -> None:
    """The firings are these, neither more nor fewer; rules that fired nowhere needn't be named."""
    fired = {rule: count for rule, count in result.changes.fired.items() if count}
    refused = [str(refusal) for refusal in result.changes.refused]
    if isinstance(fires, int):
        assert sum(fired.values()) == fires, f"fired {fired}; refused {refused}"
    else:
        wanted = {rule: count for rule, count in fires.items() if count}
        assert fired == wanted, f"fired {fired}; refused {refused}"


def assert_unchanged(pass_: Pass, program: Program) -> None:
    """Running `pass_` on its own result fires nowhere and gives the same graph."""
    program = replace(program, changes=Changes())
    again = pass_.apply(program, pass_.plan(program))
    assert not sum(again.changes.fired.values()), f"a second run fired {again.changes.fired}"
    assert str(again.graph) == str(program.graph), "a second run changed the graph"


def assert_state_equal(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """The model's state is bit for bit what it was."""
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(_bits(after[name]), _bits(tensor)), f"{name} of the model was changed"


def assert_close_to_model(claim: Any, model: nn.Module, program: Program, call: Call) -> None:
    """Every output tensor of `program` keeps `claim` against the eager model on this call."""
    args, kwargs = ((), dict(call)) if isinstance(call, Mapping) else (tuple(call), {})
    reference = tensors_of(eager(model, args, kwargs))
    outputs = evaluate(program, program.signature.flatten(args, kwargs))
    outputs = tensors_of(program.signature.unflatten(outputs))
    assert len(outputs) == len(reference)
    for index, (expected, output) in enumerate(zip(reference, outputs, strict=True)):
        measured = claim.measure(expected, output)
        shapes = [tuple(tensor.shape) for tensor in tensors_of(call)]
        assert measured.holds, f"output {index} at {shapes}: {measured.text}"


def eager(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the model answers, computed on a copy, so that buffers it writes stay as they are."""
    with torch.no_grad():
        return copy.deepcopy(model)(*args, **kwargs)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensor leaves of any nesting, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def grown(call: Call) -> Call:
    """The same call with one row more on the first axis of every tensor of rank 1 and above."""

    def grow(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] > 1:
            return torch.cat([leaf, leaf[:1].flip(-1)])
        return leaf

    return pytree.tree_map(grow, call if isinstance(call, tuple) else dict(call))  # type: ignore[no-any-return]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
