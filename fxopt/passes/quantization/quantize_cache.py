"""QuantizeCache: keys and values of earlier slots in int8, a scale for each slot and head.

    cached_attention(q, k, v, dq(K, s), dq(V, t))  =  int8_cached_attention(q, k, v, K, V, s, t)

Symmetric: K = clamp(round(k / s), -127, 127), s = max|k| / 127 over the D entries of a slot in one
head, dq(K, s) = K * s. A head of 64 entries takes 68 bytes of a slot where float32 takes 256.

What rounds is the cache, when a step's keys and values are appended to it; attention to the slots
of the step itself is exact. So a step, which is given its prefix in int8, is what it claims to be,
and the claim of this pass is held where the errors add up: as text is read token by token, against
the original on the whole of it.

Source: Sheng et al., "FlexGen" (2023), 5, compresses the cache in groups; llama.cpp's Q8_0 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.claim import Claim, Sqnr
from fxopt.nodes import arguments
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage
from fxopt.rewriting.pattern import Target

ops = torch.ops.fxopt


class ReadInt8Prefix(Rule):
    """cached_attention(q, k, v, dq(K, s), dq(V, t)) = int8_cached_attention(q, k, v, K, V, s, t)"""

    def targets(self) -> tuple[Target, ...]:
        return (ops.cached_attention.default,)

    def match(self, node: fx.Node) -> Match | None:
        given = arguments(node)
        return Match((node,), given)

    def refuse(self, match: Match) -> str | None:
        past = [match["past_k"], match["past_v"]]
        if any(one.target is not ops.dequantize.default for one in past):
            return "its prefix is given in floating point"
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        keys, values = (arguments(match[name]) for name in ("past_k", "past_v"))
        given = {
            **match.bound,
            "past_k": keys["q"],
            "past_v": values["q"],
            "past_k_scale": keys["scale"],
            "past_v_scale": values["scale"],
        }
        return edit.call_by_name(ops.int8_cached_attention.default, given)


@dataclass(frozen=True, repr=False)
class QuantizeCache(RulePass):
    """Keys and values of earlier slots are kept in int8. Claim: sqnr(26).

    For a model that generates: its steps are captured with a prefix in int8, with a scale for each
    slot and head, and the cache rounds what is appended. A further pass can't bring it into a
    module that was transformed without it. The claim is held by teacher forcing.
    """

    name: ClassVar[str] = "quantize-cache"
    stage: ClassVar[Stage] = Stage.NUMERICS
    claim: Claim = Sqnr(26.0)

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule: attention reads the int8 prefix itself."""
        return (ReadInt8Prefix(),)
