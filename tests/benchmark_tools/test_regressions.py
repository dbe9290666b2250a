"""What counts as a regression between two runs, as a property and end to end."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.__main__ import app, main
from benchmarks.recorded import Spread
from benchmarks.regressions import TOLERANCES, Tolerance, Verdict, judge, noise

_MIRRORED = {
    Verdict.WORSE: Verdict.BETTER,
    Verdict.BETTER: Verdict.WORSE,
    Verdict.SAME: Verdict.SAME,
}
_MACHINE = {"cpu": "one", "cores": 2, "threads": 2, "isa": "avx2", "gpu": None, "torch": "2.13"}


@st.composite
def spreads(draw: st.DrawFn) -> Spread:
    median = draw(st.floats(0.01, 100.0))
    below, above = draw(st.floats(1.0, 3.0)), draw(st.floats(1.0, 3.0))
    return Spread(median, median / below, median * above)


def scaled(spread: Spread, factor: float) -> Spread:
    return Spread(factor * spread.median, factor * spread.p5, factor * spread.p95)


@given(spread=spreads())
def test_a_run_is_no_regression_of_itself(spread: Spread) -> None:
    assert judge(spread, spread) is Verdict.SAME


@given(old=spreads(), new=spreads())
def test_worse_one_way_is_better_the_other(old: Spread, new: Spread) -> None:
    assert judge(new, old) is _MIRRORED[judge(old, new)]


@given(old=spreads(), new=spreads(), power=st.integers(-4, 4))
def test_the_unit_does_not_matter(old: Spread, new: Spread, power: int) -> None:
    factor = 2.0**power
    assert judge(scaled(old, factor), scaled(new, factor)) is judge(old, new)


@given(old=spreads(), new=spreads(), wider=st.floats(1.0, 4.0))
def test_more_noise_never_makes_a_regression(old: Spread, new: Spread, wider: float) -> None:
    noisy = Spread(new.median, new.p5 / wider, new.p95 * wider)
    assert judge(old, noisy) in (judge(old, new), Verdict.SAME)
    assert noise(old, noisy) >= noise(old, new)


@given(old=spreads(), new=spreads(), factor=st.floats(1.0, 4.0))
def test_slower_still_is_a_regression_still(old: Spread, new: Spread, factor: float) -> None:
    assume(judge(old, new) is Verdict.WORSE)
    assert judge(old, scaled(new, factor)) is Verdict.WORSE


@given(old=spreads(), new=spreads())
def test_spreads_that_do_not_meet_are_beyond_the_noise(old: Spread, new: Spread) -> None:
    assume(new.p5 > old.p95 and new.median > 1.051 * old.median)
    assert judge(old, new) is Verdict.WORSE


@given(old=spreads(), factor=st.floats(0.9525, 1.049))
def test_five_percent_are_never_a_regression(old: Spread, factor: float) -> None:
    assert judge(old, scaled(old, factor)) is Verdict.SAME


@given(seed=st.integers(0, 10_000), sigma=st.floats(0.0, 0.3), rounds=st.sampled_from([11, 15, 60]))
def test_two_runs_of_the_same_code_are_the_same(seed: int, sigma: float, rounds: int) -> None:
    chance = random.Random(seed)

    def run() -> Spread:
        samples = sorted(math.exp(chance.gauss(0.0, sigma)) for _ in range(rounds))
        cuts = statistics.quantiles(samples, n=20, method="inclusive")
        return Spread(statistics.median(samples), cuts[0], cuts[-1])

    assert judge(run(), run()) is Verdict.SAME


@given(seed=st.integers(0, 10_000), sigma=st.floats(0.0, 0.05))
def test_twice_the_time_is_found_under_noise(seed: int, sigma: float) -> None:
    chance = random.Random(seed)

    def run(factor: float) -> Spread:
        samples = sorted(factor * math.exp(chance.gauss(0.0, sigma)) for _ in range(15))
        cuts = statistics.quantiles(samples, n=20, method="inclusive")
        return Spread(statistics.median(samples), cuts[0], cuts[-1])

    assert judge(run(1.0), run(2.0)) is Verdict.WORSE


def test_the_bound_as_it_is_defined() -> None:
    """sqrt(log²(1.2) + log²(1.1)) is log(1.2284...)."""
    old, new = Spread(1.0, 0.5, 1.2), Spread(1.1, 1.0, 9.0)
    assert noise(old, new) == pytest.approx(math.hypot(math.log(1.2), math.log(1.1)))
    assert noise(new, old) == noise(old, new)
    assert judge(old, scaled(new, 1.228 / 1.1)) is Verdict.SAME
    assert judge(old, scaled(new, 1.229 / 1.1)) is Verdict.WORSE


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [(0.0, 0.0, "same"), (0.0, 0.1, "worse"), (0.1, 0.0, "better"), (1.0, 1.06, "worse")],
)
def test_ratios_that_do_not_vary(old: float, new: float, verdict: str) -> None:
    assert judge(Spread(old, old, old), Spread(new, new, new)).value == verdict


@given(
    tolerance=st.sampled_from([*TOLERANCES.values()]),
    old=st.floats(0.1, 99.0),
    new=st.floats(0.1, 99.0),
)
def test_fidelity_is_judged_one_way_at_a_time(tolerance: Tolerance, old: float, new: float) -> None:
    assume(not tolerance.relative)
    assert tolerance.judge(new, old) is _MIRRORED[tolerance.judge(old, new)]
    assert tolerance.judge(old, old) is Verdict.SAME


@pytest.mark.parametrize(
    ("figure", "old", "new", "verdict"),
    [
        ("sqnr_db", 30.0, 28.9, "worse"),
        ("sqnr_db", 30.0, 29.1, "same"),
        ("sqnr_db", 125.0, 104.0, "same"),
        ("sqnr_db", 125.0, 98.0, "worse"),
        ("cosine_mean", 0.999, 0.9975, "worse"),
        ("perplexity", 22.8, 23.1, "worse"),
        ("perplexity", 22.8, 22.5, "better"),
    ],
)
def test_figures_of_fidelity(figure: str, old: float, new: float, verdict: str) -> None:
    assert TOLERANCES[figure].judge(old, new).value == verdict


def document(ratio: Any = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "machine": dict(_MACHINE),
        "systems": {"fxopt int8": {"median_ms": 5.0, "p5_ms": 4.0, "p95_ms": 6.0, "sqnr_db": 30.0}},
        "ratios": {"fxopt int8 / peer": ratio},
        **more,
    }


def write(folder: Path, **documents: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def compared(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, ["regressions", *arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def test_a_regression_is_named_and_the_exit_code_is_one(tmp_path: Path) -> None:
    steady = {"median": 1.0, "p5": 0.97, "p95": 1.02}
    slower = {"median": 1.4, "p5": 1.35, "p95": 1.45}
    old = write(tmp_path / "old", bert=document(steady), vit=document(steady))
    new = write(tmp_path / "new", bert=document(slower), vit=document(steady))
    text = compared(old, new, code=1)
    assert "worse   fxopt int8 / peer: 1.00 (0.970 to 1.02) -> 1.40 (1.35 to 1.45), +40 %" in text
    assert "the noise allows 5 %" in text
    assert text.endswith("1 regression beyond the noise; 2 of 2 results compared\n")
    assert "better  fxopt int8 / peer" in compared(new, old, code=0)


def test_nothing_new_is_no_regression(tmp_path: Path) -> None:
    old = write(tmp_path / "old", bert=document())
    text = compared(old, old, code=0)
    assert "same    2 of 2 figures, within the noise" in text
    assert text.endswith("0 regressions beyond the noise; 1 of 1 results compared\n")


def test_fidelity_that_fell_is_a_regression(tmp_path: Path) -> None:
    worse = document()
    worse["systems"]["fxopt int8"]["sqnr_db"] = 20.0
    old = write(tmp_path / "old", bert=document())
    new = write(tmp_path / "new", bert=worse)
    text = compared(old, new, code=1)
    assert "worse   sqnr_db of fxopt int8: 30 -> 20, 1 allowed" in text


def test_fidelity_of_what_is_measured_against_is_not_ours(tmp_path: Path) -> None:
    before, after = document(), document()
    before["systems"]["peer"], after["systems"]["peer"] = {"sqnr_db": 30.0}, {"sqnr_db": 10.0}
    old = write(tmp_path / "old", bert=before)
    new = write(tmp_path / "new", bert=after)
    assert "of peer" not in compared(old, new, code=0)


def test_other_versions_are_noted_and_what_is_gone_is_named(tmp_path: Path) -> None:
    after = document(machine={**_MACHINE, "torch": "2.14", "load": 7.0}, ratios={})
    old = write(tmp_path / "old", bert=document(), vit=document())
    text = compared(old, write(tmp_path / "new", bert=after), code=0)
    assert "note: torch 2.13 -> 2.14" in text
    assert "gone    fxopt int8 / peer: the new run doesn't have it" in text
    assert "not compared: the new run doesn't have it" in text
    assert "load" not in text


def test_two_files_are_compared_whatever_they_are_called(tmp_path: Path) -> None:
    folder = Path(write(tmp_path / "runs", before=document(1.0), after=document(2.0)))
    text = compared(str(folder / "before.json"), str(folder / "after.json"), code=1)
    assert "fxopt int8 / peer: 1.00 -> 2.00, +100 %" in text


@pytest.mark.parametrize(
    ("new", "text"),
    [
        ({"vit": document()}, "error: the two runs have no result in common: a, bert and vit"),
        (
            {
                "bert": document(machine={**_MACHINE, "threads": 1}),
                "a": document(machine={**_MACHINE, "threads": 1}),
            },
            "error: no result could be compared, so that nothing is shown to be as before",
        ),
        ({}, "holds no .json file: record some with python -m pytest benchmarks --record"),
        ({"bert": {"figures": 1}}, 'is no recorded result: it has no "machine"; results are'),
        ({"bert": document("fast")}, "is damaged: 'fast' is neither a number nor median, p5"),
        (
            {"bert": document({"median": 1.0, "p5": 2.0, "p95": 3.0})},
            "0 <= p5 <= median <= p95 doesn't hold",
        ),
        ({"bert": document(systems={"a": {"median_ms": 1.0}})}, "is damaged: 'p5_ms'"),
    ],
)
def test_what_cannot_be_compared_exits_with_two(
    new: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    old = write(tmp_path / "old", bert=document(), a=document())
    arguments = ["benchmarks", "regressions", old, write(tmp_path / "new", **new)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())
