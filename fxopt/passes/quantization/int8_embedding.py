"""Int8Embedding: embedding tables in int8, one scale per row, at the numerics level.

    embedding(W, i)             ~  rows(i)                                rows(i) = dq(q[i], s[i])
    embedding_bag(W, i, o, w)   ~  embedding_bag(rows(i), [0, 1, 2, ...], o, w)

Symmetric: q(v) = clamp(round(v / s), -127, 127), s = max|v| / 127 over a row, dq(q, s) = q * s.
Only the rows that a call looks up are ever in floating point. A row of zeros, as that of
`padding_idx`, comes back as zeros. A bag leaves out rows k with i[k] = padding_idx by their values:

    sum    rows[k] = 0           mean    the sum over the number of others, or over 1
    max    rows[k] = -inf        and 0 where there are no others

Source: Guan et al., "Post-Training 4-bit Quantization on Embedding Tables" (2019), row-wise uniform
quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

import fxopt.kernels  # noqa: F401  (registers the fxopt:: operators)
from fxopt.claim import Claim, Sqnr
from fxopt.constant_expressions import expression, is_computed_constant
from fxopt.errors import KernelError, PassError
from fxopt.nodes import arguments, label, module_path
from fxopt.passes.linear_layers.selection import Selections, refuse_path
from fxopt.program import Program
from fxopt.recipe import materialize
from fxopt.rendering.units import size
from fxopt.rewriting import Edit, Match, Plan, Rule, RulePass, Stage
from fxopt.rewriting.pattern import Target
from fxopt.weights import quantize_rows

aten, ops = torch.ops.aten, torch.ops.fxopt

LOOKUP = aten.embedding.default
BAGS = (aten.embedding_bag.default, aten.embedding_bag.padding_idx)

_SCALE_BYTES = torch.float32.itemsize
_SUM, _MAX = 0, 2
"""Modes of a bag; 1 is the mean."""


class QuantizeEmbedding(Rule):
    """embedding(W, i) ~ dq(embedding(q, i), embedding(s, i)), and of bags of such rows"""

    def __init__(self, options: Int8Embedding) -> None:
        self.options = options
        self.learning: frozenset[str] = frozenset()

    def see(self, program: Program) -> None:
        """What a table learns gets lost in rounding."""
        self.learning = program.learning

    def targets(self) -> tuple[Target, ...]:
        return (LOOKUP, *BAGS)

    def match(self, node: fx.Node) -> Match | None:
        """Each look-up, but those of int8 rows and of their scales; a bag over [0, 1, 2, ...] pools
        what it is given and looks nothing up."""
        given = arguments(node)
        if node.target is LOOKUP:
            bound = {"table": given["weight"], "lookup": node}
            return None if _reads_rounded(node) else Match((node,), bound)
        pooled = next((user for user in node.users if user.args[1] == 0), None)
        if pooled is None or given["indices"].target is aten.arange.default:
            return None
        return Match((pooled,), {"table": given["weight"], "lookup": node})

    def refuse(self, match: Match) -> str | None:
        node, table = match["lookup"], match["table"]
        reason = self._refuse_path(node) or self._refuse_table(table)
        if reason is not None:
            return reason
        if node.target is not LOOKUP and len(node.users) > 1:
            return "more of the bag is read than the pooled rows: which ones they come from"
        other = None if self.options.tied else self.other_reader(table)
        if other is None:
            return None
        return f"its table {_name(table)} is tied: {_kind(other)} reads it too"

    def other_reader(self, table: fx.Node) -> fx.Node | None:
        """What reads a table, or state that it is computed from, and keeps it in floating point."""
        found = expression(table)
        assert found is not None
        matrices = [leaf for leaf in found.leaves if leaf.meta["val"].ndim > 1]
        return next((user for leaf in matrices for user in self._others(leaf)), None)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        node, table = match["lookup"], match["table"]
        given = arguments(node)
        if node.target is LOOKUP:
            return self._rows(node, table, given["indices"], edit)
        return self._bag(node, table, given, edit)

    def _refuse_path(self, node: fx.Node) -> str | None:
        return refuse_path(module_path(node), self.options.include, self.options.exclude)

    def _refuse_table(self, table: fx.Node) -> str | None:
        value = table.meta["val"]
        if table.target is aten.embedding_renorm.default:
            return "max_norm bounds its rows at each call, which writes to the table"
        found = expression(table)
        if found is None:
            return f"its table {_name(table)} isn't the same in every call"
        if any(str(leaf.target) in self.learning for leaf in found.leaves):
            return "it trains, and rounding to int8 has no gradient"
        if not value.is_floating_point():
            return f"its table is {value.dtype}, not floating point"
        if not value.numel():
            return "its table is empty"
        if value.shape[1] + _SCALE_BYTES >= value.shape[1] * value.dtype.itemsize:
            return f"its rows of {value.shape[1]} numbers take no less memory with a scale each"
        return None

    def _others(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            if _is_lookup(user) and arguments(user)["weight"] is node:
                if self._refuse_path(user) is not None:
                    yield user
            elif is_computed_constant(user):
                yield from self._others(user)
            else:
                yield user

    def _rows(self, node: fx.Node, table: fx.Node, indices: fx.Node, edit: Edit) -> fx.Node:
        """The rows at `indices`, [..., D] in the table's dtype."""
        made = edit.once((self, table), lambda: _rounded_table(node, table, edit))
        q, scale = made
        groups = scale.meta["val"].shape[1]
        if scale.meta["val"].ndim > 2:
            scale = edit.call(aten.view.default, scale, [table.meta["val"].shape[0], groups])
        q, scale = (edit.call(LOOKUP, one, indices) for one in (q, scale))
        if groups > 1:
            size = table.meta["val"].shape[1] // groups
            scale = edit.call(aten.repeat_interleave.self_int, scale, size, -1)
        return edit.call(ops.dequantize.default, q, scale, table.meta["val"].dtype)

    def _bag(self, node: fx.Node, table: fx.Node, given: dict[str, Any], edit: Edit) -> fx.Node:
        indices, mode, padding = given["indices"], given["mode"], given.get("padding_idx")
        rows, ids = self._rows(node, table, indices, edit), indices.meta["val"]
        count = edit.call(aten.sym_size.int, indices, 0)
        places = edit.call(aten.arange.default, count, dtype=ids.dtype, device=ids.device)

        bag = node.target
        assert isinstance(bag, torch._ops.OpOverload)

        def pooled(rows: fx.Node, mode: int) -> fx.Node:
            changed = {"weight": rows, "indices": places, "mode": mode, "padding_idx": None}
            return edit.item(edit.call_by_name(bag, {**given, **changed}), 0)

        if padding is None:
            return pooled(rows, mode)
        padding %= table.meta["val"].shape[0]
        left_out = edit.call(aten.unsqueeze.default, edit.call(aten.eq.Scalar, indices, padding), 1)
        fill = -math.inf if mode == _MAX else 0.0
        rows = edit.call(aten.masked_fill.Scalar, rows, left_out, fill)
        result = pooled(rows, _MAX if mode == _MAX else _SUM)
        if mode == _SUM:
            return result
        others = edit.call(aten.logical_not.default, left_out)
        others = pooled(edit.call(aten.to.dtype, others, torch.float32), _SUM)
        if mode == _MAX:
            alone = edit.call(aten.eq.Scalar, others, 0)
            return edit.call(aten.masked_fill.Scalar, result, alone, 0.0)
        mean = edit.call(aten.div.Tensor, result, edit.call(aten.clamp_min.default, others, 1.0))
        return edit.call(aten.to.dtype, mean, table.meta["val"].dtype)


