"""Signal over noise at a program's outputs, before its last linear layer where that is wide.

    Σ |((x + d) Wᵀ + b) - (x Wᵀ + b)|²  =  Σ d (WᵀW) dᵀ

A language model's logits are eighty times as wide as what they are made of: the product is a large
part of a run, and three runs of logits are most of its memory. WᵀW [K, K] is computed once.

A head whose weights or bias reach 256 is computed in full: it may ban an output by a bias of -1e9,
and the outputs must be measured in parts (`fxopt.parts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, fx

from fxopt.claim import Sqnr, decibels
from fxopt.interpreter import Override
from fxopt.operators.linears import Linear, as_linear
from fxopt.parts import LARGE, peak
from fxopt.program import Program
from fxopt.recipe import materialize

_WIDE = 8
"""Times as many outputs as inputs, from which a head is measured at its input."""

_ROWS = 1 << 12
_DTYPES = (torch.float32, torch.float64)

# `Sqnr` measures more than `sqnr` does (integers, shapes, NaN); its floor plays no part in that.
_METER = Sqnr(1.0)


class OutputNoise:
    """Compares outputs of `program`, run with `override`, with those of the reference, run so too.

    The nodes `rewritten` by some run are computed in full.
    """

    def __init__(self, program: Program, rewritten: Collection[fx.Node]) -> None:
        outputs: Sequence[fx.Node] = program.output.args[0]  # type: ignore[assignment]
        heads = {
            place: linear
            for place, node in enumerate(outputs)
            if node not in rewritten and (linear := _as_head(program, node)) is not None
        }
        self.override: Override = {linear.node: _input_of(linear) for linear in heads.values()}
        self._grams = {place: _gram(program, linear) for place, linear in heads.items()}

    def worst_db(self, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
        """Decibels at the worst output; infinite where all are equal."""
        pairs = enumerate(zip(reference, outputs, strict=True))
        return min((self._db(place, ref, out) for place, (ref, out) in pairs), default=math.inf)

    def _db(self, place: int, reference: Tensor, output: Tensor) -> float:
        gram = self._grams.get(place)
        if gram is None:
            return _METER.measure(reference, output).value
        ref, out = reference.double().flatten(0, -2), output.double().flatten(0, -2)
        noise = _form(torch.nn.functional.pad(out - ref, (0, 1)), gram)
        return decibels(_form(torch.nn.functional.pad(ref, (0, 1), value=1.0), gram), noise)


def _as_head(program: Program, node: fx.Node) -> Linear | None:
    """The linear that `node` is, if it is wide, an output alone reads it, and it bans none."""
    linear = as_linear(node)
    if linear is None or len(node.users) != 1 or linear.dtype not in _DTYPES:
        return None
    wide = linear.out_features >= _WIDE * linear.in_features
    if not wide or linear.x.meta["val"].ndim < 2:
        return None
    operands = [one for one in (linear.weight, linear.bias) if one is not None]
    largest = max(peak(program.tensor(str(one.target))) for one in operands)
    return linear if largest < LARGE else None


def _input_of(linear: Linear) -> Callable[..., Tensor]:
    place = linear.node.args.index(linear.x)

    def x(*args: Tensor, **kwargs: object) -> Tensor:
        return args[place]

    return x


def _gram(program: Program, linear: Linear) -> Tensor:
    """[W b]ᵀ [W b], float64 [K + 1, K + 1]: the bias meets an input that is always one."""
    rows = materialize(linear.weight_nk(program.state[str(linear.weight.target)])).detach()
    bias = rows.new_zeros(len(rows))
    if linear.bias is not None:
        bias = program.tensor(str(linear.bias.target)).detach()
    gram = rows.new_zeros((rows.shape[1] + 1,) * 2, dtype=torch.float64)
    for some, with_bias in zip(rows.split(_ROWS), bias.split(_ROWS), strict=True):
        both = torch.cat([some, with_bias.unsqueeze(1)], 1).double()
        gram.addmm_(both.t(), both)
    return gram


def _form(rows: Tensor, gram: Tensor) -> float:
    """Σ d G dᵀ over the rows d; never negative but by rounding."""
    return max(float(torch.vdot((rows @ gram).flatten(), rows.flatten())), 0.0)
