"""The space that is searched where none is given, and the lists tried first.

What a device isn't fast at is left out: half precision where it only emulates it, int8 activations
where no product of theirs outruns float32's, packed weights where there is no such library. What
learns from inputs takes part where there are some.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fxopt.calibration import Calibration
from fxopt.device import Device
from fxopt.errors import FxoptError
from fxopt.kernels import multiplies_int8
from fxopt.passes import Int8Linear
from fxopt.progress import Progress
from fxopt.search.space import Slot, Space
from fxopt.transform import transform

_LOWERINGS = {
    "cpu": ("lower", ""),
    "cuda": ("lower", "lower{mode=reduce-overhead}", "lower{mode=max-autotune}", ""),
}
_SMOOTHINGS = ("smooth-quant", "smooth-quant{alpha=auto}", "smooth-quant{alpha=auto, mode=static}")
_RATIOS = (0.125, 0.25, 0.5)
_KEPT = (1, 2, 4)
"""How many of the costliest groups of linears are left in float."""


def standard_space(device: Device, calibrated: bool, costly: Sequence[str] = ()) -> Space:
    """The space for a model on `device`; `calibrated` says whether inputs to learn from are given.

    `costly` are module paths of groups of linears, the costliest in int8 first, several paths of a
    group joined by `|`: int8 is also offered without the first of them.
    """
    int8 = bool(multiplies_int8(device))
    slots = [
        Slot("canonicalize", ("canonicalize",)),
        Slot("fold", ("", "fold-pruned")),
        Slot("prune", ("", *_prunings(calibrated))),
        Slot("fuse", ("fuse-linears", "")),
    ]
    if int8 and calibrated:
        slots += [
            Slot("smooth", ("", *_SMOOTHINGS), "int8"),
            Slot("split", ("", "split-outliers", "split-outliers{ratio=1.2}"), "int8"),
        ]
    slots.append(Slot("int8", ("", *_quantizations(int8, calibrated, costly))))
    if device.half().dtype is not None:
        slots.append(Slot("half", ("", "autocast", "autocast{mode=half}")))
    if device.kind == "cpu":
        slots.append(Slot("prepack", ("prepack", "")))
    slots.append(Slot("lower", _LOWERINGS.get(device.kind, ("lower", ""))))
    return Space(tuple(slots))


def first_points(space: Space) -> list[dict[str, str]]:
    """The points of the standard space that an engineer would write down, to be tried first."""
    wanted: list[Mapping[str, str]] = [
        {"fuse": "", "prepack": "", "lower": ""},
        {},
        {"half": "autocast"},
        {"int8": "int8-linear", "half": "autocast"},
        {"int8": "int8-linear{mode=static}", "half": "autocast"},
        {"int8": "int8-linear{mode=static}", "half": "autocast",
         "smooth": "smooth-quant{alpha=auto, mode=static}"},
        {"int8": "int8-linear{mode=static, weights=gptq}", "half": "autocast",
         "smooth": "smooth-quant{alpha=auto}", "split": "split-outliers{ratio=1.2}"},
        {"int8": "int8-linear{mode=static, weights=gptq, budget=sqnr(28)}", "half": "autocast",
         "smooth": "smooth-quant{alpha=auto}", "split": "split-outliers{ratio=1.2}"},
        {"int8": "int8-linear", "half": "autocast", "smooth": "smooth-quant"},
        {"half": "autocast{mode=half}"},
        {"int8": "int8-linear{mode=weight_only}"},
    ]  # fmt: skip
    kept = next((s.choices for s in space.slots if s.name == "int8"), ())
    wanted += [{"int8": choice, "half": "autocast"} for choice in kept if "exclude=" in choice]
    names = {slot.name for slot in space.slots}
    points = []
    for choices in wanted:
        point = space.point(**{name: choice for name, choice in choices.items() if name in names})
        if space.holds(point) and point not in points:
            points.append(point)
    return points


def costly_linears(
    model: nn.Module, inputs: Any, calibration: Iterable[Any], say: Progress
) -> tuple[str, ...]:
    """The groups of linears by what static int8 costs at the outputs, the costliest first.

    Each as its module paths, joined by `|`. Empty where the model can't be captured: the first
    trial then says why.
    """
    say("asking which linears int8 costs most")
    try:
        program = transform(
            model, "canonicalize", example_inputs=inputs, verify=False, measure_cost=False
        ).program
        program = replace(program, calibration=Calibration(calibration, program.signature))
        table = Int8Linear(mode="static").sensitivity(program)
    except FxoptError:
        return ()
    return tuple("|".join(row.paths) for row in table.rows)


def _prunings(calibrated: bool) -> Iterable[str]:
    how = "importance=obs, reconstruct=True, " if calibrated else ""
    for ratio in _RATIOS:
        yield f"prune-channels{{ratio={ratio}, {how}scope=ffn}}"
    for ratio in _RATIOS[1:]:
        yield f"prune-channels{{ratio={ratio}, {how}scope=ffn|heads}}"


def _quantizations(int8: bool, calibrated: bool, costly: Sequence[str]) -> Iterable[str]:
    yield "int8-linear{mode=weight_only}"
    if not int8:
        return
    yield "int8-linear"
    if not calibrated:
        return
    yield "int8-linear{mode=static}"
    yield "int8-linear{mode=static, weights=gptq}"
    for db in (20, 28):
        yield f"int8-linear{{mode=static, weights=gptq, budget=sqnr({db})}}"
    for count in _KEPT:
        if count < len(costly):
            yield f"int8-linear{{mode=static, exclude={'|'.join(costly[:count])}}}"
