"""Program to text: typed, deterministic, short; and the difference of two programs.

    Net(x: f32[s0, 8]) -> f32[s0, 4]

    # block.0  Block
      %fc1: f32[s0, 16] = linear(%x, fc1.weight: f32[16, 8], fc1.bias: f32[16])
      %act: f32[s0, 16] = relu(%fc1)

    return %head

How to read it. A comment opens each stretch of operations of one module: its path and class. Modules
without children (a linear, a norm) are printed with their parent; the last operation of one bears
its name, earlier ones `name.operator`. Names are resolved as in nested scopes: `%fc1` is looked up
in the module at hand, then outward; a leading dot is an absolute name. State is written where it is
read, relative to the module, with its type. Sizes are expressions of the input sizes `s0, s1, ...`;
the nodes that compute them and those that take a tuple apart (`%max[1]`) have no line of their own.

No name depends on a node's number in the graph, so a rewrite changes the lines it touches only.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx

from fxopt.program import Program, Recipe, module_path

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}
_SYMBOLIC = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_END = 2**63 - 1
# A dotted name in a printed line, but no float: it starts with a letter, an underscore or "%".
_DOTTED = re.compile(r"(?<![\w.])(?:%\.?\w+|[A-Za-z_]\w*)(?:\.\w+)+")


def text(program: Program, collapse: bool = False) -> str:
    """The canonical text of `program`, one line an operation; equal programs give equal text.

    `collapse=True` prints numbered sibling modules (the layers of a transformer) that differ in
    nothing but their number once, and names the others in one line.
    """
    printer = _Printer(program)
    chunks = printer.chunks()
    body = _collapsed(chunks) if collapse else [_chunk_text(chunk) for chunk in chunks]
    return "\n\n".join([printer.header, *body, printer.result()]) + "\n"


def diff(before: Program, after: Program) -> str:
    """What changed from `before` to `after`: removed lines (-), added ones (+), by module.

    A change that numbered siblings share is printed once. The empty string where nothing changed.
    """
    old = _Printer(before)
    new = _Printer(after, old)
    pairs = [[(c.header, line) for c in p.chunks() for line in c.lines] for p in (old, new)]
    for printer, entries in zip((old, new), pairs, strict=True):
        entries.insert(0, ("", printer.header))
        entries.append(("# return", printer.result()))
    hunks = _hunks(*pairs)
    if not hunks:
        return ""
    sizes = [f"{p.name}: {p.node_count()} operations, {_bytes_text(p)}" for p in (before, after)]
    return "\n".join([f"--- {sizes[0]}", f"+++ {sizes[1]}", *_folded(hunks)]) + "\n"


@dataclass(frozen=True)
class GraphText:
    """A program's graph for people: `str()` is its text, `diff` compares it with another."""

    program: Program

    def __str__(self) -> str:
        return text(self.program)

    def __repr__(self) -> str:
        return text(self.program, collapse=True)

    def collapsed(self) -> str:
        """The text with repeated layers printed once."""
        return text(self.program, collapse=True)

    def diff(self, other: GraphText | Program) -> str:
        """What changed from this graph to `other`; empty where nothing did."""
        return diff(self.program, other.program if isinstance(other, GraphText) else other)


def describe(node: fx.Node) -> str:
    """One node by its own name, for messages: `%add: f32[s0, 8] = aten.add.Tensor(%x, %y)`.

    Needs no program and no well-formed node, so that an error can show the node that is broken.
    """
    value = node.meta.get("val")
    kind = "" if value is None else f": {type_text(value)}"
    args = [_plain(arg) for arg in node.args]
    args += [f"{key}={_plain(arg)}" for key, arg in node.kwargs.items()]
    if node.op in ("placeholder", "get_attr"):
        return f"%{node.name}{kind} = {node.op} {node.target}"
    target = node.target if isinstance(node.target, str) else operator_name(node.target)
    return f"%{node.name}{kind} = {target}({', '.join(args)})"


