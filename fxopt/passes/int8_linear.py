"""Int8Linear: linear layers on int8 weights, at the numerics level: where values are rounded.

    weight_only   x @ Wᵀ + b  ~  x @ dq(q(W))ᵀ + b              q: one scale per output channel
    dynamic       x @ Wᵀ + b  ~  dq(q(x)) @ dq(q(W))ᵀ + b       q(x): one scale per token, at run
    time

Both symmetric: q(v) = clamp(round(v / s), -127, 127) with s = max|v| / 127, dq(v) = v * s. The
graph
holds plain quantize / dequantize / linear; a kernel pass turns each region into one int8 product.
Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018); per-token scales: Yao et al., "ZeroQuant" (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

import torch
from torch import fx

from fxopt import kernels
from fxopt.analyses import Linear, as_linear, refuse_shared_weight
from fxopt.claim import Claim, Sqnr
from fxopt.errors import PassError
from fxopt.passes.linear_rule import LinearRule
from fxopt.program import Program, materialize, module_path
from fxopt.rewriting import Edit, Match, Rule, RulePass, Stage

aten = torch.ops.aten

Int8Mode = Literal["dynamic", "weight_only"]

_FLOOR = {"dynamic": Sqnr(16.0), "weight_only": Sqnr(26.0)}
"""Decibels end to end that every model of the architecture table keeps with random weights, which
are harder than trained ones; a dropped bias or a swapped channel falls below."""


class QuantizeLinear(LinearRule):
    """x @ Wᵀ + b ~ dq(q(x)) @ dq(q(W))ᵀ + b"""

    def __init__(self, options: Int8Linear) -> None:
        self.options = options
        self.weights: dict[tuple[fx.Node, bool], tuple[fx.Node, fx.Node]] = {}
        self.rounded: dict[fx.Node, fx.Node] = {}

    def refuse(self, match: Match) -> str | None:
        linear: Linear = match["linear"]
        path = module_path(linear.node)
        if not any(fnmatchcase(path, pattern) for pattern in self.options.include):
            return f"not in include={self.options.include!r}"
        if any(fnmatchcase(path, pattern) for pattern in self.options.exclude):
            return f"in exclude={self.options.exclude!r}"
        if not linear.dtype.is_floating_point:
            return f"its weight is {linear.dtype}, not floating point"
        if not linear.in_features or not linear.out_features:
            return "its weight is empty"
        if self.options.tied:
            return None
        return refuse_shared_weight(linear, _reads_as_linear)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        linear: Linear = match["linear"]
        values, scale = self._weight(linear, edit)
        x = self._rounded(linear.x, edit) if self.options.mode == "dynamic" else linear.x
        weight = edit.call(torch.ops.fxopt.dequantize.default, values, scale, linear.dtype)
        return edit.call(aten.linear.default, x, weight, linear.bias)

    def _rounded(self, x: fx.Node, edit: Edit) -> fx.Node:
        """dq(q(x)), made once for linears that share x: roots come in topological order."""
        if x not in self.rounded:
            pair = edit.call(torch.ops.fxopt.quantize_per_token.default, x)
            values, scale = edit.item(pair, 0), edit.item(pair, 1)
            self.rounded[x] = edit.call(
                torch.ops.fxopt.dequantize.default, values, scale, x.meta["val"].dtype
            )
        return self.rounded[x]

    def _weight(self, linear: Linear, edit: Edit) -> tuple[fx.Node, fx.Node]:
        """The int8 weight [N, K] and its scale [N, 1], made once for linears that share it."""
        key = (linear.weight, linear.transposed)
        if key not in self.weights:
            rows = linear.rows_first(edit.state(linear.weight))
            values, scale = kernels.quantize_weight(materialize(rows).detach())
            name = str(linear.weight.target)
            self.weights[key] = (
                edit.constant(f"{name}_int8", values),
                edit.constant(f"{name}_scale", scale),
            )
        return self.weights[key]


@dataclass(frozen=True, repr=False)
class Int8Linear(RulePass):
    """Linear layers on symmetric int8 weights, one scale per output channel.

    `mode="dynamic"` also rounds each token of the input to int8 with a scale taken at run time;
    `mode="weight_only"` leaves activations as they are. `include` and `exclude` are globs over
    module paths (`"encoder.layer.*.output.dense"`). A weight that an embedding reads too is left
    alone unless `tied=True`. Claim: a signal-to-noise ratio of the model's outputs, 16 dB dynamic
    and 26 dB weight-only unless `claim` gives another.

    Raises `PassError` for another mode; static scales need calibration, which isn't offered yet.
    """

    mode: Int8Mode = "dynamic"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    tied: bool = False
    claim: Claim = None  # type: ignore[assignment]
    name: ClassVar[str] = "int8-linear"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def __post_init__(self) -> None:
        mode: str = self.mode
        if mode not in get_args(Int8Mode):
            static = " Static scales need calibration, which this version doesn't offer."
            raise PassError(
                f"Int8Linear(mode={mode!r}): mode must be one of {get_args(Int8Mode)}."
                + (static if mode == "static" else "")
            )
        for option in ("include", "exclude"):
            globs = getattr(self, option)
            globs = (globs,) if isinstance(globs, str) else tuple(globs)
            if not all(isinstance(glob, str) for glob in globs):
                raise PassError(f"Int8Linear({option}={globs!r}): give globs over module paths")
            object.__setattr__(self, option, globs)
        object.__setattr__(self, "claim", getattr(self, "claim", None) or _FLOOR[self.mode])

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for every spelling of a linear."""
        return (QuantizeLinear(self),)


def _reads_as_linear(user: fx.Node) -> bool:
    if as_linear(user) is not None:
        return True
    views = (aten.t.default, aten.transpose.int, aten.permute.default)
    return user.target in views and all(as_linear(inner) is not None for inner in user.users)
