"""What follows an int8 product and can be done in it, before its sums are written.

    f(product(..., "none"))            =  product(..., f)              relu, gelu, silu
    quantize(product(...), s, z)       =  product(..., s, z)           packed_int8_linear
    bf16(product(...))                 =  product(..., bf16)
    quantize_tokens(product(...))      =  product_tokens(...)

The products are `packed_int8_linear`, whose activations have one scale, and `int8_linear_fused`,
where each row has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from fxopt.passes.kernel_selection.activations import ACTIVATIONS, activation_name
from fxopt.passes.mixed_precision.half_values import is_cast
from fxopt.rewriting import Edit, Match, Rule, arguments
from fxopt.rewriting.pattern import Target

aten, ops = torch.ops.aten, torch.ops.fxopt

_IN_TOKENS: dict[Any, Any] = {
    ops.packed_int8_linear.default: ops.packed_int8_linear_tokens.default,
    ops.int8_linear_fused.default: ops.int8_linear_fused_tokens.default,
}


class Epilogue(Rule):
    """A call on the result of an int8 product, which it is the only one to use."""

    def match(self, node: fx.Node) -> Match | None:
        product = node.args[0]
        if not isinstance(product, fx.Node) or product.target not in _IN_TOKENS:
            return None
        given = arguments(product)
        if given.get("out_scale") is not None or not self.fits(node, given):
            return None
        return Match((node,), given, (product,))

    def fits(self, node: fx.Node, product: Mapping[str, Any]) -> bool:
        """Whether a product with these arguments can do the call at its end."""
        raise NotImplementedError

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        target = self.product(match.inner[0].target)
        return edit.call_by_name(target, {**match.bound, **self.inside(match.root)})

    def product(self, target: Any) -> Any:
        """The product that does the call as well as what `target` does."""
        return target

    def inside(self, node: fx.Node) -> dict[str, Any]:
        """The arguments of that product, as far as they differ."""
        raise NotImplementedError


class ActivationInside(Epilogue):
    """f(product(..., "none")) = product(..., f)"""

    def targets(self) -> tuple[Target, ...]:
        return tuple(ACTIVATIONS)

    def fits(self, node: fx.Node, product: Mapping[str, Any]) -> bool:
        return bool(product["post_op"] == "none")

    def inside(self, node: fx.Node) -> dict[str, Any]:
        return {"post_op": activation_name(node)}


class QuantizeInside(Epilogue):
    """quantize(packed_int8_linear(...), s, z) = packed_int8_linear(..., s, z)"""

    def targets(self) -> tuple[Target, ...]:
        return (ops.quantize.default,)

    def fits(self, node: fx.Node, product: Mapping[str, Any]) -> bool:
        scale: Any = node.args[1]
        one_scale = scale.meta["val"].ndim == 0
        return one_scale and "out_scale" in product and product["dtype"] == torch.float32

    def inside(self, node: fx.Node) -> dict[str, Any]:
        _, scale, zero_point = node.args
        dtype = zero_point.meta["val"].dtype  # type: ignore[union-attr]
        return {"out_scale": scale, "out_zero_point": zero_point, "dtype": dtype}


class CastInside(Epilogue):
    """bf16(product(...)) = product(..., bf16)"""

    def targets(self) -> tuple[Target, ...]:
        return (aten.to.dtype,)

    def fits(self, node: fx.Node, product: Mapping[str, Any]) -> bool:
        return is_cast(node, torch.bfloat16) and product["dtype"] == torch.float32

    def inside(self, node: fx.Node) -> dict[str, Any]:
        return {"dtype": torch.bfloat16}


class TokensInside(Epilogue):
    """quantize_tokens(product(...)) = product_tokens(...)"""

    def targets(self) -> tuple[Target, ...]:
        return (ops.quantize_tokens.default,)

    def fits(self, node: fx.Node, product: Mapping[str, Any]) -> bool:
        rounds_alone = node.args[1] is None and node.args[2] is None
        return rounds_alone and product["dtype"] == torch.float32

    def product(self, target: Any) -> Any:
        return _IN_TOKENS[target]

    def inside(self, node: fx.Node) -> dict[str, Any]:
        return {"affine": node.args[3]}
