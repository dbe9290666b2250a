"""Linear layers on a 2:4 sparse weight: of every four weights of a row at most two are not zero.

    linear_sparse24(x, V, P, b)  =  x @ Wᵀ + b      W[n, 4g + P[n, g, j]] = V[n, 2g + j], else 0

V `[N, K/2]` holds two weights of every four in their order, P uint8 `[N, K/8]` their places, two
groups of four a byte, low half first: two bits for the first place, two for the second. In half
precision that is 9/16 of the dense weight's bytes.

On CUDA the product runs on sparse tensor cores, through torch's cuSPARSELt or, on capability 8.x
without it, its CUTLASS kernels. CUTLASS reads V as it is and P reordered, which is kept beside it;
cuSPARSELt wants both in a layout of its own, a copy as large as they are. Elsewhere the operator is
this equation in aten.
Sources: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021); torch's documentation of
torch.sparse.to_sparse_semi_structured; CUTLASS, tools/util host_reorder.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fxopt.device import Device
from fxopt.errors import KernelError
from fxopt.kernels.packed_weights import PACKED_WEIGHTS

GROUP = 4
_BYTE = 2 * GROUP
"""Columns whose places fill a byte."""

_DTYPES = (torch.float16, torch.bfloat16)
# CUTLASS's least tile of a sparse operand in half precision; cuSPARSELt pads smaller ones to it.
_TILE_ROWS, _TILE_COLUMNS = 32, 64
# Rows of the dense operand must fill 16 bytes.
_DENSE_ROWS = 8
_CUTLASS_MAJOR = 8
# Rows at a time, so that temporaries stay small beside the weight.
_CHUNK_ELEMENTS = 1 << 22

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("linear_sparse24(Tensor x, Tensor values, Tensor places, Tensor? bias) -> Tensor")


def two_of_four(score: Tensor, tie: Tensor | None = None) -> Tensor:
    """bool of the shape of `score` `[N, K]`, true at the two largest of every four along K.

    Of equal scores the one of the larger `tie` is kept, and of equal ones the one at the lower
    column. `score` and `tie` hold no NaN, K is a multiple of 4.
    """
    four = _in_fours(score)
    ties = None if tie is None else _in_fours(tie)
    # Each meets the three others once; two of the four win at least two times.
    wins = torch.zeros_like(four, dtype=torch.int8)
    for one, other in combinations(range(GROUP), 2):
        won = four[..., one] >= four[..., other]
        if ties is not None:
            loses = (four[..., one] == four[..., other]) & (ties[..., one] < ties[..., other])
            won &= ~loses
        wins[..., one] += won
        wins[..., other] += ~won
    return (wins >= 2).reshape(score.shape)


def is_sparse24(weight: Tensor) -> bool:
    """Whether at most two of every four weights along the last axis of `[N, K]` are not zero."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return False
    weight = weight.detach()
    return all(bool((_filled(part) <= 2).all()) for part in row_chunks(weight))


