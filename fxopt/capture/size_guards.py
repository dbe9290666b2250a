"""From what a trace asked about sizes to the guards of its program.

Every question of Python code is a branch: where its answer would be another one, the model may
compute something else. An operator's question matters only where torch itself keeps it as a guard,
since the graph calls the operator again; and not where it decides a memory layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv, has_free_symbols
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from fxopt.capture.questions import Question
from fxopt.guards import Guard, Tree

aten = torch.ops.aten

_LAYOUT = ("contiguous", "strides", "channels_last", "dense", "reshape_view", "physical", "swap")
"""In the names of the functions that ask in order to choose strides, or between view and copy."""

_OPERATORS = {
    "Add": "add", "Mul": "mul", "FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod",
    "PythonMod": "mod", "Max": "max", "Min": "min", "Abs": "abs", "ceiling": "ceil",
    "CeilToInt": "ceil", "floor": "floor", "FloorToInt": "floor", "TruncToInt": "trunc",
    "RoundToInt": "round", "ToFloat": "float", "FloatTrueDiv": "truediv", "IntTrueDiv": "truediv",
    "OpaqueUnaryFn_sqrt": "sqrt", "Equality": "eq", "Unequality": "ne", "StrictLessThan": "lt",
    "LessThan": "le", "StrictGreaterThan": "gt", "GreaterThan": "ge", "And": "and", "Or": "or",
    "Not": "not",
}  # fmt: skip

_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)

Places = Mapping[Any, tuple[str, int, int]]


def guards_of(exported: ExportedProgram, questions: Sequence[Question]) -> tuple[Guard, ...]:
    """The guards of an exported program, those of branches first, in the order they were asked.

    A branch of a `helper` that all models share, which only a size of 1 takes otherwise, may be
    dropped by whoever tries the graph at that size.
    """
    places, environment = _places(exported)
    if environment is None:
        return ()
    found: dict[Tree, Guard] = {}
    if line := _asks_about_none(questions):
        found |= {place: Guard(("ge", place, 1), "branch", line) for place in places.values()}
    for question in questions:
        if question.by_python:
            relation = _relation(question)
            only_at_one = question.by_helper and _always(relation, 2)
            origin: Any = "helper" if only_at_one else "branch"
            for tree in _trees(relation, places, environment):
                found.setdefault(tree, Guard(tree, origin, question.source))
    lines = {
        _relation(question): question.source
        for question in reversed(questions)
        if not any(word in question.asker for word in _LAYOUT)
    }
    asked = [guard.expr for guard in environment.guards if guard.expr in lines]
    for relation in (*(one for one in asked if not _is_broadcast(one)), *_squeezed(exported)):
        for tree in _trees(relation, places, environment):
            found.setdefault(tree, Guard(tree, "operator", lines.get(relation, "")))
    return tuple(found.values())


def admits(
    exported: ExportedProgram, guards: Sequence[Guard], shapes: Sequence[Sequence[int]]
) -> bool:
    """Whether the exported program with these guards takes inputs of other shapes.

    A helper's guard is no obstacle: a trial may drop it.
    """
    values = [value for _, value in _inputs(exported)]
    fixed = all(
        has_free_symbols(wanted) or int(wanted) == size
        for value, shape in zip(values, shapes, strict=True)
        for wanted, size in zip(value.shape, shape, strict=True)
    )
    return fixed and all(guard.is_kept(shapes) for guard in guards if guard.origin != "helper")


def _asks_about_none(questions: Sequence[Question]) -> str:
    """The first line of the model that asks what torch answers alike for all sizes above 0."""
    return next(
        (
            question.source
            for question in questions
            if question.by_python and not question.by_helper and not question.asked.free_symbols
        ),
        "",
    )


def _places(exported: ExportedProgram) -> tuple[Places, ShapeEnv | None]:
    """{symbol: the first input axis that it was made for}, and the symbols' environment."""
    places: dict[Any, tuple[str, int, int]] = {}
    environment = None
    for index, value in _inputs(exported):
        sizes: tuple[Any, ...] = tuple(value.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                # What the size was called before torch found it equal to another, or a constant.
                places.setdefault(size.node._expr, ("size", index, axis))
    return places, environment


def _inputs(exported: ExportedProgram) -> Iterator[tuple[int, Tensor]]:
    """The fake tensors of the user's inputs, numbered."""
    nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
    specs = exported.graph_signature.input_specs
    values = [
        node.meta["val"]
        for node, spec in zip(nodes, specs, strict=True)
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    yield from enumerate(values)


def _is_broadcast(relation: Any) -> bool:
    """Whether torch asks if a size is 1 in order to broadcast it, which operators do anew."""
    return isinstance(relation, sympy.Ne) and relation.args[1] == 1


def _squeezed(exported: ExportedProgram) -> Iterator[Any]:
    """That sizes aren't 1 which an operator would drop if they were: the rank depends on it."""
    for node in exported.graph.nodes:
        if node.target not in _SQUEEZES:
            continue
        sizes: list[Any] = list(node.args[0].meta["val"].shape)
        axes: Any = node.args[1] if len(node.args) > 1 else range(len(sizes))
        for axis in axes if isinstance(axes, Iterable) else [axes]:
            if isinstance(sizes[axis], torch.SymInt):
                yield sympy.Ne(sizes[axis].node.expr, 1)


def _relation(question: Question) -> Any:
    """What was true when the question was asked, as a sympy relation."""
    asked, answer = question.asked, question.answer
    if answer in (True, sympy.true):
        return asked if _is_relation(asked) else sympy.Eq(asked, 1)
    if answer in (False, sympy.false):
        return sympy.Not(asked) if _is_relation(asked) else sympy.Eq(asked, 0)
    return sympy.Eq(asked, answer)


def _is_relation(asked: Any) -> bool:
    return isinstance(asked, sympy.logic.boolalg.Boolean) and not isinstance(asked, sympy.Symbol)


def _trees(relation: Any, places: Places, environment: ShapeEnv) -> Iterator[Tree]:
    """The relation as trees, all of which must hold; none where every size keeps it."""
    symbols = relation.free_symbols
    if not symbols or not symbols <= places.keys() or _always(relation, 1):
        return
    try:
        yield _tree(relation, places)
    except _UntoldError:
        # Nothing is known of other sizes, so that none is allowed.
        for symbol in sorted(symbols, key=str):
            hint: Any = environment.size_hint(symbol)
            yield ("eq", places[symbol], int(hint))


def _always(relation: Any, least: int) -> bool:
    """Whether the relation surely holds for all sizes from `least` on."""
    bounds = {symbol: ValueRanges(least, int_oo) for symbol in relation.free_symbols}
    try:
        return bool(bound_sympy(relation, bounds).lower == sympy.true)
    except Exception:  # whatever a function without a bound raises
        return False


class _UntoldError(Exception):
    """An expression holds something that a guard has no word for."""


def _tree(expression: Any, places: Places) -> Tree:
    if expression in places:
        return places[expression]
    if isinstance(expression, (bool, sympy.logic.boolalg.BooleanAtom)):
        return bool(expression)
    if expression.is_Integer:
        return int(expression)
    if expression.is_Float:
        return float(expression)
    if expression.is_Rational:
        return ("truediv", int(expression.p), int(expression.q))
    kind = type(expression).__name__
    operands = [_tree(operand, places) for operand in expression.args]
    if kind in _OPERATORS:
        return (_OPERATORS[kind], *operands)
    if kind in _COMPOSED:
        return _COMPOSED[kind](*operands)
    raise _UntoldError(kind)


def _power(base: Tree, exponent: Tree) -> Tree:
    if type(exponent) is not int:
        raise _UntoldError("Pow")
    raised = ("pow", base, abs(exponent))
    return raised if exponent >= 0 else ("truediv", 1, raised)


_COMPOSED: dict[str, Callable[..., Tree]] = {
    "Pow": _power,
    "PowByNatural": _power,
    "Identity": lambda inner: inner,
    "CeilDiv": lambda a, b: ("mul", -1, ("floordiv", ("mul", -1, a), b)),
    "ModularIndexing": lambda a, b, c: ("mod", ("floordiv", a, b), c),
}
