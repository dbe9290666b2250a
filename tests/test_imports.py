"""Imports point one way, importing fxopt does nothing, and no file is a drawer."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxopt.pass_list import PASSES

PACKAGE = Path(__file__).parents[1] / "fxopt"

ROOMS = (
    "errors",
    "progress",
    "calls",
    "parts",
    "claim",
    "guards",
    "signature",
    "calibration",
    "tensor_digest",
    "choices",
    "recipe",
    "program",
    "nodes",
    "constant_expressions",
    "operators",
    "interpreter",
    "data_sizes",
    "device",
    "cpp_library",
    "cpu_allocator",
    "rendering",
    "timing",
    "kernels",
    "graph_text",
    "sharing",
    "wellformed",
    "eval_graph",
    "attribute_names",
    "graph_modules",
    "capture",
    "observation",
    "weights",
    "analyses",
    "rewriting",
    "passes",
    "verify",
    "executor",
    "lower",
    "report",
    "saving",
    "pass_registry",
    "pass_list",
    "recommendation",
    "generation",
    "optimized",
    "pipeline",
    "transform",
    "drop_in",
    "train",
    "export",
    "loading",
    "measurement",
    "comparison",
    "search",
    "cli",
)
"""Each room may import itself and those before it."""

ROOFS = ("__init__", "__main__")
"""The files above all rooms."""

LATE = ("transformers", "optuna", "matplotlib", "rich", "typer", "triton", "networkx")
"""What takes tenths of a second or more to import, and only some calls need."""

PEERS = ("torchao", "openvino", "nncf", "onnxruntime", "torch_pruning", "onnx", "optimum")


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import in the file, those inside functions too.

    `from fxopt import kernels` counts as an import of fxopt.kernels.
    """
    package = ("fxopt", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*parts, *([node.module] if node.module else [])))
            if module == "fxopt":
                yield from ((node.lineno, f"fxopt.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def upward_imports(path: Path) -> list[str]:
    """The imports of later rooms in one file, as messages."""
    room = room_of(path)
    if room in ROOFS:
        return []
    allowed = ROOMS[: ROOMS.index(room) + 1]
    return [
        f"fxopt/{name_of(path)}:{line} imports {module}, but {room} comes before it"
        for line, module in imported_modules(path)
        if module.partition(".")[0] == "fxopt"
        and module.split(".")[1:2] not in [[r] for r in allowed]
    ]


def test_every_file_belongs_to_a_room() -> None:
    rooms = {room_of(path) for path in sources()}
    assert rooms - {*ROOMS, *ROOFS} == set()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_point_up_the_list_only(path: Path) -> None:
    assert upward_imports(path) == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    room = tmp_path / "wellformed"
    room.mkdir()
    file = room / "rules.py"
    file.write_text(
        "from fxopt.program import Program\n"
        "from fxopt import capture\n"
        "from ..passes.lower import Lower\n"
        "from .schema import facts\n"
        "def late():\n"
        "    import fxopt.cli as cli\n"
        "import fxopt\n"
    )
    assert upward_imports(file) == [
        "fxopt/wellformed/rules.py:2 imports fxopt.capture, but wellformed comes before it",
        "fxopt/wellformed/rules.py:3 imports fxopt.passes.lower, but wellformed comes before it",
        "fxopt/wellformed/rules.py:7 imports fxopt, but wellformed comes before it",
        "fxopt/wellformed/rules.py:6 imports fxopt.cli, but wellformed comes before it",
    ]


def circle_of(imports: dict[str, set[str]]) -> list[str]:
    """Files that import one another in a circle, or none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def imported_files() -> dict[str, set[str]]:
    """For each module of the package the modules that it imports; for a name of one, that one."""
    modules = {
        ".".join(("fxopt", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for path in sources()
    }
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        imports = list(ast.walk(ast.parse(path.read_text("utf-8"))))
        asked = {
            f"{node.module}.{alias.name}"
            for node in imports
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        } | {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        known = {one if one in modules else one.rpartition(".")[0] for one in asked}
        found[name] = (known & modules.keys()) - {name}
    return found


def test_no_files_import_one_another() -> None:
    assert circle_of(imported_files()) == []


def test_a_circle_is_found() -> None:
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_no_file_imports_a_peer(path: Path) -> None:
    peers = [module for _, module in imported_modules(path) if module.partition(".")[0] in PEERS]
    if room_of(path) == "export":  # it writes ONNX, inside functions: `import fxopt` loads none
        peers = [module for module in peers if module.partition(".")[0] != "onnx"]
    assert peers == []


BLIND = ("pipeline", "optimized", "verify")
"""Rooms that take passes as they come and know none by name."""


def test_what_runs_passes_knows_none() -> None:
    passes = {kind.__name__ for kind in PASSES.values()}
    named = [
        f"{name_of(path)}:{node.lineno} imports {alias.name} of {node.module}"
        for path in sources()
        if room_of(path) in BLIND
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in passes or (node.module or "").startswith("fxopt.passes")
    ]
    assert named == []


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "core", "misc", "tools"}
    found = [name_of(path) for path in PACKAGE.rglob("*") if path.stem.strip("_") in drawers]
    assert found == []


def test_the_library_neither_prints_nor_reads_the_environment() -> None:
    loud = []
    for path in sources():
        if room_of(path) in ("cli", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            prints = called and node.func.id == "print"
            reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
            if prints or reads:
                loud.append(f"{name_of(path)}:{node.lineno}")
    assert loud == []


def test_importing_does_nothing() -> None:
    code = (
        "import os, sys, torch\n"
        "before = (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(),\n"
        "          torch.is_grad_enabled(), torch.initial_seed())\n"
        "import fxopt\n"
        "after = (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(),\n"
        "         torch.is_grad_enabled(), torch.initial_seed())\n"
        "assert before == after, (before, after)\n"
        f"loaded = sorted(set({(*PEERS, *LATE)!r}) & set(sys.modules))\n"
        "assert not loaded, loaded\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    assert process.stderr == ""
