"""What the page draws of a graph: a light frozen value, without tensors or torch.fx nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx

from fxopt.nodes import module_path, source_line
from fxopt.program import Program


@dataclass(frozen=True)
class PictureNode:
    """One drawn node. `kind` is "input", "op" or "output"; `module` its module path.

    `shape` is the value's dtype and sizes as text, `weights` the constants it reads, with theirs.
    """

    name: str
    op: str
    module: str
    shape: str
    inputs: tuple[str, ...]
    kind: str = "op"
    weights: tuple[str, ...] = ()
    source: str = ""
    changed: bool = False


@dataclass(frozen=True)
class GraphPicture:
    """The nodes of a graph in topological order, and the class name of each module path.

    `sizes` counts the operations on symbolic sizes, which aren't drawn: they move no tensor.
    """

    title: str
    nodes: tuple[PictureNode, ...]
    modules: Mapping[str, str] = field(default_factory=dict)
    sizes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", dict(self.modules))


def picture(program: Program, changed: frozenset[str] = frozenset()) -> GraphPicture:
    """The picture of `program`; nodes whose names are in `changed` are marked.

    Weights are listed with the nodes that read them; operations on sizes are only counted. A value
    taken out of a tuple (`getitem`) is drawn as the node that made the tuple.
    """
    drawn: dict[fx.Node, str] = {}
    nodes: list[PictureNode] = []
    sizes = 0
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        if node.op == "call_function" and not _holds_tensor(node.meta.get("val")):
            sizes += 1
            continue
        inputs = tuple(dict.fromkeys(drawn[use] for use in node.all_input_nodes if use in drawn))
        if _is_getitem(node) and inputs:
            drawn[node] = inputs[0]
            continue
        drawn[node] = node.name
        nodes.append(_picture_node(node, inputs, changed))
    modules = {path: program.module_types.get(path, "") for path in _paths(nodes)}
    return GraphPicture(program.name, tuple(nodes), modules, sizes)


def _picture_node(node: fx.Node, inputs: tuple[str, ...], changed: frozenset[str]) -> PictureNode:
    kinds = {"placeholder": "input", "output": "output"}
    return PictureNode(
        name=node.name,
        op=_op_text(node),
        module=module_path(node),
        shape=_shape_text(node.meta.get("val")),
        inputs=inputs,
        kind=kinds.get(node.op, "op"),
        weights=tuple(
            f"{use.target}: {_shape_text(use.meta.get('val'))}"
            for use in node.all_input_nodes
            if use.op == "get_attr"
        ),
        source=source_line(node),
        changed=node.name in changed,
    )


def _op_text(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `fxopt.int8_linear` for an operator of another library."""
    if node.op != "call_function":
        return node.name
    library, _, name = str(getattr(node.target, "_opname", "")).rpartition(".")
    name = name or getattr(node.target, "__name__", str(node.target))
    library = library or str(getattr(node.target, "namespace", "aten"))
    return name if library == "aten" else f"{library}.{name}"


def _shape_text(value: object) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return ", ".join(filter(None, map(_shape_text, value)))
    return ""


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(inner) for inner in value)
    return value is None or isinstance(value, Tensor)


def _is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _paths(nodes: list[PictureNode]) -> list[str]:
    """Every module path of the nodes and all paths above them, sorted."""
    found: set[str] = set()
    for node in nodes:
        parts = node.module.split(".")
        found.update(".".join(parts[: depth + 1]) for depth in range(len(parts)))
    return sorted(found | {""})
