"""Which program goes out: the last one that says where values are rounded and not how it is run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from fxopt.errors import ExportError
from fxopt.graph_text import operator_name
from fxopt.kernels import NUMERICS_LEVEL
from fxopt.nodes import label
from fxopt.optimized import Optimized
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, constant, op, rewrite

_CPU = torch.device("cpu")


class UnpackConstant(Rule):
    """unpack_int4(P) = its value for a constant P: readers of ONNX take int8 everywhere"""

    exclusive = False
    pattern = op(torch.ops.fxopt.unpack_int4.default, constant("packed"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        packed = match["packed"]
        values = torch.ops.fxopt.unpack_int4(edit.tensor(packed))
        return edit.constant(f"{packed.target}_unpacked", values)


def numerics_program(opt: Optimized, known: Collection[object]) -> Program:
    """The program of `opt` before the first kernel-level pass, on the CPU, with present tensors.

    Kernel level is every fxopt operator that is neither of the numerics level nor `known`. Raises
    `ExportError` where that program isn't known any more, and for one that an interchange format
    can't hold: captured in train mode, or writing to its own buffers.
    """
    present = opt.program
    program = present if _kernel(present, known) is None else _before_kernels(opt, present, known)
    if program.mode == "train":
        raise ExportError(
            f"{program.name} was captured in train mode, and what is exported is for inference. "
            'Use fxopt.transform(model, ..., mode="eval").'
        )
    if program.written:
        names = ", ".join(sorted(program.written))
        raise ExportError(
            f"{program.name} writes to its buffers {names} on each call, and an ONNX model keeps "
            "nothing between calls. Make them inputs and outputs of forward."
        )
    state = {name: program.tensor(name).detach().to(_CPU) for name in program.state}
    program = rewrite(replace(program, state=state), (UnpackConstant(),))
    elsewhere = any(tensor.device != _CPU for tensor in program.signature.tensors)
    return program.on_device(_CPU) if elsewhere else program


def check_operators(program: Program, known: Collection[object]) -> None:
    """Raise `ExportError` at the first fxopt operator that isn't `known`."""
    for node in program.graph.nodes:
        if _is_ours(node) and node.target not in known:
            raise ExportError(
                f"{label(node)} calls {operator_name(node.target)}, which has no ONNX form. "
                "Export a module transformed without the pass that put it there."
            )


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fxopt"


def _kernel(program: Program, known: Collection[object]) -> fx.Node | None:
    """The first kernel-level node."""
    plain = {*NUMERICS_LEVEL, *known}
    nodes = program.graph.nodes
    return next((node for node in nodes if _is_ours(node) and node.target not in plain), None)


def _before_kernels(opt: Optimized, present: Program, known: Collection[object]) -> Program:
    """The last step without a kernel-level node; steps keep graphs, the module keeps tensors."""
    earlier = (step.graph.program for step in reversed(opt.steps))
    found = next((program for program in earlier if _kernel(program, known) is None), None)
    if found is None:
        node = _kernel(present, known)
        assert node is not None
        raise ExportError(
            f"{label(node)} calls {operator_name(node.target)}, a kernel of this machine, and the "
            "steps before it are not kept in a loaded or twice transformed module. Export the "
            "module that fxopt.transform returned, or transform without Prepack, SelectKernels "
            "and Lower."
        )
    lost = [name for name, tensor in found.state.items() if not _holds(present, name, tensor)]
    if lost:
        raise ExportError(
            f"a kernel-level pass laid {lost[0]} out anew, and the original is not kept. "
            "Export a module transformed without Prepack, or with Lower(prepack=False)."
        )
    state = {name: present.state[name] for name in found.state}
    return replace(found, state=state, example=present.example)


def _holds(program: Program, name: str, like: object) -> bool:
    tensor = program.state.get(name)
    return (
        tensor is not None
        and isinstance(like, torch.Tensor)
        and tensor.shape == like.shape
        and tensor.dtype == like.dtype
    )
