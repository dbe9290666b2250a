"""The README and the pages of docs/: what they show runs, and nothing is left out of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import fxopt
from docs import generated_pages

_ROOT = Path(__file__).parent.parent
_DOCS = _ROOT / "docs"
_README = _ROOT / "README.md"
_PAGES = [_README, *sorted(_DOCS.rglob("*.md"))]


def _name(page: Path) -> str:
    return str(page.relative_to(_ROOT).with_suffix(""))


def _python_blocks(text: str) -> list[tuple[int, str]]:
    """Each fenced block of Python with the number of lines before its first."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]


_CODE = [
    pytest.param(page, marks=pytest.mark.slow if page == _README else ())
    for page in _PAGES
    if _python_blocks(page.read_text(encoding="utf-8"))
]
"""The pages with code; the README's compiles a model, which takes longer."""


@pytest.mark.parametrize("page", _CODE, ids=_name)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": f"docs.{page.stem}"}
    for line, block in _python_blocks(page.read_text(encoding="utf-8")):
        # As many empty lines before the block as the page has: a traceback points into the page.
        code = compile("\n" * line + block, str(page), "exec", dont_inherit=True)
        exec(code, names)


@pytest.mark.parametrize("page", [*_PAGES, _ROOT / "CHANGELOG.md"], ids=_name)
def test_a_page_links_to_what_there_is(page: Path) -> None:
    made = {(_DOCS / path).resolve() for path in generated_pages.pages()}
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        place = (page.parent / target).resolve()
        assert place.exists() or (place in made and page != _README), f"{page} links to {target}"


def test_every_page_is_in_the_index_and_in_the_site() -> None:
    pages = {str(page.relative_to(_DOCS)) for page in _DOCS.rglob("*.md")} - {"index.md"}
    index = set(re.findall(r"\]\(([^)#:]+)", (_DOCS / "index.md").read_text(encoding="utf-8")))
    assert pages - index == set()
    site = yaml.safe_load((_ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert pages - set(_leaves(site["nav"])) == set()


def test_the_readme_is_short() -> None:
    assert len(_README.read_bytes()) <= 10_000


@pytest.mark.parametrize("page", [_README, _DOCS / "passes.md"], ids=_name)
def test_every_pass_is_in_the_table(page: Path) -> None:
    rows = re.findall(r"^\| `(\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {kind.__name__ for kind in generated_pages.BUILT_IN.values()} - set(rows) == set()


def test_every_pass_has_a_page_with_its_options() -> None:
    pages = generated_pages.pages()
    for name, kind in generated_pages.BUILT_IN.items():
        text = pages[generated_pages.pass_page_path(name)]
        assert text.startswith(f"# {kind.__name__}\n")
        options = {field.name for field in dataclasses.fields(kind)} - {"claim"}
        assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == options
    int8 = pages["passes/int8-linear.md"]
    assert "| `group` | `int | None` | `None` |" in int8
    assert "| `mode` | `'dynamic' | 'static' | 'weight_only'` | `'dynamic'` |" in int8


def test_every_public_name_is_in_the_reference() -> None:
    pages = generated_pages.pages()
    reference = "".join(text for path, text in pages.items() if path.startswith("reference/"))
    shown = set(re.findall(r"heading: fxopt\.(\w+)", reference))
    passes = {kind.__name__ for kind in generated_pages.BUILT_IN.values()}
    assert set(fxopt.__all__) - shown - passes == set()


def test_every_room_is_in_the_architecture_with_its_words() -> None:
    listed = dict(re.findall(r"^- `(\w+)`: (.*)$", generated_pages.lists()["rooms"], re.MULTILINE))
    assert tuple(listed) == generated_pages.rooms()
    assert all(listed.values()), [room for room, words in listed.items() if not words]


def test_every_list_that_a_page_asks_for_is_made() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in _PAGES)
    asked = set(re.findall(r"<!-- generated: (\w+) -->", text))
    assert asked == set(generated_pages.lists())


@pytest.mark.parametrize(
    ("row", "result"),
    [
        ("fp32", "bert_base_fp32"),
        ("bf16 (`Autocast`)", "bert_base_bf16"),
        ("int8 dynamic", "bert_base_int8_dynamic"),
        ("int8 static", "bert_base_int8_static"),
    ],
)
def test_the_speeds_of_the_readme_are_those_recorded(row: str, result: str) -> None:
    file = _ROOT / "benchmarks" / "results" / f"{result}.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    times = {round(one["median_ms"]) for one in recorded["systems"].values()}
    ratios = {f"{one['median']:.2f}" for one in recorded["ratios"].values()}
    line = next(
        line
        for line in _README.read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| {row} |")
    )
    ours, _, theirs, ratio = (cell.strip() for cell in line.strip("|").split("|")[1:])
    assert {int(ours), int(theirs)} <= times
    assert ratio in ratios


def _leaves(nav: object) -> list[str]:
    if isinstance(nav, dict):
        return [leaf for value in nav.values() for leaf in _leaves(value)]
    if isinstance(nav, list):
        return [leaf for value in nav for leaf in _leaves(value)]
    return [str(nav)]
