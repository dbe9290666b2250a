"""How a program runs: as captured or in evaluation mode, with gradients or without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.eval_graph import evaluation_mode
from fxopt.graph_modules import graph_over
from fxopt.kernels import native
from fxopt.lower import Lowering
from fxopt.program import Mode, Program
from fxopt.signature import Signature


class Execution:
    """The callables of one program over one set of tensors; each is made when it is first needed.

    `module` is the program as it was captured and `compiled`, where it is given, the same compiled;
    `evaluation` is the evaluation graph of one that trains, left out where it follows from it.
    A program captured in eval mode runs without gradients; one captured in train mode records them
    where they are enabled, in evaluation mode too. Each of these ways is compiled by itself, since
    what the backward needs is part of what is compiled. A program for inference has its precision
    in the graph and runs outside of the caller's autocast; training takes part in it.

    The kernels for this CPU are loaded where the program calls them: one that was saved comes to
    life in a process in which no pass has done so.
    """

    def __init__(
        self,
        program: Program,
        module: fx.GraphModule,
        lowering: Lowering | None,
        compiled: Callable[..., Any] | None,
        evaluation: Program | None = None,
    ) -> None:
        self.program = program
        self.evaluation = evaluation
        self.lowering = lowering
        self.modules: dict[Mode, fx.GraphModule] = {program.mode: module}
        self.compiled: dict[tuple[Mode, bool], Callable[..., Any]] = {}
        kinds = sorted({tensor.device.type for tensor in program.signature.tensors})
        self.device_types = [one for one in kinds if torch.amp.is_autocast_available(one)]
        programs = (program, *([evaluation] if evaluation else []))
        native.load_for(node.target for one in programs for node in one.graph.nodes)
        if compiled is not None:
            self.compiled[program.mode, program.mode == "train"] = compiled

    def run(self, mode: Mode, inputs: Sequence[Tensor]) -> Any:
        """The graph's output tensors in `mode`."""
        trains = self.program.mode == "train"
        mode = mode if trains else "eval"
        records = trains and torch.is_grad_enabled()
        with torch.set_grad_enabled(records):
            if trains or not any(map(torch.is_autocast_enabled, self.device_types)):
                return self._run(mode, records, inputs)
            with ExitStack() as stack:
                for kind in self.device_types:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                return self._run(mode, records, inputs)

    def _run(self, mode: Mode, records: bool, inputs: Sequence[Tensor]) -> Any:
        if self.lowering is None:
            return self.module(mode)(*inputs)
        return self._compiled(mode, records, self.lowering)(*inputs)

    def module(self, mode: Mode) -> fx.GraphModule:
        """The graph of `mode` as a module; a program captured in eval mode has that alone."""
        if mode not in self.modules:
            graph = self.evaluated().graph
            self.modules[mode] = graph_over(self.modules[self.program.mode], graph)
        return self.modules[mode]

    def evaluated(self) -> Program:
        """The program in evaluation mode."""
        return self.evaluation or evaluation_mode(self.program)

    def signature(self, mode: Mode) -> Signature:
        """How the program is called in `mode`."""
        given = self.evaluation if mode == "eval" else None
        return (given or self.program).signature

    def evaluating(self, program: Program) -> Execution:
        """The same training program with another evaluation, over the same tensors."""
        module = self.modules[self.program.mode]
        return Execution(self.program, module, self.lowering, None, program)

    def _compiled(self, mode: Mode, records: bool, lowering: Lowering) -> Callable[..., Any]:
        if (mode, records) not in self.compiled:
            # Dynamo caches by code object, so that each needs a module of its own.
            module = self.module(mode)
            twin = graph_over(module, module.graph)
            with torch.set_grad_enabled(records):
                self.compiled[mode, records] = lowering.compile(twin)
        return self.compiled[mode, records]
