"""FoldPruned: channels that compute nothing leave the model, whatever made them so.

    linear(x, W, b) where x_j = c_j for every input
        =  linear(x without j, W without column j, b + W[:, j] c_j)

A row of zeros with a bias is a constant channel; it stays one through activations and norms in eval
mode, so its product with the next weight belongs into the next bias. A channel that every reader
multiplies by zero is dead as well. Both are cut out of every tensor that they stand in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from fxopt.analyses.channels import Channels, Group, channels
from fxopt.analyses.dead_channels import dead_channels
from fxopt.claim import Claim, Close
from fxopt.passes.pruning.absorb_constants import AbsorbConstants
from fxopt.passes.pruning.channel_plan import ChannelPlan, cut_details, node_of, sites_of
from fxopt.passes.pruning.cut_channels import cut
from fxopt.passes.structure.canonicalize import FoldConstant
from fxopt.program import Program
from fxopt.rewriting import Pass, Stage, rewrite

_MOST_ROUNDS = 4


@dataclass(frozen=True)
class FoldPlan(ChannelPlan):
    """What stays, and by group's name the constants that its readers take into their biases.

    `absorbed` maps a reader's node to the channels along its input's axis, bool [K].
    """

    absorbed: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )


@dataclass(frozen=True, repr=False)
class FoldPruned(Pass[FoldPlan]):
    """Cut every channel that is zero, constant or unread, where that is exact.

    It finds what `torch.nn.utils.prune`, any mask or any training has left behind: rows and columns
    of zeros, attention heads that give nothing, channels that hold one constant for all inputs.
    Constants move into the biases of what reads them. Refused, with the reason: a channel that an
    output or a norm sees, a constant that a convolution pads, or that a masked attention may drop.

    Claim: close; exact in real arithmetic. In train mode what is zero now is cut, so that it can't
    come back.
    """

    name: ClassVar[str] = "fold-pruned"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    claim: Claim = Close()

    def plan(self, program: Program) -> FoldPlan:
        """The dead channels of each group, and why others that look dead stay."""
        program = _unmasked(program)
        found = channels(program)
        dead = dead_channels(program, found)
        groups = [
            group
            for group in found.groups
            if group.name in dead and bool(dead[group.name].channels.any())
        ]
        keep = {group.name: (~dead[group.name].channels).nonzero().flatten() for group in groups}
        return FoldPlan(
            repr(self),
            sites_of(groups),
            tuple(refusal for one in dead.values() for refusal in one.refusals),
            details=cut_details(groups, keep),
            keep=keep,
            stands_for={group.name: node_of(group) for group in groups},
            absorbed={group.name: dead[group.name].absorbed for group in groups},
        )

    def apply(self, program: Program, plan: FoldPlan) -> Program:
        """Move constants into biases, then cut; again where a shared weight has become several."""
        folded = self._folded(program, plan)
        for _ in range(_MOST_ROUNDS):
            more = replace(self.plan(folded), excluded=plan.excluded)
            if not plan.kept() or not more.kept():
                break
            folded = self._folded(folded, more)
        return plan.carried_out(program, folded)

    def _folded(self, program: Program, plan: FoldPlan) -> Program:
        keep = plan.kept()
        if not keep:
            return program
        program = _unmasked(program)
        only: dict[str, Tensor] = {}
        for name in keep:
            for reader, moved in plan.absorbed[name].items():
                only[reader] = only[reader] | moved if reader in only else moved
        found = channels(program)
        if not only:
            return cut(program, found, keep)
        rule = AbsorbConstants(program, only=only)
        absorbed = rewrite(program, (rule,))
        now = channels(absorbed)
        keep = _keep_now({found[name]: kept for name, kept in keep.items()}, absorbed, now)
        return cut(absorbed, now, keep, names=_unambiguous(rule.former, absorbed.state))


def _keep_now(keep: Mapping[Group, Tensor], absorbed: Program, now: Channels) -> dict[str, Tensor]:
    """`keep` by the names of the groups as they are now that readers took constants up.

    A group is known by where its first channel stands in what its readers read. One that shared a
    weight between readers of different constants has become several.
    """
    renamed = absorbed.changes.replaced
    before = {key: kept for group, kept in keep.items() for key in _keys(group, renamed)}
    found = {}
    for group in now.groups:
        known = next((before[key] for key in _keys(group, {}) if key in before), None)
        if known is not None:
            found[group.name] = known
    return found


def _keys(group: Group, renamed: Mapping[str, str]) -> list[tuple[str, int, tuple[int, ...]]]:
    operands = [reader.operand for reader in group.readers]
    return [
        (renamed.get(one.node.name, one.node.name), one.axis, tuple(one.positions[0].tolist()))
        for one in operands
    ]


def _unambiguous(former: Mapping[str, str], state: Collection[str]) -> dict[str, str]:
    """The former names of what took constants up, where nothing else has them now."""
    left = {name: old for name, old in former.items() if name in state}
    once = Counter(left.values())
    return {name: old for name, old in left.items() if old not in state and once[old] == 1}


def _unmasked(program: Program) -> Program:
    """`program` with weights that are computed, weight x mask as `torch.nn.utils.prune` leaves it,
    as constants, where nothing trains them."""
    return program if program.mode == "train" else rewrite(program, (FoldConstant(),))