def type_text(value: Any, symbols: Symbols | None = None) -> str:
    """The type of a fake value: `f32[s0, 8]`, `(f32[8], i64[8])`, `int`."""
    if isinstance(value, (torch.Tensor, Recipe)):
        sizes = ", ".join(_size_text(size, symbols) for size in value.shape)
        return f"{dtype_text(value.dtype)}[{sizes}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(type_text(item, symbols) for item in value)})"
    for kinds, name in (
        ((bool, torch.SymBool), "bool"),
        ((int, torch.SymInt), "int"),
        ((float, torch.SymFloat), "float"),
    ):
        if isinstance(value, kinds):
            return name
    return "none" if value is None else type(value).__name__


def dtype_text(dtype: torch.dtype) -> str:
    """`f32` for torch.float32, and so on; torch's own name for the rarer ones."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def operator_name(target: Any) -> str:
    """The full name of a call's target: `aten.add.Tensor`, `operator.mul`, `torch.sym_max`."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return str(target)
    module = str(getattr(target, "__module__", "") or "").lstrip("_")
    name = getattr(target, "__name__", repr(target))
    return f"{module}.{name}" if module else str(name)


class Symbols:
    """Renames size symbols to s0, s1, ... (data-dependent ones u0, u1, ...) as they appear."""

    def __init__(self) -> None:
        self._renamed: dict[sympy.Symbol, sympy.Symbol] = {}
        self._texts: dict[sympy.Basic, str] = {}
        self._counts: Counter[str] = Counter()

    def text(self, expression: sympy.Basic) -> str:
        """The expression in the new names."""
        if expression not in self._texts:
            for symbol in sorted(expression.free_symbols, key=lambda s: (len(s.name), s.name)):
                self._rename(symbol)
            self._texts[expression] = str(expression.xreplace(self._renamed)).replace(" ", "")
        return self._texts[expression]

    def _rename(self, symbol: sympy.Symbol) -> None:
        if symbol in self._renamed:
            return
        kind = "u" if symbol.name.startswith("u") else "s"
        name = f"{kind}{self._counts[kind]}"
        self._counts[kind] += 1
        self._renamed[symbol] = sympy.Symbol(name, **symbol._assumptions_orig)


@dataclass(frozen=True)
class _Chunk:
    """Consecutive operations of one module."""

    path: str
    header: str
    lines: list[str]


class _Printer:
    """Names, types and lines of one program; after a rewrite, in the names of its predecessor."""

    def __init__(self, program: Program, predecessor: _Printer | None = None) -> None:
        self.program = program
        self._symbols = Symbols()
        self._parents = _parents(program)
        self._lines = [node for node in program.graph.nodes if _has_line(node)]
        self._home = {node: self._home_of(node) for node in self._lines}
        inherited = predecessor.by_node_name() if predecessor else {}
        self._names = self._named(inherited)
        self._taken = set(self._names.values())
        # Symbols are numbered as they appear, and the header is what appears first.
        self.header = self._header()

    def by_node_name(self) -> dict[str, tuple[str, str]]:
        """{fx name: (module, printed name)} of all operations."""
        return {n.name: (self._home[n][0], self._names[n]) for n in self._lines}

    def _header(self) -> str:
        inputs = [
            f"{self._names[node]}: {self._type(node)}" for node in self.program.placeholders
        ]
        result = self._tree([self._type(node) for node in self.program.output.args[0]])
        mode = "" if self.program.mode == "eval" else f"\n# {self.program.mode} mode"
        return f"{self.program.name}({', '.join(inputs)}) -> {result}{mode}"

    def result(self) -> str:
        return "return " + self._tree([self._arg(n, "") for n in self.program.output.args[0]])

    def chunks(self) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        for node in self._lines:
            path = self._home[node][0]
            if not chunks or chunks[-1].path != path:
                chunks.append(_Chunk(path, self._chunk_header(path), []))
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
            return _plain(arg, self._symbols)
        if arg.op == "get_attr":
            return f"{self._state_name(str(arg.target), path)}: {self._type(arg)}"
        if _is_part(arg):
            return f"{self._arg(arg.args[0], path)}[{arg.args[1]}]"
        if arg not in self._names:
            return _size_text(arg.meta["val"], self._symbols)
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


def _size_text(size: Any, symbols: Symbols | None) -> str:
    expression = getattr(getattr(size, "node", None), "expr", None)
    if expression is None:
        return str(size)
    return str(expression) if symbols is None else symbols.text(expression)


