"""The pages of docs/: what they show runs, and each is found from the first one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_DOCS = Path(__file__).parent.parent / "docs"
_PAGES = sorted(_DOCS.glob("*.md"))


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": f"docs.{page.stem}"}
    for line, block in _python_blocks(page.read_text()):
        # As many empty lines before the block as the page has: a traceback points into the page.
        exec(compile("\n" * line + block, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_a_page_is_linked_from_the_index_and_links_to_files(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    if page.stem != "index":
        assert f"({page.name})" in (_DOCS / "index.md").read_text()


def _python_blocks(text: str) -> list[tuple[int, str]]:
    """Each fenced block of Python with the number of lines before its first."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in found]
