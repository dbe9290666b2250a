"""Observation: streams the calibration inputs through a program, chosen values to observers.

Only what the chosen nodes need is computed: the head of a language model is never multiplied to
learn the range of its input.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.errors import CalibrationError
from fxopt.eval_graph import in_evaluation_mode
from fxopt.interpreter import evaluate
from fxopt.nodes import is_pure, label, source_line
from fxopt.observation.observers import Observer
from fxopt.program import Program
from fxopt.progress import Progress
from fxopt.tensor_digest import tensor_digest

_SECONDS_BETWEEN_LINES = 5.0
# Ranges learnt from fewer samples than this are often exceeded by the next ones.
_FEWEST_SAMPLES = 32
_MOST_NAMES = 4


@dataclass(frozen=True)
class Observation:
    """What one pass over the calibration inputs saw.

    `batches` of them with `samples` rows in all (entries of the first axis of the first input);
    `shape` is the first input's in the first batch; `all_equal` says that several batches were all
    one and the same; `from_example` that there was no calibration and the example stood in.
    """

    batches: int
    samples: int
    shape: tuple[int, ...]
    all_equal: bool
    from_example: bool


def observe(
    program: Program,
    watched: Mapping[fx.Node, Sequence[Observer]],
    progress: Progress | None = None,
    refuse_nan: bool = True,
) -> Observation:
    """Stream `program.batches()` once and update the observers of each watched node.

    `watched` are nodes of `program.graph` whose values are tensors; of a train-mode program they
    have the values of evaluation mode, without dropout's noise. `progress`, or the calibration's
    own, gets a line every power of two batches or five seconds.

    Raises `CalibrationError` for unusable batches and, with `refuse_nan`, for a NaN at a watched
    node.
    """
    calibration = program.calibration
    progress = progress or (calibration.progress if calibration else None)
    length = calibration.length if calibration else None
    cut, observers = _only(*_evaluated(program, watched))
    tally = _Tally(progress, length)
    for index, inputs in enumerate(program.batches()):

        def look(node: fx.Node, value: Any, index: int = index) -> Any:
            if node in observers:
                if refuse_nan:
                    check_no_nan(node, value, index)
                for observer in observers[node]:
                    observer.update(value)
            return value

        tally.begin(index)
        evaluate(cut, inputs, look)
        tally.add(inputs)
    return tally.observation(from_example=calibration is None)


def calibration_warnings(
    seen: Observation, layers: Mapping[str, Sequence[Observer]]
) -> tuple[str, ...]:
    """What makes the ranges of `layers` ({name: observers}) doubtful, a line each, with names.

    Too few samples, batches that are all the same, layers that saw one constant value or none.
    """
    lines = []
    shape = " x ".join(map(str, seen.shape)) or "one number"
    if seen.all_equal:
        lines.append(
            f"all {seen.batches} calibration batches ({shape}) are the same, and the ranges of "
            f"{_named(list(layers))} come from it: give calibration= real, varied inputs"
        )
    elif seen.samples < _FEWEST_SAMPLES:
        origin = (
            f"on the example alone ({shape}), since calibration= was left out"
            if seen.from_example
            else f"on {_count(seen.samples, 'sample')} in {_count(seen.batches, 'batch')} only "
            f"(the first {shape})"
        )
        lines.append(
            f"calibrated {origin}; the ranges of {_named(list(layers))} come from it: give "
            f"calibration= at least {_FEWEST_SAMPLES} samples of real inputs"
        )
    unseen = [name for name, observers in layers.items() if any(map(_is_empty, observers))]
    constant = [name for name, observers in layers.items() if any(map(_is_constant, observers))]
    if unseen:
        lines.append(f"no value at all reached {_named(unseen)} during calibration")
    if constant:
        lines.append(
            f"one constant value alone reached {_named(constant)} during calibration, so the range "
            "learnt there says nothing about other inputs"
        )
    return tuple(lines)


class _Tally:
    """Counts batches, notices when all are the same, and tells how far the stream has come."""

    def __init__(self, progress: Progress | None, length: int | None) -> None:
        self.progress = progress
        self.length = length
        self.batches = self.samples = 0
        self.shape: tuple[int, ...] = ()
        self.first = b""
        self.all_equal = True
        self.told = time.monotonic()

    def begin(self, index: int) -> None:
        """Tell that batch `index` is about to run, if it is time to."""
        now = time.monotonic()
        is_power = not index & (index + 1)
        if self.progress and (is_power or now - self.told >= _SECONDS_BETWEEN_LINES):
            total = f" of {self.length}" if self.length is not None else ""
            self.progress(f"calibrating: batch {index + 1}{total}")
            self.told = now

    def add(self, inputs: Sequence[Tensor]) -> None:
        """Count one batch that has run."""
        main = next(iter(inputs), torch.empty(0))
        if not self.batches:
            self.shape = tuple(main.shape)
        self.samples += main.shape[0] if main.ndim else 1
        if self.all_equal:
            digest = tensor_digest(inputs)
            self.first = self.first or digest
            self.all_equal = digest == self.first
        self.batches += 1

    def observation(self, from_example: bool) -> Observation:
        """What was counted."""
        same = self.all_equal and self.batches > 1
        return Observation(self.batches, self.samples, self.shape, same, from_example)


def _evaluated(
    program: Program, watched: Mapping[fx.Node, Sequence[Observer]]
) -> tuple[Program, dict[fx.Node, list[Observer]]]:
    """The program in evaluation mode, and who watches which of its nodes."""
    program, same = in_evaluation_mode(program)
    found: dict[fx.Node, list[Observer]] = {}
    for node, observers in watched.items():
        found.setdefault(same(node), []).extend(observers)
    return program, found


def _only(
    program: Program, watched: Mapping[fx.Node, Sequence[Observer]]
) -> tuple[Program, dict[fx.Node, Sequence[Observer]]]:
    """The part of `program` that `watched` nodes need (and what writes), without outputs."""
    nodes = list(program.graph.nodes)
    needed = {node for node in nodes if node in watched or node.op == "placeholder"}
    needed |= {node for node in nodes[:-1] if not is_pure(node, "train")}
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node in needed and node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(())
    observers = {copies[node]: seen for node, seen in watched.items() if node in copies}
    return program.with_graph(graph), observers


def check_no_nan(node: fx.Node, value: Tensor, index: int) -> None:
    """Raises `CalibrationError` where a value of calibration batch `index` holds NaN."""
    if value.is_floating_point() and bool(value.isnan().any()):
        where = f", from {source_line(node)}" if source_line(node) else ""
        raise CalibrationError(
            f"calibration batch {index} gives {int(value.isnan().sum())} NaN of {value.numel()} "
            f"values at {label(node)}{where}: no range can be learnt from it. Take the batch out, "
            "or look for what makes the model itself give NaN."
        )


def _is_empty(observer: Observer) -> bool:
    return getattr(observer, "count", 1) == 0


def _is_constant(observer: Observer) -> bool:
    return bool(getattr(observer, "is_constant", False))


def _count(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}" + (plural if number != 1 else "")


def _named(names: Sequence[str]) -> str:
    """`names` for a message: the first few, and how many more."""
    more = len(names) - _MOST_NAMES
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {more} more" if more > 0 else shown
