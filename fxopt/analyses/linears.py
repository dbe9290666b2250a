"""What counts as a linear layer: y = x @ Wᵀ + b with a constant W, in each spelling of the dialect.

aten.linear(x, W, b)                 W: [N, K]
aten.addmm(b, x, V), aten.mm(x, V)   V = Wᵀ: [K, N]   (GPT-2's Conv1D)
aten.matmul(x, V)                    V: [K, N]
any of these with V = aten.t(W), aten.transpose(W, 0, 1) or aten.permute(W, [1, 0])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.program import Recipe

aten = torch.ops.aten

LINEAR_TARGETS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
)

_TRANSPOSITIONS = (aten.t.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Linear:
    """One linear layer of a graph.

    `weight` is the `get_attr` node; `transposed` says that it holds Wᵀ ([K, N]) rather than W.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None

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

    def rows_first(self, tensor: Tensor | Recipe) -> Tensor | Recipe:
        """W as [N, K] from what the weight node holds; a recipe where it must be transposed."""
        if not self.transposed:
            return tensor
        shape = torch.Size((self.out_features, self.in_features))
        grad = tensor.requires_grad
        return Recipe(transpose, (tensor,), shape, tensor.dtype, tensor.device, grad)


def transpose(weight: Tensor) -> Tensor:
    """Wᵀ [N, K], contiguous, from [K, N]."""
    return weight.t().contiguous()


def as_linear(node: fx.Node) -> Linear | None:
    """The linear layer that `node` computes, or None."""
    if node.target is aten.linear.default:
        x, weight, bias = (*node.args, None)[:3]
        return _linear(node, x, weight, False, bias)
    if node.target is aten.addmm.default:
        bias, x, weight = node.args
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        return _linear(node, x, weight, True, bias) if _rank(bias) == 1 else None
    if node.target in (aten.mm.default, aten.matmul.default):
        return _linear(node, node.args[0], node.args[1], True, None)
    return None


def refuse_shared_weight(linear: Linear, is_linear_use: Callable[[fx.Node], bool]) -> str | None:
    """Why a weight that something else reads too (a tied embedding) is left alone."""
    other = next((user for user in linear.weight.users if not is_linear_use(user)), None)
    if other is None:
        return None
    kind = str(other.target).removeprefix("aten.").partition(".")[0]
    return f"its weight {linear.weight.target} is tied: {kind} reads it too"


def reads_as_linear(user: fx.Node) -> bool:
    """Whether `user` of a weight is a linear layer, or a transposition for linear layers alone."""
    if as_linear(user) is not None:
        return True
    return user.target in _TRANSPOSITIONS and all(map(as_linear, user.users))


def _linear(
    node: fx.Node, x: object, weight: object, transposed: bool, bias: object
) -> Linear | None:
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    turned = _untransposed(weight)
    if turned is not None:
        weight, transposed = turned, not transposed
    if weight.op != "get_attr" or _rank(weight) != 2 or not _rank(x):
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
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
    return source if isinstance(source, fx.Node) and source.op == "get_attr" else None


def _rank(node: object) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else None