@dataclass(frozen=True, repr=False)
class Int8Embedding(RulePass):
    """Embedding tables in int8, a float32 scale per row: about a quarter of their memory.

    Rows are rounded symmetrically. A call brings back those that it looks up, and no others, in the
    table's dtype.

    Takes `nn.Embedding` and `nn.EmbeddingBag` (sum, mean and max, with weights and padding).
    `include` and `exclude` are globs over module paths (`"*.word_embeddings"`) or functions of the
    path. A table that something else reads too, as a tied head does, is left alone unless
    `tied=True`. The other reader then keeps the table as it was, so that the int8 copy adds to the
    memory, as the plan says; unless `Int8Linear(tied=True, range=8)` ran before, with groups or
    without: its int8 weight and scales are the table's, and kept once.

    Claim: a signal-to-noise ratio of the model's outputs, 30 dB unless `claim` gives another.

    Raises `PassError` for other options and for a table that holds NaN or infinity.
    """

    include: Selections = ("*",)
    exclude: Selections = ()
    tied: bool = False
    claim: Claim = Sqnr(30.0)  # the table of architectures, with random weights, keeps 32.5 dB
    name: ClassVar[str] = "int8-embedding"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def rules(self, program: Program) -> Sequence[Rule]:
        """One rule for single look-ups and bags."""
        return (QuantizeEmbedding(self),)

    def plan(self, program: Program) -> Plan:
        """The look-ups that will be rewritten, what they save or cost, and why others are not."""
        plan = super().plan(program)
        return replace(plan, details=tuple(dict.fromkeys(self._costs(program, plan))))

    def _costs(self, program: Program, plan: Plan) -> Iterator[str]:
        """A line for each table that stays in floating point beside its copy."""
        rule = QuantizeEmbedding(self)
        chosen = {site.node for site in plan.sites}
        for node in program.graph.nodes:
            if node.name not in chosen:
                continue
            table = arguments(node)["weight"]
            other = rule.other_reader(table)
            if other is not None:
                rows, width = table.meta["val"].shape
                added = size(rows * (width + _SCALE_BYTES))
                reader = "an output" if other.op == "output" else label(other)
                yield f"{_name(table)} stays as it is for {reader}; its int8 copy adds {added}"


