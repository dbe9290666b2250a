"""What happened to a model, as values: one `Step` per pass and one `Report` for the whole list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fxopt.errors import SaveError
from fxopt.program import Refusal
from fxopt.rendering import json_document
from fxopt.report import page, text
from fxopt.report.graph_picture.picture import GraphPicture
from fxopt.timing import Latency, Memory


@dataclass(frozen=True)
class Step:
    """One pass as it ran: what it changed, what it left alone and why, claim against measured.

    `spec` is the pass's `repr`; `fired` counts firings by rule; `reverted` lists what was undone
    because the claim failed there; bytes are those of all parameters and buffers; `milliseconds`
    includes judging; `warnings` are what the user must know, `details` the lines with which the
    pass explained its decisions; `graph` is the graph's text after the step and `changed` names
    the nodes in it that the step made.
    """

    name: str
    spec: str
    fired: Mapping[str, int]
    refused: tuple[Refusal, ...]
    reverted: tuple[Refusal, ...]
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    claim: str
    measured: str
    holds: bool
    milliseconds: float
    warnings: tuple[str, ...] = ()
    graph: str = ""
    changed: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "fired", dict(self.fired))

    @property
    def firings(self) -> int:
        """How often the pass changed something."""
        return sum(self.fired.values())


@dataclass(frozen=True)
class Domain:
    """For which calls one program of a model answers.

    `inputs` are its tensors with dtypes and sizes, a name for each size that may differ;
    `constants` the other arguments it was captured with; `relations` what the sizes must satisfy,
    each with who needs it; `judged` the sizes at which it was compared with the original.
    """

    inputs: tuple[str, ...]
    constants: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """A whole transformation. `str(report)` is a plain table of at most 100 columns.

    `end_to_end` is the claim of the whole list against what was measured, as text; latency is per
    call in milliseconds, memory the extra bytes of one call at its peak; None was not measured.
    `domains` says for which calls each of its programs answers, and `most_programs` how many there
    may be, since one is captured when a call needs it; None where that isn't known.
    """

    model: str
    capture_ms: float
    steps: tuple[Step, ...]
    end_to_end: str | None = None
    latency_before: Latency | None = None
    latency_after: Latency | None = None
    memory_before: Memory | None = None
    memory_after: Memory | None = None
    notes: tuple[str, ...] = ()
    fingerprint: Mapping[str, str | int | float | None] = field(default_factory=dict)
    picture_before: GraphPicture | None = None
    picture_after: GraphPicture | None = None
    domains: tuple[Domain, ...] = ()
    most_programs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", dict(self.fingerprint))

    def __str__(self) -> str:
        return text.render(self)

    def to_json(self) -> str:
        """The report as JSON with a schema version; `Report.from_json` reads it back."""
        return json_document.dump(self)

    @staticmethod
    def from_json(content: str) -> Report:
        """The report that `to_json` wrote; raises `SaveError` where it is damaged or newer."""
        return json_document.load(content, Report)

    def to_html(self) -> str:
        """The report as one self-contained page, with the graph before and after as a picture."""
        return page.render(self)

    def save(self, path: str | Path) -> None:
        """Write the report; the suffix says how: .html, .json or .txt. Raises `SaveError`."""
        path = Path(path)
        writers = {".html": self.to_html, ".json": self.to_json, ".txt": self.__str__}
        write = writers.get(path.suffix.lower())
        if write is None:
            raise SaveError(
                f"can't tell from the name {path.name!r} how to write the report: end it in "
                ".html (page with pictures), .json (for programs) or .txt (plain text)"
            )
        try:
            path.write_text(write().rstrip("\n") + "\n", encoding="utf-8")
        except OSError as error:
            raise SaveError(
                f"can't write the report to {path}: {error.strerror}. Give a file in a folder that "
                "exists and can be written."
            ) from error
