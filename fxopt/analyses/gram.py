"""Gram matrices: what calibration tells of the inputs of linear layers and convolutions.

Both are one matrix product, y = M p + b, over rows p: of a linear layer its input, of a convolution
the patches that its kernel sees. Sums of p pᵀ and p, in float64, are all that a least-squares fit
of M needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxopt.analyses.linears import as_linear
from fxopt.analyses.observation import observe
from fxopt.program import Program, arguments, label

aten = torch.ops.aten

_ROWS = 1 << 12
_COLUMNS = 1 << 10
_WAVE_BYTES = 1 << 29
_PATCHES = 1 << 10
"""Patches of one image, evenly spread, that a convolution is fitted to; neighbours say the same."""

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
)


@dataclass(frozen=True)
class Product:
    """A node as y = M p + b.

    `weight` and `bias` are `get_attr` nodes; `channels` says how many input channels there are and
    `taps` how many columns of M, [N, channels x taps], each of them takes.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    channels: int
    taps: int
    transposed: bool
    window: _Window | None

    @property
    def columns(self) -> int:
        """How many columns M has."""
        return self.channels * self.taps

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for products that have the same rows."""
        return self.x, self.window

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """The rows p of a value of x, [R, columns], some at a time."""
        if self.window is not None:
            return self.window.rows(x)
        return iter(x.detach().reshape(-1, x.shape[-1]).split(_ROWS))

    def matrix(self, weight: Tensor) -> Tensor:
        """M [N, columns], float64, from what the weight node holds."""
        rows = weight.detach().t() if self.transposed else weight.detach().flatten(1)
        return rows.double()

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        """What the weight node would hold for M, in the shape and dtype of `like`."""
        rows = matrix.t() if self.transposed else matrix
        return rows.reshape(like.shape).to(like.dtype).contiguous()

    def columns_of(self, channels: Tensor) -> Tensor:
        """int64 indices of M's columns for indices of channels, [..., taps] flattened."""
        if self.taps == 1:
            return channels
        spread = channels.unsqueeze(-1) * self.taps + torch.arange(self.taps)
        return spread.flatten(-2)


def as_product(node: fx.Node) -> Product | str:
    """`node` as a matrix product, or the reason why it isn't one that can be fitted."""
    linear = as_linear(node)
    if linear is not None:
        inner, turned = linear.in_features, linear.transposed
        return Product(node, linear.x, linear.weight, linear.bias, inner, 1, turned, None)
    if node.target not in _CONVOLUTIONS:
        return f"{node.target} is neither a linear layer nor a convolution of one or two axes"
    args = arguments(node)
    x, weight, bias = args["input"], args["weight"], args["bias"]
    if args["groups"] != 1:
        return f"a convolution in {args['groups']} groups"
    if weight.op != "get_attr" or (bias is not None and bias.op != "get_attr"):
        return "its weight is computed"
    if x.meta["val"].ndim != weight.meta["val"].ndim:
        return "a convolution without a batch"
    shape = weight.meta["val"].shape
    window = _Window.of(args, tuple(shape[2:]))
    return Product(node, x, weight, bias, shape[1], shape[2:].numel(), False, window)


