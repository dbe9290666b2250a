"""Guards: what the sizes of a call must satisfy for a captured graph to be the model's own answer.

A guard is an expression over the sizes of the graph's inputs that was true when the model was
captured, and by which the model chose what it computes. As data it is a tree of numbers and tuples:

    ("eq", ("mod", ("size", 0, 1), 4), 0)        the first input's axis 1 is a multiple of 4

so that it is saved as it is and never evaluated as anything else. All guards of a program become
one Python expression over integers, compiled once and evaluated at every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Tree: TypeAlias = Any
"""A number, a truth value, or `(operator, operand, ...)`; sizes are `("size", input, axis)`."""

Shapes: TypeAlias = Sequence[Sequence[int]]
GuardOrigin: TypeAlias = Literal["branch", "helper", "operator", "trial"]

_INFIX = {
    "add": " + ", "mul": " * ", "floordiv": " // ", "mod": " % ", "truediv": " / ", "pow": " ** ",
    "eq": " == ", "ne": " != ", "lt": " < ", "le": " <= ", "gt": " > ", "ge": " >= ",
    "and": " and ", "or": " or ",
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "abs": abs,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "round": round,
    "float": float,
    "sqrt": math.sqrt,
}
_OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}
_EXACTLY_TWO = {"floordiv", "mod", "truediv", "pow", *_OPPOSITE}
_ONE = {"not", "abs", "floor", "ceil", "trunc", "round", "float", "sqrt"}
_MOST_NODES = 500
_MOST_BITS = 4096


@dataclass(frozen=True)
class Guard:
    """`holds` is true of the sizes of every call that the program answers as the model does.

    `origin` says who needs it: a `branch` of the model's Python code, one in a `helper` that many
    models share, an `operator` whose result depends on it, or a `trial` that showed the graph to
    differ from the model elsewhere.
    `source` is the model's line, as `file:line  code`, empty where it isn't known.
    """

    holds: Tree
    origin: GuardOrigin
    source: str = ""

    def text(self, paths: Sequence[str]) -> str:
        """The relation in words of the inputs' `paths`: `x.shape[1] % 4 == 0`."""
        return _text(self.holds, paths)

    def broken_text(self, paths: Sequence[str]) -> str:
        """What a call that breaks the guard does: `x.shape[1] == 1 takes another branch at ...`."""
        opposite = _text(negated(self.holds), paths)
        line = self.source.partition("  ")[0]
        at = f" at {line}" if line else ""
        if self.origin in ("branch", "helper"):
            return f"{opposite} takes another branch{at}"
        if self.origin == "operator":
            return f"{opposite} changes what an operator computes{at}"
        return f"{opposite} was tried, and the graph doesn't answer as the model does there"

    def is_kept(self, shapes: Shapes) -> bool:
        """Whether it holds of the inputs' shapes; what can't be computed doesn't."""
        return _compiled((self.holds,), list(map(len, shapes)))(shapes)


def negated(tree: Tree) -> Tree:
    """The tree that is true where `tree` is false."""
    if isinstance(tree, bool):
        return not tree
    operator, *operands = tree
    if operator in _OPPOSITE:
        return (_OPPOSITE[operator], *operands)
    return operands[0] if operator == "not" else ("not", tree)


def sizes_of(tree: Tree) -> Iterator[tuple[int, int]]:
    """Every (input, axis) that the tree reads."""
    if isinstance(tree, tuple):
        if tree[0] == "size":
            yield tree[1], tree[2]
        else:
            for operand in tree[1:]:
                yield from sizes_of(operand)


def check_tree(tree: Tree, ranks: Sequence[int]) -> None:
    """Raise `ValueError` unless `tree` is a guard over inputs of these ranks, cheap to evaluate."""
    if _count(tree) > _MOST_NODES:
        raise ValueError(f"a guard of more than {_MOST_NODES} operations")
    if _bits(tree, ranks) > _MOST_BITS:
        raise ValueError("a guard whose numbers don't stay small")


def _count(tree: Tree) -> int:
    return 1 + sum(map(_count, tree[1:])) if isinstance(tree, tuple) else 1


