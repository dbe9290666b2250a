"""What mkdocs calls while it builds the site: generated pages, and links out of docs/."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent.parent))  # mkdocs runs as a program of its own

from docs import generated_pages

_LINK = re.compile(r"\]\((?P<target>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")
_CODE = re.compile(r"`[^`\n]+`")
_LIST = re.compile(r"<!-- generated: (?P<name>\w+) -->")


def on_config(config: Any) -> Any:
    """Puts a page for each pass under `Passes` in the navigation."""
    section = next(entry for entry in config.nav if "Passes" in entry)
    section["Passes"] = [
        section["Passes"],
        *({title: path} for title, path in generated_pages.pass_titles().items()),
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, and the files of the repository that the site shows."""
    for path, text in generated_pages.pages().items():
        files.append(File.generated(config, path, content=text))
    for source, path in generated_pages.ELSEWHERE.items():
        files.append(File.generated(config, path, abs_src_path=str(generated_pages.ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in the generated lists; a link to a file outside of docs/ leads to its page."""
    place = page.file.src_uri
    home = {path: source for source, path in generated_pages.ELSEWHERE.items()}.get(place)
    written = home or f"docs/{place}"
    lists = generated_pages.lists()
    text = _LIST.sub(lambda match: lists[match["name"]], markdown)
    text = _CODE.sub(
        lambda match: match[0].replace(r"\|", "|"), text
    )  # GitHub wants it, mkdocs not
    return _LINK.sub(lambda match: _inside(match, written, place), text)


def _inside(match: re.Match[str], written: str, place: str) -> str:
    target = posixpath.normpath(posixpath.join(posixpath.dirname(written), match["target"]))
    shown = generated_pages.ELSEWHERE.get(target)
    if shown is None:
        return match[0]
    relative = posixpath.relpath(shown, posixpath.dirname(place) or ".")
    return f"]({relative}{match['anchor'] or ''})"
