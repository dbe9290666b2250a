"""The results page: whole, self-contained, and true to the files."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.__main__ import app, main
from benchmarks.markdown import markdown
from benchmarks.page import page
from benchmarks.recorded import Result, Spread, read_results, spread_of
from benchmarks.standing import behind, is_ours, standings

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_MACHINE = {"cpu": "AMD EPYC", "cores": 2, "threads": 2, "isa": "avx2", "gpu": None}
_VOID = {"meta", "br", "link"}


class Balanced(HTMLParser):
    """Fails at a tag that isn't closed in its turn; collects tags and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "style_") for name, _ in attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def timed(median: float, **more: Any) -> dict[str, Any]:
    return {"median_ms": median, "p5_ms": 0.9 * median, "p95_ms": 1.1 * median, **more}


def result(**changes: Any) -> Result:
    fields: dict[str, Any] = {
        "name": "bert",
        "machine": _MACHINE,
        "systems": {"fxopt a": timed(10.0), "fxopt b": timed(8.0), "peer": timed(4.0)},
        "ratios": {
            "fxopt a / peer": Spread(2.5, 2.4, 2.6),
            "fxopt b / peer": Spread(2.0, 1.9, 2.1),
        },
        "more": {},
    }
    return Result(**{**fields, **changes})


def test_every_recorded_result_is_on_the_page_with_its_machine() -> None:
    results = read_results(_RESULTS)
    assert len(results) >= 10
    parsed = Balanced(page(results))
    assert parsed.tags.isdisjoint({"script", "link", "img", "iframe", "object"})
    words, text = "".join(parsed.words), markdown(results)
    for found in results:
        for shown in (words, text):
            assert found.name in shown
            assert str(found.machine["cpu"]) in shown
            for name, ratio in found.ratios.items():
                assert name.partition(" / ")[2] in shown
                assert str(ratio) in shown
            for system in found.systems:
                assert system in shown
    assert len(re.findall("Machine: ", words)) == len(results)


def test_recorded_results_hold_what_the_page_needs() -> None:
    for found in read_results(_RESULTS):
        assert found.ratios or found.systems or found.more, found.name
        assert {"cpu", "threads", "torch", "fxopt"} <= set(found.machine)


def test_ratios_beside_the_others_are_ratios(tmp_path: Path) -> None:
    spread = {"median": 3.0, "p5": 2.9, "p95": 3.1}
    written = {"machine": _MACHINE, "48 / 12": spread, "quantiles": spread, "layers, ratio": 4.0}
    (tmp_path / "fold.json").write_text(json.dumps(written))
    (found,) = read_results(tmp_path)
    assert found.ratios == {"48 / 12": Spread(3.0, 2.9, 3.1)}
    assert found.more == {"quantiles": spread, "layers, ratio": 4.0}


def test_what_is_nested_is_a_table() -> None:
    figures = {"l2": {"10 %": 4712.6, "20 %": 22046.0}, "obs": {"10 %": 49.1}}
    more = {"perplexity": figures, "left": {"10 %": 0.94}, "none": {}}
    written = markdown([result(more=more)])
    assert "perplexity:\n\n|  | 10 % | 20 % |\n| --- | --- | --- |" in written
    assert "| l2 | 4712.6 | 22046 |\n| obs | 49.1 | - |" in written
    assert "left:\n\n|  | figure |\n| --- | --- |\n| 10 % | 0.94 |" in written
    assert "none:" not in written
    words = Balanced(page([result(more=more)])).words
    assert {"perplexity", "l2", "49.1", "left", "0.94"} <= set(words)


