"""The written list of what a program may contain, checked between any two passes.

    nodes      placeholder (tensors), get_attr, call_function, output; names unique; every argument
               is defined earlier in the same graph; one output at the end, a flat tuple of tensors
    calls      aten overloads, fxopt:: overloads, overloads that a user registered with torch.library,
               getitem, and the size arithmetic of `SIZE_FUNCTIONS`; no control-flow operator, no
               assertion (`_ASSERTIONS`), no dropout in eval mode (`_DROPOUT`)
    arguments  what the operator's schema asks for: arity, names and types
    writes     no operator writes to its arguments, except `aten.copy_` to state, in the tail of the
               graph; what it has written is not read again
    metadata   `val` (fake value), `module_path` and `source` on every node but the output
    state      each get_attr names an entry of that shape, dtype and device; all entries are used;
               all of one device, scalars aside
    signature  one placeholder for each tensor of the signature, of its dtype, rank and fixed sizes

A node that nobody uses is allowed: a rule that replaces a node may leave its inputs behind, and
dropping them is a pass of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx

from fxopt.errors import WellFormedError
from fxopt.graph_text import describe, operator_name, type_text
from fxopt.program import Program, module_path, source_line

Check = Callable[[Any], bool]

SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        **{
            f"operator.{name}": getattr(operator, name)
            for name in (
                "add sub mul floordiv truediv mod pow neg pos abs and_ or_ not_ "
                "eq ne lt le gt ge getitem"
            ).split()
        },
        **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
        **{
            f"torch.{name}": getattr(torch, name)
            for name in ("sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum sym_sqrt").split()
            if hasattr(torch, name)
        },
    }
)
"""The Python functions a graph may call, by name: arithmetic on sizes, and `getitem`."""

_SIZE_FUNCTIONS = frozenset(SIZE_FUNCTIONS.values())
_NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")
_ASSERTIONS = frozenset(
    (
        "aten::_assert_async",
        "aten::_assert_scalar",
        "aten::_assert_tensor_metadata",
        "aten::_functional_assert_async",
        "aten::_functional_assert_scalar",
        "aten::sym_constrain_range",
        "aten::sym_constrain_range_for_size",
    )
)
_DROPOUT = frozenset(
    f"aten::{name}"
    for name in (
        "dropout",
        "native_dropout",
        "feature_dropout",
        "alpha_dropout",
        "feature_alpha_dropout",
    )
)
_COPY = torch.ops.aten.copy_.default
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_METADATA = (("val", None), ("module_path", str), ("source", str))


def check(program: Program) -> None:
    """Raise `WellFormedError`, naming the node and its neighbours, where a rule is broken.

    Nothing is computed and nothing changed; costs some tens of microseconds a node.
    """
    _Checker(program).check()


class _Checker:
    """One walk over a program's nodes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.seen: set[fx.Node] = set()
        self.names: set[str] = set()
        self.written: dict[str, fx.Node] = {}
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
        if node.op not in _NODE_KINDS:
            _fail(node, f"a node of kind {node.op}", f"only {', '.join(_NODE_KINDS)} are allowed")
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
            if result in self.written.values():
                _fail(node, f"%{result.name} writes state and is returned", "return its source")

    def _metadata(self, node: fx.Node) -> None:
        for key, kind in _METADATA:
            if key not in node.meta or (kind and not isinstance(node.meta[key], kind)):
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
        elif target not in _SIZE_FUNCTIONS:
            is_control_flow = isinstance(target, torch._ops.HigherOrderOperator)
            kind = "a control-flow operator" if is_control_flow else "a Python function"
            _fail(
                node,
                f"{kind}, {operator_name(target)}, is called",
                "call an operator overload such as torch.ops.aten.add.Tensor, or register the "
                "function with torch.library.custom_op",
            )

    def _operator(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        name, mutable, dropout_at, parameters = _facts(target)
        if name in _ASSERTIONS:
            _fail(node, "an assertion node", "drop it: the signature checks the inputs of calls")
        if self.program.mode == "eval":
            self._no_dropout(node, name, dropout_at)
        if mutable:
            self._write(node, target)
        fault = _argument_fault(node, parameters)
        if fault:
            _fail(node, fault, f"the schema is {target._schema}")

    def _no_dropout(self, node: fx.Node, name: str, dropout_at: int | None) -> None:
        rate: Any = 0.0
        if dropout_at is not None:
            default = node.kwargs.get("dropout_p", 0.0)
            rate = node.args[dropout_at] if dropout_at < len(node.args) else default
        if name in _DROPOUT or rate != 0.0:
            _fail(
                node,
                "dropout in a program captured in eval mode",
                "replace the node by its input, or capture with mode='train'",
            )

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
        if node.op == "call_function" and node.target is not _COPY:
            _fail(
                node,
                "a computation after a write to state",
                "move it before the first aten.copy_: writes are the tail of the graph",
            )
        sources = node.all_input_nodes[1:] if node.target is _COPY else []
        for source in sources:
            if source in self.written.values() or str(source.target) in self.written:
                _fail(node, f"%{source.name} is read after it was written", "read it before")

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
                and all(
                    not isinstance(want, int) or size == want
                    for size, want in zip(value.shape, expected.sizes, strict=True)
                    if isinstance(size, int)
                )
            )
            if not fits:
                _fail(node, f"the signature wants {expected}", "inputs keep their type")

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


