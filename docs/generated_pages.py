"""The pages and lists of the site that are made from the code, and never committed.

`pages()` are whole pages by their place in the site; `lists()` are what takes the place of a line
`<!-- generated: NAME -->` in a page. `docs/hooks.py` hands both to mkdocs.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import fxopt
from benchmarks.markdown import markdown
from benchmarks.recorded import read_results
from fxopt.pass_list import PASSES
from fxopt.rewriting import Pass, Stage

ROOT = Path(__file__).parent.parent

ELSEWHERE = {
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "developing/benchmarks.md",
    "benchmarks/results/minilm_comparison.html": "results/minilm_comparison.html",
    "benchmarks/results/pruned_smollm2_perplexity.svg": "results/pruned_smollm2_perplexity.svg",
}
"""Files of the repository that the site shows, and where; links in pages are to the files."""

BUILT_IN = {name: kind for name, kind in PASSES.items() if kind.__module__.startswith("fxopt.")}
"""The passes that come with fxopt."""

GUIDES = {
    "structure": "concepts/overview.md#levels",
    "pruning": "guides/pruning.md",
    "quantization": "guides/quantization.md",
    "mixed_precision": "guides/mixed-precision.md",
    "kernel_selection": "concepts/overview.md#levels",
    "lower": "concepts/overview.md#levels",
}
"""The guide that shows a pass in use, by the package that the pass is in."""

LEVELS = {
    Stage.ANY: "any",
    Stage.STRUCTURE: "structure",
    Stage.NUMERICS: "numerics",
    Stage.KERNELS: "kernels",
    Stage.LOWER: "lowering",
}


def pages() -> dict[str, str]:
    """Every generated page in Markdown, by its path in the site."""
    return {
        **{pass_page_path(name): _pass_page(kind) for name, kind in BUILT_IN.items()},
        **_reference(),
        "results.md": _results(),
    }


def lists() -> dict[str, str]:
    """What takes the place of `<!-- generated: NAME -->`, by NAME."""
    return {"passes": _pass_links(), "rooms": _rooms(), "machines": _machines()}


def pass_page_path(name: str) -> str:
    """Where the page of the pass called `name` is."""
    return f"passes/{name}.md"


def pass_titles() -> dict[str, str]:
    """The page of each pass by its title, in the order in which a list could hold them."""
    ordered = sorted(BUILT_IN.items(), key=lambda item: item[1].stage)
    return {kind.__name__: pass_page_path(name) for name, kind in ordered}


def rooms() -> tuple[str, ...]:
    """The rooms of the package in the order of their imports, as `tests/test_imports.py` has it."""
    tree = ast.parse((ROOT / "tests" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS":
            return tuple(ast.literal_eval(node.value))
    raise LookupError("tests/test_imports.py defines no ROOMS")


def _pass_page(kind: type[Pass]) -> str:
    default, types = kind(), get_type_hints(kind)
    rows = [
        (f"`{name}`", f"`{_type_text(types[name])}`", f"`{getattr(default, name)!r}`")
        for name in (field.name for field in dataclasses.fields(kind))
        if name != "claim"
    ]
    options = [_table(("option", "type", "default"), rows)] if rows else ["None but `claim`."]
    return "\n\n".join(
        [
            f"# {kind.__name__}",
            f'`fxopt.{kind.__name__}()`, in a list of names `"{kind.name}"`. '
            f"Level: {LEVELS[kind.stage]}. Claim, unless `claim=` says otherwise: "
            f"`{default.claim!r}`, that is {default.claim}.",
            inspect.cleandoc(kind.__doc__ or ""),
            "## Options",
            *options,
            f"In use: [the guide](../{GUIDES[_package(kind)]}). All passes: [table](../passes.md).",
        ]
    )


def _package(kind: type[Pass]) -> str:
    parts = kind.__module__.split(".")
    return parts[2] if parts[1] == "passes" else parts[1]


def _type_text(kind: Any) -> str:
    """A type as a user writes its values: `'dynamic' | 'static'` for a Literal of the two."""
    if get_origin(kind) is Literal:
        return " | ".join(map(repr, get_args(kind)))
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(map(_type_text, get_args(kind)))
    if get_origin(kind) is tuple:
        of = [_type_text(one) for one in get_args(kind) if one is not Ellipsis]
        return f"tuple of {' | '.join(of)}"
    if get_origin(kind) is Callable:
        return "function"
    return "None" if kind is type(None) else str(getattr(kind, "__name__", kind))


def _pass_links() -> str:
    rows = [
        (f"[`{kind.__name__}`](passes/{name}.md)", f"`{name}`", LEVELS[kind.stage])
        for name, kind in BUILT_IN.items()
    ]
    return _table(("pass", "in a list of names", "level"), rows)


def _reference() -> dict[str, str]:
    public = {name: getattr(fxopt, name) for name in fxopt.__all__ if name != "train"}
    classes = {name: value for name, value in public.items() if inspect.isclass(value)}
    errors = {name for name, kind in classes.items() if issubclass(kind, fxopt.FxoptError)}
    claims = {"Exact", "Close", "Sqnr"}
    passes = {kind.__name__ for kind in BUILT_IN.values()}
    kinds = {
        "functions": ("Functions", public.keys() - classes.keys()),
        "classes": ("Classes", classes.keys() - errors - claims - passes),
        "claims": ("Claims", claims),
        "errors": ("Errors", errors),
    }
    pages = {
        f"reference/{file}.md": _api_page(
            title, [_api(f"fxopt.{name}", public[name]) for name in sorted(names, key=str.lower)]
        )
        for file, (title, names) in kinds.items()
    }
    train = [
        _api(f"fxopt.train.{name}", getattr(fxopt.train, name)) for name in fxopt.train.__all__
    ]
    return {**pages, "reference/train.md": _api_page("Distillation", train)}


def _api(shown: str, value: Any) -> str:
    """`shown` with its docstring, from the module that defines it.

    `fxopt.search` may be a package or its function; `fxopt.search.search.search` is one thing.
    """
    place = f"{value.__module__}.{value.__qualname__}"
    return f"::: {place}\n    options:\n      heading: {shown}\n      toc_label: {shown}"


def _api_page(title: str, entries: list[str]) -> str:
    return "\n\n".join([f"# {title}", *entries])


def _results() -> str:
    text = markdown(read_results(ROOT / "benchmarks" / "results"))
    return text.replace("# Benchmarks", "# All recorded results", 1)


def _machines() -> str:
    results = read_results(ROOT / "benchmarks" / "results")
    keys = ("cpu", "isa", "gpu", "threads", "os", "python", "torch", "transformers")
    found: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        machine = tuple(str(result.machine.get(key) or "-") for key in keys)
        found.setdefault(machine, []).append(result.name)
    rows = [(*machine, str(len(names))) for machine, names in found.items()]
    return _table((*keys, "results"), rows)


def _rooms() -> str:
    return "\n".join(f"- `{room}`: {_first_paragraph(room)}" for room in rooms())


def _first_paragraph(room: str) -> str:
    package = ROOT / "fxopt" / room
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


# A stroke inside of code parts no cells for mkdocs, and has no backslash there; GitHub wants one.
def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(_lines(head, rows))


def _lines(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
