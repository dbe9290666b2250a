"""Attention to a prefix that is kept in int8, with a scale for each slot and head.

    int8_cached_attention(q, k, v, K, V, s, t, ...)  =  cached_attention(q, k, v, s · K, t · V, ...)

for int8 K `[B, G, P, D]` and V `[B, G, P, E]` and float32 scales s and t `[B, G, P, 1]`; all else
is as `fxopt.cached_attention` has it. Products are rounded to the dtype of q once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.cached_attention import Call
from fxopt.kernels.native import on_cpu
from fxopt.kernels.quantization import dequantize

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "int8_cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, "
    "Tensor past_k_scale, Tensor past_v_scale, Tensor past_seen, Tensor seen, float scale, "
    "int? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor"
)
_library.define(_SCHEMA)


def int8_cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_k_scale: Tensor,
    past_v_scale: Tensor,
    past_seen: Tensor,
    seen: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition: `[B, S, H, E]` in the dtype of `q`."""
    keys = _floats("past_k", past_k, past_k_scale, q.dtype)
    values = _floats("past_v", past_v, past_v_scale, q.dtype)
    attended: Tensor = torch.ops.fxopt.cached_attention(
        q, k, v, keys, values, past_seen, seen, scale, window, softcap, sinks
    )
    return attended


def _floats(name: str, past: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check(name, past, scale)
    return dequantize(past, scale, dtype)


def _check(name: str, past: Tensor, scale: Tensor) -> None:
    if past.dtype != torch.int8 or scale.dtype != torch.float32:
        raise KernelError(
            f"int8_cached_attention needs {name} of torch.int8 with scales of torch.float32, not "
            f"{past.dtype} with {scale.dtype}"
        )
    if past.dim() != 4 or scale.dim() != 4 or scale.shape != (*past.shape[:3], 1):
        raise KernelError(
            f"int8_cached_attention needs {name} [B, G, P, D] with a scale for each slot and head, "
            f"[B, G, P, 1], not {tuple(past.shape)} with {tuple(scale.shape)}"
        )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_k_scale: Tensor,
    past_v_scale: Tensor,
    *others: Any,
    **options: Any,
) -> Tensor:
    _check("past_k", past_k, past_k_scale)
    _check("past_v", past_v, past_v_scale)
    keys, values = (torch.empty_like(one, dtype=q.dtype) for one in (past_k, past_v))
    Call(q, k, v, keys, values, *others, **options).checked()
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


_library.impl("int8_cached_attention", int8_cached_attention, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, int8_cached_attention, "decoding")
torch.library.register_fake("fxopt::int8_cached_attention", _fake, lib=_library)
