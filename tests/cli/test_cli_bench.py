"""`fxopt bench`: systems side by side, joules or why not, and what Ctrl-C keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.cli import preparing, rounds
from fxopt.cli.preparing import named_lists
from fxopt.cli.rounds import measure_rounds
from fxopt.measurement import Energy, Unmeasured
from fxopt.measurement.energy import Spread
from fxopt.timing import summarize
from tests.cli.command import SIZES, refused, run

_LISTS = ["-p", "canonicalize", "-p", "packed=prepack"]
_NO_COUNTER = Unmeasured("no counter")


@pytest.fixture(autouse=True)
def no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "energy_counter", lambda device: _NO_COUNTER)


def test_the_original_beside_each_list(bert: str) -> None:
    result = run("bench", bert, *_LISTS, *SIZES, "--repeats", "1", "--json")
    document = json.loads(result.stdout)
    assert document["model"] == bert
    assert "torch" in document["machine"]
    assert [row["system"] for row in document["rows"]] == ["eager", "canonicalize", "packed"]
    for row in document["rows"]:
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert "joules" not in row
    assert document["rows"][0]["ratio_to_eager"] == 1.0
    assert document["energy"] == "not measured: no counter"
    assert document["interrupted"] is False
    assert "timing in turns" in result.stderr


def test_a_table(bert: str) -> None:
    result = run("bench", bert, "-p", "canonicalize", *SIZES, "--repeats", "1")
    for text in ("system", "median ms", "p5", "p95", "ratio to eager", "eager"):
        assert text in result.stdout
    assert "energy not measured: no counter" in result.stdout
    assert "J a call" not in result.stdout


@pytest.mark.parametrize("estimated", [False, True])
def test_joules_stand_beside_the_times(
    estimated: bool, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spent(systems: Any, device: Any, watts: float | None) -> dict[str, Energy]:
        joules = Spread(0.5, 0.4, 0.6)
        return {name: Energy(joules, 30.0, "RAPL", 2.0, estimated=estimated) for name in systems}

    monkeypatch.setattr(rounds, "_energy", spent)
    arguments = ["bench", bert, "-p", "canonicalize", *SIZES, "--repeats", "1"]
    text = " ".join(run(*arguments).stdout.split())
    assert ("J a call, estimated" in text) is estimated or "estimated" in text
    assert "0.5" in text
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["energy"] is None
    expected = {"median": 0.5, "p5": 0.4, "p95": 0.6, "source": "RAPL", "estimated": estimated}
    assert document["rows"][1]["joules"] == expected


def test_no_energy_is_not_asked_for(bert: str) -> None:
    arguments = ["bench", bert, "-p", "canonicalize", *SIZES, "--repeats", "1", "--no-energy"]
    document = json.loads(run(*arguments, "--json").stdout)
    assert document["energy"] == "not measured: --no-energy was given"


def test_ctrl_c_while_timing_keeps_the_rounds_before(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = iter([2.0])

    def latency(systems: Any, repeats: int, seconds: float) -> Any:
        for block in blocks:
            return {name: summarize([block] * repeats) for name in systems}
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "latency", latency)
    result = run("bench", bert, *_LISTS, *SIZES, "--json", code=130)
    document = json.loads(result.stdout)
    assert document["interrupted"] is True
    assert [row["rounds"] for row in document["rows"]] == [5, 5, 5]
    assert [row["median_ms"] for row in document["rows"]] == [2.0] * 3
    assert "interrupted: kept 3 of 3 systems" in result.stderr


def test_ctrl_c_while_preparing_measures_the_lists_before(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = preparing.transform

    def transform(model: Any, passes: str, **options: Any) -> Any:
        if "prepack" in passes:
            raise KeyboardInterrupt
        return real(model, passes, **options)

    monkeypatch.setattr(preparing, "transform", transform)
    result = run("bench", bert, *_LISTS, *SIZES, "--repeats", "1", code=130)
    assert "canonicalize" in result.stdout
    assert "packed" not in result.stdout
    assert "interrupted: kept 2 of 3 systems" in result.stderr


def test_ctrl_c_while_reading_joules_keeps_the_times(
    bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "_energy", interrupted)
    result = run("bench", bert, *_LISTS, *SIZES, "--repeats", "1", "--json", code=130)
    document = json.loads(result.stdout)
    assert len(document["rows"]) == 3
    assert document["energy"] == "not measured: interrupted before it was measured"


def test_ctrl_c_in_the_first_block_prints_nothing(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(rounds, "latency", interrupted)
    code, printed = refused(monkeypatch, capsys, "bench", bert, *_LISTS, *SIZES)
    assert code == 130
    assert "interrupted: nothing was measured" in printed


def test_an_estimate_is_of_a_cpu_alone() -> None:
    with pytest.raises(ValueError, match="--watts estimates the energy of a CPU alone"):
        rounds._energy({"a": lambda: None}, torch.device("meta"), 30.0)


@given(repeats=st.integers(1, 23), systems=st.integers(1, 3))
def test_blocks_make_up_the_rounds_asked_for(repeats: int, systems: int) -> None:
    names = [f"s{i}" for i in range(systems)]
    taken: list[int] = []

    def block(given: Any, repeats: int, seconds: float) -> Any:
        taken.append(repeats)
        return {name: summarize([float(len(taken))] * max(repeats, 3)) for name in given}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "latency", block)
        calls = {name: lambda: None for name in names}
        found = measure_rounds(
            calls,
            torch.device("cpu"),
            repeats=repeats,
            energy=False,
            watts=None,
            say=lambda line: None,
        )
    assert list(found.times) == names
    lengths = {time.runs for time in found.times.values()}
    assert len(lengths) == 1
    # A block is never shorter than three rounds.
    assert repeats <= lengths.pop() < repeats + 3
    assert max(taken) <= 5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["prepack"], {"prepack": "prepack"}),
        (["int8-linear{mode=dynamic}"], {"int8-linear{mode=dynamic}": "int8-linear{mode=dynamic}"}),
        (["my list = prepack"], {"my list": "prepack"}),
        (
            ["a=int8-linear{mode=dynamic, exclude=x}", "canonicalize, prepack"],
            {
                "a": "int8-linear{mode=dynamic, exclude=x}",
                "canonicalize, prepack": "canonicalize, prepack",
            },
        ),
        (None, {preparing.DEFAULT_PASSES: preparing.DEFAULT_PASSES}),
    ],
)
def test_lists_and_their_names(given: list[str] | None, expected: dict[str, str]) -> None:
    assert named_lists(given, "eager") == expected
