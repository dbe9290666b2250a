"""Autocast: products in half precision, with the fewest bytes cast for it.

    op(x, W, b)  ~  float32(op(half(x), half(W), half(b)))       for each node on the low side
    half(float32(y))  =  y                                       for y in half already
    float32(y) + z    =  y + z                                   beside a float32 z (promotion)

`torch.autocast` decides operator by operator, at every call. Here a table gives each operator a
side and a numerical reason, and what may be on either is placed by a minimum cut of the whole
graph, whose edges weigh the bytes that a cast moves. A value is rounded only for a product's sake:
arithmetic on a float32 operand stays in float32.
Source: Micikevicius et al., "Mixed Precision Training" (2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import fx

from fxopt.analyses.precision import MIXED_PRECISION, Placement, Side, autocast_casts
from fxopt.claim import Claim, Exact, Sqnr
from fxopt.errors import FxoptError
from fxopt.nodes import label, module_path
from fxopt.passes.mixed_precision.autocast_planning import (
    Policy,
    Sides,
    keep_costly,
    keep_in_range,
    matches,
    place,
    planned_casts,
    sides_of,
)
from fxopt.passes.mixed_precision.half_choice import HalfDtype, half_choice
from fxopt.passes.mixed_precision.half_precision import CancelCasts, ComputeInHalf
from fxopt.passes.mixed_precision.half_values import HALF, is_cast, is_tensor_of
from fxopt.program import Program, Refusal
from fxopt.rewriting import Edit, Match, Pass, Plan, Rule, Stage, rewrite
from fxopt.rewriting.option_annotations import DeviceOption
from fxopt.rewriting.option_types import OptionType, Several
from fxopt.rewriting.options import follows
from fxopt.rewriting.pattern import Target
from fxopt.rewriting.plan import Site

aten = torch.ops.aten

Mode = Literal["mixed", "full", "half"]

_CLAIMS: dict[str, Claim] = {"full": Exact(), "mixed": MIXED_PRECISION, "half": Sqnr(20.0)}
_MOST_REGIONS = 8


@dataclass(frozen=True)
class AutocastPlan(Plan):
    """A plan with the dtype, and where its values and their casts are; None for nowhere."""

    dtype: torch.dtype = torch.bfloat16
    placement: Placement | None = None

    @property
    def low(self) -> frozenset[str]:
        """The names of the nodes that will compute in `dtype`."""
        return self.placement.low if self.placement else frozenset()


class WidenInside(Rule):
    """float32(y) + z = y + z beside a float32 tensor z: the operator itself widens y"""

    exclusive = False

    def targets(self) -> tuple[Target, ...]:
        return (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)

    def match(self, node: fx.Node) -> Match | None:
        for widened, other in (node.args[:2], node.args[1::-1]):
            if (
                widened is not other
                and _is_widening(widened)
                and is_tensor_of(other, torch.float32)
            ):
                return Match((node,), {"widened": widened, "y": widened.args[0]})  # type: ignore[union-attr]
        return None

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        node, widened = match.root, match["widened"]
        args = [match["y"] if argument is widened else argument for argument in node.args]
        return edit.call(node.target, *args, **node.kwargs)


@dataclass(frozen=True)
class PolicyEntry(OptionType):
    """A glob over module paths or operators and a side: "*.classifier:high"."""

    @property
    def expected(self) -> str:
        return "globs over module paths or operators, each with :low, :high or :either"

    def take(self, given: Any) -> str:
        glob, _, side = given.rpartition(":") if isinstance(given, str) else ("", "", "")
        if not glob or side not in get_args(Side):
            raise self.unfit()
        return str(given)

    def read(self, text: str) -> str:
        return self.take(text)


@dataclass(frozen=True)
class PolicyEntries(Several):
    """Entries, or a mapping of globs to sides."""

    item: OptionType = PolicyEntry()
    named: str = (
        "globs over module paths or operators and their sides, each one of "
        f"{', '.join(map(repr, get_args(Side)))}: {{'*.classifier': 'high'}}"
    )

    written: str = PolicyEntry().expected

    def take(self, given: Any) -> tuple[Any, ...]:
        if isinstance(given, Mapping):
            given = tuple(f"{glob}:{side}" for glob, side in given.items())
        return super().take(given)


@dataclass(frozen=True, repr=False)
class Autocast(Pass[AutocastPlan]):
    """Half precision where the hardware is fast in it and the numbers allow it.

    `mode="mixed"` puts linears, convolutions, matrix products and attention in half precision and
    keeps softmax, norms, losses, exponentials and large sums in float32; `"half"` puts everything
    that has a half kernel in half precision; `"full"` leaves the model in float32. `dtype="auto"`
    takes what `device` multiplies natively: bfloat16, or float16 where only that is. A dtype that
    the device emulates is refused with the reason, unless `force=True`. `device` describes another
    one than the model is on, such as "cuda:8.0": see `Device.parse`.

    `policy` maps globs over module paths or operators to "low", "high" or "either", the last that
    matches a node counting: `{"*.classifier": "high", "aten.gelu": "low"}`, in a textual spec
    `policy=*.classifier:high|aten.gelu:low`. What leaves the range of the dtype on the calibration
    inputs stays in float32 and is named. `budget` leaves the products that cost most in float32,
    until the outputs keep that ratio on calibration inputs.

    Claim: a signal-to-noise ratio of the outputs, 30 dB mixed, 20 dB half, exact in full.

    Raises `PassError` for options that don't exist.
    """

    dtype: HalfDtype = "auto"
    mode: Mode = "mixed"
    policy: Annotated[tuple[str, ...], PolicyEntries()] = ()
    budget: Sqnr | None = None
    device: DeviceOption = None
    force: bool = False
    claim: Claim = follows()
    name: ClassVar[str] = "autocast"
    stage: ClassVar[Stage] = Stage.NUMERICS

    def default_claim(self) -> Claim:
        """What the mode keeps."""
        return _CLAIMS[self.mode]

    def plan(self, program: Program) -> AutocastPlan:
        """Which operations will be in half precision, in which regions, and what casts that takes.

        Prints the bytes that casts move in a call, beside those of `torch.autocast`.
        """
        if self.mode == "full":
            return AutocastPlan(repr(self), details=("mode='full': everything stays in float32",))
        sides = sides_of(program, self._policy(), self.mode == "half")
        choice = half_choice(program, self.dtype, self.device, self.force)
        if isinstance(choice, str):
            reasons = tuple(Refusal(choice, label(node)) for node in sides.low())
            return AutocastPlan(repr(self), refusals=reasons)
        sides, warnings = keep_in_range(program, sides, choice)
        details: list[str] = []
        if self.budget is not None:
            sides, table = keep_costly(program, sides, choice, self.budget)
            details += table
        placement = place(program, sides)
        low = [node for node in sides.of if node.name in placement.low]
        return AutocastPlan(
            repr(self),
            tuple(Site("ComputeInHalf", node.name, label(node)) for node in low),
            tuple(Refusal(reason, label(node)) for node, reason in sides.pinned.items()),
            warnings=(*warnings, *self._unmatched(program)),
            details=(*details, *_account(program, sides, placement, choice)),
            dtype=choice,
            placement=placement,
        )

    def apply(self, program: Program, plan: AutocastPlan) -> Program:
        """Compute the plan's nodes in half precision, but for its excluded ones."""
        chosen = plan.low - plan.excluded
        if not chosen:
            return rewrite(program, ())
        dtype = plan.dtype
        lowered = rewrite(program, (ComputeInHalf(chosen, dtype), CancelCasts(dtype)))
        # What is chosen must have been taken before its operands become float32 by promotion.
        return rewrite(lowered, (WidenInside(),))

    def _policy(self) -> Policy:
        pairs = (entry.rpartition(":") for entry in self.policy)
        return tuple((glob, side) for glob, _, side in pairs)  # type: ignore[misc]

    def _unmatched(self, program: Program) -> tuple[str, ...]:
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        return tuple(
            f"policy {glob!r} matches no module path and no operator of the graph"
            for glob, _ in self._policy()
            if not any(matches(glob, node) for node in calls)
        )


