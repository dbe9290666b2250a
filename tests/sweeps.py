"""Sweeps: tests over many like cases, of which each run takes a part.

`@pytest.mark.sweep(one_in=3)` on a parametrised test has a run take about a third of its cases, and
`@in_parts(27, one_in=3)` above `@given` has it draw nine of 27 examples. Another day takes another
part; `--sweeps=all` takes all. The number of the part is printed at the top, and
`--sweep-part=N` takes it again.
"""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import seed, settings

_PART: int | None = 0  # of this run; None takes every case


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sweeps")
    group.addoption(
        "--sweeps",
        choices=("part", "all"),
        default="part",
        help="part: of each sweep as many of its cases as its mark says; all: every case",
    )
    group.addoption("--sweep-part", type=int, help="the part to take; left out, another each day")


def pytest_configure(config: pytest.Config) -> None:
    global _PART
    config.addinivalue_line(
        "markers", "sweep(one_in): each run takes one in so many of the cases; --sweeps=all"
    )
    if config.option.sweep_part is None:
        # Set here, before workers copy the options: all of them must take the same part.
        config.option.sweep_part = datetime.date.today().toordinal()
    _PART = config.option.sweep_part if config.option.sweeps == "part" else None


def pytest_report_header(config: pytest.Config) -> str:
    if config.option.sweeps == "all":
        return "sweeps: every case"
    return f"sweeps: a part of each, --sweep-part={config.option.sweep_part}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.option.sweep_part
    if config.option.sweeps == "all" or any("::" in arg for arg in config.args):
        return  # a test that is named runs
    left = {item for item in items if not _is_in(item, part)}
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def _is_in(item: pytest.Item, part: int) -> bool:
    """Whether the part has this case; of `one_in` parts in a row, one has."""
    mark = item.get_closest_marker("sweep")
    if mark is None:
        return True
    return (zlib.crc32(item.nodeid.encode()) + part) % int(mark.kwargs["one_in"]) == 0


def in_parts(examples: int, *, one_in: int = 3) -> Callable[[Any], Any]:
    """Settings of a property that draws `examples` in all, one in `one_in` of them each run.

    Each part has a seed of its own, the same in every run that takes it.
    """
    if _PART is None:
        return settings(max_examples=examples)
    part = _PART % one_in

    def decorate(test: Any) -> Any:
        return seed(part)(settings(max_examples=-(-examples // one_in))(test))

    return decorate
