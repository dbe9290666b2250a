"""The whole text of a program, and the value that shows it to people."""

from __future__ import annotations

from dataclasses import dataclass

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

    def diff(self, other: GraphText | Program) -> str:
        """What changed from this graph to `other`; empty where nothing did."""
        return diff(self.program, other.program if isinstance(other, GraphText) else other)
