"""The page: what it must hold, and what no name may do to it. JSON and texts."""

from __future__ import annotations

import functools
import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.comparison import Comparison, Failure
from fxopt.errors import SaveError
from fxopt.rendering import svg
from tests.comparison.made import NO_COUNTER, made_comparison

TWO = [("original", 148.0, math.inf), ("int8", 21.0, 31.4)]
HOSTILE = '<script>alert("1")</script>&amp;$x_{1}$\'"'
_NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("<>&\"'$_^{}\\"),
    min_size=1,
    max_size=12,
)


class Parsed(HTMLParser):
    """Every element with its attributes, the texts, and the elements that were left open."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@functools.cache
def page_of_two(joules: bool = False) -> str:
    return made_comparison(TWO, joules=joules).to_html()


@functools.cache
def plain_page(models: int) -> str:
    points = [(f"m{i}", 20.0 + i, 0.9 - i / 10) for i in range(models)]
    return made_comparison(points, quality="metric").to_html()


def test_the_page_is_whole_and_self_contained() -> None:
    html = page_of_two(joules=True)
    page = Parsed(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert "default-src 'none'" in html
    links = [value for _, a in page.elements for name, value in a.items() if "href" in name]
    assert all(value is not None and value.startswith("#") for value in links)
    headings = {text for text in page.texts if text.strip()}
    assert headings >= {
        "What quality costs",
        "SQNR against latency",
        "SQNR against energy",
        "SQNR against parameters",
        "The figures",
        "Fidelity",
        "Memory",
        "Layer by layer",
        "Roofline",
        "What was not measured, and why",
        "Machine",
        "Made CPU <b>",
    }


def test_plots_say_in_words_what_they_show() -> None:
    page = Parsed(page_of_two())
    plots = page.all("svg")
    assert len(plots) == 2 + 2
    labels = [str(plot["aria-label"]) for plot in plots]
    assert all(plot["role"] == "img" for plot in plots)
    assert labels[0] == (
        "SQNR, dB against latency, ms. 1 original: 148 ms, SQNR exact, on the front; "
        "2 int8: 21 ms, SQNR 31.4 dB, on the front"
    )
    assert labels[2].startswith("Roofline of original: 8 layers under float32 0.2 TFLOP/s")


def test_identifiers_are_the_only_ones_of_their_name() -> None:
    page = Parsed(page_of_two(joules=True))
    names = [a["id"] for _, a in page.elements if "id" in a]
    assert len(names) == len(set(names))
    used = {str(value)[1:] for _, a in page.elements for n, value in a.items() if "href" in n}
    assert used <= set(names)


def test_no_style_of_a_plot_reaches_the_page_and_colours_follow_it() -> None:
    html = page_of_two()
    assert html.count("<style>") == 1
    assert "var(--accent)" in html
    assert "#040404" not in html
    assert "#000000" not in html
    assert "DejaVu" not in html


@settings(max_examples=4)
@given(names=st.lists(_NAMES, min_size=2, max_size=3, unique=True), metric=_NAMES)
def test_no_name_is_taken_for_markup(names: list[str], metric: str) -> None:
    points = [(name, 20.0 + i, 0.9 - i / 10) for i, name in enumerate(names)]
    hostile = made_comparison(points, quality=metric)
    expected = Parsed(plain_page(len(names)))
    page = Parsed(hostile.to_html())

    def shape(parsed: Parsed) -> list[str]:
        return [
            tag for tag, _ in parsed.elements if tag in ("b", "li", "h3", "td", "svg", "script")
        ]

    assert shape(page) == shape(expected)
    for name in names:
        assert any(name in text for text in page.texts)


def test_hostile_names_reach_the_reader_as_they_are() -> None:
    failures = (Failure(HOSTILE, HOSTILE),)
    points = [(HOSTILE, 148.0, 1.0), ("b", 20.0, 0.9)]
    html = made_comparison(points, failures=failures, quality=HOSTILE).to_html()
    page = Parsed(html)
    assert "<script" not in html
    assert any(HOSTILE in text for text in page.texts)
    assert f"{HOSTILE} failed: {HOSTILE}" in page.texts


def test_what_was_not_measured_is_said_and_has_no_plot() -> None:
    page = Parsed(page_of_two())
    assert f"No plot: {NO_COUNTER}" in page.texts
    assert f"energy of all models: {NO_COUNTER}" in page.texts


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0, 31.4])
def test_any_number_of_models_and_any_figure_is_drawn(count: int, value: float) -> None:
    points = [(f"m{i}", 10.0 * 2**i, value) for i in range(count)]
    assert Parsed(made_comparison(points).to_html()).open == []


@given(
    points=st.lists(
        st.tuples(_NAMES, st.floats(0.1, 1e4), st.floats(allow_nan=False)),
        min_size=1,
        max_size=4,
        unique_by=lambda point: point[0],
    ),
    joules=st.booleans(),
)
def test_json_reads_back_what_it_wrote(
    points: list[tuple[str, float, float]], joules: bool
) -> None:
    found = made_comparison(points, joules=joules, failures=(Failure("x", "because"),))
    content = found.to_json()
    json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Comparison.from_json(content) == found


def test_damaged_json_is_refused() -> None:
    content = json.loads(made_comparison(TWO).to_json())
    content["rows"][0]["number"] = "one"
    with pytest.raises(SaveError, match=r"rows\[0\]\.number holds 'one', which is no int"):
        Comparison.from_json(json.dumps(content))
    with pytest.raises(SaveError, match=r'no "schema": "fxopt\.comparison"'):
        Comparison.from_json(json.dumps({"schema": "fxopt.report"}))


def test_saving_goes_by_the_suffix(tmp_path: Path) -> None:
    found = made_comparison(TWO)
    for name in ("a.html", "a.json", "a.txt"):
        found.save(tmp_path / name)
    assert (tmp_path / "a.txt").read_text() == f"{found}\n"
    assert Comparison.from_json((tmp_path / "a.json").read_text()) == found
    with pytest.raises(SaveError, match=r"how to write the comparison: end it in \.html"):
        found.save(tmp_path / "a.pdf")
    with pytest.raises(SaveError, match=r"can't write the comparison to .*: No such file"):
        found.save(tmp_path / "nowhere" / "a.json")


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SaveError, match=r"pip install 'fxopt\[report\]', or save as \.json"):
        svg.new_figure()


def test_the_table_is_readable() -> None:
    points = [("original", 148.0, math.inf), ("a name that is far too long to be here", 21.0, 9.0)]
    assert str(made_comparison(points)).splitlines() == [
        "    model                   latency     time / reference  parameters     peak    SQNR",
        "-------------------------------------------------------------------------------------",
        "*1  original                 148 ms        the reference     90.0 MB  12.0 MB   exact",
        "*2  a name tha… to be here  21.0 ms  0.14 (0.14 to 0.14)     45.0 MB  12.0 MB  9.0 dB",
        "",
        "judged by SQNR, higher is better; * Pareto front of latency",
        "front of latency: a name that is far too long to be here, original",
        "front of parameters: a name that is far too long to be here, original",
        f"not measured: energy of all models: {NO_COUNTER}",
    ]


def test_a_metric_that_is_named_as_a_column_has_its_own() -> None:
    found = made_comparison([("a", 1.0, 0.5), ("b", 2.0, 0.7)], quality="energy")
    assert "energy (metric)" in str(found)


def test_an_estimate_is_marked_wherever_it_stands() -> None:
    found = made_comparison(TWO, joules=True)
    rows = tuple(
        replace(
            row,
            measurement=replace(
                row.measurement, energy=replace(row.measurement.energy, estimated=True)
            ),
        )
        for row in found.rows
    )
    found = replace(found, rows=rows)
    assert "~4.93 J" in str(found)
    assert "~ an estimate: no counter was read" in str(found)
    assert "energy, J (ESTIMATED, no counter was read) against" not in found.to_html()
    assert "ESTIMATED" in found.to_html()
