"""What Int8Linear decides before it acts: which linears, with which scales, and why not the rest.

Four questions, each asked of what the one before left: which linears can be int8; which are faster
so on this machine; which ranges their inputs have (calibration); which cost too much at the outputs
(sensitivity). Linears that share an input are chosen together, since it is rounded once for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fxopt.analyses.sensitivity import Candidate, Sensitivity, measure_sensitivity, measured_batches
from fxopt.kernels import saturates
from fxopt.kernels.linear_speed import LINEAR_KERNELS, ROWS, BreakEven, linear_speeds
from fxopt.kernels.onednn import dense_linear
from fxopt.nodes import module_path, size_at_capture
from fxopt.observation import Histogram, Observer, SecondMoment, calibration_warnings, observe
from fxopt.operators import Linear
from fxopt.passes.linear_layers.linear_rule import chosen_linears, rows_of
from fxopt.passes.quantization.quantize_linear import (
    QuantizeLinear,
    Rounded,
    Scheme,
    StaticScale,
    WeightKey,
    bits_of,
    weight_key,
)
from fxopt.program import Program
from fxopt.rewriting import Plan, plan_rules
from fxopt.weights import quantize_rows
from fxopt.weights.rounding_noise import rounding_db

_KERNELS = {"dynamic": "int8", "static": "int8_static", "weight_only": "weight_only"}
_KERNELS_OF_GROUPS = {"dynamic": "int8_groups", "weight_only": "weight_only_groups"}
"""The names under which a mode's kernel is timed."""

_UNSEEN = (
    "no value reached it on the calibration inputs, so its range isn't known: give calibration= "
    "inputs that use it, or mode='dynamic'"
)
_SATURATES = (
    "no faster in int8 here: this CPU has no int8 dot product, so weights of 8 bits are multiplied "
    "in float32 (range=7 is exact and faster; where='always' rewrites it all the same)"
)


@dataclass(frozen=True)
class Int8Plan(Plan):
    """A plan with the scheme that carries it out, and the sensitivity it was chosen by, if any."""

    scheme: Scheme = Scheme("dynamic", "symmetric", None, ("*",), (), False)
    sensitivity: Sensitivity | None = None


def make_plan(program: Program, scheme: Scheme, needs: Mapping[str, Any], spec: str) -> Int8Plan:
    """The plan of Int8Linear for `program`; `needs` are its options about what to leave alone."""
    planning = _Planning(program, scheme)
    planning.choose_range(needs["range"])
    if needs["where"] == "faster":
        planning.keep_slower()
    if scheme.mode == "static" or needs["weights"] == "gptq":
        planning.calibrate(needs["observer"], needs["weights"])
    if needs.get("table") or needs["budget"] is not None or needs["max_layers"] is not None:
        planning.keep_costly(needs["budget"], needs["max_layers"])
    return planning.plan(spec)