def compress24(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[N, K/2]` in the dtype of `weight` `[N, K]`, and their places, uint8 `[N, K/8]`.

    Where fewer than two of four are not zero, the zeros at the lowest columns fill up. Raises
    `KernelError` for K that is no multiple of 8 and a row that is not 2:4 sparse, with its number.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or weight.shape[1] % _BYTE:
        raise KernelError(
            "compress24 needs a float weight [N, K] with K a multiple of 8, not "
            f"{weight.dtype} of {tuple(weight.shape)}"
        )
    weight = weight.detach()
    rows = [_filled(part).gt(2).any(-1) for part in row_chunks(weight)]
    full = torch.cat(rows).nonzero() if rows else weight.new_empty(0)
    if full.numel():
        raise KernelError(
            f"compress24: row {int(full[0])} holds four neighbours of which more than two are not "
            "zero; mask the weight with Sparsify24 first"
        )
    parts = [_compressed(part) for part in row_chunks(weight)]
    if not parts:
        half, byte = weight.shape[1] // 2, weight.shape[1] // _BYTE
        return weight.new_empty(0, half), weight.new_empty(0, byte, dtype=torch.uint8)
    values, places = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(places)


def decompress24(values: Tensor, places: Tensor) -> Tensor:
    """The dense weight `[N, K]` of `values` `[N, K/2]` and `places` uint8 `[N, K/8]`."""
    rows, half = values.shape
    dense = values.new_zeros(rows, half // 2, GROUP)
    dense = dense.scatter(-1, _unpacked(places), values.view(rows, half // 2, 2))
    return dense.view(rows, 2 * half)


def refuse_sparse24(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why a weight `[rows, columns]` can't be multiplied on sparse tensor cores; None if it can."""
    answer = Device.describe(device).sparse24()
    if not answer:
        return answer.reason
    if dtype not in _DTYPES:
        return (
            f"its weight is {dtype}: torch multiplies 2:4 in float16 and bfloat16, so put "
            "HalfLinear() after the mask"
        )
    if rows % _TILE_ROWS or columns % _TILE_COLUMNS or not rows or not columns:
        return (
            f"its weight of {rows} x {columns} is no multiple of {_TILE_ROWS} x {_TILE_COLUMNS}, "
            "which sparse tensor cores take"
        )
    if library_for(device) is None:
        return (
            f"torch {torch.__version__} is built without cuSPARSELt, and its CUTLASS kernels run "
            "on capability 8.x alone"
        )
    return None


def library_for(device: torch.device) -> str | None:
    """The library that multiplies 2:4 on a CUDA device: "cusparselt", "cutlass" or none."""
    if torch.backends.cusparselt.is_available():
        return "cusparselt"
    capability = Device.describe(device).capability
    return "cutlass" if capability is not None and capability[0] == _CUTLASS_MAJOR else None


def cutlass_metadata(places: Tensor) -> Tensor:
    """int16 `[N, K/16]`: the places `[N, K/8]` in the order in which CUTLASS reads them.

    The 32 rows of a tile are interleaved by four, every 2 x 2 block of 16-bit words is transposed,
    and columns lie in pairs. N is a multiple of 32, K of 64.
    """
    words = places.contiguous().view(torch.int16)
    rows, columns = words.shape
    tiles = words.view(rows // _TILE_ROWS, 2, 2, _TILE_ROWS // 4, columns // 2, 2)
    return tiles.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)


def row_chunks(weight: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix `[N, K]`, a few megabytes at a time."""
    step = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        yield weight[first : first + step]


def _filled(rows: Tensor) -> Tensor:
    """How many of every four are not zero, `[N, K/4]`. NaN is not zero."""
    return _in_fours(rows != 0).sum(-1, dtype=torch.int8)


def _in_fours(rows: Tensor) -> Tensor:
    return rows.view(rows.shape[0], rows.shape[1] // GROUP, GROUP)


def _compressed(rows: Tensor) -> tuple[Tensor, Tensor]:
    kept = _in_fours(two_of_four((rows != 0).to(torch.int8)))
    a, b, c, d = kept.unbind(-1)
    first = (~a).to(torch.uint8) + (~a & ~b).to(torch.uint8)
    second = 3 - (~d).to(torch.uint8) - (~d & ~c).to(torch.uint8)
    places = torch.stack((first, second), -1).to(torch.int64)
    values = _in_fours(rows).gather(-1, places).reshape(rows.shape[0], rows.shape[1] // 2)
    halves = first | (second << 2)
    return values, halves[:, ::2] | (halves[:, 1::2] << 4)


def _unpacked(places: Tensor) -> Tensor:
    """int64 `[N, K/4, 2]` in [0, 3]."""
    halves = torch.stack((places & 15, places >> 4), -1).flatten(-2)
    return torch.stack((halves & 3, halves >> 2), -1).to(torch.int64)


def _check(x: Tensor, values: Tensor, places: Tensor) -> None:
    if not x.is_floating_point() or x.dtype != values.dtype or places.dtype != torch.uint8:
        raise KernelError(
            "linear_sparse24 needs x and values of one float dtype and uint8 places, not "
            f"{x.dtype}, {values.dtype}, {places.dtype}"
        )
    fits = values.dim() == places.dim() == 2 and x.dim() >= 1
    fits = fits and values.shape == (places.shape[0], GROUP * places.shape[1])
    if not fits or x.shape[-1] != 2 * values.shape[1]:
        raise KernelError(
            "linear_sparse24 needs x [..., K], values [N, K/2] and places [N, K/8], not "
            f"{tuple(x.shape)}, {tuple(values.shape)} and {tuple(places.shape)}"
        )


def _reference(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, places)
    return torch.nn.functional.linear(x, decompress24(values, places), bias)


def _on_cuda(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, places)
    inference = values.is_inference() or places.is_inference()  # no copy can be kept of these
    unfit = refuse_sparse24(values.shape[0], x.shape[-1], values.dtype, x.device)
    if not x.numel() or inference or unfit is not None:
        return _reference(x, values, places, bias)
    rows = x.reshape(-1, x.shape[-1])
    missing = -rows.shape[0] % _DENSE_ROWS
    columns = torch.nn.functional.pad(rows, (0, 0, 0, missing)).contiguous().t()
    multiply = _by_cusparselt if library_for(x.device) == "cusparselt" else _by_cutlass
    y = multiply(columns, values, places, bias)
    return y[: rows.shape[0]].reshape(*x.shape[:-1], values.shape[0]).contiguous()


def _by_cusparselt(columns: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    def pack(values: Tensor) -> Tensor:
        packed: Tensor = torch._cslt_compress(decompress24(values, places.detach()))
        return packed

    packed = PACKED_WEIGHTS.get(values, pack)
    y: Tensor = torch._cslt_sparse_mm(packed, columns, bias=bias, transpose_result=True)
    return y


def _by_cutlass(columns: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    metadata = PACKED_WEIGHTS.get(places, cutlass_metadata)
    weight = values.detach().contiguous()
    if bias is None:
        y: Tensor = torch._sparse_semi_structured_mm(weight, metadata, columns)
    else:
        y = torch._sparse_semi_structured_addmm(bias.detach(), weight, metadata, columns)
    return y.t()


def _fake(x: Tensor, values: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, places)
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, places, bias = inputs
    ctx.save_for_backward(x, values, places)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The values train at their places; what is zero stays zero."""
    x, values, places = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    dx = grad @ decompress24(values, places) if ctx.needs_input_grad[0] else None
    dvalues = None
    if ctx.needs_input_grad[1]:
        dense = rows.t() @ x.reshape(-1, x.shape[-1])
        dvalues = _in_fours(dense).gather(-1, _unpacked(places)).reshape(values.shape)
    wants_bias = ctx.has_bias and ctx.needs_input_grad[3]
    return dx, dvalues, None, rows.sum(0) if wants_bias else None


_library.impl("linear_sparse24", _reference, "CompositeExplicitAutograd")
_library.impl("linear_sparse24", _on_cuda, "CUDA")
torch.library.register_fake("fxopt::linear_sparse24", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::linear_sparse24", _backward, setup_context=_save, lib=_library
)
