"""`fxopt search`: lists that can be pasted, a study that goes on, and what Ctrl-C keeps."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

import fxopt
from fxopt.cli import searching
from fxopt.loading import load_model
from fxopt.search import search
from tests.cli.command import SIZES, run

pytest.importorskip("optuna", reason="needs optuna (extra search)")

_SPACE = [["canonicalize"], ["", "fuse-linears"]]


@pytest.fixture(autouse=True)
def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard space compiles each list, for minutes."""
    monkeypatch.setattr(searching, "search_passes", partial(search, space=_SPACE))


def test_lists_that_can_be_pasted(bert: str) -> None:
    result = run("search", bert, *SIZES, "--trials", "2", "--json")
    document = json.loads(result.stdout)
    assert document["objectives"] == ["latency"]
    assert document["metric"]["original"] == pytest.approx(1.0)
    assert document["interrupted"] is False
    assert "trial" in result.stderr
    loaded = load_model(bert, 2, 12)
    for candidate in document["pareto"]:
        fxopt.transform(loaded.model, candidate["passes"], example_inputs=loaded.inputs)


def test_a_table_and_a_study_that_goes_on(bert: str, tmp_path: Path) -> None:
    storage = ["--storage", str(tmp_path / "study.db"), "--objective", "memory"]
    first = run("search", bert, *SIZES, *storage, "--trials", "1")
    assert "search over memory: 1 " in first.stdout
    second = run("search", bert, *SIZES, *storage, "--trials", "2", "--json")
    assert len([t for t in json.loads(second.stdout)["trials"] if t["state"] != "waiting"]) >= 2


def test_a_metric_of_a_file(bert: str, tmp_path: Path) -> None:
    file = tmp_path / "metric.py"
    file.write_text("def score(model, data):\n    return 0.25 + len(list(data))\n")
    result = run("search", bert, *SIZES, "--trials", "1", "--metric", f"{file}:score", "--json")
    assert json.loads(result.stdout)["metric"]["original"] == 1.25


def test_ctrl_c_keeps_the_trials_before(bert: str, tmp_path: Path) -> None:
    file, calls = tmp_path / "metric.py", tmp_path / "calls"
    file.write_text(
        "from pathlib import Path\n"
        "def score(model, data):\n"
        f"    calls = Path({str(calls)!r})\n"
        "    calls.write_text((calls.read_text() if calls.exists() else '') + 'x')\n"
        "    if calls.read_text() == 'x' * 3:\n"
        "        raise KeyboardInterrupt\n"
        "    return 1.0\n"
    )
    arguments = ["--trials", "2", "--metric", f"{file}:score", "--json"]
    result = run("search", bert, *SIZES, *arguments, code=130)
    document = json.loads(result.stdout)
    assert document["interrupted"] is True
    states = [trial["state"] for trial in document["trials"]]
    assert states.count("measured") == 1
    assert "of 2 trials" in result.stderr