def _bits(tree: Tree, ranks: Sequence[int]) -> int:
    """An upper bound on the bits of the tree's value; `ValueError` for what is no tree."""
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"a guard with the number {tree}")
    if isinstance(tree, (bool, float)):
        return 64
    if isinstance(tree, int):
        return max(tree.bit_length(), 1)
    if not isinstance(tree, tuple) or not tree or not isinstance(tree[0], str):
        raise ValueError(f"a guard with the value {tree!r:.40}")
    operator, *operands = tree
    if operator == "size":
        known = {(index, axis) for index, rank in enumerate(ranks) for axis in range(rank)}
        if tuple(operands) in known and all(type(operand) is int for operand in operands):
            return 63
        raise ValueError(f"a guard on the size {operands!r:.40}, which no input has")
    if operator not in _INFIX and operator not in _CALLS and operator != "not":
        raise ValueError(f"a guard with the unknown operator {operator!r:.40}")
    count = len(operands)
    if count == 0 or (operator in _EXACTLY_TWO and count != 2) or (operator in _ONE and count != 1):
        raise ValueError(f"a guard that gives {operator} {count} operands")
    bits = [_bits(operand, ranks) for operand in operands]
    if operator == "pow":
        exponent = operands[1]
        if type(exponent) is not int or not 0 <= exponent <= 64:
            raise ValueError(f"a guard with the exponent {exponent!r:.40}")
        return bits[0] * max(exponent, 1)
    return sum(bits) if operator in ("add", "mul") else max(bits)


class SizeCheck:
    """All that a program asks of the sizes of a call, as one compiled function of their shapes.

    `sizes` are those of each input, an int where it is fixed and else a name, equal for equal
    sizes; `highest` the largest value of a named size, where there is one.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int | str]],
        highest: Mapping[str, int],
        guards: Sequence[Guard],
    ) -> None:
        self._made_of = (sizes, highest, guards)
        places: dict[int | str, Tree] = {}
        canonical: dict[Tree, Tree] = {}
        trees: list[Tree] = []
        for index, axes in enumerate(sizes):
            for axis, size in enumerate(axes):
                place = ("size", index, axis)
                known = size if isinstance(size, int) else places.setdefault(size, place)
                if known != place:
                    canonical[place] = known
                    trees.append(("eq", place, known))
        trees += [("le", places[size], high) for size, high in highest.items() if size in places]
        trees += [_replaced(guard.holds, canonical) for guard in guards]
        self.fits = _compiled(trees, list(map(len, sizes)))

    def __reduce__(self) -> tuple[type[SizeCheck], tuple[Any, ...]]:
        return SizeCheck, self._made_of


def _replaced(tree: Tree, by: Mapping[Tree, Tree]) -> Tree:
    """`tree` with sizes read where they are read anyway, and fixed ones as numbers."""
    if not isinstance(tree, tuple):
        return tree
    if tree in by:
        return by[tree]
    operator, *operands = tree
    if operator == "size":
        return tree
    inner = [_replaced(operand, by) for operand in operands]
    if operator == "eq" and inner[0] == inner[1] and type(inner[0]) is type(inner[1]):
        return True
    return (operator, *inner)


def _compiled(trees: Sequence[Tree], ranks: Sequence[int]) -> Callable[[Shapes], bool]:
    """`shapes -> all trees hold`, each shape unpacked once; generated from trees alone."""
    needed = dict.fromkeys(tree for tree in trees if tree is not True)
    body = " and ".join(map(_code, needed)) or "True"
    unpacked = [
        f"        [{', '.join(f's{index}_{axis}' for axis in range(rank))}] = shapes[{index}]"
        for index, rank in enumerate(ranks)
        if rank
    ]
    lines = [
        "def fits(shapes):",
        "    try:",
        *unpacked,
        f"        return {body}",
        "    except errors:",
        "        return False",
    ]
    scope = {"__builtins__": {}, "errors": (ArithmeticError, ValueError), **_CALLS}
    exec("\n".join(lines), scope)
    return scope["fits"]  # type: ignore[return-value]


def _code(tree: Tree) -> str:
    if not isinstance(tree, tuple):
        return f"({tree!r})"
    operator, *operands = tree
    if operator == "size":
        index, axis = map(int, operands)
        return f"s{index}_{axis}"
    inner = [_code(operand) for operand in operands]
    if operator == "not":
        return f"(not {inner[0]})"
    if operator in _INFIX:
        return f"({_INFIX[operator].join(inner)})"
    assert operator in _CALLS
    return f"{operator}({', '.join(inner)})"


def _text(tree: Tree, paths: Sequence[str], outermost: bool = True) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    operator, *operands = tree
    if operator == "size":
        return f"{paths[operands[0]]}.shape[{operands[1]}]"
    inner = [_text(operand, paths, False) for operand in operands]
    if operator == "not":
        return f"not {inner[0]}"
    if operator in _INFIX:
        joined = _INFIX[operator].join(inner)
        return joined if outermost else f"({joined})"
    return f"{operator}({', '.join(inner)})"
