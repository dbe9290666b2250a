"""Attention of new positions to a filled prefix of keys and values, and to themselves.

    cached_attention(q, k, v, K, V, ...)  =  softmax(c(s · q [K; k]ᵀ) + mask) [V; v]
    c(x)  =  softcap · tanh(x / softcap)                              where there is a softcap

for q `[B, H, S, D]`, k `[B, G, S, D]`, v `[B, G, S, E]` and a prefix of P positions that earlier
calls made, K `[B, G, P, D]` and V `[B, G, P, E]`. P may be 0, and K and V may be strided views of
larger buffers. Query head h reads key head h // (H / G). The query at new position i sees slot j of
the P + S slots where j <= P + i, the slot holds a token (`past_seen` `[B, P]`, `seen` `[B, S]`:
False is padding) and, under a window, P + i - j < window. A sink, one logit a head, takes part in
the sum that weights are divided by and has no value. A query that sees nothing gives zeros. Sums
are float32, or float64 if that is the dtype.

The result is `[B, S, H, E]`, as the product after it reads it. Nothing is written: who calls
appends k and v to the buffers.
Source: Vaswani et al., "Attention Is All You Need", 3.2.1; Gemma Team, "Gemma 2" (2024), 2, for the
softcap; Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxopt.errors import KernelError
from fxopt.kernels.native import on_cpu

_AXES = {
    "q": "BHSD",
    "k": "BGSD",
    "v": "BGSE",
    "past_k": "BGPD",
    "past_v": "BGPE",
    "past_seen": "BP",
    "seen": "BS",
    "sinks": "H",
}
_MASKS = ("past_seen", "seen")

_library = torch.library.Library("fxopt", "FRAGMENT")
_SCHEMA = (
    "cached_attention(Tensor q, Tensor k, Tensor v, Tensor past_k, Tensor past_v, "
    "Tensor past_seen, Tensor seen, float scale, int? window=None, float? softcap=None, "
    "Tensor? sinks=None) -> Tensor"
)
_library.define(_SCHEMA)


class Call(NamedTuple):
    """The arguments of one call, in the operator's order; shapes as above."""

    q: Tensor
    k: Tensor
    v: Tensor
    past_k: Tensor
    past_v: Tensor
    past_seen: Tensor
    seen: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def checked(self) -> Call:
        """This call; raises `KernelError` for what the definition has no answer to.

        Equal sizes become relations of the sizes where they are symbols.
        """
        sizes: dict[str, tuple[Any, str]] = {}
        for name in _AXES:
            tensor = getattr(self, name)
            if tensor is not None:
                _check_dtype(name, tensor, self.q.dtype)
                _check_sizes(name, tensor, sizes)
        heads, groups = sizes["H"][0], sizes["G"][0]
        if groups < 1 or heads % groups:
            raise KernelError(
                f"cached_attention shares the heads of q among those of k: {heads} are no multiple "
                f"of {groups}"
            )
        if self.window is not None and self.window < 1:
            raise KernelError(
                f"cached_attention needs a window of 1 position or more, not {self.window}"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise KernelError(f"cached_attention needs a softcap above 0, not {self.softcap}")
        return self

    def within_window(self) -> Call:
        """This call without the slots that are too far back for the first query."""
        if self.window is None:
            return self
        far = max(0, self.past_k.shape[2] - self.window + 1)
        return self._replace(
            past_k=self.past_k[:, :, far:],
            past_v=self.past_v[:, :, far:],
            past_seen=self.past_seen[:, far:],
        )


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    past_seen: Tensor,
    seen: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The definition, in aten: `[B, S, H, E]` in the dtype of `q`."""
    keys, values = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    visible = visible_slots(past_seen, seen, window)
    batch, heads, queries, _ = q.shape
    if not queries:
        return q.new_empty(batch, queries, heads, v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = _grouped(q, k.shape[1]).to(wide) @ keys.to(wide).transpose(-1, -2) * scale
    scores = scores.view(batch, heads, queries, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    # A row of -inf alone must not become NaN: -inf - (-inf).
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(wide).min)
    if sinks is not None:
        sinks = sinks.to(wide).view(-1, 1, 1)
        largest = torch.maximum(largest, sinks)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    weights = weights / total.clamp_min(torch.finfo(wide).tiny)
    output = _grouped(weights, k.shape[1]) @ values.to(wide)
    return output.view(batch, heads, queries, -1).transpose(1, 2).to(q.dtype).contiguous()


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """`[B, H, S, D]` as `[B, G, (H / G) S, D]`: the queries of all heads that read a key head."""
    return rows.reshape(rows.shape[0], groups, -1, rows.shape[3])


def visible_slots(past_seen: Tensor, seen: Tensor, window: int | None) -> Tensor:
    """bool `[B, 1, S, P + S]`: which of prefix and new slots each query sees."""
    past, new = past_seen.shape[1], seen.shape[1]
    slots = torch.arange(past + new, device=seen.device)
    behind = slots[past:, None] - slots
    near = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return (torch.cat((past_seen, seen), 1)[:, None] & near)[:, None]


def _by_library(*given: Any, **options: Any) -> Tensor:
    call = Call(*given, **options).checked().within_window()
    if call.softcap is not None or call.sinks is not None:
        return cached_attention(*call)
    if not call.q.numel() or not call.v.numel():
        return cached_attention(*call)
    return _by_sdpa(call).contiguous()


def _by_sdpa(call: Call) -> Tensor:
    """By aten's fused attention, without a mask where all that lies before a query is seen."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    q, k, v, past_k, past_v, past_seen, seen, scale, window, *_ = call
    past, (batch, heads, queries, _) = past_k.shape[2], q.shape
    # Asking a GPU would wait for it at each call.
    tokens_only = q.device.type == "cpu" and bool(past_seen.all()) and bool(seen.all())
    all_before = tokens_only and (window is None or window >= past + queries)
    if all_before and not past and queries > 1:
        grouped = bool(heads != k.shape[1])
        return sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
    keys, values = torch.cat((past_k, k), 2), torch.cat((past_v, v), 2)
    rows = _grouped(q, k.shape[1])
    if all_before and queries == 1:
        output = sdpa(rows, keys, values, scale=scale)
        return output.reshape(batch, heads, queries, -1).transpose(1, 2)
    visible = visible_slots(past_seen, seen, window)
    mask = visible.expand(-1, heads // k.shape[1], -1, -1).reshape(batch, 1, rows.shape[2], -1)
    output = sdpa(rows, keys, values, mask, scale=scale).view(batch, heads, queries, -1)
    if not tokens_only:
        output = output.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    return output.transpose(1, 2)


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if name in _MASKS:
        if tensor.dtype != torch.bool:
            raise KernelError(f"cached_attention needs {name} of torch.bool, not {tensor.dtype}")
    elif not tensor.is_floating_point() or (name != "sinks" and tensor.dtype != dtype):
        raise KernelError(
            f"cached_attention needs q, k, v, past_k and past_v of one float dtype and float "
            f"sinks; {name} is {tensor.dtype}, q {dtype}"
        )


def _check_sizes(name: str, tensor: Tensor, sizes: dict[str, tuple[Any, str]]) -> None:
    axes, shape = _AXES[name], tuple(tensor.shape)
    wanted = f"cached_attention needs {name} [{', '.join(axes)}]"
    if len(shape) != len(axes):
        raise KernelError(f"{wanted}, not {shape}")
    for axis, size in zip(axes, shape, strict=True):
        known, where = sizes.setdefault(axis, (size, name))
        if size != known:
            raise KernelError(f"{wanted}, not {shape}: {axis} is {known} in {where}")


def _fake(*given: Any, **options: Any) -> Tensor:
    q, _, v, *_ = Call(*given, **options).checked()
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale, window, softcap, sinks = inputs
    ctx.save_for_backward(*tensors, sinks)
    ctx.options = scale, window, softcap


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
            for t in ctx.saved_tensors
        ]
        *tensors, sinks = leaves
        given: list[Any] = [*tensors, *ctx.options, sinks]
        output = cached_attention(*given)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, grad))
    *filled, of_sinks = (next(grads) if t is not None and t.requires_grad else None for t in leaves)
    return (*filled, None, None, None, of_sinks)


_library.impl("cached_attention", _by_library, "CompositeExplicitAutograd")
on_cpu(_SCHEMA, _by_library, "decoding")
torch.library.register_fake("fxopt::cached_attention", _fake, lib=_library)
torch.library.register_autograd(
    "fxopt::cached_attention", _backward, setup_context=_save, lib=_library
)
