"""A program as an ONNX graph in memory, under the names that people know."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fxopt.device import Device
from fxopt.errors import ExportError
from fxopt.export.int8_weights import METADATA, write_int8_weights
from fxopt.export.naming import axis_names, input_names, renamed, result_names
from fxopt.export.operators import translations
from fxopt.export.products import speed_up_products
from fxopt.optimized import graph_module
from fxopt.program import Program

_SCALE_SHAPERS = ("Reshape", "Squeeze")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def onnx_graph(program: Program, opset: int, target: Device | None = None) -> Any:
    """The `onnxscript.ir.Model` of `program`: named inputs, outputs and sizes, int8 weights that
    are exact on `target` (None: on every CPU), and no traces of where it was made. Raises
    `ExportError` for what has no ONNX form."""
    with _quiet_exporter():
        exported = _exported(program)
        try:
            result = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                verbose=False,
                custom_translation_table=translations(opset),
            )
        except Exception as error:
            raise ExportError(
                f"{program.name} can't be written as ONNX: {_cause(error)}"
            ) from error
    assert result is not None
    model = result.model
    _fold_scale_shapes(model)
    speed_up_products(model)
    exactness = write_int8_weights(model, target)
    _tidy(model)
    _name_sizes(model, program)
    _name_ends(model, program)
    _strip(model, program.name)
    if exactness is not None:
        model.metadata_props[METADATA] = exactness
    return model


def _exported(program: Program) -> ExportedProgram:
    """The program as torch.export has it, traced again with every dynamic size dynamic."""
    tensors = program.signature.tensors
    shapes = tuple(
        {axis: Dim.AUTO for axis, size in enumerate(tensor.sizes) if isinstance(size, str)}
        for tensor in tensors
    )
    with torch.no_grad():
        exported = torch.export.export(
            graph_module(program), _example(program), dynamic_shapes=shapes, strict=False
        )
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    for tensor, node in zip(tensors, placeholders[-len(tensors) :], strict=True):
        for axis, size in enumerate(tensor.sizes):
            if isinstance(size, str) and not isinstance(node.meta["val"].shape[axis], torch.SymInt):
                raise ExportError(
                    f"{tensor.path} axis {axis} is dynamic in {program.name} but becomes fixed in "
                    "ONNX. Transform the model with a longer example there."
                )
    return exported


def _example(program: Program) -> tuple[Tensor, ...]:
    """Zeros of the example's sizes; a dynamic size of 1 is doubled, or it would be taken as fixed.

    Tracing sees sizes and no values.
    """
    return tuple(
        torch.zeros(
            [
                max(2, known) if isinstance(size, str) else known
                for known, size in zip(value.shape, tensor.sizes, strict=True)
            ],
            dtype=tensor.dtype,
        )
        for value, tensor in zip(program.example, program.signature.tensors, strict=True)
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on packages that it would like to see installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _fold_scale_shapes(model: Any) -> None:
    """Scales and zero points as plain initializers, which is the form that runtimes fuse.

    The exporter folds small constants only, and the scales of a vocabulary are not small.
    """
    from onnxscript.optimizer import fold_constants

    def should_fold(node: Any) -> bool | None:
        if node.op_type not in _SCALE_SHAPERS:
            return None
        users = [user for user, _ in node.outputs[0].uses()]
        return True if users and all(user.op_type in _QUANTIZERS for user in users) else None

    fold_constants(model, should_fold=should_fold)


def _tidy(model: Any) -> None:
    """One node for equal ones, constants as initializers, nothing that nobody reads."""
    from onnxscript.ir.passes.common import (
        CommonSubexpressionEliminationPass,
        LiftConstantsToInitializersPass,
    )
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    fold_constants(model)
    CommonSubexpressionEliminationPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    remove_unused_nodes(model)


def _name_sizes(model: Any, program: Program) -> None:
    from onnxscript import ir

    readable = axis_names(program.signature.tensors)
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.inputs, program.signature.tensors, strict=True):
        for size, known in zip(value.shape, tensor.sizes, strict=True):
            if isinstance(known, str):
                names.setdefault(str(size), readable[known])
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape(_dimension(size, names) for size in value.shape)


def _dimension(size: Any, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return renamed(str(size.value), names)


def _name_ends(model: Any, program: Program) -> None:
    """Inputs and outputs under the model's own names, which no other value may have."""
    graph = model.graph
    _separate_outputs(graph)
    wanted = dict(zip(graph.inputs, input_names(program), strict=True))
    wanted.update(zip(graph.outputs, result_names(program), strict=True))
    taken = set(wanted.values())
    for value in [*_values(model)]:
        if value in wanted or value.name not in taken:
            continue
        free = value.name
        while free in taken:
            free += "_inner"
        if value.is_initializer():
            del graph.initializers[value.name]
            value.name = free
            graph.initializers[free] = value
        value.name = free
    for value, name in wanted.items():
        value.name = name


def _separate_outputs(graph: Any) -> None:
    """An output of its own for each: not an input, a constant or another output handed through."""
    from onnxscript import ir

    seen: set[Any] = set()
    for index, value in enumerate(graph.outputs):
        if value in seen or value.is_graph_input() or value.is_initializer():
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]
        seen.add(graph.outputs[index])


def _strip(model: Any, name: str) -> None:
    """Drop source lines, paths and class names of the machine that the exporter attaches."""
    model.producer_name, model.producer_version = "fxopt", None
    model.metadata_props.clear()
    for holder in (model.graph, *_nodes(model), *_values(model)):
        holder.metadata_props.clear()
        holder.doc_string = None
    model.graph.name = name
    model.doc_string = None


def _nodes(model: Any) -> Iterator[Any]:
    from onnxscript import ir

    graphs = (model.graph, *(function.graph for function in model.functions.values()))
    for graph in graphs:
        yield from ir.traversal.RecursiveGraphIterator(graph)


def _values(model: Any) -> Iterator[Any]:
    """Inputs, constants and results, those of inner graphs too; each once."""
    yield from model.graph.inputs
    yield from [v for v in model.graph.initializers.values() if not v.is_graph_input()]
    for node in _nodes(model):
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                yield from attribute.value.inputs
