"""A further program of a module: its tensors are those of the first one wherever they can be.

It shares every tensor of the first that means the same; the rest, such as weights that passes made
for it, are its own, and right only as long as the first one's are what they were.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import InputError, ModelError
from fxopt.eval_graph import evaluation_mode
from fxopt.graph_modules import attribute, graph_module, hold
from fxopt.optimized.execution import Execution
from fxopt.optimized.pipeline_result import PipelineResult
from fxopt.program import Mode, Program
from fxopt.recipe import materialize

Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Member:
    """One further program: its `outcome`, how it runs, and the names of what it shares.

    `stamp` tells in which state the first program's tensors were when it was made; None where it
    shares all that it has, and so is right in any state.
    """

    outcome: PipelineResult
    execution: Execution
    shared: frozenset[str]
    stamp: Stamp | None

    @property
    def program(self) -> Program:
        """The program over the tensors that it holds by now."""
        return replace(self.outcome.program, state=present_tensors(self.outcome))

    def run(self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The model's outputs for a call; raises `InputError` where it isn't of this program's."""
        if mode != self.outcome.program.mode and self.outcome.evaluation.missing:
            raise ModelError(f"no evaluation mode for this call: {self.outcome.evaluation.missing}")
        signature = self.execution.signature(mode)
        leaves = signature.flatten(args, kwargs)
        return signature.unflatten(self.execution.run(mode, leaves))

    @property
    def follows(self) -> bool:
        """Whether its evaluation graph follows from it."""
        return self.outcome.evaluation.program is None and not self.outcome.evaluation.missing

    def in_mode(self, mode: Mode) -> Program:
        """The program of `mode` over the tensors that it holds by now."""
        if mode == self.outcome.program.mode:
            return self.program
        evaluated = self.outcome.evaluation.program
        if evaluated is None:
            return evaluation_mode(self.program)
        assert self.outcome.module is not None
        state = {name: attribute(self.outcome.module, name) for name in evaluated.state}
        return replace(evaluated, state=state)

    def answers(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call is one of this program's."""
        return self.refusal(args, kwargs) is None

    def refusal(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> InputError | None:
        """Why a call isn't one of this program's; None where it is."""
        try:
            self.outcome.program.signature.flatten(args, kwargs)
        except InputError as refused:
            return refused
        return None


def member(
    outcome: PipelineResult, present: Mapping[str, Tensor], shared: Collection[str]
) -> Member:
    """`outcome` as a program beside the one whose tensors are `present`, `shared` of which it
    takes by their names."""
    state = {name: materialize(tensor) for name, tensor in outcome.program.state.items()}
    state.update({name: present[name] for name in shared})
    program = replace(outcome.program, state=state)
    module, compiled = outcome.module, outcome.compiled
    if module is None or any(attribute(module, name) is not state[name] for name in shared):
        module, compiled = graph_module(program), None
        for name in program.written.intersection(shared):
            put(module, name, present[name])  # what calls write, both programs write
    outcome = replace(outcome, program=program, module=module, compiled=compiled)
    evaluated = outcome.evaluation.program
    if evaluated is not None:
        hold(module, evaluated)
    execution = Execution(program, module, outcome.lowering, compiled, evaluated)
    made_beside = None if set(shared) == set(state) else stamp(present)
    return Member(outcome, execution, frozenset(shared), made_beside)


def shareable(
    outcome: PipelineResult, first: PipelineResult, present: Mapping[str, Tensor]
) -> set[str]:
    """The names of the tensors of the `first` program, `present` by now, that mean the same in
    `outcome`: those that both took from the model, and those that passes made alike.

    Where code was compiled for `outcome`, what passes made stays as it is compiled.
    """
    free = outcome.compiled is None or getattr(outcome.compiled, "is_listed", False)
    both = _untouched(outcome) & _untouched(first)
    return {
        name
        for name, tensor in outcome.program.state.items()
        if name in present
        and (name in both or (free and _alike(materialize(tensor), present[name])))
    }


def present_tensors(outcome: PipelineResult) -> dict[str, Tensor]:
    """The tensors that an installed program holds by now, by name."""
    assert outcome.module is not None
    return {name: attribute(outcome.module, name) for name in outcome.program.state}


def own_what_is_written(outcome: PipelineResult, first: PipelineResult) -> None:
    """Give the `first` program a copy of what calls of `outcome` write, where it only reads that.

    Its own would be the model's, which calls leave as it is.
    """
    assert first.module is not None
    for name in outcome.program.written - first.program.written:
        if name in first.program.state:
            put(first.module, name, attribute(first.module, name).detach().clone())


def put(module: fx.GraphModule, name: str, buffer: Tensor) -> None:
    """Let `module` hold `buffer` under a dotted name."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._buffers[leaf] = buffer


def stamp(tensors: Mapping[str, Tensor]) -> Stamp:
    """What changes when one of these tensors is written in place, or replaced."""
    return tuple(
        (id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors.values()
    )


def _untouched(outcome: PipelineResult) -> frozenset[str]:
    return outcome.source.untouched if outcome.source is not None else frozenset()


def _alike(one: Tensor, other: Tensor) -> bool:
    if type(one) is not type(other) or one.requires_grad != other.requires_grad:
        return False
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and bool(torch.equal(one, other))
