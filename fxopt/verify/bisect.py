"""Each rewritten node on its own: judged on the error it makes itself, guilty by what that costs.

Both programs run on one trial. At every node that stands for a node of the predecessor the new
value is compared with the old one, and then *replaced* by it, so that each rewritten region is
measured on exactly the inputs it had before: one run finds each node's own error, however deep the
graph and however errors would have piled up. Codes of int8 may have become uint8, shifted by 128. A
value whose type the pass changed otherwise, inside a region that lost channels, can't be compared
nor replaced; its error is found where the region ends.

A large error may be lost on the way, in a gate that is closed, and a small one may decide. So the
values of the worst are put into the predecessor one by one, and the worst at its outputs is guilty.

Where a pass changes outputs by intent, its oracle stands for the predecessor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.claim import Claim, Exact, Measured, Sqnr, sqnr
from fxopt.interpreter import evaluate, evaluate_variants, same_draws
from fxopt.kernels.packed_int8_linear import shift_to_unsigned
from fxopt.nodes import label, same_sizes, size_at_capture, source_line
from fxopt.program import Program
from fxopt.verify.judge import Verdict, worst_of
from fxopt.verify.oracle import Trial

_CODES = (torch.int8, torch.uint8)
_MOST_TIES = 0.01
_MOST_TRIED = 16
"""Nodes whose error is followed to the outputs, the worst by themselves."""


@dataclass(frozen=True)
class Blame:
    """One node's error: its name before and after the pass, its own SQNR in dB, and that of the
    outputs if it alone errs; None where this was not tried."""

    before: str
    after: str
    db: float
    text: str
    outputs_db: float | None = None


def blame(
    before: Program, after: Program, trial: Trial, oracle: Program | None = None
) -> list[Blame]:
    """Every node that differs on its predecessor's inputs; the worst first, at the outputs for the
    worst by themselves.

    The names are those in `before`, also where the values are held against the `oracle`'s.
    """
    stands_for = _stands_for(before, after, oracle)
    blames: dict[str, Blame] = {}
    worst: list[tuple[float, str, Tensor]] = []

    def compare(name: str, node: fx.Node, old: Tensor, new: Tensor) -> None:
        same_kind = new.shape == old.shape and new.dtype == old.dtype
        db = sqnr(old, new) if same_kind else -math.inf
        if db == math.inf:
            return
        expected = stands_for[node.name][1]
        outputs_db = None if same_kind else -math.inf
        blames[expected] = Blame(name, node.name, db, _describe(node), outputs_db)
        if same_kind:
            worst.append((db, expected, new))
            worst.sort(key=itemgetter(0))
            del worst[_MOST_TRIED:]

    try:
        _compare_nodes(before, after, oracle, trial, compare)
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        blames[""] = Blame("", "", -math.inf, f"a node that fails: {first}", -math.inf)
    values = {name: value for _, name, value in worst}
    for name, db in _outputs_with(before if oracle is None else oracle, trial, values):
        blames[name] = replace(blames[name], outputs_db=db)
    return sorted(
        blames.values(),
        key=lambda one: (one.outputs_db is None, one.outputs_db or 0.0, one.db),
    )


def _outputs_with(
    program: Program, trial: Trial, values: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """The SQNR of the outputs where one node has the value given for it, node by node."""
    variants = [
        {node: functools.partial(_given, _codes_like(node, values[node.name]))}
        for node in program.graph.nodes
        if node.name in values
    ]
    with same_draws():
        expected = evaluate(program, trial.inputs)
    with same_draws():
        for index, outputs in evaluate_variants(program, trial.inputs, variants):
            (node,) = variants[index]
            yield node.name, min(map(sqnr, expected, outputs), default=math.inf)


def _given(value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return value


def _codes_like(node: fx.Node, value: Tensor) -> Tensor:
    """Codes of int8 that have become uint8 as the node has them."""
    if (node.meta["val"].dtype, value.dtype) != (torch.int8, torch.uint8):
        return value
    return (value.to(torch.int16) - 128).to(torch.int8)


def judge_nodes(
    claim: Claim,
    before: Program,
    after: Program,
    trials: Sequence[Trial],
    oracle: Program | None = None,
) -> Verdict | None:
    """The claim measured on each rewritten node's own error, the worst; None if none can be.

    Against an `oracle` every node counts as rewritten that has one to compare it with.

    Where activations are rounded to integers, the last bit of a sum decides about a whole step, so
    two right programs differ at their outputs as much as rounding itself costs. Their nodes don't,
    but for codes of 8 bits, of which one in a hundred may be the neighbouring one: a value that
    lies between two codes to the last bit goes to either.
    """
    verdicts: list[Verdict] = []
    for trial in trials:

        def compare(
            name: str, node: fx.Node, old: Tensor, new: Tensor, trial: Trial = trial
        ) -> None:
            if oracle is not None or name in after.changes.replaced:
                measured = _measure(claim, old, new)
                verdicts.append(Verdict(claim, measured, trial, f"node {label(node)}"))

        _compare_nodes(before, after, oracle, trial, compare)
    return worst_of(verdicts) if verdicts else None


def _measure(claim: Claim, old: Tensor, new: Tensor) -> Measured:
    codes = old.dtype == new.dtype and old.dtype in _CODES and old.shape == new.shape
    if isinstance(claim, Exact) or not codes or not old.numel():
        return claim.measure(old, new)
    steps = (old.to(torch.int16) - new.to(torch.int16)).abs()
    count, most = int(steps.count_nonzero()), int(steps.max())
    share = count / old.numel()
    holds = most <= 1 and count <= math.ceil(_MOST_TIES * old.numel())
    value = (-20 * math.log10(share) if share else math.inf) if isinstance(claim, Sqnr) else share
    text = f"{share:.2%} of the codes differ, by at most {most} step{'s' * (most != 1)}"
    return Measured(holds, value, f"{text} (allowed {_MOST_TIES:.0%}, by one)")


def _compare_nodes(
    before: Program,
    after: Program,
    oracle: Program | None,
    trial: Trial,
    compare: Callable[[str, fx.Node, Tensor, Tensor], None],
) -> None:
    """Call `compare(old name, new node, old value, new value)`; feed the old values onwards."""
    expected = before if oracle is None else oracle
    stands_for = _stands_for(before, after, oracle)
    needed = {old for _, old in stands_for.values()}
    old_values: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor) and node.name in needed:
            old_values[node.name] = value
        return value

    def force(node: fx.Node, value: Any) -> Any:
        name, old_name = stands_for.get(node.name, ("", ""))
        old = old_values.get(old_name)
        if old is None or not isinstance(value, Tensor):
            return value
        if (old.dtype, value.dtype) == (torch.int8, torch.uint8):
            old = shift_to_unsigned(old)
        compare(name, node, old, value)
        return old

    with same_draws():
        evaluate(expected, trial.inputs, keep)
    with same_draws():
        evaluate(after, trial.inputs, force)


def _stands_for(
    before: Program, after: Program, oracle: Program | None
) -> dict[str, tuple[str, str]]:
    """Node of `after` -> the node of `before` whose value it has by intent, and what gives it.

    That is this node itself or, where there is an oracle, the one that the oracle has for it. Left
    out are nodes whose size the pass changed.
    """
    names = {node.name: node.name for node in before.graph.nodes if node.op == "call_function"}
    names.update(after.changes.replaced)
    masked = {} if oracle is None else oracle.changes.replaced
    old_nodes = {node.name: node for node in (oracle or before).graph.nodes}
    new_nodes = {node.name: node for node in after.graph.nodes}
    found: dict[str, tuple[str, str]] = {}
    for name, new_name in names.items():
        old_name = masked.get(name, name)
        old, new = old_nodes.get(old_name), new_nodes.get(new_name)
        if old is not None and new is not None and not _is_resized(old, new):
            found.setdefault(new_name, (name, old_name))
    return found


def _is_resized(old: fx.Node, new: fx.Node) -> bool:
    """Whether a tensor's sizes were changed on purpose: they differ by the fake values."""
    one, other = old.meta["val"], new.meta["val"]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one is other:
        return False
    if same_sizes(one.shape, other.shape):
        return False
    return len(one.shape) != len(other.shape) or any(
        size_at_capture(a) != size_at_capture(b)
        for a, b in zip(one.shape, other.shape, strict=True)
        if not (_is_unknown(a) or _is_unknown(b))
    )


def _is_unknown(size: Any) -> bool:
    """Whether a size depends on the data, so that none was known at capture."""
    return free_unbacked_symbols(size) != set()


def _describe(node: fx.Node) -> str:
    inputs = ", ".join(operand.name for operand in node.all_input_nodes)
    users = ", ".join(user.name for user in node.users)
    lines = [f"{label(node)} = {node.target}({inputs})", f"used by {users}"]
    if source_line(node):
        lines.append(f"from {source_line(node)}")
    return "\n    ".join(lines)
