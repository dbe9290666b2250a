"""What counts as a linear layer: y = x @ Wᵀ + b with a constant W, in each spelling of the dialect.

aten.linear(x, W, b)                 W: [N, K]
aten.addmm(b, x, V), aten.mm(x, V)   V = Wᵀ: [K, N]   (GPT-2's Conv1D)
aten.matmul(x, V)                    V: [K, N]
any of these with V = aten.t(W), aten.transpose(W, 0, 1) or aten.permute(W, [1, 0])

W may be state, or computed from state alone: see `constant_expressions`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.constant_expressions import expression, is_computed_constant
from fxopt.nodes import module_path
from fxopt.recipe import Recipe

aten = torch.ops.aten

LINEAR_TARGETS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
)


@dataclass(frozen=True)
class Linear:
    """One linear layer of a graph.

    `weight` is the `get_attr` node, or what is computed from state alone; `transposed` says that it
    holds Wᵀ ([K, N]) rather than W.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None

    @property
    def name(self) -> str:
        """The weight's name in the state, or one for a weight that is computed."""
        if self.weight.op == "get_attr":
            return str(self.weight.target)
        path = module_path(self.weight)
        return f"{path}.{self.weight.name}" if path else self.weight.name

    @property
    def out_features(self) -> int:
        """N, the number of output channels."""
        return int(self.weight.meta["val"].shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return int(self.weight.meta["val"].shape[0 if self.transposed else 1])

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype."""
        dtype = self.weight.meta["val"].dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def weight_nk(self, tensor: Tensor | Recipe) -> Tensor | Recipe:
        """W as [N, K] from what the weight node holds; a recipe where it must be transposed."""
        if not self.transposed:
            return tensor
        shape = torch.Size((self.out_features, self.in_features))
        grad = tensor.requires_grad
        return Recipe(transpose, (tensor,), shape, tensor.dtype, tensor.device, grad)


def transpose(weight: Tensor) -> Tensor:
    """Wᵀ [N, K], contiguous, from [K, N]."""
    return weight.t().contiguous()


def as_linear(node: fx.Node, computed: bool = False) -> Linear | None:
    """The linear layer that `node` computes, or None.

    With `computed`, weights that are computed from state alone count as well, and any bias [N]; a
    product of two constants doesn't: it is part of a weight.
    """
    if computed and node.target in LINEAR_TARGETS and is_computed_constant(node):
        return None
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        return _linear(node, x, weight, False, bias, computed)
    if node.target is aten.addmm.default:
        bias, x, weight = node.args
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        return _linear(node, x, weight, True, bias, computed) if _rank(bias) == 1 else None
    if node.target in (aten.mm.default, aten.matmul.default):
        return _linear(node, node.args[0], node.args[1], True, None, computed)
    return None


def refuse_shared_weight(linear: Linear, is_linear_use: Callable[[fx.Node], bool]) -> str | None:
    """Why a weight that something else reads too (a tied embedding) is left alone."""
    reads = [(linear.weight, user) for user in linear.weight.users if not is_linear_use(user)]
    if linear.weight.op != "get_attr":
        found = expression(linear.weight)
        matrices = [leaf for leaf in found.leaves if (_rank(leaf) or 0) > 1] if found else []
        reads += [
            (one, user) for one in matrices for user in one.users if not reads_as_linear(user)
        ]
    for weight, user in reads:
        kind = str(user.target).removeprefix("aten.").partition(".")[0]
        name = weight.target if weight.op == "get_attr" else weight.name
        return f"its weight {name} is tied: {kind} reads it too"
    return None


def reads_as_linear(user: fx.Node) -> bool:
    """Whether `user` of a weight is a linear layer, or computes a weight for such alone."""
    if as_linear(user, computed=True) is not None:
        return True
    return is_computed_constant(user) and all(map(reads_as_linear, user.users))


def _linear(
    node: fx.Node, x: object, weight: object, transposed: bool, bias: object, computed: bool
) -> Linear | None:
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    if _rank(weight) != 2 or not _rank(x):
        return None
    turned = _untransposed(weight)
    if turned is not None and (turned.op == "get_attr" or computed):
        weight, transposed = turned, not transposed
    if weight.op != "get_attr" and not (computed and is_computed_constant(weight)):
        return None
    if bias is not None:
        if not isinstance(bias, fx.Node) or (bias.op != "get_attr" and not computed):
            return None
        if _rank(bias) != 1:
            return None
    return Linear(node, x, weight, transposed, bias)


def _untransposed(weight: fx.Node) -> fx.Node | None:
    if _rank(weight) != 2:
        return None
    swaps = (
        weight.target is aten.t.default
        or (weight.target is aten.transpose.int and {a % 2 for a in weight.args[1:3]} == {0, 1})  # type: ignore[operator]
        or (weight.target is aten.permute.default and list(weight.args[1]) == [1, 0])  # type: ignore[arg-type]
    )
    source = weight.args[0] if swaps else None
    return source if isinstance(source, fx.Node) else None


def _rank(node: object) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else None
