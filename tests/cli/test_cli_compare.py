"""`fxopt compare`: cost and worth of pass lists, a page, and what Ctrl-C keeps."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxopt.cli import comparing
from fxopt.cli.comparing import UntilStopped
from fxopt.comparison import Comparison
from tests.cli.command import SIZES, run

_LISTS = ["-p", "clean=canonicalize", "-p", "int8=canonicalize, int8-linear{where=always}"]
_QUICK = [*SIZES, "--repeats", "1", "--no-energy"]


def test_one_table_and_one_page(bert: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra report)")
    page = tmp_path / "page.html"
    result = run("compare", bert, *_LISTS, *_QUICK, "--out", str(page))
    for name in ("original", "clean", "int8"):
        assert name in result.stdout
    assert f"comparison saved to {page}" in " ".join(result.stdout.split())
    assert page.read_text().lower().startswith("<!doctype html>")
    assert "measuring in turns" in result.stderr


def test_json_alone_on_the_standard_output(reader: str, texts: str, tmp_path: Path) -> None:
    out = tmp_path / "comparison.json"
    arguments = [*_LISTS, *_QUICK, "--data", texts, "--out", str(out), "--json"]
    result = run("compare", reader, *arguments)
    comparison = Comparison.from_json(result.stdout)
    assert [row.name for row in comparison.rows] == ["original", "clean", "int8"]
    assert comparison["clean"].fidelity is not None
    assert comparison["clean"].fidelity.batches == 3
    assert Comparison.from_json(out.read_text()) == comparison


def test_a_list_that_fails_is_told_and_the_others_are_compared(bert: str) -> None:
    broken = ["-p", "broken=int8-linear{claim=sqnr(90), where=always}"]
    result = run("compare", bert, *_LISTS[:2], *broken, *_QUICK, "--json", code=1)
    comparison = Comparison.from_json(result.stdout)
    assert [row.name for row in comparison.rows] == ["original", "clean"]
    (failure,) = comparison.failures
    assert failure.name == "broken"
    assert failure.reason.startswith("EquivalenceError: Int8Linear(")
    assert "broke its claim" in failure.reason


def test_ctrl_c_keeps_the_times_and_what_was_judged(
    reader: str, texts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparing.compare_models

    def pressed(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(comparing, "compare_models", pressed)
    arguments = [*_LISTS, *_QUICK, "--data", texts, "--json"]
    result = run("compare", reader, *arguments, code=130)
    comparison = Comparison.from_json(result.stdout)
    assert len(comparison.rows) == 3
    assert all(row.fidelity and row.fidelity.batches == 1 for row in comparison.rows)
    assert "interrupted: kept 3 of 3 models, judged on what was read" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_leaves_at_once(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still here")

    monkeypatch.setattr(comparing, "compare_models", pressed)
    result = run("compare", bert, "-p", "canonicalize", *_QUICK, code=130)
    assert result.stdout == ""
    assert "interrupted: nothing was measured" in result.stderr


def test_json_of_a_real_run_can_be_read_by_any_program(bert: str) -> None:
    result = run("compare", bert, "-p", "canonicalize", *_QUICK, "--json")
    assert json.loads(result.stdout)["schema"] == "fxopt.comparison"


@given(count=st.integers(1, 6), after=st.integers(0, 8))
def test_batches_end_after_the_one_at_hand(count: int, after: int) -> None:
    seen: list[int] = []
    batches = UntilStopped([{"i": i} for i in range(count)], lambda: len(seen) >= after)
    for batch in batches:
        seen.append(batch["i"])
    assert seen == list(range(min(count, max(after, 1))))
