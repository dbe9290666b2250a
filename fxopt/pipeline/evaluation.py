"""What a training program's model computes in evaluation: captured from it, and rewritten alike.

Where that is a part of the training graph's own evaluation graph, it is that part of what the
passes made of it. Else (another branch in each mode, say) the passes run on it as they ran on the
training graph, and what is left must stand over the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxopt.calls import Inputs, bind, forward_signature
from fxopt.claim import Claim, Close
from fxopt.errors import EquivalenceError, FxoptError, ModelError
from fxopt.eval_graph import evaluation_mode
from fxopt.optimized import Optimized, evaluation_of
from fxopt.pipeline.embedding import is_whole, part_of, same_tensor
from fxopt.pipeline.nested import capture_whole
from fxopt.pipeline.pass_result import carry_out
from fxopt.pipeline.recording import violation_text
from fxopt.program import Program
from fxopt.recipe import Recipe, concatenate
from fxopt.rewriting import Pass, Plan
from fxopt.verify import Trial, judge, output_names, run_model, run_program, trials
from fxopt.wellformed import check


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of the state `name`."""

    name: str
    start: int
    stop: int


def joined_rows(before: Program, after: Program) -> dict[str, Rows]:
    """Which state of `before` a pass has joined, one below the other, in the state of `after`."""
    names = {id(tensor): name for name, tensor in before.state.items()}
    found: dict[str, Rows] = {}
    for name, entry in after.state.items():
        if name in before.state or not isinstance(entry, Recipe) or entry.make is not concatenate:
            continue
        start = 0
        for source in entry.sources:
            stop = start + source.shape[0]
            if id(source) in names:
                found[names[id(source)]] = Rows(name, start, stop)
            start = stop
    return found


@dataclass(frozen=True)
class Evaluator:
    """The evaluation of a `model` `captured` to train; `applied` are the passes that ran."""

    model: nn.Module
    captured: Program
    applied: Sequence[tuple[Pass, Plan]]
    kept: frozenset[str]
    """The state that no pass has changed."""
    joined: Mapping[str, Rows]
    """State that a pass made rows of another tensor: of which, and where they are."""

    def program(
        self, inputs: Inputs | None, present: Program, budget: Claim | None = None
    ) -> Program | None:
        """What the model computes for calls like `inputs`, over the tensors of `present`.

        `present` is what the passes made of the training program, with the tensors that it has by
        now; None stands for all of its own evaluation graph. With a `budget` the result is held to
        it, against the model. Raises `ModelError` where the passes can't be repeated over the same
        tensors, `EquivalenceError` for a broken claim, and what `capture` raises.
        """
        found = self._found(inputs)
        check(found)
        tried, _ = trials(found, run_model(self.model, found))
        self._judge("the capture in evaluation mode", Close(), tried, found)
        derived = evaluation_mode(self.captured)
        part = part_of(found, derived)
        if part is None:
            result = self._replayed(found, present)
        else:
            result = part.of(evaluation_mode(present))
        if budget is not None:
            self._judge("the whole list in evaluation mode", budget, tried, result)
        return None if part is not None and is_whole(part, derived) else result

    def for_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], present: Program) -> Program:
        """`program` for calls like `model(*args, **kwargs)`."""
        inputs = bind(forward_signature(self.model), args, kwargs)
        return self.program(inputs, present) or evaluation_mode(present)

    def _found(self, inputs: Inputs | None) -> Program:
        if isinstance(self.model, Optimized) and self.model.is_captured:
            return evaluation_of(self.model, inputs)
        return capture_whole(self.model, inputs, "eval", learns=True)

    def _judge(self, who: str, claim: Claim, tried: Sequence[Trial], program: Program) -> None:
        expected = [trial.outputs for trial in tried]
        verdict, _ = judge(claim, tried, expected, run_program(program), output_names(program))
        if not verdict.holds:
            raise EquivalenceError(violation_text(who, verdict))

    def _replayed(self, found: Program, present: Program) -> Program:
        """The passes on `found`, whose parameters may move as those of the training graph do."""
        program = replace(found, mode="train")
        tried, _ = trials(program, lambda inputs: run_program(program)([inputs])[0])
        outputs = [trial.outputs for trial in tried]
        for pass_, plan in self.applied:
            try:
                again = plan if plan.names_state else pass_.plan(program)
                done = carry_out(pass_, again, program, tried, outputs, verify=True)
            except (FxoptError, KeyError) as error:
                raise self._not_carried(f"{pass_!r} can't be repeated on it ({error})") from error
            if not done.holds:
                assert done.verdict is not None
                raise EquivalenceError(violation_text(f"{pass_!r} in evaluation", done.verdict))
            program, outputs = done.after, done.outputs
        program = self._with_rows(program, found, present)
        state = {name: self._shared(name, program, found, present) for name in program.state}
        result = replace(program, mode="eval", state=state)
        check(result)
        return result

    def _with_rows(self, program: Program, found: Program, present: Program) -> Program:
        """`program` reading the rows of joined tensors where it reads the ones that they were."""
        gone = {
            name: self.joined[name]
            for name, tensor in program.state.items()
            if tensor is found.state.get(name) and name in self.joined
        }
        gone = {name: rows for name, rows in gone.items() if rows.name in present.state}
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            if node.op == "get_attr" and node.target in gone:
                new[node] = _rows(graph, node, gone[str(node.target)], present, program)
            else:
                new[node] = graph.node_copy(node, new.__getitem__)
                new[node].meta = dict(node.meta)
        added = {rows.name: present.state[rows.name] for rows in gone.values()}
        return program.with_graph(graph, added) if gone else program

    def _shared(
        self, name: str, program: Program, found: Program, present: Program
    ) -> Tensor | Recipe:
        """The tensor that the training program holds for a state of the evaluation program."""
        tensor = program.state[name]
        if tensor is present.state.get(name):
            return tensor
        own = tensor is found.state.get(name)
        if name in present.state:
            if own and name in self.kept:
                return present.state[name]
            if same_tensor(tensor, present.state[name]):
                return present.state[name]
            raise self._not_carried(f"{name} has become another tensor in each of them")
        if own and name not in self.captured.state:
            return tensor
        raise self._not_carried(f"it reads {name}, which is no tensor of the training graph")

    def _not_carried(self, why: str) -> ModelError:
        passes = ", ".join(pass_.name for pass_, _ in self.applied)
        return ModelError(
            f"{type(self.model).__name__} computes another graph in evaluation than in training, "
            f"and the passes ({passes}) can't be carried over to it: {why}. Leave out the pass, or "
            "evaluate the original: model.load_state_dict(opt.state_dict()), model.eval()."
        )


def _rows(
    graph: fx.Graph, state: fx.Node, rows: Rows, present: Program, program: Program
) -> fx.Node:
    whole = graph.get_attr(rows.name)
    shape = present.state[rows.name].shape
    with program.fake_mode:
        value = state.meta["val"].new_empty(shape)
        part = value[rows.start : rows.stop]
    whole.meta = {**state.meta, "val": value}
    args = (whole, 0, rows.start, rows.stop)
    new = graph.call_function(torch.ops.aten.slice.Tensor, args)
    new.meta = {**state.meta, "val": part}
    return new
