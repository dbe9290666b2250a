"""The rules by which linears keep a weight in half precision and compute in float32 as before.

    linear(x, W, b)  =  half_weight_only_linear(x, half(W), b)       half: bfloat16 or float16
    embedding(W, i)  =  float32(embedding(half(W), i))               for the W of such a linear

Equal but for the order of sums where half(W) = W, as in most checkpoints: they are stored in
bfloat16 and made float32 when they are loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.constant_expressions import stored
from fxopt.operators import Linear, reads_as_linear, refuse_shared_weight
from fxopt.passes.linear_layers.linear_rule import ProductRule, chosen_linears
from fxopt.passes.linear_layers.selection import Selection, refuse_by_path, refuse_weight
from fxopt.passes.mixed_precision.half_values import rounded
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.rewriting import Edit, Match, Rule, plan_rules
from fxopt.rewriting.pattern import Target

aten, ops = torch.ops.aten, torch.ops.fxopt

_LOOKUP = aten.embedding.default
_CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Fit:
    """The half dtype that changes the fewest values of a weight, and how many it changes."""

    dtype: torch.dtype
    changed: int


@dataclass(frozen=True)
class HalfWeights:
    """Which linears keep their weight in half precision: the options, and the `fits` of weights.

    A weight that isn't among these, by its name, has not been looked at yet.
    """

    include: Sequence[Selection]
    exclude: Sequence[Selection]
    tied: bool
    lossless: bool
    fits: Mapping[str, Fit] = field(default_factory=dict)

    def rules(self) -> tuple[Rule, ...]:
        """Tables first: what they look for is the linear that reads them too."""
        linears = StoreInHalf(self)
        return LookUpInHalf(linears), linears

    def lines(self) -> Iterator[str]:
        """How many weights are in which dtype, and how many of them were rounded for it."""
        for dtype, count in Counter(fit.dtype for fit in self.fits.values()).items():
            changed = sum(bool(f.changed) for f in self.fits.values() if f.dtype == dtype)
            if changed and self.lossless:
                count, changed = count - changed, 0
            exactly = f"{changed} of them rounded" if changed else "each value as it was"
            if count:
                yield f"{count} weights are stored in {dtype}, {exactly}"


class StoreInHalf(ProductRule):
    """linear(x, W, b) = half_weight_only_linear(x, half(W), b)"""

    def __init__(self, how: HalfWeights) -> None:
        self.how = how

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        how = self.how
        unfit = refuse_by_path(linear, how.include, how.exclude) or refuse_weight(linear)
        if unfit is not None:
            return unfit
        if linear.dtype != torch.float32:
            return f"its weight is {linear.dtype}; only float32 is stored in half precision"
        if self.mode == "train":
            return "it trains, and steps of training are lost in half precision"
        shared = None if how.tied else refuse_shared_weight(linear, _reads_rows_or_products)
        return shared or self._refuse_rounding(linear)

    def _refuse_rounding(self, linear: Linear) -> str | None:
        fit = self.how.fits.get(linear.name)
        if fit is None or not fit.changed or not self.how.lossless:
            return None
        total = linear.in_features * linear.out_features
        return (
            f"{fit.dtype} would round {fit.changed:,} of the {total:,} values of its weight; "
            "lossless=False does it all the same"
        )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        weight = self.stored(linear, edit)
        return edit.call(ops.half_weight_only_linear.default, linear.x, weight, linear.bias)

    def stored(self, linear: Linear, edit: Edit) -> fx.Node:
        """half(W) [N, K] as a constant, one for all that read W so."""

        def make() -> fx.Node:
            dtype = self.how.fits[linear.name].dtype
            name = f"{linear.name}_{str(dtype).removeprefix('torch.')}"
            weight = rounded(linear.weight_nk(edit.state(linear.weight)), dtype)
            return edit.constant(name, weight, of=linear.weight)

        return edit.once((self, linear.name, linear.transposed), make)

    def taken(self, user: fx.Node) -> Linear | None:
        """The linear at `user` where this rule rewrites it."""
        match = self.match(user) if user.target in self.targets() else None
        takes = match is not None and self.reason_to_refuse(match) is None
        return match["linear"] if match is not None and takes else None


class LookUpInHalf(Rule):
    """embedding(W, i) = float32(embedding(half(W), i)) where a linear reads W so"""

    def __init__(self, linears: StoreInHalf) -> None:
        self.linears = linears

    def see(self, program: Program) -> None:
        self.linears.see(program)

    def targets(self) -> tuple[Target, ...]:
        return (_LOOKUP,)

    def match(self, node: fx.Node) -> Match | None:
        table = node.args[0]
        taken = map(self.linears.taken, table.users) if isinstance(table, fx.Node) else ()
        linear = next((one for one in taken if one is not None and not one.transposed), None)
        return None if linear is None else Match((node,), {"linear": linear, "lookup": node})

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        table = self.linears.stored(match["linear"], edit)
        rows = edit.call(_LOOKUP, table, *match["lookup"].args[1:])
        return edit.call(aten.to.dtype, rows, match["lookup"].meta["val"].dtype)


def with_fits(how: HalfWeights, program: Program, dtypes: Iterable[torch.dtype]) -> HalfWeights:
    """`how`, with what it needs to know of the weights of `program`; the first of `dtypes` that
    changes the fewest values is a weight's."""
    rule = StoreInHalf(how)
    sites = plan_rules(program, (rule,), "").sites
    fits: dict[str, Fit] = {}
    for linear in chosen_linears(program, rule, sites):
        if linear.name not in fits:
            weight = materialize(stored(program, linear.weight)).detach()
            each = (Fit(dtype, _changed(weight, dtype)) for dtype in dtypes)
            fits[linear.name] = min(each, key=lambda fit: fit.changed)
    return HalfWeights(how.include, how.exclude, how.tied, how.lossless, fits)


def _changed(weight: Tensor, dtype: torch.dtype) -> int:
    """How many values are others after rounding; NaN is, so that it is named."""
    chunks = weight.reshape(-1).split(_CHUNK_ELEMENTS)
    return sum(int((one.to(dtype).to(one.dtype) != one).sum()) for one in chunks)


def _reads_rows_or_products(user: fx.Node) -> bool:
    """Whether a reader of W [N, K] can read half(W) as well."""
    return user.target is _LOOKUP or reads_as_linear(user)
