"""What holds for every model and every legal pass list, on models and lists drawn by hypothesis."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

import fxopt
from fxopt import wellformed
from fxopt.capture import capture
from fxopt.claim import Claim, Close, Sqnr
from fxopt.errors import EquivalenceError
from fxopt.interpreter import evaluate
from fxopt.nodes import label, module_path
from fxopt.operators import LINEAR_TARGETS, as_linear
from fxopt.pass_list import resolve_passes
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Pass, Plan, Rule, Stage
from fxopt.rewriting.pattern import Target
from fxopt.verify import compose
from tests.captured import captured_once
from tests.check import assert_state_equal, assert_unchanged, eager, tensors_of
from tests.models import (
    Attention,
    ConstantSubgraph,
    Drawn,
    ParallelLinears,
    conv_models,
    models,
    pass_lists,
    sequence_models,
)
from tests.sweeps import in_parts

aten = torch.ops.aten
_FEW = settings(max_examples=10)
_FLOATS = st.just(torch.float32)


def _optimize(drawn: Drawn, passes: list[Any], **options: Any) -> fxopt.Optimized:
    return fxopt.transform(drawn.model, passes, example_inputs=drawn.example, **options)


def _violation(drawn: Drawn, passes: list[Any]) -> str | None:
    try:
        _optimize(drawn, passes)
    except EquivalenceError as error:
        return str(error)
    return None


def _assert_equivalent(claim: Claim, drawn: Drawn, opt: torch.nn.Module) -> None:
    for call in (drawn.example, *drawn.others):
        reference = eager(drawn.model, (), call)
        with torch.no_grad():
            output = opt(**call)
        assert type(output) is type(reference)
        for expected, got in zip(tensors_of(reference), tensors_of(output), strict=True):
            measured = claim.measure(expected, got)
            assert measured.holds, f"{claim}: {measured.text} at {[t.shape for t in call.values()]}"


@in_parts(20)
@given(models(), pass_lists(int8=False))
def test_outputs_keep_the_claims_at_every_size(drawn: Drawn, passes: list[Any]) -> None:
    opt = _optimize(drawn, passes)
    claims = [pass_.claim for pass_ in resolve_passes(passes)]
    _assert_equivalent(compose([Close(), *claims]), drawn, opt)


@in_parts(20)
@given(models(), pass_lists())
def test_int8_keeps_its_floor_or_names_the_node_that_breaks_it(
    drawn: Drawn, passes: list[Any]
) -> None:
    with captured_once(drawn.model, drawn.example):
        violation = _violation(drawn, passes)
        opt = _optimize(drawn, passes, on_violation="revert")
    if violation is not None:
        assert "Int8Linear" in violation or "HalfAttention" in violation
        assert "guilty node" in violation
    reverted = any(step.record.reverted for step in opt.steps)
    assert reverted == (violation is not None)
    claims = [pass_.claim for pass_ in resolve_passes(passes)]
    # The judge saw other inputs than these; noise differs by a few decibels from one to the next.
    budget = compose([Close(), *claims])
    floor = Sqnr(budget.db - 6.0) if isinstance(budget, Sqnr) else budget
    _assert_equivalent(floor, drawn, opt)


@_FEW
@given(models(), pass_lists())
def test_programs_are_well_formed_and_keep_their_metadata(drawn: Drawn, passes: list[Any]) -> None:
    program = capture(drawn.model, drawn.example)
    paths = {module_path(node) for node in program.graph.nodes}
    for pass_ in resolve_passes(passes):
        program = pass_.apply(program, pass_.plan(program))
        wellformed.check(program)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        assert all("val" in node.meta for node in calls)
        assert {module_path(node) for node in calls} <= paths


@_FEW
@given(models(), pass_lists())
def test_the_model_is_left_as_it_was(drawn: Drawn, passes: list[Any]) -> None:
    model = drawn.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    try:
        _optimize(drawn, passes, on_violation="revert")
        assert_state_equal(model, before)
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
        assert {n: id(p) for n, p in model.named_parameters()} == identities
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


@_FEW
@given(models(), pass_lists())
def test_a_second_run_of_a_pass_changes_nothing(drawn: Drawn, passes: list[Any]) -> None:
    program = capture(drawn.model, drawn.example)
    for pass_ in resolve_passes(passes):
        program = pass_.apply(program, pass_.plan(program))
        assert_unchanged(pass_, program)


@_FEW
@given(models(), pass_lists())
def test_untouched_state_is_shared_and_not_copied(drawn: Drawn, passes: list[Any]) -> None:
    opt = _optimize(drawn, passes, on_violation="revert")
    own = dict(drawn.model.named_parameters(remove_duplicate=False))
    own.update(drawn.model.named_buffers(remove_duplicate=False))
    for name, tensor in opt.program.state.items():
        if name in own:
            assert tensor.data_ptr() == own[name].data_ptr(), f"{name} was copied"


@_FEW
@given(models(), pass_lists())
def test_the_printed_graph_is_deterministic(drawn: Drawn, passes: list[Any]) -> None:
    first = _optimize(drawn, passes, on_violation="revert")
    second = _optimize(drawn, passes, on_violation="revert")
    assert str(first.graph) == str(second.graph)
    assert [str(a.graph) for a in first.steps] == [str(b.graph) for b in second.steps]


@_FEW
@given(models(), pass_lists())
def test_specs_parse_back_to_the_same_passes(drawn: Drawn, passes: list[Any]) -> None:
    resolved = resolve_passes(passes)
    assert resolve_passes([pass_.spec for pass_ in resolved]) == resolved
    assert resolve_passes(", ".join(pass_.spec for pass_ in resolved)) == resolved
    assert tuple(eval(repr(p), vars(fxopt).copy()) for p in resolved) == resolved


@_FEW
@given(models(), pass_lists())
def test_saving_and_loading_gives_the_same_program(drawn: Drawn, passes: list[Any]) -> None:
    opt = _optimize(drawn, passes, on_violation="revert")
    with tempfile.TemporaryDirectory() as folder:
        opt.save(Path(folder) / "saved")
        loaded = fxopt.load(Path(folder) / "saved")
        assert str(loaded.graph) == str(opt.graph)
        for call in (drawn.example, *drawn.others):
            pairs = zip(tensors_of(opt(**call)), tensors_of(loaded(**call)), strict=True)
            assert all(torch.equal(expected, output) for expected, output in pairs)


@_FEW
@given(models(), pass_lists())
def test_sizes_stay_dynamic(drawn: Drawn, passes: list[Any]) -> None:
    with captured_once(drawn.model, drawn.example) as program:
        before = program.signature.tensors
        after = _optimize(drawn, passes, on_violation="revert").program.signature.tensors
    for old, new in zip(before, after, strict=True):
        assert [isinstance(s, str) for s in old.sizes] == [isinstance(s, str) for s in new.sizes]
        assert isinstance(new.sizes[0], str)


@_FEW
@given(models(), pass_lists(int8=False), pass_lists(int8=False))
def test_a_transformed_model_can_be_transformed_again(
    drawn: Drawn, first: list[Any], second: list[Any]
) -> None:
    again = fxopt.transform(_optimize(drawn, first), second, example_inputs=drawn.example)
    claims = [pass_.claim for pass_ in (*resolve_passes(first), *resolve_passes(second))]
    _assert_equivalent(compose([Close(), *claims]), drawn, again)


class SpoiledLinear(Rule):
    """linear(x, W, b) = fault(x, W, b) at one module path: what a wrong rewrite would do."""

    def __init__(self, node: str, fault: str) -> None:
        self.node, self.fault = node, fault

    def targets(self) -> tuple[Target, ...]:
        return LINEAR_TARGETS

    def match(self, node: fx.Node) -> Match | None:
        linear = as_linear(node)
        named = linear is not None and node.name == self.node
        return Match((node,), {"linear": linear}) if named else None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        wrong = edit.call(match.root.target, *match.root.args, **match.root.kwargs)
        faults: Mapping[str, tuple[Any, ...]] = {
            "scaled": (aten.mul.Tensor, wrong, 1.5),
            "zeros": (aten.mul.Tensor, wrong, 0.0),
            "infinity": (aten.div.Tensor, wrong, 0.0),
            "channels swapped": (aten.flip.default, wrong, [-1]),
            "offset": (aten.add.Tensor, wrong, 1.0),
        }
        return edit.call(*faults[self.fault])


_FAULTS = ["scaled", "zeros", "infinity", "channels swapped", "offset"]


def _planted(program: Program, data: st.DataObject) -> tuple[fx.Node, SpoiledLinear]:
    """A drawn linear of `program` with the rule that spoils it, so that the outputs show it."""
    linears = [node for node in program.graph.nodes if as_linear(node) is not None]
    guilty = data.draw(st.sampled_from(linears))
    rule = SpoiledLinear(guilty.name, data.draw(st.sampled_from(_FAULTS)))
    assume(_breaks(rule, program))
    return guilty, rule


@in_parts(20)
@given(models(), st.data())
def test_a_planted_fault_is_caught_and_its_node_named(drawn: Drawn, data: st.DataObject) -> None:
    with captured_once(drawn.model, drawn.example) as program:
        guilty, rule = _planted(program, data)
        with pytest.raises(EquivalenceError) as caught:
            _optimize(drawn, [rule])
    text = str(caught.value)
    assert "SpoiledLinear() broke its claim" in text
    assert "guilty node" in text
    assert f"from {guilty.meta['source']}" in text or label(guilty) in text


@_FEW
@given(models(), st.data())
def test_revert_undoes_a_planted_fault(drawn: Drawn, data: st.DataObject) -> None:
    with captured_once(drawn.model, drawn.example) as program:
        guilty, rule = _planted(program, data)
        opt = _optimize(drawn, [rule], on_violation="revert")
    (refusal,) = opt.steps[-1].record.reverted
    assert refusal.node == label(guilty)
    assert refusal.reason.startswith("reverted: ")
    _assert_equivalent(Close(), drawn, opt)


@dataclass(frozen=True)
class Sabotaged(Pass):
    """`inner`, and then a fault in the first tensor that it made, or in the last node if none."""

    inner: Pass
    fault: str
    name: ClassVar[str] = "sabotaged"
    stage: ClassVar[Stage] = Stage.ANY

    @property
    def claim(self) -> Claim:  # type: ignore[override]
        return self.inner.claim

    def plan(self, program: Program) -> Plan:
        return self.inner.plan(program)

    def apply(self, program: Program, plan: Plan) -> Program:
        result = self.inner.apply(program, plan)
        made = [name for name in result.state if name not in program.state]
        if made:
            damaged = {made[0]: _spoil_tensor(result.state[made[0]], self.fault)}
            return replace(result, state={**result.state, **damaged})
        old = {node.name for node in program.graph.nodes}
        new = [n for n in result.graph.nodes if n.op == "call_function" and n.name not in old]
        if new:
            _spoil_node(new[-1], self.fault)
        return result


def _spoil_tensor(tensor: Tensor | Recipe, fault: str) -> Recipe:
    makers = {
        "zeros": torch.zeros_like,
        "flipped": lambda value: value.flip(0),
        "negated": lambda value: -value,
    }
    return Recipe(makers[fault], (tensor,), tensor.shape, tensor.dtype, tensor.device)


def _spoil_node(node: fx.Node, fault: str) -> None:
    faults: Mapping[str, tuple[Any, ...]] = {
        "zeros": (aten.mul.Tensor, 0.0),
        "flipped": (aten.flip.default, [-1]),
        "negated": (aten.neg.default,),
    }
    target, *more = faults[fault]
    with node.graph.inserting_after(node):
        wrong = node.graph.call_function(target, (node, *more))
    wrong.meta = dict(node.meta)
    node.replace_all_uses_with(wrong, delete_user_cb=lambda user: user is not wrong)


_SABOTAGE: list[tuple[str, Pass, st.SearchStrategy[Drawn]]] = [
    ("", fxopt.Canonicalize(), sequence_models(dtypes=_FLOATS, last=ConstantSubgraph)),
    (
        "",
        fxopt.FuseLinears(),
        sequence_models(dtypes=_FLOATS, last=lambda width: ParallelLinears(width, [(4, True)] * 2)),
    ),
    (
        "",
        fxopt.FuseConvBatchNorm(),
        conv_models(
            dtypes=_FLOATS,
            last=lambda n: torch.nn.Sequential(
                torch.nn.Conv2d(n, n, 1, bias=False), torch.nn.BatchNorm2d(n)
            ),
        ),
    ),
    ("", fxopt.Int8Linear(mode="dynamic"), sequence_models(dtypes=_FLOATS)),
    ("", fxopt.Int8Linear(mode="weight_only"), sequence_models(dtypes=_FLOATS)),
    ("", fxopt.Int8Linear(mode="static"), sequence_models(dtypes=_FLOATS)),
    ("", fxopt.Int8Linear(activations="affine"), sequence_models(dtypes=_FLOATS)),
    (
        "",
        fxopt.HalfAttention(force=True),
        sequence_models(dtypes=_FLOATS, last=lambda width: Attention(width, 1, False, True)),
    ),
    ("", fxopt.Prepack(), sequence_models(dtypes=_FLOATS)),
    ("int8-linear", fxopt.SelectKernels(), sequence_models(dtypes=_FLOATS)),
    ("int8-linear{mode=static}", fxopt.SelectKernels(), sequence_models(dtypes=_FLOATS)),
]


@pytest.mark.parametrize(
    ("before", "inner", "drawn_models"), _SABOTAGE, ids=[repr(row[1]) for row in _SABOTAGE]
)
@settings(max_examples=6)
@given(data=st.data())
def test_a_fault_planted_in_each_pass_is_caught(
    before: str, inner: Pass, drawn_models: st.SearchStrategy[Drawn], data: st.DataObject
) -> None:
    drawn = data.draw(drawn_models)
    sabotaged = Sabotaged(inner, data.draw(st.sampled_from(["zeros", "flipped", "negated"])))
    with captured_once(drawn.model, drawn.example) as program:
        for pass_ in resolve_passes(before) if before else ():
            program = pass_.apply(program, pass_.plan(program))
        assume(_breaks(sabotaged, program))
        with pytest.raises(EquivalenceError, match="broke its claim"):
            _optimize(drawn, [*([before] if before else []), sabotaged])


def _breaks(change: Rule | Pass, program: Program) -> bool:
    """Whether `change` breaks its claim on the example, measured without the judge.

    A fault can be invisible: a scale before a norm, a dead activation, an offset a softmax drops.
    """
    (pass_,) = resolve_passes([change])
    result = pass_.apply(program, pass_.plan(program)).materialized()
    reference = evaluate(program, program.example)
    outputs = evaluate(result, program.example)
    return not all(
        pass_.claim.measure(expected, output).holds
        for expected, output in zip(reference, outputs, strict=True)
    )
