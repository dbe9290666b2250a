"""`transform` of one list, stage by stage, from a capture that all lists of a search share.

    captured once  ->  numerics  ->  kernels  ->  a module  ->  lowering  ->  a module

A capture is a value: passes make new programs of it. Each list still begins with a graph of its
own, and with the capture only as long as that says what it said: a model whose tensors were written
since, or sizes that a pass has fixed in the symbols which all programs of a capture share, are
captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxopt.capture import callers_modes_off, uncompiled
from fxopt.choices import Choices
from fxopt.interpreter import fork_rng
from fxopt.optimized import MOST_PROGRAMS, Optimized, PipelineResult, make_optimized
from fxopt.optimized.members import stamp
from fxopt.pass_list import resolve_passes, scheduled
from fxopt.passes import QuantizeCache
from fxopt.pipeline import (
    Judging,
    Run,
    begun,
    captured_alone,
    finished,
    lowered,
    rewritten,
    with_source,
)
from fxopt.program import Program
from fxopt.rewriting import Stage
from fxopt.transform import NO_CACHE, UNCOMPILED


@dataclass(frozen=True)
class _Kept:
    """A capture: what it was made of, what it knew then, and the run that begins with it."""

    inputs: Any
    further: bool
    known: object
    run: Run


class Captures:
    """The captures of one model for its calls, each made once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = uncompiled(model)
        self.notes = (UNCOMPILED,) if self.model is not model else ()
        self._kept: list[_Kept] = []

    def run(self, inputs: Any, further: bool = False) -> Run:
        """A run that begins with the capture for `inputs`, over a graph of its own.

        `further` tells that it is for a call which another program refused. Raises what capturing
        raises.
        """
        self._kept = [kept for kept in self._kept if kept.known == self._known(kept.run.program)]
        for kept in self._kept:
            if kept.further == further and _same(kept.inputs, inputs):
                return _of_its_own(kept.run)
        run = captured_alone(self.model, inputs, "eval", Judging(), further=further)
        own = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), inputs)
        self._kept.append(_Kept(own, further, self._known(run.program), run))
        return _of_its_own(run)

    def _known(self, program: Program) -> object:
        """What a capture rests on that others can change: the model, and facts on its symbols."""
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        modes = tuple(module.training for module in self.model.modules())
        return stamp(dict(tensors)), modes, _facts_on_symbols(program)


class Staged:
    """One list of passes on its way; each stage is that of `transform`.

    Every method may raise what `transform` raises there.
    """

    def __init__(
        self, captures: Captures, passes: str, inputs: Any, calibration: Iterable[Any] | None
    ) -> None:
        self.captures, self.inputs, self.calibration = captures, inputs, calibration
        self.passes = resolve_passes(passes)
        self.schedule = scheduled(self.passes, "eval")
        self.judging = Judging()
        self.choices = Choices()
        self._left = list(self.schedule.rewrites)
        self._run: Run | None = None

    @property
    def rewrites(self) -> bool:
        """Whether the list holds more than a lowering."""
        return any(pass_.stage is not Stage.LOWER for pass_ in self.passes)

    @property
    def lowers(self) -> bool:
        """Whether the list ends in a lowering."""
        return self.schedule.lowering is not None

    def numerics(self) -> Program:
        """The program before the first pass of the kernel level."""
        return self._rewritten(lambda stage: stage is not Stage.KERNELS)

    def kernels(self) -> Program:
        """The program that all passes but the lowering make."""
        return self._rewritten(lambda stage: True)

    def module(self) -> Optimized:
        """What all passes but the lowering make, as a module."""
        return self._module(lower=False)

    def lowered(self) -> Optimized:
        """What the whole list makes, as a module."""
        return self._module(lower=True)

    def _rewritten(self, belongs: Callable[[Stage], bool]) -> Program:
        with callers_modes_off(), fork_rng():
            run = self._run or self._begun(self.inputs, False)
            while self._left and belongs(self._left[0].pass_.stage):
                run = rewritten(run, self._left.pop(0), self.judging)
        self._run = run
        return run.program

    def _begun(self, inputs: Any, further: bool) -> Run:
        run = self.captures.run(inputs, further)
        cache = any(isinstance(one, QuantizeCache) for one in self.passes)
        notes = (*self.captures.notes, *((NO_CACHE,) if cache else ()))
        return begun(
            run,
            self.judging,
            calibration=self.calibration,
            notes=notes,
            further=further,
            choices=self.choices,
        )

    def _module(self, lower: bool) -> Optimized:
        assert self._run is not None
        # Computed once, though two modules are made of it.
        run = self._run = replace(self._run, program=self._run.program.materialized())

        def further(model: nn.Module, inputs: Mapping[str, Any]) -> PipelineResult:
            with callers_modes_off(), fork_rng():
                other = self._begun(inputs, True)
                for one in self.schedule.rewrites:
                    other = rewritten(other, one, self.judging)
                return self._result(other, lower, further)

        made = make_optimized(self.captures.model)
        with callers_modes_off(), fork_rng():
            made.install(self._result(run, lower, further))
        return made

    def _result(
        self, run: Run, lower: bool, further: Callable[[nn.Module, Any], PipelineResult]
    ) -> PipelineResult:
        if lower and self.schedule.lowering is not None:
            run = lowered(run, self.schedule.lowering, self.judging)
        result = finished(run, self.judging, False)
        return with_source(result, self.captures.model, further, MOST_PROGRAMS)


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are the same call: equal tensors, equal constants."""
    leaves, shape = pytree.tree_flatten(one)
    others, other_shape = pytree.tree_flatten(other)
    return shape == other_shape and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and bool(one == other)
    alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
    return alike and bool(torch.equal(one, other))


def _facts_on_symbols(program: Program) -> object:
    """What is known of the sizes in `program`: symbols, their ranges, and those that were fixed."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    sizes = {
        size.node.expr
        for value in pytree.tree_leaves(list(values))
        for size in (value.shape if isinstance(value, Tensor) else (value,))
        if isinstance(size, torch.SymInt)
    }
    symbols = sorted({s for size in sizes for s in size.free_symbols}, key=str)
    environment = program.fake_mode.shape_env if symbols else None
    if environment is None:
        return ()
    return tuple(
        (
            symbol,
            environment.var_to_range.get(symbol),
            environment.replacements.get(symbol),
            environment.var_to_hint_override.get(symbol),
        )
        for symbol in symbols
    ), len(environment.guards)


def _of_its_own(run: Run) -> Run:
    """The run over a copy of its graph, whose nodes have notes of their own."""
    program = run.program
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    program = replace(program, graph=graph)
    return replace(run, program=program, reference=replace(run.reference, captured=program))
