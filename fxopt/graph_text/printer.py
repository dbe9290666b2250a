"""Names, types and lines of one program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from fxopt.graph_text.types import Symbols, constant_text, operator_name, size_text, type_text
from fxopt.nodes import module_path
from fxopt.program import Program

_SYMBOLIC = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Chunk:
    """Consecutive operations of one module."""

    path: str
    header: str
    lines: list[str]


class Printer:
    """Names, types and lines of one program; after a rewrite, in the names of its predecessor."""

    def __init__(self, program: Program, predecessor: Printer | None = None) -> None:
        self.program = program
        self._symbols = Symbols()
        self._parents = _parents(program)
        self._lines = [node for node in program.graph.nodes if _has_line(node)]
        self._home = {node: self._home_of(node) for node in self._lines}
        self._names = self._named(self._inherited(predecessor) if predecessor else {})
        self._taken = set(self._names.values())
        # Symbols are numbered as they appear, and the header is what appears first.
        self.header = self._header()

    def _inherited(self, predecessor: Printer) -> dict[str, tuple[str, str]]:
        """{node name: (module, printed name)} of the nodes whose values the predecessor named."""
        names = {
            node.name: (predecessor._home[node][0], predecessor._names[node])
            for node in predecessor._lines
        }
        present = {node.name for node in self._lines}
        for old, new in self.program.changes.replaced.items():
            if old in names and old not in present:
                names.setdefault(new, names[old])
        return names

    def _header(self) -> str:
        inputs = [f"{self._names[node]}: {self._type(node)}" for node in self.program.placeholders]
        result = self._tree([self._type(node) for node in self._results()])
        mode = "" if self.program.mode == "eval" else f"\n# {self.program.mode} mode"
        return f"{self.program.name}({', '.join(inputs)}) -> {result}{mode}"

    def result(self) -> str:
        return "return " + self._tree([self._arg(node, "") for node in self._results()])

    def _results(self) -> list[fx.Node]:
        results: Any = self.program.output.args[0]
        return list(results)

    def chunks(self) -> list[Chunk]:
        chunks: list[Chunk] = []
        for node in self._lines:
            path = self._home[node][0]
            if not chunks or chunks[-1].path != path:
                chunks.append(Chunk(path, self._chunk_header(path), []))
            chunks[-1].lines.append(self._line(node, path))
        return chunks

    def _chunk_header(self, path: str) -> str:
        kind = self.program.module_types.get(path) or (self.program.name if not path else "")
        return f"# {path}  {kind}".rstrip() if path else f"# {kind}"

    def _line(self, node: fx.Node, path: str) -> str:
        args = [self._arg(arg, path) for arg in node.args]
        args += [f"{key}={self._arg(arg, path)}" for key, arg in node.kwargs.items()]
        name = self._names[node]
        local = name[len(path) + 1 :] if path else name
        call = operator_name(node.target).removeprefix("aten.")
        call = call.rpartition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else call
        return f"  %{local}: {self._type(node)} = {call}({', '.join(args)})"

    def _type(self, node: fx.Node) -> str:
        return type_text(node.meta.get("val"), self._symbols)

    def _arg(self, arg: Any, path: str) -> str:
        if not isinstance(arg, fx.Node):
            if isinstance(arg, (tuple, list)):
                inner = ", ".join(self._arg(item, path) for item in arg)
                return f"[{inner}]"
            if isinstance(arg, slice):
                return ":".join(self._arg(a, path) for a in (arg.start, arg.stop, arg.step))
            return constant_text(arg, self._symbols)
        if arg.op == "get_attr":
            return f"{self._state_name(str(arg.target), path)}: {self._type(arg)}"
        if _is_part(arg):
            return f"{self._arg(arg.args[0], path)}[{arg.args[1]}]"
        if arg not in self._names:
            return size_text(arg.meta["val"], self._symbols)
        return "%" + self._reference(self._names[arg], path)

    def _state_name(self, target: str, path: str) -> str:
        local = target.removeprefix(f"{path}.")
        return target if local in self.program.state else local

    def _reference(self, name: str, path: str) -> str:
        """The shortest form of an absolute name that, looked up from `path` outward, finds it."""
        scope = path
        while scope and not name.startswith(f"{scope}."):
            scope = scope.rpartition(".")[0]
        short = name[len(scope) + 1 :] if scope else name
        while path:
            found = f"{path}.{short}"
            if found in self._taken:
                return short if found == name else f".{name}"
            path = path.rpartition(".")[0]
        return short if short == name else f".{name}"

    def _tree(self, leaves: list[str]) -> str:
        signature = self.program.signature
        remaining = iter(leaves)
        texts = [
            repr(signature.out_constants[i]) if i in signature.out_constants else next(remaining)
            for i in range(signature.out_spec.num_leaves)
        ]
        return _tree_text(signature.out_spec, iter(texts))

    def _home_of(self, node: fx.Node) -> tuple[str, str]:
        """The module that a node is printed under, and the childless module it belongs to."""
        path = module_path(node)
        if path and path not in self._parents:
            parent, _, leaf = path.rpartition(".")
            return parent, leaf
        return path, ""

    def _named(self, inherited: Mapping[str, tuple[str, str]]) -> dict[fx.Node, str]:
        inputs = self.program.placeholders
        paths = [tensor.path for tensor in self.program.signature.tensors]
        names = dict(zip(inputs, paths, strict=False))
        for node in self._lines:
            module, name = inherited.get(node.name, (None, ""))
            if module == self._home[node][0]:
                names[node] = name
        taken, counts = set(names.values()), Counter[str]()
        for index, node in enumerate(self._lines):
            if node in names:
                continue
            following = self._lines[index + 1] if index + 1 < len(self._lines) else None
            last = following is None or self._home[following] != self._home[node]
            base = self._base_name(node, last)
            name = base
            while name in taken:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
            taken.add(name)
            names[node] = name
        return names

    def _base_name(self, node: fx.Node, last: bool) -> str:
        module, leaf = self._home[node]
        call = operator_name(node.target).split(".")
        overload = isinstance(node.target, torch._ops.OpOverload)
        name = (call[-2] if overload else call[-1]).strip("_")
        local = leaf if leaf and last else f"{leaf}.{name}" if leaf else name
        return f"{module}.{local}" if module else local


def _parents(program: Program) -> set[str]:
    """All module paths that have children, and the root."""
    paths = set(program.module_types) | {module_path(node) for node in program.graph.nodes}
    parents = {""}
    for path in paths:
        while path := path.rpartition(".")[0]:
            parents.add(path)
    return parents


def _has_line(node: fx.Node) -> bool:
    if node.op != "call_function" or _is_part(node):
        return False
    reads_data = any(_is_tensor(used) for used in node.all_input_nodes)
    is_size = isinstance(node.meta.get("val"), _SYMBOLIC)
    return not is_size or (reads_data and "sym_" not in str(node.target))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_part(node: fx.Node) -> bool:
    """Whether the node takes one value out of a tuple."""
    if getattr(node.target, "__name__", "") != "getitem" or not node.args:
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and isinstance(source.meta.get("val"), (tuple, list))


def _tree_text(spec: pytree.TreeSpec, leaves: Iterator[str]) -> str:
    if spec.type is None:
        return next(leaves)
    parts = [_tree_text(child, leaves) for child in spec.children()]
    if spec.type is tuple:
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if spec.type is list:
        return f"[{', '.join(parts)}]"
    keys = spec.context if isinstance(spec.context, (list, tuple)) else [None] * len(parts)
    if len(keys) != len(parts):
        keys = [None] * len(parts)
    named = [
        part if key is None else f"{key}: {part}" for key, part in zip(keys, parts, strict=True)
    ]
    inner = ", ".join(named)
    return f"{{{inner}}}" if spec.type is dict else f"{spec.type.__name__}({inner})"
