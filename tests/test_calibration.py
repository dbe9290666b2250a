"""Calibration: what counts as an input, how often it can be streamed, and what is refused."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.utils.data
from torch import Tensor, nn

import fxopt
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import CalibrationError
from fxopt.observation import MinMax, calibration_warnings, observe
from fxopt.program import Program
from fxopt.rewriting import Pass, Plan

X = torch.linspace(-1.0, 1.0, 8).view(2, 4)


class Scaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x if scale is None else x * scale


def of(source: Any, example: tuple[Tensor, ...] = (X,)) -> Calibration:
    return Calibration(source, capture(Scaled(), example).signature)


def same(found: Any, wanted: list[tuple[Tensor, ...]]) -> bool:
    found = list(found)
    return len(found) == len(wanted) and all(
        len(one) == len(other) and all(map(torch.equal, one, other))
        for one, other in zip(found, wanted, strict=True)
    )


def test_each_form_of_an_input_is_taken_as_example_inputs_are() -> None:
    scale = torch.ones(4)
    pair = of([(X, scale), [X, scale], {"scale": scale, "x": X}], (X, scale))
    assert same(pair.batches(), [(X, scale)] * 3)
    assert same(of([X, (X,), {"x": X}, {"x": X, "scale": None}]).batches(), [(X,)] * 4)


@pytest.mark.parametrize("form", ["list", "generator", "loader"])
def test_every_form_can_be_streamed_again_and_only_a_generator_is_spooled(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Any] = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: files.append(make()) or files[-1])
    batches = [X * n for n in range(5)]
    loader = torch.utils.data.DataLoader(torch.stack(batches), batch_size=None)
    source = {"list": batches, "generator": (b for b in batches), "loader": loader}[form]
    calibration = of(source)
    assert not calibration.was_read
    for _ in range(3):
        assert same(calibration.batches(), [(batch,) for batch in batches])
    assert calibration.was_read
    assert len(files) == (form == "generator")
    assert calibration.length == (None if form == "generator" else 5)


def test_a_pass_over_a_generator_that_stops_early_loses_nothing() -> None:
    calibration = of(X * n for n in range(6))
    assert torch.equal(next(calibration.batches())[0], X * 0)
    first, second = calibration.batches(), calibration.batches()
    for n in range(4):
        assert torch.equal(next(first)[0], X * n)
        assert torch.equal(next(second)[0], X * n)
    assert same(calibration.batches(), [(X * n,) for n in range(6)])
    assert torch.equal(next(first)[0], X * 4)


def test_a_generators_batches_are_not_kept_in_memory() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def source() -> Iterator[Tensor]:
        for n in range(6):
            batch = X * n
            seen.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            assert sum(one() is not None for one in seen) <= 1

    calibration = of(source())
    for _ in range(2):
        assert sum(1 for _ in calibration.batches()) == 6
    assert len(seen) == 6
    gc.collect()
    assert not any(one() for one in seen)


def test_a_view_of_a_large_tensor_is_spooled_alone() -> None:
    large = torch.randn(100_000, 4)
    calibration = of(iter([large[:2]]))
    assert same(calibration.batches(), [(large[:2],)])
    assert calibration._source.ends[-1] < 10_000  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (3, "calibration= must be an iterable of inputs (a list, a DataLoader, a generator), not "
            "int"),
        ("texts.txt", "calibration= must be an iterable of inputs (a list, a DataLoader, a "
                      "generator), not str"),
        (X, "calibration= is one input (a Tensor), not an iterable of inputs. Give a list of "
            "them: [inputs]"),
        ({"x": X}, "calibration= is one input (a dict), not an iterable of inputs. Give a list of "
                   "them: [inputs]"),
    ],
)  # fmt: skip
def test_what_is_no_iterable_of_inputs_is_refused_at_once(source: Any, text: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        fxopt.transform(nn.Linear(4, 2), "canonicalize", calibration=source)
    assert str(caught.value) == text


@pytest.mark.parametrize("empty", [[], iter([])])
def test_an_empty_iterable_is_refused(empty: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        list(of(empty).batches())
    assert str(caught.value) == (
        "calibration= is empty: it gave no batch at all. Give an iterable of inputs, each a "
        "tensor, a tuple of positional arguments or a dict of keyword arguments; a generator that "
        "was used up before gives nothing."
    )


@pytest.mark.parametrize("as_iterator", [False, True])
@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (X.double(), "x has dtype torch.float64, but the graph was captured with torch.float32. "
                     "Convert it with .to(torch.float32)."),
        (X[0], "x has rank 1 and shape (4,), but the graph takes rank 2"),
        (X[:, :3], "x has size 3 on axis 1, but the model fixes it to 4"),
        ({"x": X, "labels": X}, "labels"),
        ((X, X), "scale"),
        ((), "x"),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_named(batch: Any, text: str, as_iterator: bool) -> None:
    signature = capture(Fixed(), (X,)).signature
    source = [X, X, batch]
    calibration = Calibration(iter(source) if as_iterator else source, signature)
    with pytest.raises(CalibrationError, match=r"^calibration batch 2 doesn't fit") as caught:
        list(calibration.batches())
    assert text in str(caught.value)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.linear(x)
        return y if scale is None else y * scale


def test_a_batch_that_is_no_input_at_all_is_named() -> None:
    with pytest.raises(CalibrationError) as caught:
        list(of([X, "text"]).batches())
    assert str(caught.value) == (
        "calibration batch 1 must be a tensor, a tuple of positional arguments or a dict of "
        "keyword arguments, not str"
    )


def test_a_full_disk_says_what_to_give_instead() -> None:
    calibration = of(iter([X]))

    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, content: Any) -> None:
            raise OSError(28, "No space left on device")

    calibration._source.file = Full()  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError) as caught:
        list(calibration.batches())
    assert str(caught.value) == (
        f"calibration batch 0 can't be kept for later passes in {tempfile.gettempdir()}: No space "
        "left on device. Give calibration= as a list or DataLoader, which is iterated again "
        "instead."
    )


@dataclass(frozen=True, repr=False)
class Learn(Pass):
    """Changes nothing, but shows in its plan what it saw."""

    name: ClassVar[str] = "learn"

    def plan(self, program: Program) -> Plan:
        extremes = MinMax()
        seen = observe(program, {program.placeholders[0]: [extremes]})
        return Plan(
            repr(self),
            warnings=calibration_warnings(seen, {"linear": [extremes]}),
            details=(f"range  {extremes.low:.1f}  {extremes.high:.1f}",),
        )

    def apply(self, program: Program, plan: Plan) -> Program:
        return program


@pytest.mark.parametrize("as_iterator", [False, True])
def test_passes_stream_it_and_the_report_shows_what_they_learnt(as_iterator: bool) -> None:
    batches = [X * n for n in range(1, 4)]
    lines: list[str] = []
    opt = fxopt.transform(
        Fixed(),
        [Learn(), Learn()],
        example_inputs=(X,),
        calibration=iter(batches) if as_iterator else batches,
        progress=lines.append,
    )
    of_all = "" if as_iterator else " of 3"
    told = [f"calibrating: batch {n}{of_all}" for n in (1, 2)]
    assert [line for line in lines if line.startswith("calib")] == told * 2
    for step in opt.report.steps[1:]:
        assert step.details == ("range  -3.0  3.0",)
        (warning,) = step.warnings
        assert warning.startswith("calibrated on 6 samples in 3 batches only")
    assert "planned      range  -3.0  3.0" in str(opt.report)
    assert "calibrated on 6 samples" in " ".join(str(opt.report).split())
    assert opt.program.calibration is None
    assert all(step.graph.program.calibration is None for step in opt.steps)
    assert not any("calibration=" in note for note in opt.report.notes)


def test_bad_calibration_stops_the_list_and_leaves_the_model() -> None:
    model = Fixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="calibration batch 1 doesn't fit the model"):
        fxopt.transform(model, [Learn()], example_inputs=(X,), calibration=[X, X.double()])
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_calibration_that_nothing_asked_for_is_noted() -> None:
    opt = fxopt.transform(Fixed(), "canonicalize", example_inputs=(X,), calibration=[X])
    assert opt.report.notes[-1] == (
        "calibration= was given, but no pass of the list asked for it: none of them learns from "
        "inputs with these options"
    )


def test_calibration_waits_for_the_first_call_with_the_capture() -> None:
    opt = fxopt.transform(Fixed(), [Learn()], calibration=iter([X * 2]))
    assert not opt.is_captured
    opt(X)
    assert opt.report.steps[1].details == ("range  -2.0  2.0",)


def test_what_outlives_the_transformation_holds_no_calibration() -> None:
    program = capture(Fixed(), (X,))
    held = replace(program, calibration=Calibration([X], program.signature))
    assert same(held.batches(), [(X,)])
    assert held.outline().calibration is None
    assert held.on_device(torch.device("meta")).calibration is None
    assert held.with_graph(held.graph).calibration is held.calibration
    assert same(program.batches(), [program.example])
