"""Reconstruction: what is left of a layer makes up for the input channels that it loses.

    y = W_K p_K + W_M p_M + b   ~   W' p_K + b'

With C = Σ w p pᵀ over the calibration's rows (centred where a bias can follow), the least-squares
fit that is pulled towards the old weight with a weight λ is

    W' = W_K + W_M C_MK (C_KK + λ)⁻¹                    b' = b + W_M m_M - (W' - W_K) m_K

for the mean row m. So it is never worse on these rows than W' = W_K, which is plain zeroing. The
weights w are all 1, or how sensitive the program's outputs are to an error there (`fisher`).
What a column costs that leaves, all others refitted, is ‖W_j‖² / (C + λ)⁻¹_jj.

Sources: He, Zhang, Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017;
Kwon et al., "A Fast Post-Training Pruning Framework for Transformers", NeurIPS 2022;
Hassibi, Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992;
Kurtic, Frantar, Alistarh, "ZipLM", NeurIPS 2023, for columns that leave together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxopt.errors import PassError
from fxopt.nodes import label
from fxopt.observation.gram import Gram, Product, Weighting, as_product, few_rows, grams
from fxopt.program import Program

DAMPING = 1e-4
_LARGEST_DAMPING = 1.0


@dataclass(frozen=True)
class Fitted:
    """A reader refitted to the channels that it keeps.

    `weight` has the shape and dtype of the old one, with zeros for the channels that left; `bias`
    is None where the layer has none. Errors are squares summed over the outputs of a row, mean over
    the calibration's rows by their weights, against the old outputs: `error_before` with the
    channels zeroed alone, `error_after` with this weight and bias before they are rounded to their
    dtype. `warning` tells that there were fewer rows than columns.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error_after: float
    warning: str | None = None


def reconstruct(
    program: Program,
    masks: Mapping[str, Tensor],
    damping: float = DAMPING,
    weighting: Weighting = "uniform",
    seed: int = 0,
) -> dict[str, Fitted]:
    """Each reader refitted by least squares to what it keeps of its inputs, by its node name.

    `masks` gives bool [K] by the reader's node name: True for the input channels that stay (along
    the weight's input axis: columns of a linear layer, kernels of a convolution). Readers are
    linear layers in any spelling, and convolutions of one or two axes in one group, of which at
    most 1024 patches an image are taken. The inputs are those of `program.batches()`, streamed in
    as many passes as Gram matrices of 512 MiB take; `damping` is λ as a share of the mean diagonal
    of C. Readers that share a weight are fitted together and must have the same mask. `weighting`
    says what a row counts: all the same, or with "fisher" as much as the program's outputs are
    sensitive to an error there, from one backward pass a batch, drawn from `seed`.

    Raises `PassError` for a reader that isn't in the program or can't be fitted, with the reason,
    for a mask that doesn't fit, for shared weights with different masks, and for "fisher" where
    gradients don't reach the readers.
    """
    if not 0.0 <= damping <= _LARGEST_DAMPING:
        raise PassError(f"reconstruct(damping={damping!r}): give a share between 0 and 1")
    nodes = {node.name: node for node in program.graph.nodes}
    sets: dict[tuple[str, bool], list[Product]] = {}
    for name, mask in masks.items():
        product = _product_of(nodes, name)
        _check_mask(product, mask)
        sets.setdefault((str(product.weight.target), product.transposed), []).append(product)
    fitted: dict[str, Fitted] = {}
    for products, gram in grams(program, list(sets.values()), weighting, seed):
        kept = masks[products[0].node.name]
        if any(not torch.equal(kept, masks[one.node.name]) for one in products):
            names = " and ".join(label(one.node) for one in products)
            raise PassError(
                f"reconstruct: {names} share the weight {products[0].weight.target}, so they must "
                "keep the same channels; give them one mask"
            )
        fitted.update(_fit(program, products, gram, kept, damping))
    return {name: fitted[name] for name in masks}


def removal_errors(
    gram: Tensor, weight: Tensor, columns: Tensor | None = None, damping: float = DAMPING
) -> Tensor:
    """What the output error grows by when columns leave and the others are refitted.

    `gram` float [K, K] is the sum of p pᵀ over rows p, `weight` is [N, K]. Returns float64 [K], in
    the unit of `gram`; with `columns`, int64 [size, width], float64 [size] for the columns of each
    row leaving together. Exact for `damping=0` and an invertible `gram`; else λ, that share of its
    mean diagonal, is added to the diagonal, and a column pays λ ‖W_j‖² itself.
    """
    if columns is None:
        columns = torch.arange(gram.shape[0]).unsqueeze(1)
    return Removal(gram.double(), weight.double(), columns, damping).errors()


