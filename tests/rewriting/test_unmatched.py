"""Globs that match nothing are said, by every pass that takes them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.pass_list import PASSES
from fxopt.rewriting.option_types import Paths
from fxopt.rewriting.options import declared
from fxopt.rewriting.unmatched import unmatched

NAMES = st.lists(st.from_regex(r"[a-e]{1,3}(\.[a-e]{1,3}){0,2}", fullmatch=True), min_size=1)


@given(NAMES, st.data())
def test_what_matches_is_not_said_and_what_does_not_is(names: list[str], data: Any) -> None:
    name = data.draw(st.sampled_from(names))
    start = data.draw(st.integers(0, len(name)))
    matching = data.draw(st.sampled_from([name, f"{name[:start]}*", f"*{name[start:]}"]))
    assert fnmatchcase(name, matching)
    assert unmatched("exclude", [matching, str.islower], set(names)) == ()
    (warning,) = unmatched("exclude", [matching, f"{name}x*"], set(names))
    assert warning.startswith(f"exclude='{name}x*' matches none of {len(set(names))} paths; ")
    nearest = warning.rpartition("the nearest are ")[2].split(", ")
    assert set(nearest) <= set(names)
    assert name in nearest or len(set(names)) > len(nearest)


def test_nothing_is_said_of_a_graph_without_what_a_pass_looks_at() -> None:
    assert unmatched("exclude", ["head"], ()) == ()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 64)
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        self.classifier = nn.Linear(64, 8)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(self.table(ids)))
        return logits


CHOOSING = [
    (kind, option.name)
    for kind in PASSES.values()
    for option in declared(kind)
    if isinstance(option.type, Paths) or (kind is fxopt.PruneChannels and option.name == "exclude")
]


@pytest.mark.parametrize(
    ("kind", "option"), CHOOSING, ids=[f"{kind.name}-{option}" for kind, option in CHOOSING]
)
def test_every_pass_says_which_glob_chose_nothing(kind: Any, option: str) -> None:
    program = capture(Words().eval(), (torch.zeros(2, 6, dtype=torch.int64),))
    pass_ = kind(**{option: ("*", "classifer")})
    warned = [w for w in pass_.plan(program).warnings if "matches none" in w]
    (warning,) = warned
    assert warning.startswith(f"{option}='classifer' matches none of ")
    if kind not in (fxopt.Int8Embedding, fxopt.PruneChannels):
        assert "the nearest are classifier" in warning


def test_the_report_of_a_transformation_says_it() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    given = fxopt.HalfLinear("bfloat16", exclude="body.1.*", force=True)
    opt = fxopt.transform(Words().eval(), [given], example_inputs=(ids,))
    said = " ".join(str(opt.report).split())
    assert "exclude='body.1.*' matches none of 3 paths; the nearest are body.2" in said
