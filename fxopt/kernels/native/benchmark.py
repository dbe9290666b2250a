"""The compiled kernels beside the libraries', timed once on a machine before they are used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.timing import Timing, compare_kernels

ops = torch.ops.fxopt

_ROWS, _INNER, _OUTPUTS = 256, 512, 768
_POSITIONS = 300


Layer = Callable[[], object]


def trial(layer: Callable[[str], Layer], digest: str) -> Timing:
    """What a set of kernels is for, by libraries and as compiled.

    On one thread: on a busy machine those of several wait for each other, whoever's kernels they
    run. Recalled from the last time, for sources of the same `digest`.
    """
    systems = {"libraries": layer("_by_library"), "compiled": layer("")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare_kernels(systems, ("kernels compiled for this CPU", digest))
    finally:
        torch.set_num_threads(threads)


def product_layer(suffix: str) -> Layer:
    """A linear in float32, bfloat16 and int8 and an attention."""
    linear, product, attention = (
        getattr(ops, f"{name}{suffix}") for name in ("packed_linear", "int8_product", "attention")
    )
    x, weight = _spread(_ROWS, _INNER), _spread(_OUTPUTS, _INNER)
    half, half_weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
    q, q_weight = ((t * 127).to(torch.int8) for t in (x, weight))
    heads = half.view(4, _ROWS // 4, 8, _INNER // 8).transpose(1, 2)

    def run() -> None:
        linear(x, weight, None, "gelu", None)
        linear(half, half_weight, None, "none", None)
        product(q, q_weight)
        attention(heads, heads, heads, None, False, 0.125)

    return run


def decoding_layer(suffix: str) -> Layer:
    """A step's attention to a prefix, four heads to a key head, and linears of its one row."""
    names = ("cached_attention", "int8_weight_only_linear", "int4_weight_only_linear")
    attention, int8, int4 = (getattr(ops, f"{name}{suffix}") for name in names)
    groups, size = 4, 64
    q = _spread(groups * 4, size)[None, :, None]
    new = _spread(groups, size)[None, :, None]
    past = _spread(groups * _POSITIONS, size).view(1, groups, _POSITIONS, size)
    past_seen, seen = torch.ones(1, _POSITIONS).bool(), torch.ones(1, 1).bool()
    x, weight = _spread(1, _INNER), (_spread(_OUTPUTS, _INNER) * 127).to(torch.int8)
    scale, packed = torch.ones(_OUTPUTS, 1), weight[:, : _INNER // 2].contiguous().view(torch.uint8)
    scales = torch.ones(_OUTPUTS, _INNER // 32)

    def run() -> None:
        attention(q, new, new, past, past, past_seen, seen, 0.125)
        int8(x, weight, scale, None)
        int4(x, packed, scales, None)

    return run


def _spread(rows: int, columns: int) -> Tensor:
    # Numbers between -1 and 1 that draw nothing from the caller's generator.
    return (torch.arange(rows * columns) % 255 / 127 - 1).reshape(rows, columns)
