"""One spelling for operators that have several.

    view(x, s), _unsafe_view(x, s)   ->  reshape(x, s), which a rewrite of strides can't break
    numpy_T(x), t(x), mT(x), x.H     ->  transpose(x, -2, -1), permute(x, all axes backwards)
"""

from __future__ import annotations

import torch
from torch import fx

aten = torch.ops.aten

_VIEWS = frozenset((aten.view.default, aten._unsafe_view.default))


def respell(node: fx.Node) -> None:
    """Say what `node` computes in the first spelling, in place."""
    if node.target in _VIEWS:
        node.target = aten.reshape.default