def test_no_name_can_become_markup() -> None:
    nasty = '<script>alert("1")</script> | `x`'
    found = result(
        name=nasty,
        systems={nasty: timed(1.0, note=nasty)},
        ratios={f"{nasty} / {nasty}": Spread(1.0, 0.9, 1.1)},
        more={nasty: nasty, "deep": {nasty: {"a": nasty}}},
    )
    parsed = Balanced(page([found]))
    assert "script" not in parsed.tags
    assert "".join(parsed.words).count("alert(") >= 6
    rows = [line for line in markdown([found]).splitlines() if line.startswith("| ")]
    assert any("\\| `x`" in line for line in rows)
    assert not any(re.search(r"(?<!\\)\| `x`", line) for line in rows)


def test_where_another_system_is_faster_is_said() -> None:
    (found,) = behind([result()])
    assert (found.ours, found.other) == ("fxopt b", "peer")
    text = "bert: peer is faster than fxopt b, which takes 2.00 (1.90 to 2.10) times as long"
    assert text in markdown([result()])
    close = result(ratios={"fxopt b / peer": Spread(1.02, 0.98, 1.1)})
    assert behind([close]) == []


def test_a_floor_is_no_contestant() -> None:
    systems = {
        "fxopt a": timed(10.0, sqnr_db=30.0),
        "peer": timed(12.0, sqnr_db=30.0),
        "its products alone": timed(5.0),
    }
    floor = result(systems=systems, ratios={"fxopt a / its products alone": Spread(2.0, 1.9, 2.1)})
    (standing,) = standings([floor])
    assert standing.other == "peer"
    assert standing.ratio is None
    assert behind([floor]) == []
    assert "not taken" in page([floor])


def test_machines_that_differ_are_said_to() -> None:
    other = result(name="vit", machine={**_MACHINE, "threads": 1})
    text = "Measured on 2 machines, or with other settings of one: they differ in threads."
    assert text in markdown([result(), other])
    assert text in page([result(), other])
    assert "Measured on" not in markdown([result(), result(name="vit")])


@given(
    medians=st.lists(st.floats(0.001, 1e5), min_size=1, max_size=6),
    ratios=st.lists(st.floats(0.001, 1e3), min_size=0, max_size=6),
)
def test_no_mark_leaves_its_track(medians: list[float], ratios: list[float]) -> None:
    found = result(
        systems={f"fxopt {i}": timed(median) for i, median in enumerate(medians)},
        ratios={f"a / {i}": Spread(r, 0.5 * r, 2.0 * r) for i, r in enumerate(ratios)},
    )
    content = page([found]).partition("<body>")[2]
    for place in re.findall(r'style="left:([-\d.]+)%;width:([-\d.]+)%', content):
        left, width = map(float, place)
        assert 0 <= left <= 100
        assert width >= 0
        assert left + width <= 100.2
    for place in re.findall(r'style="(?:left|width):([-\d.]+)%"', content):
        assert 0 <= float(place) <= 100


@given(st.floats(1e-6, 1e6), st.floats(0.0, 1.0), st.floats(1.0, 10.0))
def test_spreads_are_read_as_written(median: float, low: float, high: float) -> None:
    written = {"median": median, "p5": low * median, "p95": high * median}
    found = spread_of(json.loads(json.dumps(written)))
    assert (found.median, found.p5, found.p95) == tuple(written.values())
    assert spread_of(median) == Spread(median, median, median)


def test_the_command_prints_markdown_and_writes_the_page(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["page", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("# Benchmarks")
    assert out.read_text(encoding="utf-8") == page(read_results(_RESULTS))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["no/folder"], "error: no/folder doesn't exist: give a folder of results or one .json"),
        (["--out", "no/folder/page.html"], "error: can't write no/folder/page.html: No such file"),
    ],
)
def test_what_cannot_be_read_or_written(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "page", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert text in capsys.readouterr().err


def test_text_that_is_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "a.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["benchmarks", "page", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "a.json can't be read as JSON" in capsys.readouterr().err


def test_ours_are_told_by_their_name() -> None:
    assert is_ours("fxopt int8 static")
    assert not is_ours("fxoptimizer")
    assert not is_ours("OpenVINO bf16")
