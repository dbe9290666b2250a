"""Models side by side as a value: a table for people, JSON for programs, a page with plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.comparison import page, table
from fxopt.comparison.fields import ComparisonFields
from fxopt.rendering.saved import Saved


@dataclass(frozen=True)
class Comparison(ComparisonFields, Saved):
    """Models side by side. `print(comparison)` is one table, `save` writes the page or JSON."""

    SCHEMA: ClassVar[str] = "fxopt.comparison"
    PAGE: ClassVar[str] = "page with plots"

    def __str__(self) -> str:
        return table.render(self)

    def to_html(self) -> str:
        """One self-contained page without scripts. Raises `SaveError` without matplotlib."""
        return page.render(self)
