"""AbsorbConstants: constant input channels of a layer move into its bias.

    linear(x, W, b)  =  linear(x, W', b + sum over k of W[:, k] c_k)      where x_k is always c_k

W' is W with the columns k zeroed, so that nothing reads these channels any more and they can be
cut. A convolution sums its taps as well, which holds up to the border only without padding; under
zero padding a channel must be zero itself. The sum is taken in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.analyses.constant_channels import Known, constant_channels
from fxopt.analyses.constant_channels.products import is_padded
from fxopt.analyses.constant_channels.readers import (
    READERS,
    Reader,
    as_reader,
    summed_axis,
)
from fxopt.errors import RewriteError
from fxopt.nodes import arguments, label
from fxopt.operators.convolutions import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Edit, Match, Rule
from fxopt.rewriting.pattern import Target

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.matmul.default)


@dataclass(frozen=True, eq=False)
class _Absorption:
    """The channels [K] that one reader takes up, their constants [K] in float64, and its weight.

    `left` says why further constant channels stay.
    """

    mask: Tensor
    constants: Tensor
    weight: str
    left: str | None


class AbsorbConstants(Rule):
    """linear(x, W, b) = linear(x, W', b + W[:, k] c_k), W' = W with column k zero, where x_k = c_k.

    Also for addmm, mm and matmul with a constant matrix, and for convolutions: with padding and
    transposed ones where c_k = 0 only. `facts` are what `constant_channels(program)` gives, and
    computed where they are left out. `only` maps names of the program's nodes to the channels
    (bool [K]) that each may take up; the others are left alone. None allows all.

    Columns that are zero already need no rewrite. Weights and biases become recipes over the old
    ones, which other readers keep; a bias is made where there was none and the sum isn't zero.
    `former` maps the names that they have to the old ones.
    Raises `RewriteError` for a mask in `only` of another length.
    """

    exclusive = False

    def __init__(
        self,
        program: Program,
        facts: Mapping[fx.Node, Known] | None = None,
        only: Mapping[str, Tensor] | None = None,
    ) -> None:
        facts = constant_channels(program) if facts is None else facts
        self.decisions: dict[str, _Absorption | str] = {}
        self.former: dict[str, str] = {}
        for node in program.graph.nodes:
            if node.target in READERS and (only is None or node.name in only):
                wanted = None if only is None else only[node.name]
                decision = _decide(program, node, facts, wanted)
                if decision is not None:
                    self.decisions[node.name] = decision

    def targets(self) -> tuple[Target, ...]:
        """Linear layers in each spelling, and convolutions."""
        return READERS

    def match(self, node: fx.Node) -> Match | None:
        """A reader that still reads constant channels."""
        decision = self.decisions.get(node.name)
        if isinstance(decision, _Absorption):
            reader = as_reader(node)
            if reader is None or reader.name != decision.weight:
                return None
            return Match((node,), {"decision": decision, "reader": reader})
        return None if decision is None else Match((node,), {"decision": decision})

    def refuse(self, match: Match) -> str | None:
        """Why none of its constant channels can be taken up."""
        decision = match["decision"]
        return decision if isinstance(decision, str) else None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        """The same operator on the weight without the columns, and the raised bias."""
        reader, absorption = match["reader"], match["decision"]
        weight = self._weight(reader, absorption, edit)
        raised = bool((absorption.constants[absorption.mask] != 0).any())
        bias = self._bias(reader, absorption, edit) if raised else reader.bias
        layer, result = _rebuilt(reader, weight, bias, edit)
        if absorption.left is not None:
            self.decisions[layer.name] = absorption.left
        return result

    def _weight(self, reader: Reader, absorption: _Absorption, edit: Edit) -> fx.Node:
        def make() -> fx.Node:
            weight = edit.state(reader.weight)
            sources = weight, reader.aligned(~absorption.mask)
            recipe = _recipe(keep_columns, sources, weight.shape, weight)
            return self._constant(reader.name, recipe, reader.weight, edit)

        key = (reader.name, reader.columns, reader.groups, _bits(absorption.mask))
        return edit.once((self, "weight", *key), make)

    def _bias(self, reader: Reader, absorption: _Absorption, edit: Edit) -> fx.Node:
        constants = torch.where(absorption.mask, absorption.constants, 0.0)
        old = None if reader.bias is None else str(reader.bias.target)

        def make() -> fx.Node:
            weight = edit.state(reader.weight)
            bias = () if reader.bias is None else (edit.state(reader.bias),)
            raised = raised_by_columns if reader.columns else raised_by_rows
            sources = weight, reader.aligned(constants), *bias
            shape = torch.Size((reader.outputs,))
            recipe = _recipe(raised, sources, shape, bias[0] if bias else weight)
            return self._constant(old or _bias_name(reader.name), recipe, reader.bias, edit)

        key = (reader.name, old, reader.columns, reader.groups, _bits(constants))
        return edit.once((self, "bias", *key), make)

    def _constant(self, name: str, recipe: Recipe, of: fx.Node | None, edit: Edit) -> fx.Node:
        made = edit.constant(f"{name}_absorbed", recipe, of=of)
        self.former[str(made.target)] = name
        return made


def keep_columns(weight: Tensor, keep: Tensor) -> Tensor:
    """`weight` where `keep` (bool, broadcasts) holds, zero elsewhere."""
    return torch.where(keep, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def raised_by_columns(weight: Tensor, constants: Tensor, bias: Tensor | None = None) -> Tensor:
    """b + sum of W * c over all axes of W [N, K, ...] but the first, rounded once: [N]."""
    if len(constants) == 1:
        nonzero = constants.flatten().nonzero().flatten()
        weight, constants = (t.index_select(1, nonzero) for t in (weight, constants))
    return _added((weight.double() * constants).flatten(1).sum(1), bias, weight.dtype)


def raised_by_rows(weight: Tensor, constants: Tensor, bias: Tensor | None = None) -> Tensor:
    """b + sum of W * c over the first axis of W [K, N], rounded once: [N]."""
    nonzero = constants.flatten().nonzero().flatten()
    weight, constants = (t.index_select(0, nonzero) for t in (weight, constants))
    return _added((weight.double() * constants).sum(0), bias, weight.dtype)


def _added(raised: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return raised.to(dtype) if bias is None else (bias.double() + raised).to(bias.dtype)


def _decide(
    program: Program, node: fx.Node, facts: Mapping[fx.Node, Known], wanted: Tensor | None
) -> _Absorption | str | None:
    """What `node` takes up, why it can't, or None where it reads no constant that is wanted."""
    x, axis = summed_axis(node)
    known = facts.get(x)
    if known is None:
        return None
    size = x.meta["val"].shape[axis]
    if wanted is not None and wanted.shape != (size,):
        raise RewriteError(
            f"AbsorbConstants: only[{node.name!r}] is of shape {tuple(wanted.shape)}, but "
            f"{label(node)} reads {size} channels. Give a bool tensor with one entry for each."
        )
    channels = known.channels(axis, int(size))
    mask = channels.mask if wanted is None else channels.mask & wanted.to(known.mask.device)
    if not bool(mask.any()):
        return None
    reader = as_reader(node)
    if reader is None:
        return _unfit(node)
    reason = _refuse_state(program, reader)
    return reason or _absorption(program, reader, mask, channels.wide().double())


def _absorption(
    program: Program, reader: Reader, mask: Tensor, constants: Tensor
) -> _Absorption | str | None:
    indices = mask.nonzero().flatten()
    entries = reader.read(program.tensor(reader.name).detach(), indices)
    if not bool(entries.isfinite().all()):
        return f"its weight {reader.name} holds NaN or infinity"
    mask = torch.zeros_like(mask).index_fill(0, indices[(entries != 0).any(1)], True)
    reason = _only_zeros(reader)
    stay = mask & (constants != 0) if reason else torch.zeros_like(mask)
    left = f"{int(stay.sum())} constant channels aren't zero, and {reason}" if stay.any() else None
    mask = mask & ~stay
    return _Absorption(mask, constants, reader.name, left) if bool(mask.any()) else left


def _only_zeros(reader: Reader) -> str | None:
    """Why a constant doesn't add the same to every position of the output."""
    if reader.node.target in TRANSPOSED_CONVOLUTIONS:
        return "the positions of a transposed convolution see different taps"
    taps = reader.weight.meta["val"].shape[2:]
    if reader.node.target in CONVOLUTIONS and is_padded(arguments(reader.node), taps):
        return "the convolution's padding puts zeros beside them"
    return None


def _refuse_state(program: Program, reader: Reader) -> str | None:
    for one in (reader.weight, reader.bias):
        if one is not None and str(one.target) in program.written:
            return f"{one.target} is written by the model"
    dtype = reader.weight.meta["val"].dtype
    return None if dtype.is_floating_point else f"its weight is {dtype}, not floating point"


def _unfit(node: fx.Node) -> str | None:
    """Why a layer has no constant weight and bias; None for a product of two activations."""
    if node.target is aten.addmm.default and any(value != 1 for value in node.kwargs.values()):
        return "it scales its bias or its product (alpha, beta)"
    summed = summed_axis(node)[0]
    for operand in node.all_input_nodes:
        if operand is summed or operand.op == "get_attr":
            continue
        from_state = all(source.op == "get_attr" for source in operand.all_input_nodes)
        if from_state or node.target not in _PRODUCTS:
            return f"its operand {operand.name} is computed, and only state can take constants up"
    return None


def _rebuilt(
    reader: Reader, weight: fx.Node, bias: fx.Node | None, edit: Edit
) -> tuple[fx.Node, fx.Node]:
    """The layer on another weight and bias, and what takes its place: a sum where it takes none."""
    node, operand = reader.node, weight
    if reader.weight not in node.all_input_nodes:
        turned = next(one for one in node.all_input_nodes if reader.weight in one.all_input_nodes)
        operand = edit.call(turned.target, weight, *turned.args[1:], **turned.kwargs)
    if node.target is aten.addmm.default:
        layer = edit.call(node.target, bias, reader.x, operand)
        return layer, layer
    if node.target is aten.mm.default and bias is not None:
        layer = edit.call(aten.addmm.default, bias, reader.x, operand)
        return layer, layer
    if node.target in _PRODUCTS:
        layer = edit.call(node.target, reader.x, operand)
        return layer, layer if bias is None else edit.call(aten.add.Tensor, layer, bias)
    given = arguments(node)
    given["weight"], given["bias"] = operand, bias
    layer = edit.call(node.target, *given.values())
    return layer, layer


def _recipe(
    make: Any, sources: tuple[Tensor | Recipe, ...], shape: torch.Size, like: Tensor | Recipe
) -> Recipe:
    return Recipe(make, sources, shape, like.dtype, like.device, like.requires_grad)


def _bias_name(weight: str) -> str:
    """`fc.bias` for `fc.weight`."""
    path, dot, name = weight.rpartition(".")
    return path + dot + (name.replace("weight", "bias") if "weight" in name else f"{name}_bias")


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.cpu().numpy().tobytes())
