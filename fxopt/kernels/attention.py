"""Attention in float32 on oneDNN, its two products each one grouped 1×1 convolution.

    attention(q, k, v, mask, is_causal, s)  =  softmax(s · q kᵀ + mask) v
    quantized_attention(..., t, z)          =  quantize(attention(...), t, z)

aten's fused attention calls MKL for its products, which is slow on some CPUs (AMD's), and torch has
no float32 batched product on oneDNN. A 1×1 convolution with G groups is one: G products side by
side, with queries for pixels. With G = batch × heads and channels last,

    scores[q, (g, k)]  =  Σ_d  Q[q, (g, d)] · K[(g, k), d]           convolution, weight K
    output[q, (g, d)]  =  Σ_k  P[q, (g, k)] · V[(g, k), d]           its transpose, weight V

so that K and V are the weights as they lie. Several heads go at once, as many as the cache holds
scores of. Wherever that doesn't pay (only AVX-512 has been measured), off the CPU, in other dtypes
and where a query may see no key at all, the operator is aten.scaled_dot_product_attention.
Source: oneDNN, "Convolution"; Vaswani et al., "Attention Is All You Need", 3.2.1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu
from fxopt.kernels.onednn import has_onednn

# oneDNN's vectorised grouped convolutions take channels of a group by AVX-512's 16 floats; others
# run on a reference loop that is slower than anything else.
LANES = 16
# Scores made in one go: enough to outweigh two calls of oneDNN, little enough to stay in the cache
# from one product to the next and in memory that malloc holds on to. Above 3 MiB a small process
# gives the pages back after each call, and taking them anew costs more than the attention.
_SCORES_BYTES = 5 << 19
# Below this many scores the calls around the products cost more than they save.
_LEAST_SCORES = 1 << 17
# Above this many scores a head, aten's flash kernel, which keeps them in registers and skips what a
# causal mask hides, catches up.
_MOST_SCORES_A_HEAD = 1 << 20

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale) -> Tensor"
)
_QUANTIZED_SCHEMA = (
    "quantized_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, "
    "Tensor out_scale, Tensor out_zero_point) -> Tensor"
)
_library.define(_SCHEMA)
_library.define(_QUANTIZED_SCHEMA)


def check_rank(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises `KernelError` for inputs of `name` that are not of rank 4."""
    if not q.dim() == k.dim() == v.dim() == 4:
        raise KernelError(
            f"{name} needs q, k and v of rank 4 [batch, heads, length, size], not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    grouped = bool(q.shape[1] != k.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped
    )


def _reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    check_rank("attention", q, k, v)
    return _sdpa(q, k, v, mask, is_causal, scale).transpose(1, 2).contiguous().transpose(1, 2)


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    check_rank("attention", q, k, v)
    if not is_causal and _fits(q, k, v, mask) and _pays(q, k):
        usable, bias = _key_bias(mask)
        if usable:
            return _by_convolution(q, k, v, bias, scale)
    return _reference(q, k, v, mask, is_causal, scale)


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return (
        q.dtype == k.dtype == v.dtype == torch.float32
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape[2] == v.shape[2]
        and min(*q.shape, *v.shape) > 0
        and not q.shape[3] % LANES
        and not v.shape[3] % LANES
        and (mask is None or mask.dtype in (torch.bool, torch.float32))
    )


