"""Rows as lines: cells of a column below one another."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fxopt.rendering.alignment import aligned

WORDS = st.text("ab", min_size=1, max_size=6)
TABLES = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.lists(WORDS, min_size=count, max_size=count), min_size=1, max_size=5)
)


@given(TABLES, st.text("<>", min_size=1, max_size=4))
def test_each_cell_stands_in_its_column(rows: list[list[str]], align: str) -> None:
    align = align[: len(rows[0])]
    lines = aligned(rows, align, " | ")
    for line, row in zip(lines, rows, strict=True):
        assert [cell.strip() for cell in line.split(" | ")] == row
    for at, column in enumerate(zip(*(line.split(" | ") for line in lines), strict=True)):
        side = align[min(at, len(align) - 1)]
        edges = {len(cell) - len(cell.lstrip()) for cell in column}
        assert edges == {0} if side == "<" else len({len(cell) for cell in column}) == 1


def test_no_line_ends_in_blanks() -> None:
    assert aligned([("a", "b"), ("long", "")], "<") == ["a     b", "long"]
