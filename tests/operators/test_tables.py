"""A table of operators that are treated alike stands once: in `operators`, or where it is used."""

from __future__ import annotations

import ast
import importlib
import itertools
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

import fxopt
from fxopt import operators

PACKAGE = Path(fxopt.__file__).parent
SHARED = PACKAGE / "operators"
FEW = 3
"""As many operators two tables may have in common: which are alike in one way may be in another."""


class Table(NamedTuple):
    """Operators that a program treats alike, and where it says so."""

    place: str
    names: frozenset[str]


def operator_name(node: ast.expr) -> str | None:
    """`aten.add.Tensor` of an expression, or of a string, that names an operator of torch."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        name = node.value.replace("::", ".")
    else:
        name = ast.unparse(node).removeprefix("torch.ops.")
    known = name.startswith("aten.") and name.replace(".", "").replace("_", "").isalnum()
    return name if known else None


def listed(elements: list[ast.expr]) -> frozenset[str]:
    """The operators of a literal, those of literals inside it too."""
    found: set[str] = set()
    for element in elements:
        one = element.value if isinstance(element, ast.Starred) else element
        if isinstance(one, (ast.Tuple, ast.List, ast.Set)):
            found |= listed(one.elts)
        elif name := operator_name(one):
            found.add(name)
    return frozenset(found)


def literals(source: str, name: str) -> Iterator[Table]:
    """The tables of a file: sequences, arguments of a call, and keys of a dict with one value.

    Of literals that stand in another one only the outer counts.
    """
    inner: set[ast.AST] = set()
    for node in ast.walk(ast.parse(source)):
        groups: list[list[ast.expr]] = []
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            groups = [node.elts]
        elif isinstance(node, ast.Call):
            groups = [node.args]
        elif isinstance(node, ast.Dict):
            alike: dict[str, list[ast.expr]] = {}
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None:
                    alike.setdefault(ast.unparse(value), []).append(key)
            groups = list(alike.values())
        if node not in inner:
            for group in groups:
                if len(names := listed(group)) > FEW:
                    yield Table(f"{name}:{group[0].lineno}", names)
                    inner.update(part for one in group for part in ast.walk(one))


def repeats(tables: list[Table], shared: list[Table]) -> list[str]:
    """Which of the `tables` say what another one, or a shared one, says."""
    pairs = [*itertools.product(tables, shared), *itertools.combinations(tables, 2)]
    return [
        f"{one.place} repeats {', '.join(sorted(one.names & other.names))} of {other.place}"
        for one, other in pairs
        if len(one.names & other.names) > FEW
    ]


def shared_tables() -> list[Table]:
    """The tables of `fxopt.operators`, by what they hold."""
    found = []
    for module in pkgutil.iter_modules(operators.__path__, "fxopt.operators."):
        for name, value in vars(importlib.import_module(module.name)).items():
            rows = value.values() if isinstance(value, Mapping) else [value]
            for row in rows:
                if isinstance(row, (tuple, frozenset)):
                    names = {str(one) for one in row if isinstance(one, torch._ops.OpOverload)}
                    found.append(Table(f"{module.name}.{name}", frozenset(names)))
    return found


def test_no_table_of_operators_stands_twice() -> None:
    tables = [
        table
        for path in sorted(PACKAGE.rglob("*.py"))
        if SHARED not in path.parents
        for table in literals(path.read_text("utf-8"), str(path.relative_to(PACKAGE)))
    ]
    assert repeats(tables, shared_tables()) == []


_PLANTED = """
aten = torch.ops.aten
FIRST = frozenset(
    {aten.sort.default, *(aten.topk.default, torch.ops.aten.argsort.default, aten.msort.default)}
)
HANDLERS = {
    "aten.sort.default": one, "aten::topk.default": one, "aten.argsort.default": one,
    "aten.msort.default": one, aten.conv1d.default: two, aten.conv2d.default: three,
    aten.conv1d.padding: four, aten.conv3d.default: five,
}
SHAPES = handlers_of(
    reshaped, aten.view.default, aten.reshape.default, aten.ravel.default, aten.unflatten.int
)
"""


def test_a_repeated_table_is_found() -> None:
    tables = list(literals(_PLANTED, "planted.py"))
    sorts = "aten.argsort.default, aten.msort.default, aten.sort.default, aten.topk.default"
    assert f"planted.py:4 repeats {sorts} of planted.py:7" in repeats(tables, [])
    shapes = "aten.ravel.default, aten.reshape.default, aten.unflatten.int, aten.view.default"
    expected = f"planted.py:12 repeats {shapes} of fxopt.operators.views.REGROUPINGS"
    found = repeats(tables, shared_tables())
    assert expected in found
    assert not any("conv" in one for one in found)


def test_tables_of_all_kinds_are_shared() -> None:
    names = {table.place.removeprefix("fxopt.operators.") for table in shared_tables()}
    assert {"views.VIEWS", "windows.WINDOWED", "casts.CASTS", "dropout.DROPOUT"} <= names
