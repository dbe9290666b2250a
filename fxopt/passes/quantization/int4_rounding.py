"""How Int4Linear rounds a layer, and what calibration tells it: scales of inputs, and feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fxopt.analyses.channel_scaling import Absorption
from fxopt.errors import KernelError, PassError
from fxopt.kernels import pack_int4
from fxopt.nodes import label
from fxopt.operators import Linear, as_linear
from fxopt.passes.linear_layers.linear_rule import rows_of
from fxopt.passes.linear_layers.weight_inputs import watch_moments
from fxopt.passes.quantization.quantize_linear import WeightKey, weight_key
from fxopt.passes.quantization.scaled_groups import Group, scaled_groups
from fxopt.passes.quantization.smoothing_rule import Smoothing, SmoothLinear
from fxopt.program import Changes, Program
from fxopt.rewriting import rewrite
from fxopt.weights import quantize_rows
from fxopt.weights.activation_scales import choose_scale
from fxopt.weights.affine import Fitting, affine_groups, dense_groups, weighted_groups
from fxopt.weights.error_feedback import normalised_moment

Packed = tuple[Tensor, ...]
"""A weight: uint8 [N, K/2], float scales [N, K/g, 1] and, if affine, zero points like them."""

Int4Scheme = Literal["symmetric", "affine"]
Int4Weights = Literal["nearest", "hqq", "weighted", "gptq", "awq", "awq-gptq"]

_FITTING: Mapping[Int4Weights, Fitting] = {
    "nearest": "nearest",
    "hqq": "hqq",
    "weighted": "weighted",
    "gptq": "gptq",
    "awq": "weighted",
    "awq-gptq": "gptq",
}
_BITS = 4
_WITHOUT = "weights='nearest' or 'hqq'"


@dataclass(frozen=True)
class Rounding:
    """The scheme and the method of a pass; `spec` tells its choices from those of another."""

    scheme: Int4Scheme
    weights: Int4Weights
    spec: str

    @property
    def needs_inputs(self) -> bool:
        """Whether weights are rounded by what their inputs are."""
        return self.weights not in ("nearest", "hqq")

    @property
    def scales(self) -> bool:
        """Whether input channels are scaled first."""
        return self.weights.startswith("awq")

    def round(self, linear: Linear, rows: Tensor, group: int, moment: Tensor | None) -> Packed:
        """The weight `rows` [N, K] of a layer in four bits; by its inputs where `moment` is given.

        Raises `PassError`, naming the layer, for NaN and infinity.
        """
        fitting = _FITTING[self.weights]
        if moment is None and fitting != "hqq":
            fitting = "nearest"
        try:
            if self.scheme == "affine":
                q, *numbers = affine_groups(rows, group, fitting, moment)
            else:
                q, *numbers = quantize_rows(
                    rows.detach(),
                    bits=_BITS,
                    group=group,
                    method="gptq" if fitting == "gptq" else "nearest",
                    second_moment=moment,
                    order=True,
                )
        except KernelError as error:
            raise PassError(f"{label(linear.node)}: {error}; exclude= takes it out") from error
        return pack_int4(q), *(number.unsqueeze(-1) for number in numbers)

    def dense(self, rows: Tensor, group: int, power: Tensor) -> Tensor:
        """What `rows` [N, K], finite, become for inputs of mean squares `power` [K], float [N, K],
        without feedback."""
        if self.scheme == "affine":
            return dense_groups(*weighted_groups(rows, group, power))
        q, scale = quantize_rows(rows, bits=_BITS, group=group)
        return (q.view(*scale.shape, group) * scale.unsqueeze(2)).view(q.shape)


def round_by_inputs(
    rounding: Rounding,
    program: Program,
    linears: Sequence[tuple[Linear, int]],
    warnings: dict[str, None],
) -> dict[WeightKey, Packed]:
    """The weights of `linears`, with their groups, rounded by what meets them in calibration.

    What makes that doubtful is added to `warnings`. What was rounded for another program of the
    model stays as it was there.
    """
    rounded: dict[WeightKey, Packed] = {}
    groups = {weight_key(linear): group for linear, group in linears}
    asked = []
    for linear, _ in linears:
        known = _known(program, ("weights", rounding.spec, weight_key(linear)), [linear])
        if known is None:
            asked.append(linear)
        else:
            rounded[weight_key(linear)] = known
    for layers, moment in watch_moments(program, asked, warnings, "the nearest", _WITHOUT):
        for linear in layers:
            key, rows = weight_key(linear), rows_of(program, linear)
            matrix = moment.matrix if moment.rows else None
            rounded[key] = rounding.round(linear, rows, groups[key], matrix)
            if program.choices is not None:
                program.choices.note(("weights", rounding.spec, key), [rows], rounded[key])
    return rounded


def choose_scales(
    rounding: Rounding,
    program: Program,
    linears: Sequence[tuple[Linear, int]],
    warnings: dict[str, None],
) -> tuple[tuple[Smoothing, ...], tuple[str, ...]]:
    """What the inputs of `linears` are divided by, and a line on each."""
    sizes = {linear.node.name: group for linear, group in linears}
    groups, _ = scaled_groups(
        program, lambda linear: None if linear.node.name in sizes else "it isn't chosen"
    )
    keys = [("scales", rounding.spec, *map(weight_key, one.linears)) for one in groups]
    known = [_known(program, key, one.linears) for key, one in zip(keys, groups, strict=True)]
    place = {linear.node: at for at, one in enumerate(groups) for linear in one.linears}
    asked = [
        linear
        for one, found in zip(groups, known, strict=True)
        if found is None
        for linear in one.linears
    ]
    for layers, moment in watch_moments(program, asked, warnings, "the nearest", _WITHOUT):
        at = place[layers[0].node]
        group = groups[at]
        if {one.node for one in layers} != {one.node for one in group.linears} or not moment.rows:
            continue
        known[at] = _scale_of(rounding, program, group, sizes, moment.matrix)
        if program.choices is not None:
            rows = [rows_of(program, linear) for linear in group.linears]
            program.choices.note(keys[at], rows, known[at])
    pairs = [_smoothing(*pair) for pair in zip(groups, known, strict=True)]
    return tuple(one for one, _ in pairs if one is not None), tuple(line for _, line in pairs)


def _known(program: Program, key: Any, linears: Iterable[Linear]) -> Any:
    if program.choices is None:
        return None
    return program.choices.known(key, (rows_of(program, linear) for linear in linears))


def _scale_of(
    rounding: Rounding,
    program: Program,
    group: Group,
    sizes: Mapping[str, int],
    moment: Tensor,
) -> tuple[Tensor | None, str]:
    weights = [rows_of(program, linear).float() for linear in group.linears]
    if not all(bool(weight.isfinite().all()) for weight in weights):
        return None, "its weight holds NaN or infinity"
    size = sizes[group.linears[0].node.name]
    moment = normalised_moment(moment, weights[0].device)
    home = group.home
    ties = home.ties if isinstance(home, Absorption) else torch.arange(len(moment))
    chosen = choose_scale(
        weights,
        moment,
        ties.to(moment.device),
        lambda rows, power: rounding.dense(rows, size, power),
    )
    return (None, "no scale errs less than none") if chosen is None else chosen


def _smoothing(
    group: Group, found: tuple[Tensor | None, str] | None
) -> tuple[Smoothing | None, str]:
    """The group's scale as a rule takes it, and a line for the plan."""
    scale, word = found or (None, "its weights meet no input of their own")
    if scale is None:
        return None, f"{group.name}: not scaled, {word}"
    home = group.home
    if isinstance(home, Absorption) and not _is_tied(scale, home.ties):
        home = f"{label(home.producer)} ties other channels than those that share a scale"
        group = replace(group, home=home)
    inverse = scale.reciprocal().to(group.linears[0].dtype).cpu()
    names = tuple(linear.node.name for linear in group.linears)
    low, high = float(scale.min()), float(scale.max())
    return (
        Smoothing(names, inverse, isinstance(home, Absorption)),
        f"{group.name}: {word}, scales {low:.3g} to {high:.3g}, {group.place}",
    )


def _is_tied(scale: Tensor, ties: Tensor) -> bool:
    """Whether channels of one number share one scale."""
    shared = torch.zeros_like(scale).scatter_reduce(0, ties.to(scale.device), scale, "amax")
    return torch.equal(shared[ties], scale)


def scaled(program: Program, smoothings: Sequence[Smoothing]) -> tuple[Program, Mapping[str, str]]:
    """The program with its inputs divided and its weights multiplied, and the names that its
    linears have then.

    Changes tell of nodes that keep their value alone; a linear that takes the scale of another has
    none of that kind, but all stay in their order.
    """
    result = rewrite(replace(program, changes=Changes()), (SmoothLinear(smoothings, {}),))
    before, after = (
        [node.name for node in one.graph.nodes if as_linear(node) is not None]
        for one in (program, result)
    )
    renamed = dict(zip(before, after, strict=True))
    return replace(result, changes=program.changes.then(result.changes)), renamed
