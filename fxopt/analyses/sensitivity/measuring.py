"""Sensitivity: what rewriting each layer costs at the outputs, measured by the graph itself.

    alone        the model with one candidate rewritten, against the model as it is
    cumulative   the model with this candidate and all cheaper ones rewritten

Both in decibels of signal over noise at the worst output of the worst batch. With L candidates,
a batch takes one reference run, L runs for `alone`, each from its candidate on (half a run on
average), and L - 1 for `cumulative`, or log2(L) where only one budget is asked about.
All runs, the reference too, take linears from the fastest library and stop before a wide head.
Noise from one layer hides behind that of another or adds to it in amplitude; hence the second list
is measured, not summed up from the first.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxopt.analyses.sensitivity.effect import Effect
from fxopt.analyses.sensitivity.output_noise import OutputNoise
from fxopt.analyses.sensitivity.table import draw, table
from fxopt.claim import Sqnr
from fxopt.errors import PassError
from fxopt.interpreter import Override, evaluate, evaluate_variants, same_draws
from fxopt.kernels.onednn import dense_linear
from fxopt.nodes import label, module_path
from fxopt.program import Program
from fxopt.progress import Progress, silent

aten = torch.ops.aten

Batch = Sequence[Tensor]

# Measuring runs the model 2 L times on each.
_CALIBRATION_BATCHES = 2


@dataclass(frozen=True)
class Candidate:
    """A rewrite that is done as a whole or not at all, such as that of all linears on one input.

    `values` gives for each node that it changes the function that computes its new value from the
    values of the node's arguments, as the graph passes them.
    """

    name: str
    values: Override

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the modules that it rewrites, a node's name where it is of none."""
        return tuple(dict.fromkeys(module_path(node) or node.name for node in self.values))


@dataclass(frozen=True)
class Sensitivity:
    """The effects of all candidates, the costliest first; prints as a table.

    `runs` counts the model runs that it took, partial ones included. So `rows[n].cumulative_db` is
    what remains when the n costliest are left as they are.
    """

    rows: tuple[Effect, ...]
    runs: int = 0

    def within(self, budget: Sqnr | None = None, max_layers: int | None = None) -> frozenset[str]:
        """The names of the candidates to leave as they are, always the costliest.

        With `budget`, the fewest for which the rest, all rewritten together, was measured to hold
        it; with `max_layers`, that many, and with both, never more than that, whether or not the
        budget then holds. Raises `PassError` for neither, or for a negative number.
        """
        if budget is None and max_layers is None:
            raise PassError("within() got neither a budget nor a number of layers; give one")
        if max_layers is not None and max_layers < 0:
            raise PassError(f"within(max_layers={max_layers!r}): must be 0 or more")
        most = len(self.rows) if max_layers is None else max_layers
        return frozenset(row.name for row in self.rows[: min(most, self._fewest(budget))])

    def cumulative_db(self, kept: Iterable[str]) -> float | None:
        """Decibels when all but the candidates `kept` are rewritten: infinite when none is, None
        when that was not measured."""
        left = frozenset(kept)
        count = len(left)
        if left != {row.name for row in self.rows[:count]}:
            return None
        return self.rows[count].cumulative_db if count < len(self.rows) else math.inf

    def lines(self, most: int | None = None) -> tuple[str, ...]:
        """The table, line by line; with `most`, the costliest so many and one line on the rest."""
        return table(self.rows, self.runs, most)

    def svg(self, budget: Sqnr | None = None, most: int = 40) -> str:
        """The costliest `most` candidates as one self-contained `<svg>`: a bar each for its share
        of the noise, a dot for the decibels left from there on, and a line at `budget`."""
        return draw(self.rows, budget, most)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _fewest(self, budget: Sqnr | None) -> int:
        if budget is None:
            return len(self.rows)
        for count, row in enumerate(self.rows):
            if row.cumulative_db is not None and row.cumulative_db >= budget.db:
                return count
        return len(self.rows)


