"""Generating: an `Optimized` that transformers' `generate` takes as one of its own models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from fxopt.claim import Claim
from fxopt.errors import InputError
from fxopt.generation import (
    LayerShape,
    Positions,
    append,
    empty_cache,
    positions_of,
    prefix,
)
from fxopt.generation.cache import CACHE
from fxopt.generation.examples import step_inputs, text_of
from fxopt.generation.prefix import PREFIX
from fxopt.optimized.optimized import Optimized, optimized_like

_WAY_OUT = "transform the model with generation=False, whose graph answers single calls"
POSITIONS = "_positions_without_ids"
"""Under which name a module carries its `Positions`."""
_OTHER_CACHES = ("quantized", "offloaded", "offloaded_static", "offloaded_hybrid")


class Generating(Optimized, GenerationMixin):
    """A causal language model whose steps are fxopt programs.

    `opt.generate(...)`, a transformers pipeline and a call with or without `past_key_values` do
    what they do with the original: all of them are steps (`fxopt.generation.seam`) behind a cache,
    which only grows. `opt.programs` holds the program that reads many tokens and the one that
    reads one.
    """

    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("text",)
    base_model_prefix = "model"
    _is_stateful = False
    hf_quantizer = None
    _no_split_modules = None
    _supports_cache_class = True
    kind: ClassVar[str] = "decoder"
    """What a saved module says of how it generates."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, K, V] for ids [B, S] behind the slots that `past_key_values` holds, or
        `cache`, as transformers calls it since 5.24.

        `attention_mask` [B, P + S] covers these too and is 0 where a slot is padding;
        `position_ids` [B, S] left out are those that the original takes. `logits_to_keep` is the
        number of last slots, 0 for all, or their indices. Raises `InputError` for what no step
        computes.
        """
        ids = checked_ids(input_ids, inputs_embeds, labels, kwargs)
        rows, length = ids.shape
        cache = _one_cache(past_key_values, cache)
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = self._new_cache()
        held = 0 if cache is None else int(cache.get_seq_length())
        seen = seen_slots(attention_mask, rows, held, length, ids.device)
        past_seen, sides = prefix(self.kept_shapes(), cache, packed(seen[:, :held]))
        logits, keys, values = self._ask(
            "many" if length > 1 else "one",
            input_ids=ids,
            position_ids=self._positions(position_ids, seen, held),
            keep=kept_slots(logits_to_keep, length, ids.device),
            seen=packed(seen[:, held:]),
            past_seen=past_seen,
            **dict(zip(PREFIX, sides, strict=False)),
        )
        if cache is not None:
            append(cache, keys, values)
        kept: dict[str, Any] = {CACHE: cache if use_cache else None}
        output = CausalLMOutputWithPast(logits=logits, **kept)
        whole = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if whole else output.to_tuple()

    def _ask(self, kind: str, **inputs: Any) -> Any:
        """The outputs for `inputs`; what answered the last call of this `kind` is asked first."""
        self._check_origins()
        known = self._programs.run_again(kind, inputs)
        if known is not None:
            return known[0]
        outputs = self._answer((), inputs)
        self._programs.note(kind)
        return outputs

    def _positions(self, given: Tensor | None, seen: Tensor, held: int) -> Tensor:
        """The positions int64 [B, S] of the new slots, as the original has them."""
        rows, slots = seen.shape
        if given is not None:
            return packed(given.expand(rows, slots - held))
        by_slot = torch.arange(slots, device=seen.device).expand(rows, slots)
        by_seen = positions_of(seen)
        known: Positions = self._carried[POSITIONS]
        if known == "unknown" and not torch.equal(by_slot[seen], by_seen[seen]):
            raise InputError(
                "attention_mask has padding ahead of text, and what this model makes of it where a "
                "call gives no positions isn't known: give position_ids"
            )
        return packed((by_seen if known == "seen" else by_slot)[:, held:])

    def kept_shapes(self) -> tuple[LayerShape, ...]:
        """What the cache keeps of a slot in each layer."""
        found: tuple[LayerShape, ...] | None = self.__dict__.get("_layer_shapes")
        if found is None:
            tensors = self._done().program.signature.tensors
            keys = [one for one in tensors if one.path.startswith("keys[")]
            values = [one for one in tensors if one.path.startswith("values[")]
            found = tuple(
                LayerShape(int(k.sizes[2]), int(k.sizes[3]), int(v.sizes[3]), k.dtype)
                for k, v in zip(keys, values, strict=True)
            )
            object.__setattr__(self, "_layer_shapes", found)
        return found

    def _generation(self) -> dict[str, Any]:
        config: Any = self._carried.get("generation_config")
        text = "{}" if config is None else config.to_json_string()
        return {
            "config": json.loads(text),
            "positions": self._carried[POSITIONS],
            "kind": self.kind,
        }

    def step_inputs(self, text: Any) -> dict[str, Any]:
        """The arguments of the step that a call with `text`, ids and perhaps a mask, is answered
        by."""
        ids, seen = text_of(text)
        return step_inputs(self.kept_shapes(), ids, seen, keep=ids.shape[1])

    def as_step(self) -> Optimized:
        """This module's programs, called as a step (`fxopt.generation.seam.Step`) is."""
        outcome = self._done()
        twin = optimized_like(type(self).__name__, outcome.program.signature.forward, self._carried)
        further = tuple(one.outcome for one in self._programs.valid())
        twin.install(replace(outcome, further=further))
        return twin

    @property
    def claim(self) -> Claim | None:
        """What the programs were held to against the original, where they were and it is known."""
        return self._done().claim

    def note(self, *notes: str) -> None:
        """Add `notes` to the report."""
        outcome = self._done()
        report = replace(outcome.report, notes=(*outcome.report.notes, *notes))
        object.__setattr__(self, "_outcome", replace(outcome, report=report))

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put the cache for one `generate` into `model_kwargs`, unless the user gave one."""
        kind = generation_config.cache_implementation
        if kind in _OTHER_CACHES:
            raise InputError(
                f"cache_implementation={kind!r}: an optimised model keeps keys and values in a "
                "cache of its own, which grows as it is filled. Leave cache_implementation out."
            )
        given = model_kwargs.get(CACHE)
        if given is not None:
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self._new_cache()

    def _new_cache(self) -> Cache:
        return empty_cache(self.kept_shapes())

    def can_generate(self) -> bool:
        """True."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: the code that runs is fxopt's."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None to switch: which experts run is in the graph."""
        return {}

    def set_experts_implementation(self, implementation: Any) -> None:
        """Nothing: which experts run is in the graph."""


def packed(slots: Tensor) -> Tensor:
    """A copy of [B, S] whose rows follow each other, also where there is one: compiled code holds
    for strides, and those of a slice grow with the text."""
    return slots.clone(memory_format=torch.contiguous_format)


def checked_ids(
    ids: Tensor | None,
    embeds: Tensor | None,
    labels: Tensor | None,
    others: Mapping[str, Any],
    name: str = "input_ids",
) -> Tensor:
    """The ids [B, S] under the argument `name`; raises `InputError` for what no step computes."""
    if labels is not None:
        raise InputError(f"a step computes no loss from labels: {_WAY_OUT}, or take it of logits")
    if embeds is not None or ids is None:
        embedded = f"{name.removesuffix('input_ids')}inputs_embeds"
        raise InputError(f"a step reads {name}, not {embedded}: {_WAY_OUT}")
    check_others(others)
    if ids.dim() != 2 or not ids.numel():
        raise InputError(f"{name} must be [batch, length] with an entry, not {tuple(ids.shape)}")
    return ids


def check_others(others: Mapping[str, Any]) -> None:
    """Raise `InputError` where a call gives arguments that no step takes."""
    wanted = [name for name, value in others.items() if value is not None and value is not False]
    if wanted:
        raise InputError(
            f"this call gives {', '.join(wanted)}, which a step doesn't take: leave it out, or "
            f"{_WAY_OUT}"
        )


def _one_cache(older: Cache | None, newer: Cache | None) -> Cache | None:
    """The cache of a call that gives it by one of its two names."""
    if older is not None and newer is not None:
        raise InputError("this call gives past_key_values and cache, which are one: leave one out")
    return newer if older is None else older


def seen_slots(
    mask: Tensor | None,
    rows: int,
    held: int,
    length: int,
    device: torch.device,
    name: str = "attention_mask",
) -> Tensor:
    """Which of all slots [B, P + S] aren't padding."""
    if mask is None:
        return torch.ones(rows, held + length, dtype=torch.bool, device=device)
    if mask.shape != (rows, held + length):
        raise InputError(
            f"{name} must be [batch, tokens so far], ({rows}, {held + length}) in this "
            f"call, not {tuple(mask.shape)}: masks of every pair of tokens aren't taken"
        )
    return mask.to(device=device, dtype=torch.bool)


def kept_slots(given: int | Tensor, length: int, device: torch.device) -> Tensor:
    """The slots whose logits are wanted, int64 [K]."""
    if isinstance(given, Tensor):
        return given.to(device) % length
    return torch.arange(max(0, length - given) if given else 0, length, device=device)
