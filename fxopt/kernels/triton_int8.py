"""The int8 linear layer as one Triton kernel: product, scales, bias and activation in one pass.

    y[m, n] = act( (sum_k q[m, k] W[n, k]  -  z[m] u[n]) * t[n] * s[m]  +  b[n] )

with u[n] = sum_k W[n, k]. The sum runs in int32 on the tensor cores; y is written once, in its
final dtype, where a product of its own would write and read int32 in between. Blocks of y are
visited in groups of `GROUP` rows of blocks, so that those in flight share what they read in L2.
Source: Tillet et al., "Triton: An Intermediate Language and Compiler for Tiled Neural Network
Computations", MAPL 2019; the order of blocks is that of its matrix multiplication tutorial.

Importing this file imports Triton, which only Linux has: `fxopt.kernels.int8_linear_fused` does
so late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Offsets are 32 bits wide up to here.
_NARROW = 2**31
# The batch varies from call to call; one choice of blocks serves all up to the next power of two.
_FEWEST_ROWS, _MOST_ROWS = 16, 16384


@dataclass(frozen=True)
class Blocks:
    """How one program of the kernel works: its block of y, its steps over K, its pipeline."""

    rows: int
    columns: int
    inner: int
    stages: int
    warps: int
    group: int = 8

    @property
    def config(self) -> triton.Config:
        """The same as Triton's autotuner takes it."""
        return triton.Config(self.meta, num_stages=self.stages, num_warps=self.warps)

    @property
    def meta(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.inner,
            "GROUP": self.group,
        }


# A stage holds (rows + columns) * inner bytes of shared memory, an H100 has 227 KB of it; a choice
# that doesn't fit a smaller device is dropped by the autotuner.
BLOCKS = (
    Blocks(16, 128, 128, stages=5, warps=4),
    Blocks(64, 64, 128, stages=4, warps=4),
    Blocks(64, 128, 128, stages=4, warps=4),
    Blocks(128, 64, 128, stages=4, warps=4),
    Blocks(64, 256, 128, stages=4, warps=8),
    Blocks(128, 128, 64, stages=5, warps=8),
    Blocks(128, 128, 128, stages=4, warps=8),
    Blocks(128, 256, 64, stages=4, warps=8),
    Blocks(128, 256, 128, stages=3, warps=8),
    Blocks(256, 128, 128, stages=3, warps=8),
)