def measure_sensitivity(
    program: Program,
    candidates: Sequence[Candidate],
    batches: Iterable[Batch],
    budget: Sqnr | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """The effect of each candidate on the outputs of `program`.

    `batches` are input tensors in placeholder order; all of them and their outputs are held, so
    give a handful. With `budget` the cumulative list is not walked but bisected for the place where
    the budget stops to hold, which assumes that more rewritten layers make more noise; what comes
    out was measured all the same. Equal costs are ordered as given.

    Raises `PassError` for no batch, and for candidates that share a name or a node.
    """
    return _Measurement(program, candidates, batches, progress).run(budget)


def measured_batches(program: Program) -> list[Batch]:
    """The inputs that a pass measures on: the example and the first calibration batches."""
    first = itertools.islice(program.batches(), _CALIBRATION_BATCHES)
    return [program.example, *(first if program.calibration else ())]


class _Measurement:
    def __init__(
        self,
        program: Program,
        candidates: Sequence[Candidate],
        batches: Iterable[Batch],
        progress: Progress | None,
    ) -> None:
        _check(candidates)
        # Gradients would keep every value of a run alive.
        self.program = replace(program, mode="eval")
        rewritten = {node for candidate in candidates for node in candidate.values}
        self.noise = OutputNoise(program, rewritten)
        self.always = {**_products(program), **self.noise.override}
        self.candidates = candidates
        self.batches = [tuple(batch) for batch in batches]
        if not self.batches:
            raise PassError("sensitivity got no batch of inputs to measure on; give at least one")
        self.say = progress or silent
        self.references: list[list[Tensor]] = []
        self.runs = 0

    def run(self, budget: Sqnr | None) -> Sensitivity:
        alone = self._alone()
        order = sorted(range(len(alone)), key=lambda index: alone[index])
        powers = _shares([alone[index] for index in order])
        cumulative = self._cumulative(order, alone, budget)
        rows = []
        for place, (index, power) in enumerate(zip(order, powers, strict=True)):
            one = self.candidates[index]
            effect = Effect(one.name, alone[index], cumulative.get(place), power, one.paths)
            rows.append(effect)
        return Sensitivity(tuple(rows), self.runs)

    def _alone(self) -> list[float]:
        worst = [math.inf] * len(self.candidates)
        variants = [candidate.values for candidate in self.candidates]
        for number, batch in enumerate(self.batches, start=1):
            self.say(f"sensitivity: {len(variants)} candidates alone, batch {number}")
            with same_draws():
                self.references.append(evaluate(self.program, batch, override=self.always))
            with same_draws():
                runs = evaluate_variants(self.program, batch, variants, self.always)
                for index, outputs in runs:
                    db = self.noise.worst_db(self.references[-1], outputs)
                    worst[index] = min(worst[index], db)
            self.runs += 1 + len(variants)
        return worst

    def _cumulative(
        self, order: Sequence[int], alone: Sequence[float], budget: Sqnr | None
    ) -> dict[int, float]:
        """The decibels left when the candidates from a place of `order` on are rewritten."""
        if not order:
            return {}
        last = len(order) - 1
        measured = {last: alone[order[last]]}

        def at(place: int) -> float:
            if place not in measured:
                measured[place] = self._together(order[place:])
            return measured[place]

        if budget is None:
            for place in reversed(range(last)):
                at(place)
            return measured
        low, high = 0, 0 if at(0) >= budget.db else last + 1
        while low < high:
            place = (low + high) // 2
            low, high = (low, place) if at(place) >= budget.db else (place + 1, high)
        return measured

    def _together(self, indices: Sequence[int]) -> float:
        self.say(f"sensitivity: {len(indices)} of {len(self.candidates)} candidates together")
        override = dict(self.always)
        for index in indices:
            override.update(self.candidates[index].values)
        worst = math.inf
        for batch, reference in zip(self.batches, self.references, strict=True):
            with same_draws():
                outputs = evaluate(self.program, batch, override=override)
            worst = min(worst, self.noise.worst_db(reference, outputs))
        self.runs += len(self.batches)
        return worst


def _products(program: Program) -> Override:
    """The linears as the fastest library computes them, in the reference as in all other runs."""
    linears = [node for node in program.graph.nodes if node.target is aten.linear.default]
    return dict.fromkeys(linears, dense_linear)


def _check(candidates: Sequence[Candidate]) -> None:
    names = Counter(candidate.name for candidate in candidates)
    nodes = Counter(node for candidate in candidates for node in candidate.values)
    for name, count in names.items():
        if count > 1:
            raise PassError(
                f"sensitivity: {count} candidates are named {name!r}; their effects could not be "
                "told apart, so give each its own name"
            )
    for node, count in nodes.items():
        if count > 1:
            owners = [candidate.name for candidate in candidates if node in candidate.values]
            raise PassError(
                f"sensitivity: {label(node)} belongs to the candidates {' and '.join(owners)}; "
                "what is rewritten together must be one candidate"
            )


def _shares(decibels: Sequence[float]) -> list[float]:
    """Each noise power over their sum; where some are infinite, those alone have a share."""
    lowest = min(decibels, default=math.inf)
    if lowest == math.inf:
        return [0.0 for _ in decibels]
    if lowest == -math.inf:
        powers = [float(db == lowest) for db in decibels]
    else:
        powers = [10.0 ** ((lowest - db) / 10.0) for db in decibels]
    return [power / sum(powers) for power in powers]