def _plain(arg: Any, symbols: Symbols | None = None) -> str:
    """A constant argument, or a node by its own name."""
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _size_text(arg, symbols)
    if isinstance(arg, torch.dtype):
        return dtype_text(arg)
    if isinstance(arg, (torch.layout, torch.memory_format, torch.device)):
        return str(arg).removeprefix("torch.")
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(_plain(item, symbols) for item in arg)}]"
    return "end" if arg == _END and isinstance(arg, int) else repr(arg)


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
    named = [part if key is None else f"{key}: {part}" for key, part in zip(keys, parts)]
    inner = ", ".join(named)
    return f"{{{inner}}}" if spec.type is dict else f"{spec.type.__name__}({inner})"


def _chunk_text(chunk: _Chunk) -> str:
    return "\n".join([chunk.header, *chunk.lines])


def _block(path: str) -> tuple[str, int] | None:
    """(`encoder.layer`, 3) of `encoder.layer.3.output`: the outermost numbered module."""
    match = re.match(r"(?:(.*?)\.)?(\d+)(?:\.|$)", path)
    return (match[1] or "", int(match[2])) if match else None


def _template(line: str, number: int) -> str:
    """The line with module numbers written relative to `number`."""

    def relative(match: re.Match[str]) -> str:
        segments = re.split(r"([%.]+)", match[0])
        return "".join(f"<{int(s) - number}>" if s.isdigit() else s for s in segments)

    return _DOTTED.sub(relative, line)


def _collapsed(chunks: list[_Chunk]) -> list[str]:
    """Texts of the chunks; runs of numbered siblings equal to the one before become one line."""
    blocks: list[tuple[tuple[str, int] | None, list[str]]] = []
    for chunk in chunks:
        key = _block(chunk.path)
        if key is None or not blocks or blocks[-1][0] != key:
            blocks.append((key, []))
        blocks[-1][1].append(_chunk_text(chunk))
    texts: list[str] = []
    run: list[tuple[str, int]] = []
    previous = None
    for key, parts in blocks:
        block = "\n\n".join(parts)
        shape = (key[0], _template(block, key[1])) if key else None
        if key and shape == previous:
            run.append(key)
            continue
        texts += _run_text(run)
        run, previous = [], shape
        texts.append(block)
    return texts + _run_text(run)


def _run_text(run: list[tuple[str, int]]) -> list[str]:
    if not run:
        return []
    (prefix, first), (_, last) = run[0], run[-1]
    dot = f"{prefix}." if prefix else ""
    numbers = f"{dot}{first}" if first == last else f"{dot}{first} ... {dot}{last}"
    return [f"# {numbers}: as {dot}{first - 1}"]


def _hunks(
    old: list[tuple[str, str]], new: list[tuple[str, str]]
) -> dict[str, list[str]]:
    """{module header: its removed and added lines}, in order."""
    hunks: dict[str, list[str]] = {}
    for tag, i0, i1, j0, j1 in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if tag != "equal":
            for sign, entries in (("-", old[i0:i1]), ("+", new[j0:j1])):
                for header, line in entries:
                    hunks.setdefault(header, []).append(f"{sign}{line}")
    return hunks


def _folded(hunks: Mapping[str, list[str]]) -> list[str]:
    """The hunks as lines; a hunk that numbered siblings share is printed for the first only."""
    alike: dict[tuple[str, str], list[str]] = {}
    for header, lines in hunks.items():
        block = _block(header.removeprefix("# "))
        joined = "\n".join(lines)
        key = (_template(header, block[1]), _template(joined, block[1])) if block else (header, joined)
        alike.setdefault(key, []).append(header)
    texts: list[str] = []
    for headers in alike.values():
        first, *rest = headers
        texts += ["", first] if first.startswith("# ") else [""]
        texts += hunks[first]
        if rest:
            names = [header.removeprefix("# ").partition("  ")[0] for header in rest]
            shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
            texts.append(f"  and the same in {len(names)} more: {shown}")
    return texts


def _bytes_text(program: Program) -> str:
    return f"{program.parameter_bytes() / 1e6:.2f} MB"
