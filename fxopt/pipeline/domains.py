"""For which calls a program answers, in words for the report."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.guards import Guard
from fxopt.program import Program
from fxopt.report import Domain
from fxopt.signature import gathered
from fxopt.verify import Trial, shapes_text

_WHO = {
    "branch": "a branch",
    "helper": "a branch",
    "operator": "an operator",
    "trial": "tried: the graph and the model differ elsewhere",
}


def domain_of(program: Program, trials: Sequence[Trial]) -> Domain:
    """The calls of `program`, which was compared with the original on `trials`."""
    signature = program.signature
    inputs = gathered([(tensor.path, tensor.type_text) for tensor in signature.tensors])
    relations = [_words(guard, signature.paths) for guard in signature.guards]
    return Domain(
        inputs=tuple(f"{path}: {text}" for path, text in inputs),
        constants=tuple(f"{name}={value!r}" for name, value in signature.constants.items()),
        relations=tuple(dict.fromkeys(relations)),
        judged=tuple(dict.fromkeys(shapes_text(program, trial.inputs) for trial in trials)),
    )


def _words(guard: Guard, paths: Sequence[str]) -> str:
    line = guard.source.partition("  ")[0]
    return f"{guard.text(paths)} ({_WHO[guard.origin]}{f' at {line}' if line else ''})"