# Of annotations only `constexpr`: Triton looks each name in one up as a global of the kernel.
@triton.jit
def _activated(y, POST_OP: tl.constexpr):  # noqa: N803
    if POST_OP == "relu":
        # Not a maximum, which would turn NaN into zero.
        y = tl.where(y < 0.0, 0.0, y)
    elif POST_OP == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif POST_OP == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2u), and 2 sqrt(2 / pi) = 1.595769...
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif POST_OP == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.heuristics({"WHOLE_K": lambda given: given["inner"] % given["BLOCK_K"] == 0})
@triton.jit(do_not_specialize=["rows"])
def int8_linear_kernel(
    q,
    weight,
    out,
    scale,
    zero_point,
    weight_scale,
    weight_sums,
    bias,
    rows,
    outputs,
    inner,
    rows_bucket,
    q_stride,
    weight_stride,
    scale_stride,
    zero_point_stride,
    POST_OP: tl.constexpr,  # noqa: N803
    HAS_ZERO_POINT: tl.constexpr,  # noqa: N803
    HAS_BIAS: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    WHOLE_K: tl.constexpr,  # noqa: N803
):
    """One block of `out`; `rows_bucket` only tells the autotuner which choice of blocks to use."""
    program = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    in_group = GROUP * blocks_n
    first = (program // in_group) * GROUP
    height = min(blocks_m - first, GROUP)
    block_m = first + (program % in_group) % height
    block_n = (program % in_group) // height

    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    # Rows past the end read the first ones again: cheaper than a mask, and never stored.
    q_row, weight_row, out_row = row % rows, column % outputs, row
    if WIDE:
        q_row, weight_row = q_row.to(tl.int64), weight_row.to(tl.int64)
        out_row = out_row.to(tl.int64)
    q_at = q + (q_row[:, None] * q_stride + step[None, :])
    weight_at = weight + (weight_row[None, :] * weight_stride + step[:, None])

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for block_k in range(tl.cdiv(inner, BLOCK_K)):
        if WHOLE_K:
            a, b = tl.load(q_at), tl.load(weight_at)
        else:
            left = inner - block_k * BLOCK_K
            a = tl.load(q_at, mask=step[None, :] < left, other=0)
            b = tl.load(weight_at, mask=step[:, None] < left, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        q_at += BLOCK_K
        weight_at += BLOCK_K

    in_rows, in_columns = row < rows, column < outputs
    if HAS_ZERO_POINT:
        z = tl.load(zero_point + row * zero_point_stride, mask=in_rows, other=0).to(tl.int32)
        u = tl.load(weight_sums + column, mask=in_columns, other=0)
        total -= z[:, None] * u[None, :]
    t = tl.load(weight_scale + column, mask=in_columns, other=0.0)
    s = tl.load(scale + row * scale_stride, mask=in_rows, other=0.0)
    y = total.to(tl.float32) * t[None, :] * s[:, None]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    y = _activated(y, POST_OP)
    where = out_row[:, None] * outputs + column[None, :]
    tl.store(out + where, y.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


_autotuned = triton.autotune(
    configs=[blocks.config for blocks in BLOCKS], key=["rows_bucket", "outputs", "inner"]
)(int8_linear_kernel)


def int8_linear(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    post_op: str,
    blocks: Blocks | None = None,
) -> Tensor:
    """`[M, N]` in `dtype` from int8 `q` `[M, K]` and `weight` `[N, K]`, both with K of unit stride.

    `scale` (float32) and `zero_point` (int8) hold M numbers or one; `weight_scale` (float32),
    `weight_sums` (int32, needed with a zero point) and `bias` hold N. Without `blocks` the fastest
    of `BLOCKS` is found by timing at the first call with these sizes, M up to a power of two.
    """
    rows, inner = q.shape
    outputs = weight.shape[0]
    out = q.new_empty((rows, outputs), dtype=dtype)
    if not out.numel():
        return out
    most = max(rows * q.stride(0), outputs * weight.stride(0), rows * outputs)
    constants: Mapping[str, Any] = {
        "POST_OP": post_op,
        "HAS_ZERO_POINT": zero_point is not None,
        "HAS_BIAS": bias is not None,
        # A block of rows past the end is addressed before it is masked.
        "WIDE": most + 256 * max(q.stride(0), weight.stride(0), outputs) >= _NARROW,
    }

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        return (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(outputs, meta["BLOCK_N"]),)

    arguments = (
        q,
        weight,
        out,
        scale,
        q if zero_point is None else zero_point,
        weight_scale,
        q if weight_sums is None else weight_sums,
        weight_scale if bias is None else bias,
        rows,
        outputs,
        inner,
        rows_bucket(rows),
        q.stride(0),
        weight.stride(0),
        int(scale.numel() > 1),
        int(zero_point is not None and zero_point.numel() > 1),
    )
    # Triton launches on the current device, which needn't be the tensors'.
    with torch.cuda.device_of(q):
        if blocks is None:
            _autotuned[grid](*arguments, **constants)
        else:
            int8_linear_kernel[grid](
                *arguments,
                **constants,
                **blocks.meta,
                num_stages=blocks.stages,
                num_warps=blocks.warps,
            )
    return out


def rows_bucket(rows: int) -> int:
    """`rows` rounded up to a power of two between 16 and 16384."""
    return min(max(1 << (rows - 1).bit_length(), _FEWEST_ROWS), _MOST_ROWS)