class _Planning:
    def __init__(self, program: Program, scheme: Scheme) -> None:
        self.program, self.scheme = program, scheme
        self.warnings: list[str] = []
        self.details: list[str] = []
        self.sensitivity: Sensitivity | None = None
        rule = QuantizeLinear(scheme)
        sites = plan_rules(program, (rule,), "").sites
        self.linears = chosen_linears(program, rule, sites)

    def plan(self, spec: str) -> Int8Plan:
        base = plan_rules(self.program, (QuantizeLinear(self.scheme),), spec)
        return Int8Plan(
            spec,
            base.sites,
            base.refusals,
            warnings=tuple(self.warnings),
            details=tuple(self.details),
            scheme=self.scheme,
            sensitivity=self.sensitivity,
        )

    def choose_range(self, given: Any) -> None:
        """How many bits the weights have, and what 7 of them cost."""
        multiplied = self.linears if self._multiplies_rows() else []
        bits = bits_of(given, multiplied)
        self.scheme = replace(self.scheme, bits=bits)
        if bits == 8 or not self.linears:
            return
        why = "this CPU has no int8 dot product" if given == "auto" else "range=7"
        weights = {weight_key(linear): linear for linear in self.linears}.values()
        rows = partial(rows_of, self.program)
        seven, eight = (rounding_db(map(rows, weights), each) for each in (7, 8))
        self.details.append(
            f"weights of 7 bits ({why}): rounding leaves them {seven:.1f} dB, 8 bits {eight:.1f} dB"
        )

    def _saturates(self, device: torch.device) -> bool:
        """Whether no int8 product of this scheme is both exact and fast on `device`."""
        return self._multiplies_rows() and self.scheme.bits == 8 and saturates(device)

    def _multiplies_rows(self) -> bool:
        """Whether whole rows are multiplied as integers; groups never saturate."""
        return self.scheme.mode != "weight_only" and self.scheme.group is None

    def keep_slower(self) -> None:
        """Leave alone what is not faster in int8 here, at the example's number of rows."""
        kernel = (_KERNELS_OF_GROUPS if self.scheme.group else _KERNELS)[self.scheme.mode]
        table = {name: LINEAR_KERNELS[name] for name in ("float", kernel)}
        bits = self.scheme.bits
        speeds: dict[Any, BreakEven] = {}
        reasons = {}
        for linear in self.linears:
            m, shape = _rows(linear), (linear.in_features, linear.out_features, linear.dtype)
            device = linear.weight.meta["val"].device
            if self._saturates(device):
                reasons[linear.node.name] = _SATURATES
                continue
            key = (m, *shape, device)
            if key not in speeds:
                speeds[key] = linear_speeds(m, *shape, device, rows=(), table=table, bits=bits)
            timing = speeds[key].at(m)
            if not timing.pays(kernel):
                ratio = timing.ratios.get(kernel)
                failure = f"can't run: {timing.failed.get(kernel)}"
                takes = f"takes {ratio} the time of float" if ratio else failure
                reasons[linear.node.name] = (
                    f"no faster in int8 here: at M={m}, K={shape[0]}, N={shape[1]} it {takes} "
                    "(where='always' rewrites it all the same)"
                )
        self.details += [f"timed: {speed.sentence}" for speed in speeds.values()]
        total = len(self.linears)
        if reasons:
            self.details.append(
                f"rewrites {total - len(reasons)} of {total} linears; no faster: {len(reasons)}"
            )
        self._keep(reasons)

    def calibrate(self, observer: Any, weights: str) -> None:
        """Learn the ranges of inputs, and round weights by what their inputs are."""
        histograms: dict[fx.Node, Histogram] = {}
        moments: dict[fx.Node, SecondMoment] = {}
        for linear in self.linears:
            if self.scheme.mode == "static":
                histograms[linear.x] = Histogram()
            if weights == "gptq":
                moments[linear.x] = SecondMoment()
        watched: dict[fx.Node, list[Observer]] = {}
        for found in (histograms, moments):
            for node, seen in found.items():
                watched.setdefault(node, []).append(seen)
        if not watched:
            return
        observation = observe(self.program, watched)
        names = self._names()
        named = {names[node]: seen for node, seen in watched.items()}
        self.warnings += calibration_warnings(observation, named)
        symmetric = self.scheme.activations == "symmetric"
        scales = {
            x: StaticScale.of_range(*seen.range(observer, symmetric), self.scheme.activations)
            for x, seen in histograms.items()
            if seen.count
        }
        if histograms:
            unseen = [one.node.name for one in self.linears if one.x not in scales]
            self._keep(dict.fromkeys(unseen, _UNSEEN))
        self.scheme = replace(
            self.scheme,
            scales={one.node.name: scales[one.x] for one in self.linears if one.x in scales},
            weights=self._rounded_by(moments) if moments else {},
        )

    def keep_costly(self, budget: Any, max_layers: int | None) -> None:
        """Leave alone the groups that cost most at the outputs."""
        self._round_weights()
        groups, names = self._groups(), self._names()
        candidates = [
            Candidate(names[x], {linear.node: self._values(linear) for linear in group})
            for x, group in groups.items()
        ]
        if not candidates:
            return
        batches = measured_batches(self.program)
        found = measure_sensitivity(self.program, candidates, batches, budget)
        self.sensitivity = found
        self.details += found.lines(12)
        if budget is None and max_layers is None:
            return
        kept = found.within(budget, max_layers)
        left = found.cumulative_db(kept)
        alone = {row.name: row.alone_db for row in found.rows}
        limits = [f"budget={budget}" if budget else "", f"max_layers={max_layers}"]
        limit = ", ".join(text for text in limits if text and not text.endswith("None"))
        remaining = "" if left is None else f"; without them {left:.1f} dB remain"
        self.details.append(f"leaves {len(kept)} of {len(groups)} groups in float{remaining}")
        self._keep(
            {
                linear.node.name: f"costs {alone[names[x]]:.1f} dB alone: left in float by {limit}"
                for x, group in groups.items()
                if names[x] in kept
                for linear in group
            }
        )

    def _keep(self, reasons: Mapping[str, str]) -> None:
        self.linears = [linear for linear in self.linears if linear.node.name not in reasons]
        used = set(map(weight_key, self.linears))
        weights = {key: rounded for key, rounded in self.scheme.weights.items() if key in used}
        kept = {**self.scheme.kept, **reasons}
        self.scheme = replace(self.scheme, kept=kept, weights=weights)

    def _groups(self) -> dict[fx.Node, list[Linear]]:
        groups: dict[fx.Node, list[Linear]] = {}
        for linear in self.linears:
            groups.setdefault(linear.x, []).append(linear)
        return groups

    def _names(self) -> dict[fx.Node, str]:
        """A name for each group of linears by their input; a module that is called twice has two
        groups, which the names of their nodes tell apart."""
        groups = self._groups()
        names = {x: _common_path([one.node for one in group]) for x, group in groups.items()}
        often = Counter(names.values())
        return {
            x: f"{name} ({groups[x][0].node.name})" if often[name] > 1 else name
            for x, name in names.items()
        }

    def _values(self, linear: Linear) -> Callable[..., Tensor]:
        """The linear with rounded operands, as a function of its node's argument values."""
        scheme, static = self.scheme, self.scheme.static_scale(linear)
        q, scale = scheme.stored(scheme.weights[weight_key(linear)])
        places = [linear.node.args.index(one) for one in (linear.x, linear.bias) if one]

        def rounded(*args: Any, **kwargs: Any) -> Tensor:
            x, *bias = (args[place] for place in places)
            weight = scheme.dense_weight(linear, q, scale, _run)
            return dense_linear(scheme.rounded_input(x, x.dtype, static, _run), weight, *bias)

        return rounded

    def _round_weights(self) -> None:
        """Round each weight that is not yet, once for all runs of the sensitivity and for the
        rewriting."""
        weights = dict(self.scheme.weights)
        for linear in self.linears:
            key = weight_key(linear)
            if key not in weights:
                weights[key] = self.scheme.round_weight(rows_of(self.program, linear))
        self.scheme = replace(self.scheme, weights=weights)

    def _rounded_by(self, moments: Mapping[fx.Node, SecondMoment]) -> dict[WeightKey, Rounded]:
        """Each weight rounded for all the inputs that meet it: their moments are summed.

        Where none came, as in an expert that got no token, there is nothing to round for but
        itself.
        """
        meeting: dict[WeightKey, dict[fx.Node, SecondMoment]] = {}
        linears: dict[WeightKey, Linear] = {}
        for linear in self.linears:
            meeting.setdefault(weight_key(linear), {})[linear.x] = moments[linear.x]
            linears.setdefault(weight_key(linear), linear)
        rounded = {}
        for key, linear in linears.items():
            seen = [one.matrix for one in meeting[key].values() if one.rows]
            rounded[key] = quantize_rows(
                rows_of(self.program, linear),
                bits=self.scheme.bits,
                group=self.scheme.group,
                method="gptq" if seen else "nearest",
                second_moment=sum(seen[1:], seen[0]) if seen else None,
                order=True,
            )
        return rounded


def _common_path(nodes: Sequence[fx.Node]) -> str:
    """`layer.0.attention.{query,key,value}` for what lies in one module, else all paths."""
    paths = list(dict.fromkeys(module_path(node) or node.name for node in nodes))
    if len(paths) == 1:
        return paths[0]
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return " + ".join(paths)
    parent, tails = parents.pop(), ",".join(path.rpartition(".")[2] for path in paths)
    return f"{parent}.{{{tails}}}" if parent else f"{{{tails}}}"


def _run(target: Callable[..., Any], *args: Any) -> Any:
    return target(*args)


def _rows(linear: Linear) -> int:
    """The example's number of rows; the nearest of `ROWS` where it is another at each call.

    Such a number depends on data. Each expert of a mixture has its own, and timing all of them
    would cost a second each.
    """
    sizes = linear.x.meta["val"].shape[:-1]
    rows = max(math.prod(map(size_at_capture, sizes)), 1)
    if any(free_unbacked_symbols(size) for size in sizes):
        return min(ROWS, key=lambda count: abs(math.log(count / rows)))
    return rows
