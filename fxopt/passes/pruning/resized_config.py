"""A model's config after channels were cut, where it has a place for the new sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from fxopt.analyses.channels import Group, channels
from fxopt.program import Program

_FIELDS: dict[str, tuple[str, ...]] = {
    "ffn": (
        "intermediate_size",
        "moe_intermediate_size",
        "ffn_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "hidden_dim",
        "d_ff",
        "n_inner",
    ),
    "heads": ("num_key_value_heads", "num_attention_heads", "num_heads", "n_heads", "n_head"),
    "residual": ("hidden_size", "d_model", "dim", "n_embd"),
}
"""What transformers calls the sizes of each kind of group."""

_HEAD_DIMENSIONS = ("head_dim", "d_kv")
"""Without one of these a config derives a head's size from the number of heads."""


def resized_config(config: Any, before: Program, after: Program) -> Any:
    """A copy of `config` with the sizes that `after` has where `before` had those of `config`.

    Only a size that is the same in all layers has a place; what differs from layer to layer, and
    heads where the config derives their dimension from their number, are left as they were.
    """
    if config is None:
        return None
    config = copy.deepcopy(config)
    pairs = [(group, _size_after(group, after)) for group in channels(before).groups]
    cut_heads = any(old.kind == "heads" and old.size != size for old, size in pairs)
    if cut_heads and getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    fixed_heads = any(getattr(config, name, None) for name in _HEAD_DIMENSIONS)
    for kind, fields in _FIELDS.items():
        of_kind = [(old, size) for old, size in pairs if old.kind == kind]
        if kind == "heads" and not fixed_heads:
            continue
        for field in fields:
            _resize(config, field, of_kind)
    if fixed_heads:
        _resize_queries(config, [old for old, _ in pairs], after)
    return config


def _size_after(group: Group, after: Program) -> int:
    """How many channels the group has in `after`: by the place where a channel takes the least."""
    place = min(group.places, key=lambda one: one.positions.shape[1])
    tensor = after.state.get(place.name)
    return (
        group.size if tensor is None else int(tensor.shape[place.axis] // place.positions.shape[1])
    )


def _resize(config: Any, field: str, pairs: Sequence[tuple[Group, int]]) -> None:
    size = getattr(config, field, None)
    if field == "n_inner" and size is None:  # GPT-2: four times the hidden size
        size = 4 * config.n_embd if hasattr(config, "n_embd") else None
    sizes = {new for old, new in pairs if old.size == size}
    if len(sizes) == 1 and sizes != {size}:
        setattr(config, field, sizes.pop())


def _resize_queries(config: Any, groups: Sequence[Group], after: Program) -> None:
    """Query heads, of which each key/value head has several: as many as their rows allow."""
    if getattr(config, "num_key_value_heads", None) is None:
        return
    count = config.num_attention_heads
    counts = set()
    for group in groups:
        if group.kind in ("heads", "queries"):
            place = max(group.places, key=lambda one: one.positions.numel())
            rows = after.state[place.name].shape[place.axis] if place.name in after.state else 0
            counts.add(count * rows // place.positions.numel())
    if len(counts) == 1:
        config.num_attention_heads = counts.pop()
