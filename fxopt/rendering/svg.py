"""matplotlib's figures as inline SVG that takes its colours and letters from the page.

A figure is drawn in stand-in colours, each of which becomes a property of the page's style sheet,
so that one drawing serves light and dark. What matplotlib would apply to the whole page (its own
style sheet, identifiers that are the same in each figure) is made the drawing's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from fxopt.errors import SaveError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, SHEET, ACCENT, WAS = (f"#0{n}0{n}0{n}" for n in range(1, 7))
"""Stand-ins for text, lesser text, grid, background, what is marked and what is not."""

WIDTH, HEIGHT = 360, 280
"""Units of the drawing: at this width, letters are as large as they say."""

_PROPERTIES = {INK: "ink", SOFT: "soft", LINE: "line", SHEET: "sheet", ACCENT: "accent", WAS: "was"}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_FONT = re.compile(r"font:[^;]*?([\d.]+)px[^;]*;?|font-family:[^;]*;?")


def new_figure(height: int = HEIGHT) -> Figure:
    """An empty figure of `WIDTH` by `height` units. Raises `SaveError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SaveError(
            "the plots of the page need matplotlib, which isn't installed: "
            "pip install 'fxopt[report]', or save as .json"
        ) from error
    return Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


def inline(figure: Figure, key: str, title: str, titles: Mapping[str, str]) -> str:
    """One `<svg role="img">`; `key` is its own on the page, `title` what it shows in words.

    `titles` are the tooltips of artists, by their `gid`.
    """
    buffer = StringIO()
    with letters_by_the_browser():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    root = ElementTree.fromstring(text[text.index("<svg") :])
    _clean(root)
    _tell(root, titles)
    _make_own(root, key)
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.attrib |= {
        "class": "plot",
        "role": "img",
        "aria-label": title,
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return ElementTree.tostring(root, encoding="unicode")


@contextmanager
def letters_by_the_browser() -> Iterator[None]:
    """Inside, texts stay texts, and a letter that matplotlib's own font lacks is no matter."""
    from matplotlib import rc_context

    with (
        rc_context({"svg.hashsalt": "fxopt", "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def _clean(root: ElementTree.Element) -> None:
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        style = element.get("style")
        if style:
            element.set("style", _coloured(_FONT.sub(_size, style)))


def _size(found: re.Match[str]) -> str:
    return f"font-size: {found[1]}px;" if found[1] else ""


def _tell(root: ElementTree.Element, titles: Mapping[str, str]) -> None:
    for element in root.iter():
        text = titles.get(element.get("id", ""))
        if text is not None:
            title = ElementTree.Element(f"{_SVG}title")
            title.text = text
            element.insert(0, title)


def _make_own(root: ElementTree.Element, key: str) -> None:
    """Keep the identifiers that are referred to, under names that no other drawing has."""
    referred = set()
    for element in root.iter():
        if element.get(_LINK, "").startswith("#"):
            referred.add(element.attrib[_LINK][1:])
            element.set(_LINK, f"#{key}-{element.attrib[_LINK][1:]}")
        clip = re.fullmatch(r"url\(#(.+)\)", element.get("clip-path", ""))
        if clip:
            referred.add(clip[1])
            element.set("clip-path", f"url(#{key}-{clip[1]})")
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in referred:
            element.set("id", f"{key}-{name}")


def _coloured(style: str) -> str:
    for colour, name in _PROPERTIES.items():
        style = style.replace(colour, f"var(--{name})")
    return style
