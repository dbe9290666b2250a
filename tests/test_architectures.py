"""Every architecture of the table through the whole pipeline, lowered, at sizes it never saw."""

from __future__ import annotations

import pytest
import torch

import fxopt
from tests.architectures import ARCHITECTURES
from tests.check import tensors_of

PASSES = {
    "numerics": "canonicalize, fuse-linears, fuse-conv-batch-norm, int8-linear, lower",
    "kernels": "canonicalize, fuse-linears, fuse-conv-batch-norm, prepack, lower",
}


@pytest.mark.sweep(one_in=2)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_printed_and_quantized(name: str) -> None:
    case = ARCHITECTURES[name]()
    opt = fxopt.transform(
        case.model,
        ["canonicalize, fuse-linears, fuse-conv-batch-norm, int8-linear, select-kernels"],
        example_inputs=case.example,
    )
    assert str(opt.graph).startswith(type(case.model).__name__)
    assert all(step.record.holds for step in opt.steps)
    assert any(step.record.fired for step in opt.steps[1:])
    for inputs in case.others:
        assert type(opt(**inputs)) is type(case.model(**inputs))


@pytest.mark.slow
@pytest.mark.sweep(one_in=4)
@pytest.mark.parametrize("form", PASSES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lowered_at_other_sizes(name: str, form: str) -> None:
    torch.compiler.reset()
    case = ARCHITECTURES[name]()
    opt = fxopt.transform(case.model, PASSES[form], example_inputs=case.example, measure_cost=False)
    claim = fxopt.Sqnr(16.0) if form == "numerics" else fxopt.Close()
    assert len(case.others) >= 2
    for inputs in case.others:
        with torch.no_grad():
            expected, found = tensors_of(case.model(**inputs)), tensors_of(opt(**inputs))
        for old, new in zip(expected, found, strict=True):
            measured = claim.measure(old, new)
            assert measured.holds, measured.text