def _rounded_table(node: fx.Node, table: fx.Node, edit: Edit) -> tuple[fx.Node, ...]:
    """int8 [V, D] and scales [V, 1] as constants; [V, G, 1] where a tied linear has groups."""
    name = _name(table)
    try:
        values = materialize(edit.state(table)).detach()
        shared = _stored_by_linear(values, edit)
        if shared is not None:
            return shared
        q, scale = quantize_rows(values)
    except KernelError as error:
        raise PassError(
            f"{label(node)}: its table {name} holds NaN or infinity, which integers can't express; "
            "exclude= takes it out"
        ) from error
    return _constant(f"{name}_int8", q, edit), _constant(f"{name}_scale", scale, edit)


def _stored_by_linear(table: Tensor, edit: Edit) -> tuple[fx.Node, ...] | None:
    """The int8 values and scales in groups that a linear of the graph has of `table`, if any."""
    for node in edit.graph.nodes:
        scale = _scale_in_groups(node, table)
        if scale is None:
            continue
        q, numbers = quantize_rows(table, group=table.shape[1] // scale.meta["val"].shape[1])
        same = torch.equal(edit.tensor(node), q)
        if same and torch.equal(edit.tensor(scale), numbers.unsqueeze(-1)):
            return node, scale
    return None


def _scale_in_groups(q: fx.Node, table: Tensor) -> fx.Node | None:
    """The scales [V, G, 1] of an int8 constant of the shape of `table`, where it has them."""
    value = q.meta.get("val") if q.op == "get_attr" else None
    if not isinstance(value, Tensor) or (value.dtype, value.shape) != (torch.int8, table.shape):
        return None
    readers = (reader for view in q.users for reader in view.users)
    scales = (one.args[1] for one in readers if one.target is ops.dequantize.default)
    constants = (one for one in scales if isinstance(one, fx.Node) and one.op == "get_attr")
    return next((one for one in constants if one.meta["val"].ndim == 3), None)


def _constant(name: str, tensor: Tensor, edit: Edit) -> fx.Node:
    """A constant of these values: the one that the graph has, as of a tied linear, or a new one."""
    node: fx.Node
    for node in edit.graph.nodes:
        value = node.meta["val"] if node.op == "get_attr" else None
        if isinstance(value, Tensor) and (value.dtype, value.shape) == (tensor.dtype, tensor.shape):
            known = edit.state(node)
            if isinstance(known, Tensor) and torch.equal(known, tensor):
                return node
    return edit.constant(name, tensor)


def _reads_rounded(node: fx.Node) -> bool:
    """Whether a look-up is of int8 rows or of their scales: all that it gives is dequantized."""

    def dequantizes(user: fx.Node) -> bool:
        return user.target is ops.dequantize.default or (
            user.target is aten.repeat_interleave.self_int and _reads_rounded(user)
        )

    return bool(node.users) and all(map(dequantizes, node.users))


def _is_lookup(node: fx.Node) -> bool:
    return node.target in (LOOKUP, *BAGS)


def _name(table: fx.Node) -> str:
    """The table's name in the state, or one for a table that is computed."""
    if table.op == "get_attr":
        return str(table.target)
    path = module_path(table)
    return f"{path}.{table.name}" if path else table.name


def _kind(reader: fx.Node) -> str:
    if reader.op == "output":
        return "an output"
    return str(reader.target).removeprefix("aten.").partition(".")[0]
