"""Gram matrices: what calibration tells of the inputs of linear layers and convolutions.

Both are one matrix product, y = M p + b, over rows p: of a linear layer its input, of a convolution
the patches that its kernel sees. Sums of w p pᵀ and w p, in float64, are all that a least-squares
fit of M needs; the weights w of rows are 1, or how sensitive the outputs are to an error there
(`fisher`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx
from torch.nn import functional

from fxopt.errors import PassError
from fxopt.nodes import arguments, label
from fxopt.observation.fisher import output_gradients
from fxopt.observation.observation import observe
from fxopt.operators.convolutions import CONVOLUTIONS
from fxopt.operators.linears import as_linear
from fxopt.program import Program

Weighting: TypeAlias = Literal["uniform", "fisher"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)

_ROWS = 1 << 12
_COLUMNS = 1 << 10
_WAVE_BYTES = 1 << 29
_PATCHES = 1 << 10
"""Patches of one image, evenly spread, that a convolution is fitted to; neighbours say the same."""


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

    def energies(self, y: Tensor) -> Iterator[Tensor]:
        """The sums of squares over the outputs of a value of the node's shape, [R], as `rows`."""
        if self.window is not None:
            squares = y.detach().square().sum(1).flatten(1)
            return iter(_spread(image) for image in squares)
        return iter(y.detach().square().sum(-1).flatten().split(_ROWS))

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
    args = arguments(node) if node.target in CONVOLUTIONS else {}
    if not args or args["weight"].meta["val"].ndim > 4:
        return f"{node.target} is neither a linear layer nor a convolution of one or two axes"
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
    """Sums over all finite rows p seen: `moment` w p pᵀ [K, K] and `sums` w p [K], float64; `rows`
    is their number and `weight` Σ w, the same where every row has w = 1."""

    def __init__(self, columns: int, device: torch.device | None = None) -> None:
        self._moment = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self.sums = torch.zeros(columns, dtype=torch.float64, device=device)
        self.rows = 0
        self.weight = self._squares = 0.0

    @property
    def moment(self) -> Tensor:
        """Σ w p pᵀ, float64 [K, K]."""
        moment = self._moment
        for first in range(0, len(moment), _COLUMNS):
            last = first + _COLUMNS
            moment[last:, first:last] = moment[first:last, last:].t()
        return moment

    @property
    def mean(self) -> Tensor:
        """The mean row, float64 [K]; zeros before any."""
        return self.sums / (self.weight or 1.0)

    @property
    def effective_rows(self) -> float:
        """(Σ w)² / Σ w²: how many rows of one weight would say as much (Kish 1965)."""
        return self.weight**2 / (self._squares or 1.0)

    def centred(self) -> Tensor:
        """Σ w (p - mean)(p - mean)ᵀ: what is left of the moment once a bias follows the fit."""
        return torch.addr(self.moment, self.sums, self.mean, alpha=-1)

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Take in `rows` [R, K] with `weights` [R]; those that hold infinity are left out."""
        rows = rows.detach().double()
        finite = rows.isfinite().all(1)
        if not bool(finite.all()):
            rows = rows[finite]
            weights = None if weights is None else weights[finite]
        self.rows += len(rows)
        if weights is None:
            self.weight, self._squares = self.weight + len(rows), self._squares + len(rows)
            self._add(rows, rows)
            return
        weights = weights.double()
        self.weight += float(weights.sum())
        self._squares += float(weights.square().sum())
        # Padding is a good part of many batches, and weighs nothing.
        counts = weights > 0
        rows = rows[counts]
        self._add(rows, rows * weights[counts].unsqueeze(1))

    def _add(self, rows: Tensor, weighted: Tensor) -> None:
        # The moment is symmetric: blocks right of the diagonal are enough, at half the time.
        for first in range(0, rows.shape[1], _COLUMNS):
            some = weighted[:, first : first + _COLUMNS]
            block = self._moment[first : first + _COLUMNS, first:]
            block.addmm_(some.t(), rows[:, first:])
        self.sums += weighted.sum(0)


def grams(
    program: Program,
    sets: Sequence[Sequence[Product]],
    weighting: Weighting = "uniform",
    seed: int = 0,
) -> Iterator[tuple[Sequence[Product], Gram]]:
    """Each set of products, in order, with the Gram matrix of the rows that they all see together.

    A set is one product, or several that share one weight. The calibration is streamed once for as
    many as fit into 512 MiB; products of one input share their matrix. "fisher" weighs each row by
    how sensitive the program's outputs are to an error in the product there, drawn from `seed`
    (`fisher.output_gradients`); then a matrix is shared by the products of one set alone.

    Raises `PassError` for an unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise PassError(f"weighting={weighting!r}: give one of {', '.join(WEIGHTINGS)}")
    key, fill = (_input_key, _observe) if weighting == "uniform" else (_node_key, _weigh)
    for wave in _waves(sets, key):
        found: dict[tuple[object, ...], Gram] = {}
        members: list[tuple[Gram, Product]] = []
        for products in wave:
            if key(products) in found:
                continue
            gram = Gram(products[0].columns, products[0].x.meta["val"].device)
            found[key(products)] = gram
            members += [(gram, product) for product in products]
        fill(program, members, seed)
        for products in wave:
            yield products, found[key(products)]


