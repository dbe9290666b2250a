"""Lists that share a capture are each what `transform` makes of them, and leave it as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import FxoptError
from fxopt.graph_text import text
from fxopt.report import Report
from fxopt.search import staged
from fxopt.search.staged import Captures, Staged
from tests.search.small import INPUTS, mlp

LISTS = [
    "canonicalize",
    "prune-channels{ratio=0.5}",
    "prune-channels{ratio=0.25}, int8-linear{where=always}",
    "canonicalize, int8-linear{mode=static, where=always}",
    "int8-linear{mode=weight_only, where=always}, select-kernels",
    "int8-linear{where=always, claim=sqnr(90)}",
    "autocast{dtype=bfloat16, force=True}",
    "prepack",
    "quantize-cache",
    "canonicalize, prepack, canonicalize, fold-pruned",
]


class Branching(nn.Module):
    """Another graph for long inputs, with batch statistics that a pass folds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.up(x)))
        return self.down(hidden) if x.shape[0] < 8 else self.down(hidden).softmax(-1)


MODELS = {"mlp": mlp, "branching": lambda: Branching().eval()}
LONG = torch.randn(12, 8, generator=torch.Generator().manual_seed(9))


def said(report: Report) -> Any:
    """All of a report but how long it took, and last bits, which hang on where memory lies."""
    plain = json.loads(report.to_json())
    plain.pop("capture_ms")
    plain.pop("fingerprint", None)
    for step in plain["steps"]:
        step.pop("milliseconds")
        step.pop("measured")
    plain["end_to_end"] = plain["end_to_end"].partition("measured")[0]
    return plain


def assert_same(one: Any, other: Any) -> None:
    """Equal in all but the last bits of the outputs."""
    assert type(one) is type(other)
    if isinstance(one, str):
        assert one == other
        return
    assert one[:2] == other[:2]
    for mine, yours in zip(one[2], other[2], strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-6)


def result(make: Any) -> Any:
    """What a list makes, as values that can be compared; the text of its error where it has one."""
    try:
        made = make()
    except FxoptError as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        outputs = [made(x) for x in (*INPUTS, LONG)]
    programs = [
        (
            text(one),
            {name: one.tensor(name).tolist() for name in one.state if not packed(one, name)},
        )
        for one in made.programs
    ]
    return said(made.report), programs, outputs


def packed(program: Any, name: str) -> bool:
    """Whether a tensor's entries can't be read."""
    return program.tensor(name).layout is not torch.strided


def staged_result(captures: Captures, passes: str, calibration: Any) -> Any:
    def make() -> Any:
        one = Staged(captures, passes, INPUTS[0], calibration)
        one.numerics()
        one.kernels()
        return one.module()

    return result(make)


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(sorted(MODELS)), st.lists(st.sampled_from(LISTS), min_size=2, max_size=4),
       st.booleans())  # fmt: skip
def test_each_list_makes_what_transform_makes(
    name: str, lists: list[str], calibrated: bool
) -> None:
    model, calibration = MODELS[name](), INPUTS if calibrated else None
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    captures = Captures(model)
    first = text(captures.run(INPUTS[0]).program)
    for passes in lists:
        alone = result(
            lambda passes=passes: fxopt.transform(
                MODELS[name](), passes, example_inputs=INPUTS[0], calibration=calibration,
                measure_cost=False,
            )
        )  # fmt: skip
        assert_same(staged_result(captures, passes, calibration), alone)
        assert text(captures.run(INPUTS[0]).program) == first
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each capture, whether it is for a further program."""
    made: list[bool] = []
    capture = staged.captured_alone

    def counted(*given: Any, further: bool, **options: Any) -> Any:
        made.append(further)
        return capture(*given, further=further, **options)

    monkeypatch.setattr(staged, "captured_alone", counted)
    return made


def test_each_call_is_captured_once(count: list[bool]) -> None:
    captures = Captures(MODELS["branching"]())
    for passes in LISTS:
        staged_result(captures, passes, None)
    assert sorted(count) == [False, True]


def test_what_is_done_to_one_graph_is_not_done_to_the_next(count: list[bool]) -> None:
    captures = Captures(mlp())
    wanted = staged_result(captures, "canonicalize, int8-linear{where=always}", None)
    program = captures.run(INPUTS[0]).program
    for node in reversed(program.graph.nodes):
        node.meta.clear()
        program.graph.erase_node(node)
    assert_same(staged_result(captures, "canonicalize, int8-linear{where=always}", None), wanted)
    assert count == [False]


def test_a_module_that_is_written_to_leaves_the_others(count: list[bool]) -> None:
    captures = Captures(mlp())
    passes = "int8-linear{where=always}"
    wanted = staged_result(captures, passes, None)
    one = Staged(captures, passes, INPUTS[0], None)
    one.kernels()
    module = one.module()
    own = [t for n, t in module.program.state.items() if n not in dict(mlp().named_parameters())]
    assert own
    for tensor in own:
        tensor.zero_()
    assert_same(staged_result(captures, passes, None), wanted)
    assert count == [False]


def test_a_model_that_was_changed_is_captured_anew(count: list[bool]) -> None:
    model = mlp()
    captures = Captures(model)
    captures.run(INPUTS[0])
    with torch.no_grad():
        model.up.weight.mul_(2)
    run = captures.run(INPUTS[0])
    assert count == [False, False]
    assert torch.equal(run.trials[0].outputs[0], model(INPUTS[0]))
    captures.run(INPUTS[0])
    assert len(count) == 2


def test_sizes_that_a_pass_has_fixed_are_captured_anew(count: list[bool]) -> None:
    captures = Captures(mlp())
    program = captures.run(INPUTS[0]).program
    before = text(program)
    size = program.placeholders[0].meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    assert bool(size == 4)  # records that it is 4
    assert text(captures.run(INPUTS[0]).program) == before
    assert count == [False, False]


def test_another_example_is_another_capture(count: list[bool]) -> None:
    captures = Captures(mlp())
    changed = INPUTS[0].clone()
    captures.run(changed)
    changed[0, 0] += 1
    captures.run(changed)
    captures.run((changed,))
    assert len(count) == 3


def test_what_torch_compile_wrapped_is_said_as_transform_says_it() -> None:
    wrapped: Any = torch.compile(mlp())
    notes = [
        result(lambda: fxopt.transform(wrapped, "canonicalize", example_inputs=INPUTS[0],
                                       measure_cost=False)),
        staged_result(Captures(wrapped), "canonicalize", None),
    ]  # fmt: skip
    assert_same(*notes)
