"""Importances that ask the calibration what the readers of a channel see.

activation    Σ over the reader's weights  |W_ij| ‖x_j‖₂
              Sun et al., "A Simple and Effective Pruning Approach for LLMs" (Wanda), ICLR 2024,
              summed over all outputs i, since a channel leaves as a whole
obs           what the reader's outputs lose when the channel leaves and the others are refitted
              (`reconstruction.Removal`), channels leaving one after the other
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxopt.analyses.channels import Group, Reader
from fxopt.analyses.importance.magnitude import along, finite, per_channel
from fxopt.errors import PassError
from fxopt.nodes import label
from fxopt.observation.gram import Gram, Product, Weighting, as_product, grams
from fxopt.observation.observation import observe
from fxopt.program import Program
from fxopt.weights.reconstruction import DAMPING, Removal

_STEPS = 64
"""Rounds in which all channels leave; within one, they leave by what they cost at its start."""


def activation(program: Program, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Wanda's importance, summed over the weights of each channel's readers."""
    readers = {group.name: _weighted(group) for group in groups}
    norms: dict[tuple[fx.Node, int], _Energy] = {}
    watched: dict[fx.Node, list[_Energy]] = {}
    for reader in (one for found in readers.values() for one in found):
        key = reader.operand.node, reader.operand.axis
        if key not in norms:
            norms[key] = _Energy(reader.operand.axis)
            watched.setdefault(reader.operand.node, []).append(norms[key])
    observe(program, watched)
    scores = {}
    for group in groups:
        scores[group.name] = torch.zeros(group.size, dtype=torch.float64)
        for reader in readers[group.name]:
            energy = norms[reader.operand.node, reader.operand.axis].total
            scores[group.name] += _read(program, reader, energy)
    return scores


def obs(
    program: Program, groups: Sequence[Group], seed: int, weighting: Weighting = "uniform"
) -> dict[str, Tensor]:
    """Each channel's share of the error when all leave, one after the other, the cheapest first.

    `weighting` says what an error counts in each row. A score is never below that of a channel that
    left before, so that the largest scores are those that the greedy order keeps.
    """
    products = [_fitted(reader) for group in groups for reader in _weighted(group)]
    found = grams(program, [(product,) for product in products], weighting, seed)
    scores = {}
    for group in groups:
        removals = list(_removals(program, group, found))
        scores[group.name] = _greedy(removals, group.size)
    return scores


def _removals(
    program: Program, group: Group, found: Iterator[tuple[Sequence[Product], Gram]]
) -> Iterator[Removal]:
    for reader in _weighted(group):
        (product,), gram = next(found)
        assert reader.weight is not None
        old = program.tensor(str(product.weight.target))
        finite(along(old.detach().abs(), reader.weight.axis), reader.weight.name)
        moment = gram.moment if product.bias is None else gram.centred()
        columns = product.columns_of(reader.weight.positions)
        yield Removal(moment, product.matrix(old), columns, DAMPING)


def _greedy(removals: Sequence[Removal], size: int) -> Tensor:
    scores = torch.zeros(size, dtype=torch.float64)
    left = torch.ones(size, dtype=torch.bool)
    highest = torch.tensor(0.0, dtype=torch.float64)
    infinity = highest + torch.inf
    while bool(left.any()):
        costs = torch.stack([one.errors().cpu() for one in removals]).sum(0)
        costs.masked_fill_(~left, torch.inf)
        count = min(int(left.sum()), max(1, size // _STEPS))
        leaving = costs.argsort(stable=True)[:count]
        alone = costs[leaving]
        together = sum(one.remove(leaving.to(one.columns.device)) for one in removals)
        # What they cost together, told apart by what each would have cost alone.
        share = together / max(float(alone.sum()), torch.finfo(torch.float64).tiny)
        for channel, cost in zip(leaving.tolist(), alone.tolist(), strict=True):
            highest = torch.maximum(
                torch.nextafter(highest, infinity), highest.new_tensor(cost * share)
            )
            scores[channel] = highest
        left[leaving] = False
    return scores


def _weighted(group: Group) -> list[Reader]:
    """The readers that meet the channels with a weight."""
    found = [one for one in group.readers if one.kind == "weight" and one.weight is not None]
    if not found:
        raise PassError(
            f"importance: nothing reads the channels of {group.name} with a weight; use 'l2' or "
            "'taylor'"
        )
    return found


def _fitted(reader: Reader) -> Product:
    product = as_product(reader.node)
    if isinstance(product, str):
        raise PassError(
            f"importance(kind='obs'): {label(reader.node)} can't be refitted: {product}; use "
            "'activation'"
        )
    return product


def _read(program: Program, reader: Reader, energy: Tensor) -> Tensor:
    """Σ |W_ij| ‖x_j‖ over what belongs to each channel, [size]."""
    assert reader.weight is not None
    place = reader.weight
    entries = along(program.tensor(place.name).detach().abs(), place.axis)
    weights = finite(entries, place.name).cpu()
    if place.positions.shape == reader.operand.positions.shape:
        norms = energy.sqrt()[reader.operand.positions]
        return (weights[place.positions] * norms).sum(1)
    # The groups of a convolution share one column: all that a channel reads meets all its weights.
    return per_channel(weights, place) * per_channel(energy, reader.operand).sqrt()


@dataclass
class _Energy:
    """`total` Σ x² along `axis`, float64; infinite values, which a mask may hold, count as zero."""

    axis: int
    total: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def update(self, value: Tensor) -> None:
        squares = value.detach().float().square()
        squares.masked_fill_(~squares.isfinite(), 0.0)
        self.total = self.total + along(squares, self.axis).cpu()