def few_rows(products: Sequence[Product], gram: Gram) -> str | None:
    """A warning that a fit has fewer rows than columns to find, or None."""
    columns = products[0].columns
    if gram.rows >= columns and gram.effective_rows >= columns:
        return None
    names = ", ".join(label(product.node) for product in products)
    count = f"{gram.rows} rows"
    if gram.effective_rows < gram.rows - 0.5:
        count += f", by their weights worth {gram.effective_rows:.0f},"
    return (
        f"{names} was fitted to {count} of {columns} columns, which says little of other "
        "inputs: give calibration= more of them"
    )


_Key: TypeAlias = Callable[[Sequence[Product]], tuple[object, ...]]


def _waves(sets: Sequence[Sequence[Product]], key: _Key) -> Iterator[list[Sequence[Product]]]:
    wave: list[Sequence[Product]] = []
    held: dict[tuple[object, ...], int] = {}
    for products in sets:
        size = 8 * products[0].columns ** 2
        if wave and key(products) not in held and sum(held.values()) + size > _WAVE_BYTES:
            yield wave
            wave, held = [], {}
        wave.append(products)
        held[key(products)] = size
    if wave:
        yield wave


def _input_key(products: Sequence[Product]) -> tuple[object, ...]:
    return tuple(dict.fromkeys(product.key for product in products))


def _node_key(products: Sequence[Product]) -> tuple[object, ...]:
    return tuple(product.node for product in products)


def _observe(program: Program, members: Sequence[tuple[Gram, Product]], seed: int) -> None:
    watched: dict[fx.Node, dict[object, _Rows]] = {}
    for gram, product in members:
        watched.setdefault(product.x, {})[id(gram), product.key] = _Rows(gram, product)
    observe(program, {node: list(rows.values()) for node, rows in watched.items()})


def _weigh(program: Program, members: Sequence[tuple[Gram, Product]], seed: int) -> None:
    inputs = {product.node: product.x for _, product in members}
    for seen in output_gradients(program, inputs, seed):
        for gram, product in members:
            x, gradient = seen[product.node]
            rows = zip(product.rows(x), product.energies(gradient), strict=True)
            for some, weights in rows:
                gram.add(some, weights)


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
            yield _spread(patches.t())


def _spread(patches: Tensor) -> Tensor:
    """At most 1024 of the patches, [count, ...], evenly spread."""
    count = len(patches)
    if count <= _PATCHES:
        return patches
    return patches[torch.arange(_PATCHES, device=patches.device) * count // _PATCHES]