class Removal:
    """Channels leaving one after the other: `weight` is always refitted to those that are left.

    `gram` is float64 [K, K], `weight` float64 [N, K], `columns` int64 [size, width] tells which
    columns a channel takes. A layer with more outputs than inputs is replaced by the triangle R of
    W = QR, which has the same errors.
    """

    def __init__(self, gram: Tensor, weight: Tensor, columns: Tensor, damping: float) -> None:
        self.columns = columns.to(gram.device)
        tall = weight.shape[0] > 2 * weight.shape[1]
        self.weight = torch.linalg.qr(weight, mode="r").R if tall else weight.clone()
        self.inverse = torch.cholesky_inverse(_cholesky(gram, damping)[0])

    def errors(self) -> Tensor:
        """The error that each channel adds by leaving next, float64 [size]; 0 for one that left."""
        if self.columns.shape[1] == 1:
            at = self.columns[:, 0]
            energies: Tensor = self.weight[:, at].square().sum(0)
            return energies / self.inverse.diagonal()[at]
        blocks = self.inverse[self.columns.unsqueeze(2), self.columns.unsqueeze(1)]
        weights = self.weight.t()[self.columns]
        lower = torch.linalg.cholesky(blocks)
        solved: Tensor = torch.linalg.solve_triangular(lower, weights, upper=False)
        return solved.square().sum((1, 2))

    def remove(self, channels: Tensor) -> float:
        """Let `channels` (int64 indices) leave together; the error that this adds."""
        gone = self.columns[channels].flatten()
        lower = torch.linalg.cholesky(self.inverse[gone][:, gone])
        weight = self.weight[:, gone].t()
        error = float(torch.linalg.solve_triangular(lower, weight, upper=False).square().sum())
        taken = torch.cholesky_solve(self.inverse[gone], lower)
        self.weight.addmm_(weight.t(), taken, alpha=-1)
        self.inverse.addmm_(self.inverse[:, gone].clone(), taken, alpha=-1)
        # Rounding leaves traces of what is gone; a one keeps its block invertible.
        self.weight[:, gone] = 0.0
        self.inverse[gone] = 0.0
        self.inverse[:, gone] = 0.0
        self.inverse[gone, gone] = 1.0
        return error


def refuse_fit(node: fx.Node) -> str | None:
    """Why a reader can't be refitted by `reconstruct`, or None."""
    product = as_product(node)
    return product if isinstance(product, str) else None


def _product_of(nodes: Mapping[str, fx.Node], name: str) -> Product:
    if name not in nodes:
        raise PassError(f"reconstruct: no node of the program is called {name!r}")
    product = as_product(nodes[name])
    if isinstance(product, str):
        raise PassError(f"reconstruct: {label(nodes[name])} can't be refitted: {product}")
    return product


def _check_mask(product: Product, mask: Tensor) -> None:
    if mask.dtype != torch.bool or tuple(mask.shape) != (product.channels,):
        raise PassError(
            f"reconstruct: the mask of {label(product.node)} is {mask.dtype} of "
            f"{tuple(mask.shape)}; give bool of ({product.channels},), True for what it keeps"
        )


def _fit(
    program: Program, products: Sequence[Product], gram: Gram, kept: Tensor, damping: float
) -> dict[str, Fitted]:
    first = products[0]
    old = program.tensor(str(first.weight.target)).detach()
    # One weight that meets several biases has one fit, which no bias of theirs can follow.
    has_bias = first.bias is not None and all(one.bias is first.bias for one in products)
    matrix = first.matrix(old)
    gone = first.columns_of((~kept).nonzero()[:, 0]).to(matrix.device)
    stay = first.columns_of(kept.nonzero()[:, 0]).to(matrix.device)
    lost = matrix[:, gone]
    moment = gram.centred() if has_bias else gram.moment
    shift, after = _shift(moment, lost, gone, stay, damping)
    before = _energy(lost, gram.moment[gone][:, gone])
    weight = torch.zeros_like(matrix)
    weight[:, stay] = matrix[:, stay] + shift
    moved = lost @ gram.mean[gone] - shift @ gram.mean[stay] if has_bias else 0.0
    rows = gram.weight or 1.0
    fitted: dict[str, Fitted] = {}
    for product in products:
        bias = None if product.bias is None else program.tensor(str(product.bias.target)).detach()
        fitted[product.node.name] = Fitted(
            first.tensor(weight, old),
            None if bias is None else (bias.double() + moved).to(bias.dtype),
            before / rows,
            after / rows,
            few_rows(products, gram),
        )
    return fitted


def _shift(
    moment: Tensor, lost: Tensor, gone: Tensor, stay: Tensor, damping: float
) -> tuple[Tensor, float]:
    """(W' - W_K, the error that it leaves).

    With S = W_M C_MM W_Mᵀ, R = W_M C_MK and D = W' - W_K:  S - 2 R Dᵀ + D C_KK Dᵀ, of which
    D (C_KK + λ) = R  leaves  S - R Dᵀ - λ D Dᵀ.
    """
    whole = _energy(lost, moment[gone][:, gone])
    right = lost @ moment[gone][:, stay]
    if not len(stay):
        return right, whole
    lower, added = _cholesky(moment[stay][:, stay], damping)
    shift = torch.cholesky_solve(right.t(), lower).t()
    gained = float((right * shift).sum()) + added * float(shift.square().sum())
    return shift, max(0.0, whole - gained)


def _energy(weight: Tensor, moment: Tensor) -> float:
    """Σ over outputs of w C wᵀ; never negative but by rounding."""
    return max(0.0, float(((weight @ moment) * weight).sum()))


def _cholesky(moment: Tensor, damping: float) -> tuple[Tensor, float]:
    """L with H + λ = L Lᵀ, and λ: `damping` times the mean diagonal, and ten times more until
    H + λ is positive definite."""
    mean = (float(moment.diagonal().mean()) if len(moment) else 0.0) or 1.0
    share = damping
    while True:
        added = share * mean
        damped = moment.clone()
        damped.diagonal().add_(added)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not bool(info) and bool(lower.diagonal().isfinite().all()):
            return lower, added
        if share >= _LARGEST_DAMPING:
            raise PassError(
                "reconstruct: the Gram matrix stays indefinite with its mean diagonal added, so it "
                "is no sum of p pᵀ over rows p. Look for infinity in the calibration inputs."
            )
        share = min(_LARGEST_DAMPING, max(share, 1e-12) * 10.0)
