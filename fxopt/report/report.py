"""A whole transformation: a table for people, JSON for programs, a page with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.rendering.saved import Saved
from fxopt.report import page, text
from fxopt.report.fields import ReportFields


@dataclass(frozen=True)
class Report(ReportFields, Saved):
    """A whole transformation. `str(report)` is a plain table of at most 100 columns.

    `end_to_end` is the claim of the whole list against what was measured, as text; latency is per
    call in milliseconds, memory the extra bytes of one call at its peak; None was not measured.
    `domains` says for which calls each of its programs answers, and `most_programs` how many there
    may be, since one is captured when a call needs it; None where that isn't known.
    """

    SCHEMA: ClassVar[str] = "fxopt.report"
    PAGE: ClassVar[str] = "page with pictures"

    def __str__(self) -> str:
        return text.render(self)

    def to_html(self) -> str:
        """The report as one self-contained page, with the graph before and after as a picture."""
        return page.render(self)
