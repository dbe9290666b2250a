"""Linear layers with an int4 weight: two values a byte, one scale per group of input channels.

    int4_weight_only_linear(x, P, s, b)     =  x @ Wᵀ + b,  W[n, k] = unpack(P)[n, k] * s[n, k // g]
    int4_weight_only_linear(x, P, s, b, z)  =  x @ Wᵀ + b,  W = (unpack(P) - z) * s by groups

for P uint8 `[N, K/2]`, s and z `[N, K/g]` or `[N, K/g, 1]`, z any float of the dtype of s. Byte j
of a row holds column 2j in its low half and column 2j + 1 in its high half, each in two's
complement: ONNX's INT4 layout. Values lie in [-7, 7], with a zero point in [-8, 7].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn import dense_linear
from fxopt.kernels.packed_weights import PACKED_WEIGHTS

LARGEST = 7
_LOW = -8

# What aten's int4 products take. Up to here in rows, its bfloat16 kernel beats dequantizing first,
# twice and more for one row; its float32 and float16 kernels are scalar code and never do (on a
# CPU with AVX-512; 768 x 3072).
_FEW_ROWS = 48
_GROUPS = (32, 64, 128, 256)
_CPU_OUTPUTS = 16
_CPU_VECTORS = ("AVX2", "AVX512")
_CUDA_OUTPUTS, _CUDA_INNER = 8, 128
_CUDA_CAPABILITY = (8, 0)
_CUDA_TILES = _CUDA_INNER // 16
# Rows are packed and unpacked about this many elements at a time, so that temporaries stay small.
_CHUNK_ELEMENTS = 1 << 19
# aten lays rows out in blocks of this many; a chunk that is a multiple is laid out as in the whole.
_CPU_BLOCK = 64

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define("unpack_int4(Tensor packed) -> Tensor")
_SCHEMA = (
    "int4_weight_only_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, "
    "Tensor? zero_point=None) -> Tensor"
)
_library.define(_SCHEMA)


def pack_int4(q: Tensor) -> Tensor:
    """uint8 `[N, K/2]` that holds int8 `q` `[N, K]`, K even, of values in [-8, 7].

    Raises `KernelError` for other dtypes, an odd K and values that four bits can't hold.
    """
    if q.dtype != torch.int8 or q.dim() != 2 or q.shape[1] % 2:
        raise KernelError(
            f"pack_int4 needs int8 [N, K] with an even K, not {q.dtype} of {tuple(q.shape)}"
        )
    if q.numel() and (int(q.min()) < _LOW or int(q.max()) > LARGEST):
        raise KernelError(
            f"pack_int4 needs values in [{_LOW}, {LARGEST}], not [{int(q.min())}, {int(q.max())}]"
        )
    halves = q.view(torch.uint8)
    return (halves[:, ::2] & 15) | (halves[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 `[..., K]` of values in [-8, 7] from uint8 `packed` `[..., K/2]`, low half first."""
    if packed.dtype != torch.uint8:
        raise KernelError(f"unpack_int4 needs uint8, two values a byte, not {packed.dtype}")
    halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    # Flipping the sign bit and taking 8 off extends the sign from four bits to eight.
    return (halves ^ 8).to(torch.int8) - 8


def _unpack_on_cpu(packed: Tensor) -> Tensor:
    """`unpack_int4` of a contiguous matrix on a little-endian CPU, without strided writes."""
    pairs = packed.to(torch.int16)
    halves = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).bitwise_xor_(0x0808)
    return halves.view(torch.int8).sub_(8)


def _dense(
    packed: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None
) -> Tensor:
    """W `[N, K]` in `dtype`, by the definition: unpack, then dequantize each group."""
    rows, groups, inner = *scale.shape[:2], 2 * packed.shape[1]
    q = torch.ops.fxopt.unpack_int4(packed).view(rows, groups, inner // groups)
    by_group = (rows, groups, 1)
    zero = None if zero_point is None else zero_point.reshape(by_group)
    dense: Tensor = torch.ops.fxopt.dequantize(q, scale.reshape(by_group), dtype, zero)
    return dense.view(rows, inner)


def _dense_on_cpu(
    packed: Tensor, scale: Tensor, dtype: torch.dtype, zero_point: Tensor | None = None
) -> Tensor:
    """The same numbers, a few rows at a time: half the time, and temporaries of about 3 MB."""
    rows, groups, inner = *scale.shape[:2], 2 * packed.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    packed, scale = packed.contiguous(), scale.reshape(rows, groups, 1).to(wide)
    zero = None if zero_point is None else zero_point.reshape(rows, groups, 1).to(wide)
    dense = torch.empty((rows, inner), dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // inner)
    for first in range(0, rows, step):
        q = _unpack_on_cpu(packed[first : first + step]).to(wide)
        by_group = q.view(-1, groups, inner // groups)
        if zero is not None:
            by_group.sub_(zero[first : first + step])
        by_group.mul_(scale[first : first + step])
        dense[first : first + step] = q
    return dense


def check_int4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    name: str = "int4_weight_only_linear",
) -> None:
    """Raise `KernelError`, from `name`, for what no layer on an int4 weight is."""
    if not x.is_floating_point() or packed.dtype != torch.uint8:
        raise KernelError(
            f"{name} needs float x and uint8 packed weight, not {x.dtype}, {packed.dtype}"
        )
    if packed.dim() != 2 or x.dim() < 1 or x.shape[-1] != 2 * packed.shape[1]:
        raise KernelError(
            f"{name} needs x [..., K] and a packed weight [N, K/2], not "
            f"{tuple(x.shape)} and {tuple(packed.shape)}"
        )
    rows, groups = scale.shape[:2] if scale.dim() >= 2 else (0, 0)
    fits = scale.numel() == rows * groups and rows == packed.shape[0]
    if not fits or groups < 1 or 2 * packed.shape[1] % groups:
        raise KernelError(
            f"{name} needs scales [N, K/g], one for each group of g of the "
            f"weight's {2 * packed.shape[1]} columns, not {tuple(scale.shape)} for "
            f"{packed.shape[0]} rows"
        )
    if zero_point is not None and (zero_point.numel(), zero_point.dtype) != (
        scale.numel(),
        scale.dtype,
    ):
        raise KernelError(
            f"{name} needs as many zero points as scales, of their dtype, not "
            f"{zero_point.dtype} of {tuple(zero_point.shape)} for {scale.dtype} of "
            f"{tuple(scale.shape)}"
        )


def _reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point)
    return torch.nn.functional.linear(x, _dense(packed, scale, x.dtype, zero_point), bias)


def _on_cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point)
    if not x.numel() or not packed.numel():
        return _reference(x, packed, scale, bias, zero_point)
    suits = packed.shape[0] % _CPU_OUTPUTS == 0 and zero_point is None
    if suits and _suits_aten(x, packed, scale) and _has_vectors():
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        return _few_rows(product, _pack_for_cpu, x, packed, scale, bias)
    dense = _dense_on_cpu(packed, scale, x.dtype, zero_point)
    return dense_linear(x, dense, bias, least_rows=1)


