"""Attention in bfloat16, written out for the compiler: two products and what it fuses between them.

    written_attention(q, k, v, bias, is_causal, s) = (p v) / Σp     p = exp(s · q kᵀ + bias - max)

aten's fused attention has no fast bfloat16 products on CPUs without AMX; oneDNN's batched product
has. The scores are rounded to bfloat16 between the products, all else is float32. Dividing after
the second product spares a pass over the scores. Where a query may see no key the result is 0.

The mask comes as what to add to the scores, computed once and opaque to the compiler, which would
else compute a mask anew from its sources for each score, in each layer.

    exp(x) ≈ (1 + t + t²/2 + t³/6)⁶⁴, t = max(x, -99.2) / 64, whose power of -99.2 underflows to 0

Within 0.4 % for x > -12, where bfloat16 itself errs by as much, and 3e-6 absolutely; arithmetic
alone, it costs half of the library's vector exponential.
Source: Vaswani et al., "Attention Is All You Need", 3.2.1; the division put off: Dao et al.,
"FlashAttention" (2022).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fxopt.kernels.attention import check_rank

_LEAST = -99.2
_SQUARINGS = 6

_library = torch.library.Library("fxopt", "FRAGMENT")
_library.define(
    "written_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, bool is_causal, float scale) "
    "-> Tensor"
)
_library.define("attention_bias(Tensor mask) -> Tensor")


def attention_bias(mask: Tensor) -> Tensor:
    """float32 of the shape of `mask`, to be added to scores: 0 and -inf for True and False, and a
    mask of floats as it is."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask.to(torch.float32, copy=True)


def _bias_fake(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape, dtype=torch.float32)


def written_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """`[batch, heads, queries, size]` in the dtype of `q`; `bias` is added to the scores.

    `k` and `v` may have fewer heads, a divisor of those of `q`. Raises `KernelError` for inputs
    that are not of rank 4.
    """
    check_rank("written_attention", q, k, v)
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    k, v = _for_all_heads(k, q), _for_all_heads(v, q)
    scores = torch.matmul(q, k.transpose(-1, -2)).to(torch.float32) * scale
    if is_causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -math.inf)
    if bias is not None:
        scores = scores + bias
    # A row of -inf alone must not become NaN: -inf - (-inf).
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = _exponential(scores - largest).to(q.dtype)
    total = weights.to(torch.float32).sum(-1, keepdim=True)
    output = torch.matmul(weights, v).to(torch.float32)
    return (output / total.clamp_min(torch.finfo(torch.float32).tiny)).to(q.dtype)


def _for_all_heads(t: Tensor, q: Tensor) -> Tensor:
    if t.shape[1] == q.shape[1]:
        return t
    return t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _exponential(x: Tensor) -> Tensor:
    """e^x of float32 `x` <= 0."""
    t = x.clamp_min(_LEAST) * (1.0 / 2**_SQUARINGS)
    power: Tensor = ((t * (1.0 / 6.0) + 0.5) * t + 1.0) * t + 1.0
    for _ in range(_SQUARINGS):
        power = power * power
    return power


_library.impl("written_attention", written_attention, "CompositeImplicitAutograd")
_library.impl("attention_bias", attention_bias, "CompositeExplicitAutograd")
torch.library.register_fake("fxopt::attention_bias", _bias_fake, lib=_library)
