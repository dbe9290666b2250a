"""The graph as JSON, and back; fake values are computed anew, which type-checks the graph."""

from __future__ import annotations

import keyword
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fxopt.errors import SaveError
from fxopt.graph_text import describe
from fxopt.program import Program, fake, module_path, source_line
from fxopt.saving import operators
from fxopt.saving.values import decode, encode, field
from fxopt.signature import Range, Signature

_UNBOUNDED = 2**62


def encode_nodes(program: Program) -> list[dict[str, Any]]:
    """All nodes in order; `SaveError` for arguments and targets without a JSON form."""
    return [_encode_node(node) for node in program.graph.nodes]


def decode_nodes(
    data: list[Any],
    signature: Signature,
    state: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    namespaces: Collection[str],
) -> fx.Graph:
    """The graph that `encode_nodes` wrote, with fake values of dynamic sizes.

    Nothing is computed: operators run on fake tensors only. Raises `SaveError` for an operator that
    isn't on the list of `operators.resolve`, and for arguments that an operator rejects.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = iter(_fake_inputs(mode, signature, example))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data:
        node = _decode_node(graph, item, nodes, namespaces)
        if node.op == "placeholder":
            node.meta["val"] = next(inputs, None)
        elif node.op == "get_attr":
            node.meta["val"] = _fake_state(mode, state, str(node.target))
        elif node.op == "call_function":
            node.meta["val"] = _propagate(mode, node)
        nodes[node.name] = node
    return graph


def _encode_node(node: fx.Node) -> dict[str, Any]:
    where = f"an argument of {node.name}"
    is_call = node.op == "call_function"
    return {
        "name": node.name,
        "op": node.op,
        "target": operators.name_of(node.target, node.name) if is_call else str(node.target),
        "args": [encode(arg, where) for arg in node.args],
        "kwargs": {key: encode(arg, where) for key, arg in node.kwargs.items()},
        "module": module_path(node),
        "source": source_line(node),
    }


def _decode_node(
    graph: fx.Graph, item: Any, nodes: Mapping[str, fx.Node], namespaces: Collection[str]
) -> fx.Node:
    name, op = field(item, "name", str), field(item, "op", str)
    target: Any = field(item, "target", str)
    if op not in ("placeholder", "get_attr", "call_function", "output"):
        raise SaveError(f"the saved graph holds a node of kind {op!r:.40}")
    if op == "call_function":
        target = operators.resolve(target, namespaces)
    _refuse_code(op, target, kwargs := field(item, "kwargs", dict))
    args = tuple(decode(arg, nodes) for arg in field(item, "args", list))
    kwargs = {key: decode(arg, nodes) for key, arg in kwargs.items()}
    node = graph.create_node(op, target, args, kwargs, name=name)
    if node.name != name:
        raise SaveError(f"the saved graph holds the node name {name!r:.80} twice, or a bad name")
    node.meta = {"module_path": field(item, "module", str), "source": field(item, "source", str)}
    return node


def _refuse_code(op: str, target: Any, kwargs: Mapping[str, Any]) -> None:
    """torch.fx writes these names into the Python source of a GraphModule, so none may be code.

    Names of tensors are quoted there and may hold anything.
    """
    names = [*kwargs, target] if op == "placeholder" else list(kwargs)
    hostile = [name for name in names if not name.isidentifier() or keyword.iskeyword(name)]
    if hostile:
        raise SaveError(f"the saved graph holds the name {hostile[0]!r:.80}, which is no name")


def _propagate(mode: FakeTensorMode, node: fx.Node) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
    if not isinstance(node.target, torch._ops.OpOverload):
        operators.check_size_arguments(node.target, args)  # type: ignore[arg-type]
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:  # whatever an operator raises on arguments it wasn't made for
        reason = (str(error).splitlines() or [""])[0]
        raise SaveError(
            f"the saved graph can't be typed: {type(error).__name__}: {reason}\n"
            f"  node: {describe(node)}\n"
            f"  module: {module_path(node) or '(the model itself)'}"
        ) from error


def _fake_state(mode: FakeTensorMode, state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise SaveError(f"the saved graph reads the tensor {name!r:.80}, which wasn't saved")
    return mode.from_tensor(state[name], static_shapes=True)


def _fake_inputs(
    mode: FakeTensorMode, signature: Signature, example: tuple[Tensor, ...]
) -> list[Tensor]:
    """Fake tensors for the placeholders: equal names are one symbolic size."""
    if len(example) != len(signature.tensors):
        raise SaveError(
            f"{len(example)} example tensors were saved for {len(signature.tensors)} inputs"
        )
    symbols: dict[str, Any] = {}
    inputs = []
    for expected, tensor in zip(signature.tensors, example, strict=True):
        if tensor.dtype != expected.dtype or tensor.ndim != len(expected.sizes):
            raise SaveError(f"the example of {expected.path} doesn't fit {expected}")
        sizes = []
        for size, hint in zip(expected.sizes, tensor.shape, strict=True):
            if isinstance(size, str) and size not in symbols:
                symbols[size] = _symbol(mode, size, hint, signature.ranges.get(size))
            sizes.append(symbols[size] if isinstance(size, str) else size)
        with mode:
            inputs.append(torch.empty(sizes, dtype=expected.dtype, device=expected.device))
    return inputs


def _symbol(mode: FakeTensorMode, name: str, hint: int, bounds: Range | None) -> Any:
    """A dynamic size. Sizes 0 and 1 are special to torch's shape rules, so no hint is either."""
    from torch._dynamo.source import ConstantSource  # a second's import that few runs need

    low, high = (bounds.low, bounds.high) if bounds else (2, None)
    environment = mode.shape_env
    assert environment is not None
    hint = max(hint, low, 2)
    source = ConstantSource(name)
    symbol = environment.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    environment.constrain_symbol_range(symbol, low, _UNBOUNDED if high is None else high)
    return environment.create_symintnode(symbol, hint=hint, source=source)
