"""Origins go through a document; those of an earlier version are read from names, once."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.errors import SaveError
from fxopt.nodes import note_origins
from fxopt.passes.pruning.sparsify24 import SPARSE24
from fxopt.passes.quantization.shift_channels import SHIFT
from fxopt.passes.quantization.smoothing_rule import SMOOTHED
from fxopt.passes.quantization.split_outliers import MAIN, OUTLIERS
from fxopt.program import Origin, Program
from fxopt.saving import from_document, to_document

BEFORE = {
    "main": MAIN,
    "outliers": OUTLIERS,
    "shift": SHIFT,
    "smoothed": SMOOTHED,
    "sparse24": SPARSE24,
}


class Scaled(nn.Module):
    """x times parameters of any names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))

    def forward(self, x: Tensor) -> Tensor:
        for parameter in self.parameters():
            x = x * parameter
        return x


def program_of(names: list[str]) -> Program:
    return capture(Scaled(names), (torch.ones(2),))


def read_back(program: Program, **changed: Any) -> Program:
    document = json.loads(json.dumps(to_document(program)))
    document = {key: v for key, v in {**document, **changed}.items() if v is not KeyError}
    return from_document(document, program.state, program.example)


ORIGINS = st.builds(Origin, st.text(max_size=8), st.text(max_size=8))


@given(st.lists(st.lists(ORIGINS, max_size=3), min_size=1, max_size=4))
def test_any_origins_come_back(drawn: list[list[Origin]]) -> None:
    names = [f"w{index}_main" for index in range(len(drawn))]
    program = program_of(names)
    given_origins = {n: tuple(o) for n, o in zip(names, drawn, strict=True) if o}
    note_origins(program.graph, given_origins)
    assert program.origins == given_origins
    assert read_back(program).origins == given_origins


@pytest.mark.parametrize("number", ["", "_1", "_23"])
@pytest.mark.parametrize("suffix", BEFORE)
def test_a_document_of_before_tells_by_suffixes(suffix: str, number: str) -> None:
    program = program_of([f"a_{suffix}{number}", f"a_{suffix}_float16", f"{suffix}", "b"])
    found = read_back(program, origins=KeyError).origins
    assert found == {f"a_{suffix}{number}": (BEFORE[suffix],)}
    assert not read_back(program).origins, "what this version writes is not read from names"


def test_what_an_earlier_version_smoothed_stays_as_it_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    program = capture(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 4)), (x,))
    pass_ = fxopt.SmoothQuant(alpha=0.9)
    smoothed = pass_.apply(program, pass_.plan(program)).materialized()
    before = read_back(smoothed, origins=KeyError)
    assert before.origins == smoothed.origins == {"1.weight_smoothed": (SMOOTHED,)}
    assert str(pass_.plan(before)) == str(pass_.plan(smoothed))


@pytest.mark.parametrize(
    ("origins", "text"),
    [
        ([], "'origins' of the saved graph is []; the file is damaged"),
        ({"w": "main"}, "the saved graph holds an origin that can't be read: 'main'"),
        ({"w": [["split-outliers"]]}, "an origin that can't be read: ['split-outliers']"),
        ({"w": [["a", "b", "c"]]}, "an origin that can't be read: ['a', 'b', 'c']"),
        ({"w": [["a", 3]]}, "an origin that can't be read: ['a', 3]"),
        ({"w": [{"a": "b"}]}, "an origin that can't be read: {'a': 'b'}"),
    ],
)
def test_a_damaged_origin_is_refused(origins: Any, text: str) -> None:
    with pytest.raises(SaveError) as caught:
        read_back(program_of(["w"]), origins=origins)
    assert text in str(caught.value)
