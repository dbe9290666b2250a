"""Sizes that depend on data: every pass takes a model that has them, at the sizes observed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import fxopt
from fxopt.capture import capture
from fxopt.data_sizes import observe_sizes
from fxopt.nodes import UNKNOWN_SIZE, size_at_capture
from fxopt.pass_list import PASSES
from fxopt.program import Program
from tests.check import eager
from tests.data_sized import Experts, Masked

SPECS = [
    *(name for name in PASSES if name not in ("lower", "int8-linear")),
    "int8-linear{where=always}",
    "int8-linear{where=always, mode=static, weights=gptq}",
    "int8-linear{where=always, mode=weight_only, weights=gptq}",
    "int8-linear{where=always, budget=sqnr(40)}",
    "int4-linear{weights=gptq}",
    "int4-linear{scheme=affine, weights=awq-gptq}",
    "half-linear{dtype=float16, force=true}",
    "float8-linear{force=true}",
    "autocast{dtype=bfloat16, force=true}",
    "autocast{dtype=float16, force=true, budget=sqnr(40)}",
    "sparsify24{force=true}",
    "half-attention{force=true}",
]


def unknown_sizes(program: Program) -> Iterator[torch.SymInt]:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            yield from (size for size in value.shape if free_unbacked_symbols(size))


def experts(**options: object) -> tuple[Experts, Tensor]:
    torch.manual_seed(0)
    return Experts(**options).eval(), torch.randn(2, 8, 64)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def captured() -> fxopt.Optimized:
    """A mixture whose second expert gets no token of the example."""
    model, x = experts(idle=(1,))
    return fxopt.transform(model, "canonicalize", example_inputs=(x,))


@pytest.mark.parametrize("spec", SPECS)
def test_every_pass_takes_a_mixture_of_experts(captured: fxopt.Optimized, spec: str) -> None:
    (x,) = captured.program.example
    result = fxopt.transform(captured, spec, example_inputs=(x,))
    again = fxopt.transform(result, "canonicalize", example_inputs=(x,))
    assert again(x).shape == x.shape
    assert str(result.report)


def test_sizes_are_those_of_the_example_and_a_note_says_so() -> None:
    model, x = experts()
    tokens = x.reshape(-1, 64)
    counts = torch.bincount(model.router(tokens).argmax(-1), minlength=2).tolist()
    program = capture(model, (x,))
    assert size_at_capture(next(unknown_sizes(program))) == counts[0]
    assert set(map(size_at_capture, unknown_sizes(program))) == set(counts)
    notes = [note for note in program.notes if note.startswith("a size depends on data")]
    for count, note in zip(counts, notes, strict=True):
        assert note.startswith("a size depends on data at data_sized.py:")
        assert note.endswith(
            f"(rows,) = torch.where(chosen == index): costs are estimated for {count}, as in the "
            "example"
        )


def test_a_size_that_nobody_saw_is_the_stated_default() -> None:
    model = Masked().eval()
    keep = torch.rand(2, 5) > 0.5
    program = capture(model, (torch.randn(2, 5, 64), keep))
    (size,) = {str(size): size for size in unknown_sizes(program)}.values()
    assert size_at_capture(size) == int(keep.sum())
    assert size_at_capture(size * 3 + program.placeholders[0].meta["val"].shape[0]) == (
        3 * int(keep.sum()) + 2
    )
    env = program.fake_mode.shape_env
    assert env is not None
    env.var_to_hint_override.clear()
    assert size_at_capture(size) == UNKNOWN_SIZE
    assert len(observe_sizes(replace(program))) == 1
    assert size_at_capture(size) == int(keep.sum())


def test_default_int8_asks_for_the_rows_and_quantizes() -> None:
    model, x = experts()
    result = fxopt.transform(model, fxopt.Int8Linear(), example_inputs=(x,))
    step = result.steps[1].record
    assert all("at M=16," in refusal.reason for refusal in step.refused)
    torch.testing.assert_close(result(x), model(x), rtol=0.1, atol=0.1)


def test_static_int8_leaves_what_no_value_reached_in_float(captured: fxopt.Optimized) -> None:
    (x,) = captured.program.example
    spec = "int8-linear{where=always, mode=static}"
    result = fxopt.transform(captured, spec, example_inputs=(x,))
    reasons = {one.node: one.reason for one in result.steps[1].record.refused}
    idle = [reason for node, reason in reasons.items() if node.startswith("experts.1.")]
    assert (
        idle
        == [
            "no value reached it on the calibration inputs, so its range isn't known: give "
            "calibration= inputs that use it, or mode='dynamic'"
        ]
        * 2
    )
    assert sum(result.steps[1].record.fired.values()) == 3
    model, _ = experts()
    busy = fxopt.transform(
        model, spec, example_inputs=(x,), calibration=[(torch.randn(4, 16, 64),)]
    )
    assert sum(busy.steps[1].record.fired.values()) == 5


@settings(max_examples=4)
@given(
    count=st.integers(1, 3),
    idle=st.booleans(),
    spec=st.sampled_from(SPECS),
    sizes=st.tuples(st.integers(2, 5), st.integers(2, 9)),
)
def test_drawn_mixtures_answer_as_eager_whoever_is_idle(
    count: int, idle: bool, spec: str, sizes: tuple[int, int]
) -> None:
    model, x = experts(count=count, idle=(0,) if idle and count > 1 else ())
    result = fxopt.transform(model, spec, example_inputs=(x,))
    other = torch.randn(*sizes, 64)
    expected = eager(model, (other,), {})
    if spec.startswith(("prune", "sparsify24", "int4")):
        assert result(other).shape == expected.shape
    else:
        torch.testing.assert_close(result(other), expected, rtol=0.1, atol=0.1)


def test_a_loaded_program_keeps_its_sizes(captured: fxopt.Optimized, tmp_path: object) -> None:
    folder = f"{tmp_path}/saved"
    captured.save(folder)
    loaded = fxopt.load(folder)
    (x,) = captured.program.example
    fxopt.transform(loaded, "prune-channels", example_inputs=(x,))
    assert torch.equal(loaded(x), captured(x))
