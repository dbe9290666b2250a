"""The graph as JSON, and back; fake values are computed anew, which type-checks the graph."""

from __future__ import annotations

import keyword
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import SaveError
from fxopt.nodes import module_path, source_line
from fxopt.program import Program
from fxopt.saving import operators
from fxopt.saving.call_types import CallTypes
from fxopt.saving.symbols import fake_inputs
from fxopt.saving.values import decode, encode, field
from fxopt.signature import Signature


def encode_nodes(program: Program) -> list[dict[str, Any]]:
    """All nodes in order; `SaveError` for arguments and targets without a JSON form."""
    return [_encode_node(node) for node in program.graph.nodes]


def decode_nodes(
    data: list[Any],
    signature: Signature,
    state: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    namespaces: Collection[str] | None,
    types: CallTypes,
) -> fx.Graph:
    """The graph that `encode_nodes` wrote, with fake values of dynamic sizes.

    Nothing is computed: operators run on fake tensors only. Raises `SaveError` for an operator that
    isn't on the list of `operators.resolve`, and for arguments that an operator rejects.
    """
    inputs = iter(fake_inputs(types.mode, signature, example))
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data:
        node = _decode_node(graph, item, nodes, namespaces)
        if node.op == "placeholder":
            node.meta["val"] = next(inputs, None)
        elif node.op == "get_attr":
            node.meta["val"] = _fake_state(types.mode, state, str(node.target))
        elif node.op == "call_function":
            node.meta["val"] = types.of(node)
        nodes[node.name] = node
    types.mode.release()
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
    graph: fx.Graph, item: Any, nodes: Mapping[str, fx.Node], namespaces: Collection[str] | None
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


def _fake_state(mode: FakeTensorMode, state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise SaveError(f"the saved graph reads the tensor {name!r:.80}, which wasn't saved")
    return mode.from_tensor(state[name], static_shapes=True)
