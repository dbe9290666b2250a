"""The walk over a program that applies the rules of the room."""

from __future__ import annotations

import operator
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from fxopt.errors import WellFormedError
from fxopt.graph_text import describe, operator_name, type_text
from fxopt.nodes import module_path, source_line
from fxopt.operators.assertions import is_assertion
from fxopt.program import Program
from fxopt.sharing import may_alias
from fxopt.wellformed.dialect import NODE_KINDS, SIZE_FUNCTIONS
from fxopt.wellformed.schema import argument_fault, facts

_SIZE_FUNCTIONS = frozenset(SIZE_FUNCTIONS.values())
_COPY = torch.ops.aten.copy_.default
_METADATA = (("val", None), ("module_path", str), ("source", str))


def check(program: Program) -> None:
    """Raise `WellFormedError`, naming the node and its neighbours, where a rule is broken.

    Nothing is computed and nothing changed; costs some microseconds a node.
    """
    _Checker(program).check()


class _Checker:
    """One walk over a program's nodes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.seen: set[fx.Node] = set()
        self.names: set[str] = set()
        self.written: dict[str, fx.Node] = {}
        self.views: set[fx.Node] = set()
        self.read: set[str] = set()

    def check(self) -> None:
        nodes = list(self.program.graph.nodes)
        if not nodes or nodes[-1].op != "output":
            raise WellFormedError(
                f"the graph of {self.program.name} doesn't end in an output node; it has "
                f"{len(nodes)} nodes. Build it with graph.output((...,)) as the last node."
            )
        for node in nodes:
            self._node(node)
        self._inputs()
        self._state()

    def _node(self, node: fx.Node) -> None:
        if node.op not in NODE_KINDS:
            _fail(node, f"a node of kind {node.op}", f"only {', '.join(NODE_KINDS)} are allowed")
        if node.name in self.names:
            _fail(node, f"a second node named {node.name}", "give each node a name of its own")
        self.names.add(node.name)
        for used in node.all_input_nodes:
            if used not in self.seen:
                _fail(
                    node,
                    f"%{used.name} is used before it is defined",
                    "insert new nodes before their first user: graph.inserting_before(node)",
                )
        self.seen.add(node)
        if node.op == "output":
            self._output(node)
            return
        self._metadata(node)
        if self.written:
            self._after_write(node)
        if node.op == "get_attr":
            self._attribute(node)
        elif node.op == "call_function":
            self._call(node)

    def _output(self, node: fx.Node) -> None:
        if node is not self.program.output:
            _fail(node, "an output node before the end", "a graph has one output, its last node")
        results = node.args[0] if len(node.args) == 1 else None
        if not isinstance(results, (tuple, list)) or not all(
            isinstance(result, fx.Node) and isinstance(result.meta.get("val"), Tensor)
            for result in results
        ):
            _fail(
                node,
                "the output is not a flat tuple of tensor nodes",
                "give graph.output a tuple of nodes; the signature rebuilds the model's own type",
            )
        signature = self.program.signature
        expected = signature.out_spec.num_leaves - len(signature.out_constants)
        if len(results) != expected:
            _fail(
                node,
                f"{len(results)} outputs where the model's output type holds {expected} tensors",
                "keep the number and order of outputs",
            )
        for result in results:
            if str(result.target) in self.written:
                _fail(
                    node,
                    f"%{result.name} is state that was written, and is returned",
                    "return the aten.copy_ that wrote it, or what was written to it",
                )

    def _metadata(self, node: fx.Node) -> None:
        for key, kind in _METADATA:
            value = node.meta.get(key)
            if value is None or (kind and not isinstance(value, kind)):
                _fail(
                    node,
                    f'meta["{key}"] is missing',
                    "copy module_path and source from the node it replaces, and compute val with "
                    "the target on the fake values of its arguments",
                )

    def _attribute(self, node: fx.Node) -> None:
        name, value = str(node.target), node.meta["val"]
        tensor = self.program.state.get(name)
        if tensor is None:
            _fail(
                node,
                f"the state has no entry {name!r}",
                "add the tensor with program.with_graph(graph, added={name: tensor})",
            )
        self.read.add(name)
        if (
            not isinstance(value, Tensor)
            or value.dtype != tensor.dtype
            or tuple(value.shape) != tuple(tensor.shape)
        ):
            _fail(
                node,
                f"the fake value is {type_text(value)}, the state entry {type_text(tensor)}",
                "make the fake value of a get_attr from its tensor",
            )
        if value.device != tensor.device:
            _fail(
                node,
                f"the fake value is on {value.device}, the state entry on {tensor.device}",
                "make the fake value of a get_attr from its tensor",
            )

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            self._operator(node, target)
        elif target in _SIZE_FUNCTIONS:
            self._size_arithmetic(node)
        else:
            is_control_flow = isinstance(target, torch._ops.HigherOrderOperator)
            kind = "a control-flow operator" if is_control_flow else "a Python function"
            _fail(
                node,
                f"{kind}, {operator_name(target)}, is called",
                "call an operator overload such as torch.ops.aten.add.Tensor, or register the "
                "function with torch.library.custom_op",
            )

    def _size_arithmetic(self, node: fx.Node) -> None:
        name = operator_name(node.target)
        for used in node.all_input_nodes:
            kind = used.meta["val"]
            if node.target is operator.getitem and not isinstance(kind, (tuple, list)):
                _fail(
                    node,
                    f"{name} of {type_text(kind)}",
                    "it takes tuples apart; for tensors there are aten.select and aten.slice",
                )
            if node.target is not operator.getitem and isinstance(kind, Tensor):
                _fail(
                    node,
                    f"{name} on a tensor",
                    "it is for sizes; call the aten overload, such as aten.add.Tensor",
                )

    def _operator(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        mutable, parameters = facts(target)
        if is_assertion(target):
            _fail(node, "an assertion node", "drop it: the signature checks the inputs of calls")
        if mutable:
            self._write(node, target)
        fault = argument_fault(node, parameters)
        if fault:
            _fail(node, fault, f"the schema is {target._schema}")

    def _write(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        written = node.args[0] if node.args else None
        is_state = isinstance(written, fx.Node) and written.op in ("get_attr", "placeholder")
        if target is not _COPY or not is_state:
            _fail(
                node,
                f"{target} writes to its argument",
                "use the operator that returns a new tensor; only aten.copy_ to state, at the end "
                "of the graph, may write",
            )
        assert isinstance(written, fx.Node)
        self.written[str(written.target)] = node

    def _after_write(self, node: fx.Node) -> None:
        if self._is_view_of_written(node):
            self.views.add(node)
            return
        if node.op == "call_function" and node.target is not _COPY:
            _fail(
                node,
                "a computation after a write to state",
                "move it before the first aten.copy_: writes, and views of what they wrote, are "
                "the tail of the graph",
            )
        sources = node.all_input_nodes[1:] if node.target is _COPY else []
        for source in sources:
            if source in self.written.values() or str(source.target) in self.written:
                _fail(node, f"%{source.name} is read after it was written", "read it before")

    def _is_view_of_written(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is _COPY or not may_alias(node):
            return False
        seen = (*self.written.values(), *self.views)
        return any(operand in seen for operand in node.all_input_nodes)

    def _inputs(self) -> None:
        nodes, inputs = self.program.placeholders, self.program.signature.tensors
        if len(nodes) != len(inputs):
            raise WellFormedError(
                f"the graph of {self.program.name} has {len(nodes)} placeholders "
                f"({', '.join(n.name for n in nodes)}), its signature {len(inputs)} tensors "
                f"({', '.join(i.path for i in inputs)}). Passes must not add or drop inputs."
            )
        for node, expected in zip(nodes, inputs, strict=True):
            value = node.meta["val"]
            fits = (
                isinstance(value, Tensor)
                and value.dtype == expected.dtype
                and value.ndim == len(expected.sizes)
                and all(map(_same_size, value.shape, expected.sizes))
            )
            if not fits:
                _fail(
                    node,
                    f"the input is no {expected}, as the signature says (sizes {expected.sizes})",
                    "inputs keep dtype, rank and sizes; a size is an int in the signature where "
                    "the fake value has a number, a name where it has a symbol",
                )

    def _state(self) -> None:
        unused = sorted(set(self.program.state) - self.read)
        if unused:
            raise WellFormedError(
                f"no node of {self.program.name} reads the state {', '.join(unused[:5])}"
                f"{f' and {len(unused) - 5} more' if len(unused) > 5 else ''}. Build the new "
                "program with program.with_graph(graph), which drops such entries."
            )
        devices = {t.device: name for name, t in self.program.state.items() if len(t.shape)}
        if len(devices) > 1:
            places = ", ".join(f"{name} on {device}" for device, name in devices.items())
            raise WellFormedError(
                f"the state of {self.program.name} is on several devices: {places}. "
                "Move the model to one device before it is transformed."
            )


def _same_size(size: Any, expected: int | str) -> bool:
    """Whether a fake size is fixed where the signature fixes it, and to the same number.

    A symbolic size may have been found to be a number after all; no guard is recorded here.
    """
    if not isinstance(size, int):
        size = int(size.node.expr) if size.node.expr.is_number else None
    return size is None if isinstance(expected, str) else bool(size == expected)


def _fail(node: fx.Node, what: str, advice: str) -> NoReturn:
    inputs = [describe(used) for used in node.all_input_nodes[:4]]
    users = [describe(user) for user in list(node.users)[:4]]
    lines = [
        f"{what}.",
        f"  node:   {describe(node)}",
        f"  module: {module_path(node) or '(the model itself)'}",
        f"  source: {source_line(node) or '(unknown)'}",
        *(f"  input:  {line}" for line in inputs),
        *(f"  user:   {line}" for line in users),
        f"  fix:    {advice}",
    ]
    raise WellFormedError("\n".join(lines))
