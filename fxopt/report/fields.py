"""What happened to a model, as values: one `Step` per pass and the `ReportFields` of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxopt.program import Refusal
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
class ReportFields:
    """The fields of a `Report`, which says what they are: all that writing it down needs."""

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
