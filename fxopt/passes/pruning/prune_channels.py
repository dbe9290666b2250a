"""PruneChannels: the least important channels and attention heads leave the model.

Two steps. First the readers of the chosen channels stop reading them (and, refitted by least
squares, make up for them as well as they can); that masked program is what the pass means to
compute, its oracle. Then the channels, unread now, are cut out of every tensor, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from fxopt.analyses.arithmetic import Cost, cut_cost
from fxopt.analyses.channels import Channels, Group, GroupKind, channels
from fxopt.analyses.importance import Importance, importance, normalized, ratio_for, select
from fxopt.claim import Claim, Close
from fxopt.observation.gram import Weighting
from fxopt.passes.pruning.channel_plan import ChannelPlan, cut_details, node_of, sites_of
from fxopt.passes.pruning.cut_channels import cut
from fxopt.passes.pruning.mask_channels import masked
from fxopt.program import Program, Refusal
from fxopt.rewriting import Pass, Stage
from fxopt.rewriting.option_annotations import Give
from fxopt.rewriting.option_types import Bounds, Several, Text
from fxopt.rewriting.options import Conflict
from fxopt.rewriting.unmatched import unmatched
from fxopt.weights.reconstruction import Fitted, reconstruct, refuse_fit

_GROUPS = GroupKind.__args__  # type: ignore[attr-defined]
_COMPARABLE = ("taylor",)
"""Measures with one unit in the whole program."""

_TARGETS = ("ratio", "target_flops", "target_params")

_KINDS_OR_GLOBS = f"kinds ({', '.join(_GROUPS)}) or globs over the groups' names"

Share: TypeAlias = Annotated[
    float, Bounds(above=0, below=1), Give("a share between 0 and 1, both excluded")
]


@dataclass(frozen=True)
class PrunePlan(ChannelPlan):
    """What stays of each group, and the weights that make up for the rest, by reader's node."""

    fitted: Mapping[str, Fitted] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class PruneChannels(Pass[PrunePlan]):
    """Cut the least important channels, whole attention heads among them.

    One of three says how much: `ratio`, the share of each group's channels that leaves (with
    ranking="global" the share of the parameters of all of them; 0.5 where nothing is said);
    `target_flops` or `target_params`, the share of the dense model's that is to remain.

    `scope` says what: kinds of groups ("ffn", "heads", "queries", "residual", "channels") or globs
    over the groups' names, as `print(fxopt.channels(program))` shows them; `exclude` are globs of
    what isn't. Of grouped queries, "heads" are the key/value heads with all their queries.
    `importance` ranks: "l1", "l2" (magnitude of what produces a channel), "group_l2" (of all its
    parameters), "taylor", "activation", "obs" (from calibration inputs) or "random"; see
    `fxopt.analyses.importance` for the formulas and their sources. Magnitudes need no inputs, and
    can ruin a language model that the measures with inputs leave whole. `ranking` compares within a
    group or over all. What is kept is rounded up to a multiple of `round_to` indices. With
    `reconstruct` the readers are refitted to the calibration inputs by least squares. `weighting`
    says what a row of these counts in that, and in "obs": "uniform", or "fisher", the Fisher
    information of the model's answer there (`fxopt.observation.fisher`), which costs a backward
    pass a batch. Padding, and tokens that a classifier never reads, count for nothing then.

    Shares count from the program as it is. A group that the pass has cut once is refused the next
    time, unless `again` is set.

    Claim: close to its oracle, the same program with the channels zeroed where they are read (and
    norms taken over the others). What it costs against the model before is in the report.
    Raises `PassError` for options that don't fit together.
    """

    ratio: Share | None = None
    target_flops: Share | None = None
    target_params: Share | None = None
    importance: Importance = "l2"
    scope: Annotated[tuple[str, ...], Several(Text(), _KINDS_OR_GLOBS, least=1)] = ("ffn",)
    exclude: Annotated[tuple[str, ...], Several(Text(), "globs over the groups' names")] = ()
    ranking: Annotated[
        Literal["local", "global"],
        Give('"local" (within each group) or "global" (over all groups)'),
    ] = "local"
    round_to: Annotated[int, Bounds(least=1)] = 1
    reconstruct: bool = False
    weighting: Weighting = "uniform"
    seed: int = 0
    again: bool = False
    name: ClassVar[str] = "prune-channels"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    claim: Claim = Close()

    def conflict(self) -> Conflict | None:
        """One share says how much is cut, and rows are weighed where something looks at them."""
        given = tuple(name for name in _TARGETS if getattr(self, name) is not None)
        if len(given) > 1:
            return Conflict(
                given, f"give one of {', '.join(_TARGETS)}: each of them says how much is cut"
            )
        if self.weighting != "uniform" and not self.reconstruct and self.importance != "obs":
            return Conflict(
                ("weighting", "importance", "reconstruct"),
                'give importance="obs" or reconstruct=True, which look at the calibration\'s rows '
                "that weighting weighs",
            )
        return None

    def plan(self, program: Program) -> PrunePlan:
        """Rank the channels in scope and choose those that stay."""
        found = channels(program)
        groups, refusals = self._in_scope(found.groups, program.pruned)
        missed = unmatched("exclude", self.exclude, {group.name for group in found.groups})
        if not groups:
            warnings = (*self._missed(found, refusals), *missed)
            return PrunePlan(repr(self), refusals=refusals, warnings=warnings)
        scores = importance(program, groups, self.importance, self.seed, self.weighting)
        if self.ranking == "global":
            scores = normalized(scores, "none" if self.importance in _COMPARABLE else "mean")
        ratio = 0.5 if self.ratio is None else self.ratio
        if self.target_flops is not None or self.target_params is not None:
            ratio = ratio_for(
                program,
                groups,
                scores,
                target_flops=self.target_flops,
                target_params=self.target_params,
                ranking=self.ranking,
                round_to=self.round_to,
            )
        keep = select(groups, scores, ratio=ratio, ranking=self.ranking, round_to=self.round_to)
        cut_groups = [group for group in groups if len(keep[group.name]) < group.size]
        keep = {group.name: keep[group.name] for group in cut_groups}
        fitted, unfitted, warnings = self._fitted(program, cut_groups, keep)
        return PrunePlan(
            repr(self),
            sites_of(cut_groups),
            (*refusals, *unfitted),
            warnings=(*warnings, *missed),
            details=(
                *cut_details(cut_groups, keep),
                *_costs(cut_cost(program, {}), cut_cost(program, keep)),
            ),
            keep=keep,
            stands_for={group.name: node_of(group) for group in cut_groups},
            fitted=fitted,
        )

    def apply(self, program: Program, plan: PrunePlan) -> Program:
        """Refit the readers where that was asked for, then cut."""
        keep, before = plan.kept(), program
        if plan.fitted:
            program = masked(program, channels(program), keep, plan.fitted, norms=False)
        found = channels(program)
        sizes = {name: found[name].size for name in keep}
        program = cut(program, found, keep, exact=False)
        program = replace(program, pruned={**sizes, **program.pruned})
        return plan.carried_out(before, program)

    def oracle(self, program: Program, plan: PrunePlan) -> Program:
        """The program whose readers see zeros for the channels that are cut."""
        return masked(program, channels(program), plan.kept(), plan.fitted)

    def _in_scope(
        self, groups: Sequence[Group], pruned: Mapping[str, int]
    ) -> tuple[list[Group], tuple[Refusal, ...]]:
        chosen: list[Group] = []
        refusals: list[Refusal] = []
        for group in groups:
            if not self._wants(group):
                continue
            reason = _refuse(group)
            if group.name in pruned and not self.again:
                had = f"it was cut from {pruned[group.name]} to {group.size} channels before"
                reason = f"{had}; again=True cuts once more"
            if reason is None:
                chosen.append(group)
            else:
                refusals.append(Refusal(reason, group.name))
        return chosen, tuple(refusals)

    def _missed(self, found: Channels, refusals: Sequence[Refusal]) -> tuple[str, ...]:
        if refusals:
            return ()
        names = ", ".join(f"{group.name} ({group.kind})" for group in found.groups) or "none at all"
        return (f"no group of channels is in scope={self.scope!r}; the program has {names}",)

    def _wants(self, group: Group) -> bool:
        named = group.kind in self.scope or any(
            fnmatchcase(group.name, choice) for choice in self.scope
        )
        return named and not any(fnmatchcase(group.name, glob) for glob in self.exclude)

    def _fitted(
        self, program: Program, groups: Sequence[Group], keep: Mapping[str, Tensor]
    ) -> tuple[dict[str, Fitted], list[Refusal], tuple[str, ...]]:
        if not self.reconstruct or not groups:
            return {}, [], ()
        masks: dict[str, Tensor] = {}
        refusals: list[Refusal] = []
        for group in groups:
            for reader in group.readers:
                reason = refuse_fit(reader.node)
                if reason is not None:
                    refusals.append(Refusal(f"not reconstructed: {reason}", reader.node.name))
                    continue
                gone = torch.ones(group.size, dtype=torch.bool)
                gone[keep[group.name]] = False
                size = int(reader.operand.node.meta["val"].shape[reader.operand.axis])
                mask = masks.setdefault(reader.node.name, torch.ones(size, dtype=torch.bool))
                mask[reader.operand.positions[gone].flatten()] = False
        fitted = reconstruct(program, masks, weighting=self.weighting, seed=self.seed)
        warnings = dict.fromkeys(one.warning for one in fitted.values() if one.warning)
        return fitted, refusals, tuple(warnings)


def _refuse(group: Group) -> str | None:
    if group.refusals:
        return f"can't be cut: {group.refusals[0]}"
    if not group.readers:
        return "nothing reads it"
    if any(reader.kind == "product" for reader in group.readers):
        return "it is summed over in a product of two activations, which has no columns to zero"
    return None


def _costs(before: Cost, after: Cost) -> tuple[str, ...]:
    parameters = after.parameters / max(before.parameters, 1)
    flops = after.flops / max(before.flops, 1)
    return (
        f"parameters {before.parameters:,} -> {after.parameters:,} ({parameters:.1%}), "
        f"FLOPs of products {before.flops:,} -> {after.flops:,} ({flops:.1%})",
    )
