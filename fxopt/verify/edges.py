"""Sizes of 1 and 0, of which the trace of a model says nothing: torch.export assumes neither.

The graph's operators do there what they do in the model, unless the rank of a result depends on it
or Python asked. What Python asked is a guard; the rest is tried, and becomes one where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fxopt.claim import Close
from fxopt.guards import Guard
from fxopt.program import Program
from fxopt.verify.oracle import Run, run_program
from fxopt.verify.sizes import Key, edge_sizes, reads, resized


def with_edges(program: Program, reference: Run, *, known: bool = False) -> Program:
    """`program` with a guard for every size of 1 or 0 that it doesn't answer as `reference` does.

    Where the reference rejects such a size, so does the guard. Guards of helpers, which a size of 1
    alone breaks, are dropped where the trials at 1 agree, but those of a program that is `known`
    by a transformation before: past its guards the reference would have to be captured once more.
    """
    guards = [one for one in program.signature.guards if known or one.origin != "helper"]
    trusted = _guarded(program, guards)
    if all(_agrees(trusted, sizes, reference) for sizes in _at_one(trusted)):
        program = trusted
    else:
        program = _without_disagreeing(program, 1, reference)
    return _without_disagreeing(program, 0, reference)


def _at_one(program: Program) -> list[Mapping[Key, int]]:
    """Each kind of axis at 1 by itself, then all at once."""
    singles = edge_sizes(program, 1)
    together = {key: 1 for one in singles for key in one}
    accepted = len(singles) > 1 and program.signature.accepts(resized(program, together))
    return [*singles, together] if accepted else [*singles]


def _without_disagreeing(program: Program, size: int, reference: Run) -> Program:
    guards = [
        Guard(("ne", place, size), "trial")
        for sizes in edge_sizes(program, size)
        if not _agrees(program, sizes, reference)
        for key in sizes
        for place in reads(program, key)
    ]
    return _guarded(program, [*program.signature.guards, *guards])


def _guarded(program: Program, guards: list[Guard]) -> Program:
    return replace(program, signature=replace(program.signature, guards=tuple(guards)))


def _agrees(program: Program, sizes: Mapping[Key, int], reference: Run) -> bool:
    inputs = resized(program, sizes)
    try:
        expected = reference(inputs)
        (outputs,) = run_program(program)([inputs])
    except Exception:  # a model may raise anything for a size that it wasn't made for
        return False
    return len(expected) == len(outputs) and all(map(_same, expected, outputs))


def _same(expected: Tensor, output: Tensor) -> bool:
    """Whether two outputs are close; a NaN, as of a mean over nothing, is equal to another."""
    if expected.shape != output.shape or expected.dtype != output.dtype:
        return False
    if expected.is_floating_point() and bool(expected.isnan().any()):
        unknown = expected.isnan()
        if not bool((unknown == output.isnan()).all()):
            return False
        expected, output = expected.masked_fill(unknown, 0.0), output.masked_fill(unknown, 0.0)
    return Close().measure(expected, output).holds
