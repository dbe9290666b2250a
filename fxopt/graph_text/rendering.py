"""The whole text of a program, and the value that shows it to people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fxopt.graph_text.difference import diff
from fxopt.graph_text.printer import Printer
from fxopt.graph_text.siblings import chunk_text, collapsed
from fxopt.program import Program


def text(program: Program, collapse: bool = False) -> str:
    """The canonical text of `program`, one line an operation; equal programs give equal text.

    `collapse=True` prints numbered sibling modules (the layers of a transformer) that differ in
    nothing but their number once, and names the others in one line.
    """
    printer = Printer(program)
    chunks = printer.chunks()
    body = collapsed(chunks) if collapse else [chunk_text(chunk) for chunk in chunks]
    return "\n\n".join([printer.header, *body, printer.result()]) + "\n"


class HasGraph(Protocol):
    """What shows its graph as text: an optimised model, one of its steps."""

    @property
    def graph(self) -> GraphText: ...


@dataclass(frozen=True)
class GraphText:
    """A program's graph for people: `str()` is its text, `diff` compares it with another."""

    program: Program

    def __str__(self) -> str:
        return text(self.program)

    def __repr__(self) -> str:
        return text(self.program, collapse=True)

    def collapsed(self) -> str:
        """The text with repeated layers printed once."""
        return text(self.program, collapse=True)

    def diff(self, other: GraphText | HasGraph | Program) -> str:
        """What changed from this graph to `other` (a graph, or what has one); empty if nothing."""
        if isinstance(other, Program):
            return diff(self.program, other)
        graph = other if isinstance(other, GraphText) else other.graph
        return diff(self.program, graph.program)
