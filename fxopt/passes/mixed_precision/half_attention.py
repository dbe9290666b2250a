"""HalfAttention: attention's two products in bfloat16, with float32 around them.

    sdpa(q, k, v, mask)  ~  float32(sdpa(bf16(q), bf16(k), bf16(v), mask))
    bf16(view(x))        =  view(bf16(x))
    [bf16(split(x)[0]), ...]  =  split(bf16(x))

Queries, keys, values and the result are rounded to 8 bits of mantissa, an error of 0.4 % each,
which averages out in sums; next to int8 linears it doesn't show. Casts move up to the linear that
made the value, which can then write bfloat16 itself.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxopt.claim import Claim, Sqnr
from fxopt.device import Device
from fxopt.operators.views import PARTS, WHOLE_VIEWS
from fxopt.passes.mixed_precision.half_precision import ComputeInHalf
from fxopt.passes.mixed_precision.half_values import is_cast, is_tensor_of
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage, arguments, has_dtype, hole, op
from fxopt.rewriting.pattern import Target

aten = torch.ops.aten


class RoundAttention(ComputeInHalf):
    """sdpa(q, k, v, mask) ~ float32(sdpa(bf16(q), bf16(k), bf16(v), mask))"""

    def __init__(self, force: bool) -> None:
        super().__init__((), torch.bfloat16)
        self.force = force

    def targets(self) -> tuple[Target, ...]:
        return (aten.scaled_dot_product_attention.default,)

    def match(self, node: fx.Node) -> Match | None:
        rounded = is_tensor_of(arguments(node)["query"], torch.bfloat16)
        return None if rounded else self.match_of(node)

    def refuse(self, match: Match) -> str | None:
        given = arguments(match["node"])
        q, mask = given["query"].meta["val"], given["attn_mask"]
        if q.dtype != torch.float32:
            return f"its inputs are {q.dtype}; only float32 is rounded to bfloat16"
        if given["dropout_p"]:
            return "it drops out attention weights"
        if mask is not None and mask.meta["val"].dtype not in (torch.bool, torch.float32):
            return f"its mask is {mask.meta['val'].dtype}"
        answer = Device.describe(q.device).accelerates(torch.bfloat16)
        return None if answer or self.force else answer.reason


class CastBeforeView(Rule):
    """bf16(view(x)) = view(bf16(x))"""

    pattern = op(
        aten.to.dtype,
        op(tuple(WHOLE_VIEWS), hole("x"), name="view", where=has_dtype(torch.float32), rest=True),
        torch.bfloat16,
    )

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        view = match["view"]
        rounded = edit.call(aten.to.dtype, match["x"], torch.bfloat16)
        return edit.call(view.target, rounded, *view.args[1:], **view.kwargs)


class CastBeforeSplit(Rule):
    """[bf16(split(x)[0]), bf16(split(x)[1]), ...] = split(bf16(x))"""

    def targets(self) -> tuple[Target, ...]:
        return (aten.to.dtype,)

    def match(self, node: fx.Node) -> Match | None:
        item = node.args[0]
        if not _is_plain_cast(node) or not _is_item(item):
            return None
        split = item.args[0]  # type: ignore[union-attr]
        if not isinstance(split, fx.Node) or split.target not in PARTS:
            return None
        casts = []
        for piece in split.users:
            (cast, *others) = piece.users or (piece,)
            if others or not _is_item(piece) or not _is_plain_cast(cast):
                return None
            casts.append(cast)
        if min(casts) is not node:
            return None
        return Match(tuple(casts), {"split": split, "x": split.args[0]}, (*split.users, split))

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        split = match["split"]
        rounded = edit.call(aten.to.dtype, match["x"], torch.bfloat16)
        pieces = edit.call(split.target, rounded, *split.args[1:], **split.kwargs)
        return [edit.item(pieces, cast.args[0].args[1]) for cast in match.roots]  # type: ignore[union-attr,arg-type]


@dataclass(frozen=True, repr=False)
class HalfAttention(RulePass):
    """Attention's products in bfloat16 where the device multiplies it natively.

    Queries, keys, values and the result are rounded to bfloat16; everything else stays as it is.
    `Prepack` then writes it out for the compiler on CPUs. A device without bfloat16 products is
    refused with the reason, unless `force=True`. Claim: a signal-to-noise ratio of 30 dB.
    """

    force: bool = False
    claim: Claim = Sqnr(30.0)
    name: ClassVar[str] = "half-attention"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def rules(self, program: Program) -> Sequence[Rule]:
        """The rounding, then its casts as early as they can be."""
        return (RoundAttention(self.force), CastBeforeView(), CastBeforeSplit())


def _is_plain_cast(node: fx.Node) -> bool:
    """A conversion of float32 to bfloat16 and nothing else."""
    return is_cast(node, torch.bfloat16) and is_tensor_of(node.args[0], torch.float32, 0)


def _is_item(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is operator.getitem
