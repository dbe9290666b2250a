"""Pass lists: instances, rules or textual specs, brought to instances in an order that makes sense.

int8-linear{mode=weight_only, exclude=lm_head|*.down_proj, claim=sqnr(30)}
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import PassError
from fxopt.lower import Lower, Lowering
from fxopt.passes import (
    Autocast,
    Canonicalize,
    Float8Linear,
    FoldNorms,
    FoldPruned,
    FuseConvBatchNorm,
    FuseLinears,
    HalfAttention,
    HalfLinear,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    Prepack,
    PruneChannels,
    SelectKernels,
    ShiftChannels,
    SmoothQuant,
    Sparsify24,
    SplitOutliers,
)
from fxopt.program import Mode
from fxopt.rewriting import Pass, Rule, SingleRule, Stage

PASSES: dict[str, type[Pass]] = {
    kind.name: kind
    for kind in (
        Canonicalize,
        FoldPruned,
        PruneChannels,
        FuseLinears,
        FuseConvBatchNorm,
        FoldNorms,
        HalfAttention,
        HalfLinear,
        Sparsify24,
        SmoothQuant,
        SplitOutliers,
        Int8Linear,
        Int8Embedding,
        Int4Linear,
        Float8Linear,
        Autocast,
        SelectKernels,
        ShiftChannels,
        Prepack,
        Lower,
    )
}

_SPEC = re.compile(r"\s*(?P<name>[\w-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*")
_CLAIM = re.compile(r"(?P<kind>\w+)(?:\((?P<value>[^()]*)\))?")
_WORDS = {"true": True, "false": False, "none": None}


def resolve_passes(passes: str | Iterable[Any]) -> tuple[Pass, ...]:
    """`passes` as instances: pass and rule instances as they are, strings parsed, order checked.

    Raises `PassError` for an empty list, an unknown name (with the nearest one), a class in place
    of an instance, something that is no pass, a wrong option, and an order that can't work.
    """
    if isinstance(passes, (str, Pass, Rule)) or inspect.isclass(passes):
        passes = [passes]
    try:
        items = list(passes)
    except TypeError:
        raise PassError(f"passes must be a list of passes, not {type(passes).__name__}") from None
    resolved = [pass_ for item in items for pass_ in _resolve(item)]
    if not resolved:
        raise PassError(
            "passes is empty, so there is nothing to do. Give at least one, for example "
            "[fxopt.Canonicalize(), fxopt.Lower()], or use fxopt inspect to see a model's graph."
        )
    _check_order(resolved)
    return tuple(resolved)


@dataclass(frozen=True)
class Scheduled:
    """A pass and whether it was `asked` for, or is there because others need it."""

    pass_: Pass
    asked: bool = True


@dataclass(frozen=True)
class Schedule:
    """What will run: `rewrites` in their order, and the `lowering` that ends the list, if any."""

    rewrites: tuple[Scheduled, ...]
    lowering: Lowering | None = None


def scheduled(passes: Iterable[Pass], mode: Mode) -> Schedule:
    """The list with the passes that its passes need and it hasn't, before the first that does."""
    listed = list(passes)
    names = {pass_.name for pass_ in listed}
    found: list[Scheduled] = []
    lowering: Lowering | None = None
    for pass_ in listed:
        for needed in pass_.needs(mode):
            if needed not in names:
                names.add(needed)
                found.append(Scheduled(PASSES[needed](), asked=False))
        if isinstance(pass_, Lowering):
            lowering = pass_
        else:
            found.append(Scheduled(pass_))
    return Schedule(tuple(found), lowering)


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes of a textual spec: names separated by commas, each with its {options}."""
    found: list[Pass] = []
    text = text.strip()
    position = 0
    while position < len(text):
        match = _SPEC.match(text, position)
        if match is None:
            raise PassError(
                f"can't read the pass spec {text!r} from {text[position:]!r} on: write "
                "name{option=value, ...}, name, ..."
            )
        found.append(_build(match["name"], match["options"] or ""))
        position = match.end()
        if position < len(text):
            if text[position] != ",":
                raise PassError(
                    f"can't read the pass spec {text!r} from {text[position:]!r} on: passes are "
                    "separated by commas"
                )
            position += 1
    return tuple(found)


def _resolve(item: Any) -> tuple[Pass, ...]:
    if isinstance(item, str):
        return parse_passes(item)
    if isinstance(item, Rule):
        return (SingleRule(item),)
    if isinstance(item, Pass):
        return (item,)
    if inspect.isclass(item) and issubclass(item, (Pass, Rule)):
        raise PassError(f"{item.__name__} is a class; pass an instance: {item.__name__}()")
    if callable(getattr(item, "plan", None)) and callable(getattr(item, "apply", None)):
        raise PassError(
            f"{type(item).__name__} has plan and apply but isn't a fxopt.Pass; derive it from "
            "fxopt.Pass, which gives it a name, a stage and a claim"
        )
    raise PassError(
        f"{item!r:.80} is no pass: give instances of fxopt.Pass or fxopt.Rule, or a spec such as "
        '"int8-linear{mode=dynamic}"'
    )


def _build(name: str, options: str) -> Pass:
    kind = PASSES.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, PASSES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise PassError(f"unknown pass {name!r}{hint} Known: {', '.join(PASSES)}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = option.partition("=")
        key = key.strip()
        if not equals or key not in fields:
            raise PassError(f"{name} has no option {key!r}; it takes {', '.join(fields) or 'none'}")
        given[key] = _value(key, value.strip(), fields[key].default)
    return kind(**given)


def _value(key: str, text: str, default: Any) -> Any:
    if key in ("claim", "budget"):
        return None if text.lower() == "none" else _claim(text)
    if isinstance(default, tuple):
        return tuple(text.split("|")) if text else ()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _claim(text: str) -> Claim:
    match = _CLAIM.fullmatch(text)
    kinds: dict[str, Any] = {"exact": Exact, "close": Close, "sqnr": Sqnr}
    kind = kinds.get(match["kind"]) if match else None
    if match is None or kind is None:
        raise PassError(f"unknown claim {text!r}: write exact, close, close(1e-4) or sqnr(30)")
    try:
        numbers = match["value"].split("|") if match["value"] else []
        claim: Claim = kind(*(None if n.strip().lower() == "none" else float(n) for n in numbers))
    except (TypeError, ValueError) as error:
        raise PassError(f"can't read the claim {text!r}: {error}") from error
    return claim


def _check_order(passes: list[Pass]) -> None:
    latest: Pass | None = None
    for pass_ in passes:
        if latest is not None and latest.stage is Stage.LOWER:
            raise PassError(
                f"{pass_!r} comes after {latest!r}, but lowering ends a list: move {pass_!r} "
                "before it"
            )
        if pass_.stage is Stage.ANY:
            continue
        if latest is not None and pass_.stage < latest.stage:
            raise PassError(
                f"{pass_!r} ({pass_.stage.name.lower()}) comes after {latest!r} "
                f"({latest.stage.name.lower()}), which would keep it from seeing what it rewrites: "
                f"move {pass_!r} before {latest!r}"
            )
        latest = pass_