class Gram:
    """Sums over all finite rows p seen: `moment` p pᵀ [K, K] and `sums` p [K], float64; `rows` is
    their number."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._moment = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self.rows = 0

    @property
    def moment(self) -> Tensor:
        """Σ p pᵀ, float64 [K, K]."""
        moment = self._moment
        for first in range(0, len(moment), _COLUMNS):
            last = first + _COLUMNS
            moment[last:, first:last] = moment[first:last, last:].t()
        return moment

    @property
    def mean(self) -> Tensor:
        """The mean row, float64 [K]; zeros before any."""
        return self.sums / max(1, self.rows)

    def centred(self) -> Tensor:
        """Σ (p - mean)(p - mean)ᵀ: what is left of the moment once a bias follows the fit."""
        return torch.addr(self.moment, self.sums, self.mean, alpha=-1)

    def add(self, rows: Tensor) -> None:
        """Take in `rows` [R, K]; those that hold infinity are left out."""
        rows = rows.detach().double()
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            rows = rows[finite]
        # The moment is symmetric: blocks right of the diagonal are enough, at half the time.
        for first in range(0, rows.shape[1], _COLUMNS):
            some = rows[:, first : first + _COLUMNS]
            block = self._moment[first : first + _COLUMNS, first:]
            block.addmm_(some.t(), rows[:, first:])
        self.sums += rows.sum(0)
        self.rows += len(rows)


def grams(
    program: Program, sets: Sequence[Sequence[Product]]
) -> Iterator[tuple[Sequence[Product], Gram]]:
    """Each set of products, in order, with the Gram matrix of the rows that they all see together.

    A set is one product, or several that share one weight. The calibration is streamed once for as
    many as fit into 512 MiB; products of one input share their matrix.
    """
    for wave in _waves(sets):
        found: dict[tuple[object, ...], Gram] = {}
        watched: dict[fx.Node, list[_Rows]] = {}
        for products in wave:
            key = _key(products)
            if key in found:
                continue
            gram = found[key] = Gram(products[0].columns, products[0].x.meta["val"].device)
            for product in {one.key: one for one in products}.values():
                watched.setdefault(product.x, []).append(_Rows(gram, product))
        observe(program, watched)
        for products in wave:
            yield products, found[_key(products)]


def few_rows(products: Sequence[Product], gram: Gram) -> str | None:
    """A warning that a fit has fewer rows than columns to find, or None."""
    columns = products[0].columns
    if gram.rows >= columns:
        return None
    names = ", ".join(label(product.node) for product in products)
    return (
        f"{names} was fitted to {gram.rows} rows of {columns} columns, which says little of other "
        "inputs: give calibration= more of them"
    )


def _waves(sets: Sequence[Sequence[Product]]) -> Iterator[list[Sequence[Product]]]:
    wave: list[Sequence[Product]] = []
    held: dict[tuple[object, ...], int] = {}
    for products in sets:
        size = 8 * products[0].columns ** 2
        if wave and _key(products) not in held and sum(held.values()) + size > _WAVE_BYTES:
            yield wave
            wave, held = [], {}
        wave.append(products)
        held[_key(products)] = size
    if wave:
        yield wave


def _key(products: Sequence[Product]) -> tuple[object, ...]:
    return tuple(dict.fromkeys(product.key for product in products))


@dataclass(frozen=True)
class _Rows:
    """An observer that feeds a product's rows to a Gram matrix."""

    gram: Gram
    product: Product

    def update(self, value: Tensor) -> None:
        for rows in self.product.rows(value):
            self.gram.add(rows)


@dataclass(frozen=True)
class _Window:
    """How a convolution slides, along two axes; the first is of size 1 where it has one only."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]

    @staticmethod
    def of(args: dict[str, Any], kernel: tuple[int, ...]) -> _Window:
        """The window of a convolution with these arguments."""

        def pair(given: Sequence[int], filler: int) -> tuple[int, int]:
            spread = list(given) * (len(kernel) if len(given) == 1 else 1)
            return (filler, spread[0]) if len(kernel) == 1 else (spread[0], spread[1])

        size, dilation = pair(kernel, 1), pair(args["dilation"], 1)
        padding = args["padding"]
        if padding == "same":
            reach = [step * (taps - 1) for step, taps in zip(dilation, size, strict=True)]
            before = (reach[0] // 2, reach[1] // 2)
            after = (reach[0] - before[0], reach[1] - before[1])
        else:
            before = after = pair([0] if padding == "valid" else padding, 0)
        return _Window(size, pair(args["stride"], 1), dilation, before, after)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        """The patches of each image, [at most 1024, channels x taps]."""
        (top, left), (bottom, right) = self.before, self.after
        for image in x.detach().split(1):
            flat = image if image.ndim == 4 else image.unsqueeze(2)
            padded = functional.pad(flat, (left, right, top, bottom))
            patches = functional.unfold(
                padded, self.kernel, dilation=self.dilation, stride=self.stride
            )[0]
            count = patches.shape[1]
            if count > _PATCHES:
                patches = patches[:, torch.arange(_PATCHES, device=x.device) * count // _PATCHES]
            yield patches.t()
