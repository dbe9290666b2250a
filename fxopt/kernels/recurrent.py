"""Types of torch's recurrent operators without their loop over time.

    lstm(x [T, B, I], (h [L·D, B, P], c [L·D, B, H]), weights)  ->  [T, B, D·P], like h, like c
    gru, rnn(x [T, B, I], h [L·D, B, H], weights)               ->  [T, B, D·H], like h

for L layers in D directions; P is H where there is no projection. With batch_first, x and the first
result have the axes T and B exchanged. torch itself finds these types by running all T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_GATES_OF_LSTM = 4
_GATES_OF_GRU = 3


class Layout(NamedTuple):
    """What the operators take after x, the states and the weights, in their order."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool


def type_of_lstm(
    x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *layout: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors of the kind of `aten.lstm.input`; `ValueError` for arguments that don't fit."""
    hidden, cell = hx
    out = _output(x, (hidden, cell.shape[-1]), params, _GATES_OF_LSTM, Layout(*layout))
    return out, torch.empty_like(hidden), torch.empty_like(cell)


def type_of_gru(
    x: Tensor, hx: Tensor, params: Sequence[Tensor], *layout: Any
) -> tuple[Tensor, Tensor]:
    """Empty tensors of the kind of `aten.gru.input`; `ValueError` for arguments that don't fit."""
    out = _output(x, (hx, hx.shape[-1]), params, _GATES_OF_GRU, Layout(*layout))
    return out, torch.empty_like(hx)


def type_of_rnn(
    x: Tensor, hx: Tensor, params: Sequence[Tensor], *layout: Any
) -> tuple[Tensor, Tensor]:
    """Empty tensors of the kind of `aten.rnn_tanh.input`; `ValueError` where these don't fit."""
    out = _output(x, (hx, hx.shape[-1]), params, 1, Layout(*layout))
    return out, torch.empty_like(hx)


def _output(
    x: Tensor, states: tuple[Tensor, int], params: Sequence[Tensor], gates: int, layout: Layout
) -> Tensor:
    hidden, width = states
    directions = 2 if layout.bidirectional else 1
    if x.ndim != 3 or hidden.ndim != 3:
        raise ValueError(f"a recurrent operator takes 3 axes, not {x.ndim} and {hidden.ndim}")
    projected = hidden.shape[-1]
    shapes: list[tuple[int, ...]] = [(gates * width, 0), (gates * width, projected)]
    shapes += [(gates * width,)] * 2 if layout.has_biases else []
    shapes += [(projected, width)] if projected != width else []
    layers = layout.num_layers
    if len(params) != layers * directions * len(shapes) or hidden.shape[0] != layers * directions:
        raise ValueError(f"{len(params)} weights for {layers} layers in {directions} directions")
    for index, weight in enumerate(params):
        layer, kind = index // (directions * len(shapes)), index % len(shapes)
        wanted = shapes[kind]
        if kind == 0:
            wanted = (wanted[0], x.shape[-1] if layer == 0 else directions * projected)
        if tuple(weight.shape) != wanted or weight.dtype != x.dtype:
            raise ValueError(f"weight {index} is {weight.dtype}{list(weight.shape)}, not {wanted}")
    steps, batch = (x.shape[1], x.shape[0]) if layout.batch_first else (x.shape[0], x.shape[1])
    out = x.new_empty((steps, batch, directions * projected))
    return out.transpose(0, 1) if layout.batch_first else out