def _on_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point)
    if (
        packed.numel()
        and zero_point is None
        and packed.shape[0] % _CUDA_OUTPUTS == 0
        and 2 * packed.shape[1] % _CUDA_INNER == 0
        and _suits_aten(x, packed, scale)
        and torch.cuda.get_device_capability(x.device) >= _CUDA_CAPABILITY
    ):
        product = torch.ops.aten._weight_int4pack_mm
        return _few_rows(product, _pack_for_cuda, x, packed, scale, bias)
    return _reference(x, packed, scale, bias, zero_point)


def _suits_aten(x: Tensor, packed: Tensor, scale: Tensor) -> bool:
    """Whether aten's int4 product takes these, gains by it, and its copies can be kept."""
    return (
        x.dtype == torch.bfloat16
        and 0 < x.numel() // x.shape[-1] <= _FEW_ROWS
        and x.shape[-1] // scale.shape[1] in _GROUPS
        and not packed.is_inference()
        and not scale.is_inference()
    )


def _few_rows(
    product: Any, pack: Any, x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    scale = scale.detach().view(scale.shape[:2])
    weight = PACKED_WEIGHTS.get(packed, pack)
    scale_and_zero = PACKED_WEIGHTS.get(scale, _pack_scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = product(rows, weight, x.shape[-1] // scale.shape[1], scale_and_zero)
    y = y.view(*x.shape[:-1], packed.shape[0])
    return y if bias is None else y + bias


def _pack_for_cpu(packed: Tensor) -> Tensor:
    """The weight as `aten._weight_int4pack_mm_for_cpu` reads it; 8 added to each value."""
    step = max(1, _CHUNK_ELEMENTS // (2 * packed.shape[1] * _CPU_BLOCK)) * _CPU_BLOCK
    convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
    chunks = (
        unpack_int4(packed[first : first + step]).to(torch.int32) + 8
        for first in range(0, packed.shape[0], step)
    )
    return torch.cat([convert(chunk, 1) for chunk in chunks])


def _pack_for_cuda(packed: Tensor) -> Tensor:
    """The weight as `aten._weight_int4pack_mm` reads it: 8 added, the even column in the high
    half."""
    raised = packed ^ 0x88
    swapped = (raised << 4) | (raised >> 4)
    laid: Tensor = torch.ops.aten._convert_weight_to_int4pack(swapped, _CUDA_TILES)
    return laid


def _pack_scale(scale: Tensor) -> Tensor:
    """bfloat16 `[K/g, N, 2]`: the scale and what is added, zero; the kernels take 8 off first."""
    turned = scale.t().to(torch.bfloat16)
    return torch.stack((turned, torch.zeros_like(turned)), -1).contiguous()


def _has_vectors() -> bool:
    return torch.backends.cpu.get_cpu_capability() in _CPU_VECTORS


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    zero_point: Tensor | None = None,
) -> Tensor:
    check_int4_linear(x, packed, scale, zero_point)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scale, bias, zero_point = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scale, zero_point = ctx.saved_tensors
    needs_x, wants_bias = ctx.needs_input_grad[0], ctx.has_bias and ctx.needs_input_grad[3]
    dx = grad @ _dense(packed, scale, grad.dtype, zero_point) if needs_x else None
    return dx, None, None, grad.reshape(-1, grad.shape[-1]).sum(0) if wants_bias else None, None


_library.impl("unpack_int4", unpack_int4, "CompositeImplicitAutograd")
_library.impl("int4_weight_only_linear", _reference, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu, "decoding")
_library.impl("int4_weight_only_linear", _on_cuda, "CUDA")
torch.library.register_fake("fxopt::int4_weight_only_linear", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::int4_weight_only_linear", _backward, setup_context=_save, lib=_library
)