def _pays(q: Tensor, k: Tensor) -> bool:
    batch, heads, queries, _ = q.shape
    head = queries * k.shape[2]
    return (
        batch * heads * head >= _LEAST_SCORES
        and head <= _MOST_SCORES_A_HEAD
        and has_onednn()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _key_bias(mask: Tensor | None) -> tuple[bool, Tensor | None]:
    """Whether the mask hides keys from all queries alike and leaves each some, and then what to add
    to the scores, [..., 1, keys] or nothing. aten is as fast for masks that depend on the query."""
    if mask is None or (mask.dtype == torch.bool and bool(mask.all())):
        return True, None
    if not _same_for_all_queries(mask):
        return False, None
    row = mask[..., :1, :]
    if row.dtype == torch.bool:
        row = torch.zeros(row.shape).masked_fill_(~row, -math.inf)
    return not bool((row.amax(-1) == -math.inf).any()), row


def _same_for_all_queries(mask: Tensor) -> bool:
    if mask.shape[-2] == 1 or mask.stride(-2) == 0:
        return True
    return torch.equal(mask, mask[..., :1, :].expand_as(mask))


def _by_convolution(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    bias = None if bias is None else bias.expand(batch, heads, 1, keys)
    output = q.new_empty(batch, queries, heads, v.shape[3])
    fitting = max(1, _SCORES_BYTES // (queries * keys * q.element_size()))
    rows_step, heads_step = max(1, fitting // heads), min(heads, fitting)
    for row, head in itertools.product(range(0, batch, rows_step), range(0, heads, heads_step)):
        part = (slice(row, row + rows_step), slice(head, head + heads_step))
        added = None if bias is None else bias[part]
        output.transpose(1, 2)[part] = _products(q[part], k[part], v[part], added, scale)
    return output.transpose(1, 2)


def _products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """[batch, heads, queries, size]; `bias` [batch, heads, 1, keys]."""
    batch, heads, queries, size = q.shape
    groups, keys = batch * heads, k.shape[2]
    padding = -keys % LANES
    if padding:
        k, v = (torch.nn.functional.pad(t, (0, 0, 0, padding)) for t in (k, v))
        if bias is None:
            bias = q.new_zeros(1, 1, 1, keys).expand(batch, heads, 1, keys)
        bias = torch.nn.functional.pad(bias, (0, padding), value=-math.inf)
    pixels = q.new_empty(queries, batch, heads, size)
    torch.mul(q.permute(2, 0, 1, 3), scale, out=pixels)
    scores = torch.ops.aten.mkldnn_convolution(
        _channels_last(pixels),
        _weight(k),
        None if bias is None else bias.reshape(-1),
        (0, 0),
        (1, 1),
        (1, 1),
        groups,
    )
    scores = scores.permute(0, 2, 3, 1).view(queries, batch, heads, -1)
    # In place: fresh pages for a second copy of the scores cost as much as the softmax.
    torch.softmax(scores, -1, out=scores)
    output = torch.ops.mkldnn._convolution_transpose_pointwise(
        _channels_last(scores),
        _weight(v),
        None,
        (0, 0),
        (0, 0),
        (1, 1),
        (1, 1),
        groups,
        "none",
        [],
        "",
    )
    rows: Tensor = output.permute(0, 2, 3, 1).reshape(queries, batch, heads, v.shape[3])
    return rows.permute(1, 2, 0, 3)


def _channels_last(rows: Tensor) -> Tensor:
    """Contiguous rows [pixels, ...] as one image [1, channels, 1, pixels]."""
    pixels, channels = rows.shape[0], rows[0].numel()
    strides = (channels * pixels, 1, channels * pixels, channels)
    return rows.as_strided((1, channels, 1, pixels), strides)


def _weight(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[3], 1, 1)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    check_rank("attention", q, k, v)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, is_causal, scale = inputs
    ctx.save_for_backward(q, k, v, mask)
    ctx.options = is_causal, scale


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if needed and t is not None else t
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        ]
        q, k, v, mask = leaves
        output = _sdpa(q, k, v, mask, *ctx.options)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, grad))
    filled = (next(grads) if t is not None and t.requires_grad else None for t in leaves)
    return (*filled, None, None)


def _quantized(*given: Any) -> Tensor:
    *inputs, out_scale, out_zero_point = given
    output = torch.ops.fxopt.attention(*inputs)
    # Laid out as the attention is, whose rows the next product reads.
    rows = torch.ops.fxopt.quantize(output.transpose(1, 2), out_scale, out_zero_point)
    return rows.transpose(1, 2)  # type: ignore[no-any-return]


def _quantized_fake(*given: Any) -> Tensor:
    *inputs, _, out_zero_point = given
    return _fake(*inputs).to(out_zero_point.dtype)


_library.impl("attention", _reference, "CompositeExplicitAutograd")
_library.impl("quantized_attention", _quantized, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _on_cpu)
on_cpu(_QUANTIZED_SCHEMA, _quantized)
torch.library.register_fake("fxopt::attention", _fake, lib=_library)
torch.library.register_fake("fxopt::quantized_attention", _quantized_fake, lib=_library)
torch.library.register_autograd("fxopt::attention", _backward, setup_context=_save, lib=_library)