_Parameter = tuple[str, bool, bool, Check]


@lru_cache(maxsize=4096)
def _facts(
    target: torch._ops.OpOverload,
) -> tuple[str, bool, int | None, tuple[_Parameter, ...]]:
    """(qualified name, writes, index of dropout_p, (name, required, keyword only, type check))."""
    schema = target._schema
    names = [argument.name for argument in schema.arguments]
    return (
        schema.name,
        bool(schema.is_mutable),
        names.index("dropout_p") if "dropout_p" in names else None,
        tuple(
            (a.name, not a.has_default_value(), bool(a.kwarg_only), _type_check(a.type))
            for a in schema.arguments
        ),
    )


def _argument_fault(node: fx.Node, parameters: tuple[_Parameter, ...]) -> str | None:
    """What is wrong with a call's arguments by the operator's schema; None where nothing is."""
    args, kwargs = node.args, node.kwargs
    positional = sum(not keyword_only for _, _, keyword_only, _ in parameters)
    if len(args) > positional:
        return f"{len(args)} positional arguments where the operator takes {positional}"
    matched = 0
    for index, (name, required, _, fits) in enumerate(parameters):
        if index < len(args):
            value = args[index]
            if name in kwargs:
                return f"argument {name!r} is given twice"
        elif name in kwargs:
            value = kwargs[name]
            matched += 1
        elif required:
            return f"argument {name!r} is missing"
        else:
            continue
        if not fits(value):
            return f"argument {name!r} doesn't take {_shown(value)}"
    if matched != len(kwargs):
        known = {name for name, *_ in parameters}
        return f"no argument is named {', '.join(sorted(set(kwargs) - known))}"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name} ({type_text(value.meta.get('val'))})"
    return f"{value!r} ({type(value).__name__})"


def _type_check(kind: Any) -> Check:
    """Whether a graph argument (a constant or a node) fits a schema type."""
    name = kind.kind()
    if name == "OptionalType":
        inner = _type_check(kind.getElementType())
        return lambda value: value is None or inner(value)
    if name == "ListType":
        return _list_check(kind)
    if name == "TensorType":
        # A number where a tensor is asked for is wrapped by the dispatcher, as in x + 1.
        return lambda value: _is_a(value, (Tensor, int, float, complex, *_SYMBOLS))
    constants: dict[str, tuple[type, ...]] = {
        "IntType": (int, torch.SymInt, torch.dtype, torch.layout, torch.memory_format),
        "SymIntType": (int, torch.SymInt),
        "FloatType": (int, float, torch.SymFloat, torch.SymInt),
        "BoolType": (bool, torch.SymBool),
        "NumberType": (int, float, complex, *_SYMBOLS),
        "StringType": (str,),
        "DeviceObjType": (torch.device,),
        "GeneratorType": (torch.Generator,),
    }
    wanted = constants.get(name, (object,))
    return lambda value: _is_a(value, wanted)


def _list_check(kind: Any) -> Check:
    element = kind.getElementType()
    inner = _type_check(element)
    # `int[2] stride` takes one number for all axes.
    broadcasts = element.kind() in ("IntType", "SymIntType", "FloatType")

    def fits(value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(inner(item) for item in value)
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), (list, tuple)):
            return True
        return broadcasts and inner(value)

    return fits


def _is_a(value: Any, wanted: tuple[type, ...]) -> bool:
    return isinstance(value.meta.get("val") if isinstance(value, fx.Node) else value, wanted)


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
