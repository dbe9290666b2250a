"""A sweep takes each of its cases once in as many runs as its mark says."""

from __future__ import annotations

import pytest

from tests import sweeps


@pytest.fixture(autouse=True)
def _part_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    # The runs inside these tests are of this process, and set it.
    monkeypatch.setattr(sweeps, "_PART", sweeps._PART)


_SWEEP = """
import pytest

@pytest.mark.sweep(one_in=3)
@pytest.mark.parametrize("case", range(12))
def test_case(case):
    pass

def test_always():
    pass
"""


def _taken(pytester: pytest.Pytester, *options: str) -> set[str]:
    result = pytester.runpytest_inprocess(
        "-p", "tests.sweeps", "-p", "no:xdist", "-p", "no:benchmark", "-q", "-rp", *options
    )
    lines = [line for line in result.outlines if line.startswith("PASSED")]
    return {line.split("::")[1] for line in lines}


def test_three_parts_in_a_row_take_every_case_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_drawn=_SWEEP)
    parts = [_taken(pytester, f"--sweep-part={part}") for part in (7, 8, 9)]
    assert all("test_always" in part for part in parts)
    cases = [case for part in parts for case in part - {"test_always"}]
    assert sorted(cases) == sorted(f"test_case[{case}]" for case in range(12))


def test_all_and_a_named_case_are_taken_whatever_the_part(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_drawn=_SWEEP)
    assert len(_taken(pytester, "--sweeps=all")) == 13
    named = [_taken(pytester, "test_drawn.py::test_case[4]", f"--sweep-part={s}") for s in range(3)]
    assert named == [{"test_case[4]"}] * 3


_PROPERTY = """
from hypothesis import given, strategies as st
from tests.sweeps import in_parts

@in_parts(9, one_in=3)
@given(st.integers())
def test_property(number):
    with open("numbers.txt", "a") as file:
        print(number, file=file)
"""


def test_a_property_draws_other_examples_in_each_part_and_the_same_ones_again(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(test_drawn=_PROPERTY)
    numbers = pytester.path / "numbers.txt"

    def examples(*options: str) -> list[str]:
        assert _taken(pytester, *options) == {"test_property"}
        found = numbers.read_text().split()
        numbers.unlink()
        return found

    parts = [examples(f"--sweep-part={part}") for part in (0, 1, 2, 3)]
    assert {len(part) for part in parts} == {3}
    assert parts[0] == parts[3] != parts[1] != parts[2]
    assert len(examples("--sweeps=all")) == 9


def test_the_header_says_how_to_draw_the_same_part_again(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_drawn=_SWEEP)
    result = pytester.runpytest_inprocess("-p", "tests.sweeps", "-p", "no:xdist", "--sweep-part=7")
    result.stdout.fnmatch_lines(["sweeps: a part of each, --sweep-part=7"])
