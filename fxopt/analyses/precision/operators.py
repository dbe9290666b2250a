"""Which operators may compute in half precision: low, high or either, with the numerical reason.

    low      sums of products: rounding the operands errs by u each, independently, and the unit
             sums in float32, so a long sum errs by about u, like a short one
    high     what turns a relative error u of its operand into a larger one, or sums outside a unit
    either   what keeps a relative error as it is: it runs in what its operands are in

u is 2^-9 in bfloat16 and 2^-12 in float16. An operator that isn't listed is high.
Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2002), 1.9 and 4.2; Micikevicius
et al., "Mixed Precision Training" (2018); the lists of `torch.autocast` for comparison.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx

from fxopt.nodes import fake

Side = Literal["low", "high", "either"]


@dataclass(frozen=True)
class OperatorPrecision:
    """Where an operator computes and why.

    `exact`: it moves or selects values and rounds none, so that a cast can cross it. `widens`: it
    reads a half operand beside a float32 one as it is and computes in float32 (type promotion).
    `halved` are the operands that become half with it, None for all. `always`: no wish of the user
    changes its side.
    """

    side: Side
    reason: str
    exact: bool = False
    widens: bool = False
    halved: frozenset[int] | None = None
    always: bool = False


_PRODUCTS = (
    "linear addmm mm matmul bmm baddbmm addbmm mv addmv conv1d conv2d conv3d convolution "
    "conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention"
)
_HIGH = {
    "exponentials and logarithms turn an absolute error into a relative one: 2^-9 of a score of 30 "
    "is 6 % of its exponential": (
        "softmax _softmax log_softmax _log_softmax exp exp2 expm1 log log2 log10 log1p "
        "logsumexp logcumsumexp logaddexp softplus logit sinh cosh erfinv lgamma digamma"
    ),
    "a norm squares and sums a whole row, and the sum loses what is small": (
        "layer_norm group_norm rms_norm _fused_rms_norm native_layer_norm "
        "native_group_norm norm linalg_vector_norm var var_mean std std_mean renorm "
        "cosine_similarity cdist _cdist_forward pairwise_distance"
    ),
    "a sum of many terms outside a product's float32 accumulator loses the small ones": (
        "sum mean cumsum cumprod prod nansum trace avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d histc index_add scatter_add "
        "scatter_reduce index_reduce index_put segment_reduce"
    ),
    "a loss is one small number, and all gradients start from it": (
        "cross_entropy_loss nll_loss nll_loss2d nll_loss_nd mse_loss l1_loss smooth_l1_loss "
        "huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div ctc_loss "
        "cosine_embedding_loss hinge_embedding_loss margin_ranking_loss multi_margin_loss "
        "multilabel_margin_loss poisson_nll_loss soft_margin_loss triplet_margin_loss"
    ),
    "the absolute error of an angle is that of its sine": "sin cos tan asin acos",
    "powers and reciprocals multiply the relative error, and overflow for small numbers": (
        "pow rsqrt sqrt reciprocal float_power"
    ),
    "it decides, and near ties would fall the other way": (
        "gt ge lt le eq ne argmax argmin topk sort argsort isnan isinf isfinite sign "
        "floor ceil round trunc bucketize searchsorted multinomial bernoulli"
    ),
    "it writes the model's own state": "copy",
}
_ARITHMETIC = "add sub rsub mul div addcmul addcdiv lerp atan2 hypot"
_FUNCTIONS = (
    "gelu silu mish hardswish hardsigmoid leaky_relu elu selu celu prelu sigmoid log_sigmoid tanh "
    "erf glu square dropout alpha_dropout feature_dropout native_dropout upsample_linear1d "
    "upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
)
_MOVES = (
    "view _unsafe_view view_as reshape reshape_as permute transpose t numpy_T mT movedim moveaxis "
    "swapaxes unsqueeze squeeze flatten unflatten expand expand_as broadcast_to repeat tile "
    "repeat_interleave slice select narrow split split_with_sizes chunk tensor_split unbind cat "
    "concat stack hstack vstack index index_select gather take_along_dim masked_select embedding "
    "contiguous clone detach alias lift_fresh_copy to _to_copy type_as unfold im2col pixel_shuffle "
    "pixel_unshuffle channel_shuffle roll flip rot90 pad constant_pad_nd reflection_pad1d "
    "reflection_pad2d replication_pad1d replication_pad2d tril triu diagonal diag_embed where "
    "masked_fill scatter slice_scatter select_scatter relu relu6 hardtanh threshold clamp "
    "clamp_min clamp_max neg abs maximum minimum max_pool1d max_pool2d max_pool3d "
    "max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d amax amin upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d"
)
_WIDENING = frozenset(["add", "sub", "rsub", "mul", "div", "atan2", "hypot"])


def _build() -> dict[str, OperatorPrecision]:
    table: dict[str, OperatorPrecision] = {}

    def enter(names: str, side: Side, reason: str, **more: Any) -> None:
        for name in names.split():
            table[name] = OperatorPrecision(side, reason, widens=name in _WIDENING, **more)

    enter(_PRODUCTS, "low", "a sum of products, which the unit sums in float32")
    for reason, names in _HIGH.items():
        enter(names, "high", reason)
    enter(_ARITHMETIC, "either", "its relative error is its operands'")
    enter(_FUNCTIONS, "either", "a smooth function that keeps relative errors about as they are")
    enter(_MOVES, "either", "it moves or selects values and rounds none", exact=True)
    enter(
        "batch_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
        "_native_batch_norm_legit_no_training instance_norm",
        "either",
        "it scales and shifts by statistics that stay in float32",
        halved=frozenset({0}),
    )
    return table


OPERATORS: MappingProxyType[str, OperatorPrecision] = MappingProxyType(_build())
"""Name of an aten operator, without namespace and overload -> where it computes."""

UNLISTED = OperatorPrecision("high", "not in the table of operators, so left as it is")
_SMALL_POWER = OperatorPrecision("either", "a product of two or three equal factors")
_ITEM = OperatorPrecision("either", "it moves or selects values and rounds none", exact=True)
_FROM_INTEGERS = OperatorPrecision(
    "high", "it makes numbers of integers, which half would round", always=True
)
_NO_FLOAT = OperatorPrecision("high", "it decides or counts: its result is no float", always=True)
_QUANTIZED = OperatorPrecision(
    "high", "its operands are quantized: its kernel has its own dtype", always=True
)
_CACHED = OperatorPrecision(
    "high", "it reads what earlier calls computed, in the dtype that it is kept in", always=True
)
_OTHER_FLOAT = OperatorPrecision("high", "it computes in other dtypes than float32", always=True)


def operator_precision(node: fx.Node) -> OperatorPrecision:
    """Where the operator that `node` calls computes, its arguments considered."""
    if node.target is operator.getitem:
        return _ITEM
    if not isinstance(node.target, torch._ops.OpOverload):
        return UNLISTED
    if node.target in (
        torch.ops.fxopt.cached_attention.default,
        torch.ops.fxopt.int8_cached_attention.default,
    ):
        return _CACHED
    namespace, _, name = node.target._schema.name.partition("::")
    found = OPERATORS.get(name.removesuffix("_")) if namespace == "aten" else None
    if found is None:
        return UNLISTED
    if name == "pow" and node.args[1] in (2, 3):
        return _SMALL_POWER
    if found.side == "low" and any(_is_dequantized(operand) for operand in node.all_input_nodes):
        return _QUANTIZED
    makes = _floats(node)
    reads = {dtype for operand in node.all_input_nodes for dtype in _floats(operand)}
    if (makes | reads) - {torch.float32}:
        return _OTHER_FLOAT
    if not makes:
        return _NO_FLOAT
    if found.exact and not reads:
        return _FROM_INTEGERS
    return found


def _is_dequantized(node: fx.Node) -> bool:
    return node.target is torch.ops.fxopt.dequantize.default


def _floats(node: fx.Node) -> set[torch.dtype]:
    value = fake(node)
    values = value if isinstance(value, (tuple, list)) else (value,)
    dtypes = {one.dtype for one in values if isinstance(one, Tensor)}
    return {dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex}
