"""Q4_K and Q6_K, which gguf reads and doesn't write: rounding as llama.cpp's reference does it.

Source: llama.cpp, ggml-quants.c, `quantize_row_q4_K_ref`, `make_qkx2_quants`,
`quantize_row_q6_K_ref`, `make_qx_quants`.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

Floats = NDArray[numpy.float32]
Bytes = NDArray[numpy.uint8]

BLOCK = 256
"""Entries of a row that make a block."""


def q4_k(rows: Floats) -> Bytes:
    """uint8 [R, C / 256 * 144] of float32 [R, C]: 4 bits, 8 scales and minima of 6 bits a block."""
    x = rows.reshape(-1, 8, 32).astype(numpy.float32)
    scales, minima = _affine(x, 15)
    d, whole = _six_bits(scales)
    d_min, whole_min = _six_bits(minima)
    step = d.astype(numpy.float32)[:, None] * whole
    least = d_min.astype(numpy.float32)[:, None] * whole_min
    safe = numpy.where(step > 0, step, 1.0)[..., None]
    levels = numpy.clip(numpy.rint((x + least[..., None]) / safe), 0, 15).astype(numpy.uint8)
    pairs = levels.reshape(-1, 4, 2, 32)
    packed = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    blocks = numpy.concatenate(
        [_bytes(d), _bytes(d_min), _packed_scales(whole, whole_min), packed.reshape(len(x), 128)], 1
    )
    return blocks.reshape(rows.shape[0], -1)


def q6_k(rows: Floats) -> Bytes:
    """uint8 [R, C / 256 * 210] of float32 [R, C]: 6 bits, 16 scales of 8 bits a block."""
    x = rows.reshape(-1, 16, 16).astype(numpy.float32)
    scales = _symmetric(x, 32)
    largest = numpy.take_along_axis(scales, numpy.abs(scales).argmax(1)[:, None], 1)
    inverse = numpy.divide(-128.0, largest, out=numpy.zeros_like(largest), where=largest != 0)
    whole = numpy.clip(numpy.rint(inverse * scales), -128, 127).astype(numpy.int8)
    d = numpy.divide(1.0, inverse, out=numpy.zeros_like(inverse), where=inverse != 0)
    d = d.astype(numpy.float16)
    step = d.astype(numpy.float32) * whole
    safe = numpy.where(step != 0, step, 1.0)[..., None]
    levels = (numpy.clip(numpy.rint(x / safe), -32, 31) + 32).astype(numpy.uint8)
    quarters = levels.reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    shifts = numpy.array([0, 2, 4, 6], numpy.uint8)[None, None, :, None]
    high = numpy.bitwise_or.reduce((quarters >> 4) << shifts, 2)
    parts = [low.reshape(len(x), 128), high.reshape(len(x), 64), whole.view(numpy.uint8)]
    return numpy.concatenate([*parts, _bytes(d[:, 0])], 1).reshape(rows.shape[0], -1)


def _affine(x: Floats, most: int) -> tuple[Floats, Floats]:
    """Scales and (negated) minima [N, G] for x [N, G, S] of the least weighted square error."""
    weights = numpy.sqrt((x * x).mean(-1, keepdims=True)) + numpy.abs(x)
    low = numpy.minimum(x.min(-1), 0.0)
    span = x.max(-1) - low
    flat = span <= 1e-30  # no scale of half precision is smaller
    span = numpy.where(flat, 1.0, span)
    sum_w, sum_x = weights.sum(-1), (weights * x).sum(-1)
    best_scale, best_low = span / most, low
    best = _error(x, weights, _levels(x, low, most / span, most), best_scale, best_low)
    for step in range(21):
        levels = _levels(x, low, (most - 1 + 0.1 * step) / span, most)
        sum_l, sum_ll = (weights * levels).sum(-1), (weights * levels * levels).sum(-1)
        sum_xl = (weights * levels * x).sum(-1)
        determinant = sum_w * sum_ll - sum_l * sum_l
        solvable = determinant > 0
        safe = numpy.where(solvable, determinant, 1.0)
        scale = (sum_w * sum_xl - sum_x * sum_l) / safe
        minimum = (sum_ll * sum_x - sum_l * sum_xl) / safe
        above = minimum > 0
        scale = numpy.where(above, sum_xl / numpy.where(sum_ll > 0, sum_ll, 1.0), scale)
        minimum = numpy.where(above, 0.0, minimum)
        error = _error(x, weights, levels, scale, minimum)
        better = solvable & (error < best)
        best = numpy.where(better, error, best)
        best_scale = numpy.where(better, scale, best_scale)
        best_low = numpy.where(better, minimum, best_low)
    best_scale = numpy.where(flat, 0.0, best_scale)
    best_low = numpy.where(flat, low, best_low)
    return best_scale.astype(numpy.float32), (-best_low).astype(numpy.float32)


def _symmetric(x: Floats, most: int) -> Floats:
    """Scales [N, G] for x [N, G, S], levels in -most to most - 1, weighted by x²."""
    at = numpy.abs(x).argmax(-1)[..., None]
    largest = numpy.take_along_axis(x, at, -1)
    safe = numpy.where(largest != 0, largest, 1.0)
    weights = x * x
    best, found = None, numpy.zeros(x.shape[:-1], numpy.float32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        levels = numpy.clip(numpy.rint(-(most + 0.1 * step) / safe * x), -most, most - 1)
        products, squares = (weights * x * levels).sum(-1), (weights * levels * levels).sum(-1)
        scale = products / numpy.where(squares > 0, squares, 1.0)
        gained = scale * products
        better = squares > 0 if best is None else (squares > 0) & (gained > best)
        found = numpy.where(better, scale, found)
        best = gained if best is None else numpy.where(better, gained, best)
    return numpy.where(largest[..., 0] != 0, found, 0.0).astype(numpy.float32)


def _levels(x: Floats, low: Floats, inverse: Any, most: int) -> Floats:
    return numpy.clip(numpy.rint(inverse[..., None] * (x - low[..., None])), 0, most)


def _error(x: Floats, weights: Floats, levels: Floats, scale: Any, low: Any) -> Any:
    return (weights * (scale[..., None] * levels + low[..., None] - x) ** 2).sum(-1)


def _six_bits(values: Floats) -> tuple[NDArray[numpy.float16], Floats]:
    """One half-precision scale [N] and whole numbers in 0 to 63 [N, G] for values [N, G]."""
    largest = values.max(1)
    inverse = numpy.divide(63.0, largest, out=numpy.zeros_like(largest), where=largest > 0)
    whole = numpy.clip(numpy.rint(inverse[:, None] * values), 0, 63)
    return (largest / 63.0).astype(numpy.float16), whole.astype(numpy.float32)


def _packed_scales(scales: Floats, minima: Floats) -> Bytes:
    """8 scales and 8 minima of 6 bits in 12 bytes."""
    s, m = scales.astype(numpy.uint8), minima.astype(numpy.uint8)
    first = s[:, :4] | ((s[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    third = (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)
    return numpy.concatenate([first, second, third], 1)


def _bytes(halves: NDArray[numpy.float16]) -> Bytes:
    return halves.reshape(-1, 1).view(numpy.uint8)
