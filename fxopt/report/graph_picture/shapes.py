"""What a laid-out picture is made of: placed boxes and operations, and the wires between them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxopt.report.graph_picture.boxes import Box, Op


@dataclass
class Placed:
    """An operation or a box with its place in the drawing, in pixels."""

    item: Op | Box
    x: float
    y: float
    width: float
    height: float


@dataclass
class Wire:
    """A value's way from one row of a box to the next."""

    source: Op
    x1: float
    y1: float
    x2: float
    y2: float
    ends: bool


@dataclass
class Drawing:
    """Everything placed; boxes come before what they hold."""

    width: float
    height: float
    placed: list[Placed] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)
