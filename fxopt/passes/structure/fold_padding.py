"""FoldPadding: zeros around a convolution's input are the convolution's own padding.

conv(pad(x, [r, r, p, p], 0), W, b, stride, [q, s])  =  conv(x, W, b, stride, [p + q, r + s])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt.operators.convolutions import NUMBER_PADDED
from fxopt.rewriting import Edit, Match, Rule, arguments, hole, op

aten = torch.ops.aten


class FoldPadding(Rule):
    """conv(pad(x, p), W, b, stride, q) = conv(x, W, b, stride, p + q)"""

    pattern = op(NUMBER_PADDED, op(aten.pad.default, hole("x"), rest=True), rest=True)

    def refuse(self, match: Match) -> str | None:
        if match["mode"] != "constant" or match["value"] not in (None, 0):
            return f"it pads by {match['mode']!r} with {match['value']}, not by zeros"
        sizes = list(match["pad"])
        rank = match["x"].meta["val"].ndim
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            return f"it pads by {sizes}; a convolution takes fixed sizes from 0 on"
        if len(sizes) > 2 * (rank - 2):
            return "it pads channels or the batch"
        if sizes[::2] != sizes[1::2]:
            return f"it pads by {sizes}, on one side more; a convolution pads both sides alike"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        given: dict[str, Any] = arguments(match.root)
        spatial = match.root.meta["val"].ndim - 2
        # torch pads the last axis first.
        more = list(match["pad"])[::2][::-1]
        more = [0] * (spatial - len(more)) + more
        own = list(given["padding"])
        own = own * spatial if len(own) == 1 else own
        given["input"] = match["x"]
        given["padding"] = [mine + other for mine, other in zip(own, more, strict=True)]
        return edit.call(match.root.target, *given.values())
