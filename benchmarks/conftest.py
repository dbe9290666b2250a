"""Prints what a benchmark measured and, with `--record`, writes it to benchmarks/results/."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fxopt
from fxopt.timing import fingerprint

_RESULTS = Path(__file__).parent / "results"
_LINES = pytest.StashKey[list[str]]()

Record = Callable[[str, Mapping[str, Any]], None]
Effort = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write benchmarks/results/*.json")
    parser.addoption(
        "--quick", action="store_true", help="tiny models and few rounds: does everything run?"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and config.getoption("--record"):
        raise pytest.UsageError("--quick measures nothing worth keeping: leave out --record")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether models are to be tiny and rounds few; no figure of such a run means anything."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session")
def effort(quick: bool) -> Effort:
    """How long `compare` measures systems that take tens of milliseconds and more."""
    return {"repeats": 3, "seconds": 0.2} if quick else {"repeats": 25, "seconds": 10.0}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record(name, figures)`: shown at the end of the run, written to `results/name.json`."""

    def keep(name: str, figures: Mapping[str, Any]) -> None:
        lines = request.config.stash.setdefault(_LINES, [])
        lines.append(f"{name}:")
        lines.extend(_lines(figures))
        if request.config.getoption("--record"):
            entry = {"machine": {**fingerprint(), "fxopt": fxopt.__version__}, **figures}
            _RESULTS.mkdir(exist_ok=True)
            path = _RESULTS / f"{name}.json"
            path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")

    return keep


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(_LINES, [])
    if lines:
        quick = " of a quick run: they mean nothing" if config.getoption("--quick") else ""
        terminalreporter.section(f"figures{quick}")
        for line in lines:
            terminalreporter.write_line(line)


def _lines(figures: Mapping[str, Any], indent: str = "  ") -> list[str]:
    lines = []
    for name, value in figures.items():
        if isinstance(value, Mapping) and any(isinstance(v, Mapping) for v in value.values()):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, Mapping):
            text = "  ".join(f"{key} {_figure(figure)}" for key, figure in value.items())
            lines.append(f"{indent}{name:<60} {text}")
        else:
            lines.append(f"{indent}{name:<60} {_figure(value)}")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