def _account(
    program: Program, sides: Sides, placement: Placement, dtype: torch.dtype
) -> tuple[str, ...]:
    """What the placement comes to, for the plan."""
    low = [node for node in sides.of if node.name in placement.low]
    if not low:
        return ("no operation is in half precision",)
    regions = _regions(low)
    lines = [
        f"{len(low)} of {len(sides.of)} operations in {str(dtype).removeprefix('torch.')}, "
        f"in {len(regions)} regions",
        f"in a call {planned_casts(program, placement)}; no placement moves less",
        f"torch.autocast: {_theirs(program, dtype)}",
    ]
    for region in regions[:_MOST_REGIONS]:
        kinds = Counter(_kind(node) for node in region)
        names = ", ".join(
            f"{kind} x {count}" if count > 1 else kind for kind, count in kinds.items()
        )
        lines.append(f"region at {module_path(region[0]) or region[0].name}: {names}")
    if len(regions) > _MOST_REGIONS:
        lines.append(f"and {len(regions) - _MOST_REGIONS} regions more")
    return tuple(lines)


def _theirs(program: Program, dtype: torch.dtype) -> str:
    try:
        return str(autocast_casts(program, dtype))
    except FxoptError as error:
        return f"unknown, {error}"


def _regions(low: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """The low nodes that hand each other values in half, in the graph's order."""
    import networkx as nx

    order = {node: index for index, node in enumerate(low)}
    graph = nx.Graph()
    graph.add_nodes_from(low)
    graph.add_edges_from(
        (operand, node) for node in low for operand in node.all_input_nodes if operand in order
    )
    parts = [sorted(part, key=order.__getitem__) for part in nx.connected_components(graph)]
    return sorted(parts, key=lambda part: order[part[0]])


def _kind(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", getattr(target, "__name__", target)))


def _is_widening(node: Any) -> bool:
    """Whether `node` is float32(y) for a tensor y in half."""
    is_widened = isinstance(node, fx.Node) and is_cast(node, torch.float32)
    return is_widened and any(is_tensor_of(node.args[0], dtype) for dtype in HALF)
