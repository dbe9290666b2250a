"""What can be cut, by fxopt and by Torch-Pruning, on every architecture, and whether that is exact.

Two questions of each model and each kind of channels. Cut half of them by magnitude: do they leave,
and does what is left run, on other batches and lengths as well? Then half of them are made constant
(no weights, biases as they are) and are to be cut: what is the error against the model that still
has them? In exact arithmetic there is an answer without any.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fxopt
from benchmarks.prunable import make_constant, parameters, sizes, widths
from benchmarks.systems.system import Inputs, first
from benchmarks.systems.torch_pruning_peers import Kind, pruned, without_constants
from tests.architectures import TRANSFORMERS, Case
from tests.pruned_networks import NETWORKS

MODELS: Mapping[str, Callable[[], Case]] = {**TRANSFORMERS, **NETWORKS}
_FXOPT, _PEER = "fxopt", "Torch-Pruning"
_SECONDS = 20
"""How long a toolkit gets for a model of two layers; a second or two is usual."""

_SCOPES: Mapping[Kind, tuple[str, ...]] = {
    "ffn": ("ffn",),
    "heads": ("heads",),
    "residual": ("residual",),
    "channels": ("channels", "residual"),
}
_CONSTANTS = ("constants", "zeros")


def coverage(
    names: Sequence[str] | None = None, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Figures by model, kind of channels and toolkit; of all models, or of those in `names`."""
    figures: dict[str, Any] = {}
    for name in names or MODELS:
        progress(name)
        case = MODELS[name]()
        dense = _transformed(case.model, fxopt.Canonicalize(), case)
        kinds: tuple[Kind, ...] = ("ffn", "heads", "residual")
        for kind in ("channels",) if name in NETWORKS else kinds:
            figures[f"{name}, {kind}"] = {
                _FXOPT: _ours(case, kind, dense),
                _PEER: _theirs(case, kind),
            }
    return figures


def by_toolkit(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures, a row for each model, kind of channels and toolkit."""
    return {
        f"{name}, {toolkit}": row for name, both in figures.items() for toolkit, row in both.items()
    }


def table(figures: Mapping[str, Any]) -> Table:
    """The figures to read: what left of half, and the error of cutting constants; both toolkits."""
    shown = Table(
        title="half of the channels cut; then half of them constant, or zero, and cut",
        caption="cut: share of the channels; of the residual stream, parameters that are left\n"
        "constants, zeros: share that is cut, relative error against the model that has them",
    )
    shown.add_column("model, channels", no_wrap=True)
    for toolkit in (_FXOPT, _PEER):
        for column in ("cut", *_CONSTANTS):
            shown.add_column(f"{toolkit}\n{column}", justify="right")
    for name, row in figures.items():
        cells = [cell for toolkit in (_FXOPT, _PEER) for cell in _cells(row[toolkit])]
        shown.add_row(name, *cells)
    return shown


def _ours(case: Case, kind: Kind, dense: fxopt.Optimized) -> dict[str, Any]:
    row: dict[str, Any] = {"cuttable": _cuttable(dense, case.model, kind)}
    with _failures(row, "failure"):
        half = fxopt.PruneChannels(ratio=0.5, importance="l2", scope=_SCOPES[kind])
        halved = _transformed(case.model, half, case)
        row |= _left(halved, case, kind)
        _error(halved, case.model, case)
    for what in _CONSTANTS if kind != "residual" else ():
        constant = _constant(case, kind, what)
        with _failures(row, f"failure, {what}"):
            folded = _transformed(constant, fxopt.FoldPruned(), case)
            row[f"cut of {what}"] = _share(folded, case.model, kind)
            row[f"error of {what}"] = _error(folded, constant, case)
            row[f"refused of {what}"] = sorted(
                {refusal.reason for refusal in folded.program.changes.refused}
            )
    return row


def _theirs(case: Case, kind: Kind) -> dict[str, Any]:
    row: dict[str, Any] = {}
    with _failures(row, "failure"):
        halved = pruned(case.model, case.example, [kind])
        row |= _left(halved, case, kind)
        _error(halved, case.model, case)
    for what in _CONSTANTS if kind != "residual" else ():
        constant = _constant(case, kind, what)
        with _failures(row, f"failure, {what}"):
            folded = without_constants(constant, case.example, kind)
            row[f"cut of {what}"] = _share(folded, case.model, kind)
            row[f"error of {what}"] = _error(folded, constant, case)
    return row


def _transformed(model: nn.Module, pass_: fxopt.Pass, case: Case) -> fxopt.Optimized:
    return fxopt.transform(
        model, [pass_], example_inputs=case.example, verify=False, measure_cost=False
    )


def _constant(case: Case, kind: Kind, what: str) -> nn.Module:
    model = copy.deepcopy(case.model)
    make_constant(model, kind, case.example, zero=what == "zeros")
    return model


def _left(model: nn.Module, case: Case, kind: Kind) -> dict[str, float]:
    left = {"parameters": round(parameters(model) / parameters(case.model), 3)}
    return left if kind == "residual" else {"cut": _share(model, case.model, kind), **left}


def _share(model: nn.Module, original: nn.Module, kind: Kind) -> float:
    """Which share of the original's channels the model doesn't have any more."""
    found = widths(original)
    before = sizes(found, original.state_dict())[kind]
    return round(1.0 - sizes(found, model.state_dict())[kind] / before, 3)


def _cuttable(dense: fxopt.Optimized, model: nn.Module, kind: Kind) -> float:
    """The share of the channels of this kind whose group nothing forbids to cut."""
    groups = fxopt.channels(dense.program).groups
    if kind == "residual":
        sized = [(group.size, not group.refusals) for group in groups if group.kind == kind]
    else:
        free = {(p.name, p.axis) for g in groups if not g.refusals for p in g.places}
        counted = ((w.count(model.state_dict()), w) for w in widths(model)[kind])
        sized = [(count, (width.name, width.axis) in free) for count, width in counted]
    total = sum(size for size, _ in sized)
    return round(sum(size for size, is_free in sized if is_free) / total, 3) if total else 0.0


@torch.no_grad()
def _outputs(model: Callable[..., Any], case: Case) -> list[Tensor]:
    calls: Sequence[Inputs] = (case.example, *case.others)
    return [first(model(**inputs)) for inputs in calls]


def _error(model: Callable[..., Any], reference: Callable[..., Any], case: Case) -> float:
    """The worst relative error of the first output over the calls of the case.

    Raises `ValueError` where an output has another shape than the reference's.
    """
    pairs = list(zip(_outputs(model, case), _outputs(reference, case), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"an output has the shape {list(a.shape)}, not {list(b.shape)}")
    return float(f"{max(((a - b).norm() / b.norm()).item() for a, b in pairs):.2g}")


@contextmanager
def _failures(row: dict[str, Any], key: str) -> Iterator[None]:
    """What is raised, and what takes too long, goes into the row: that is a figure too."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"not done after {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(_SECONDS)
    try:
        yield
    except Exception as error:
        row[key] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "failure" in row:
        cells = ["fails"]
    else:
        cells = [_percent(row["cut"]) if "cut" in row else f"to {_percent(row['parameters'])}"]
    for what in _CONSTANTS:
        if f"failure, {what}" in row:
            cells.append("fails")
        elif not row.get(f"cut of {what}"):
            cells.append("-")
        else:
            cells.append(f"{_percent(row[f'cut of {what}'])}, {row[f'error of {what}']:.0e}")
    return cells


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
