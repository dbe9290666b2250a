"""PruneChannels on drawn models: the pruned program is the original with blind readers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt import wellformed
from fxopt.analyses.channels import channels
from fxopt.capture import capture
from fxopt.evaluate import evaluate
from fxopt.passes.prune_channels import PruneChannels
from fxopt.rewriting import Pass
from tests.models import Drawn
from tests.pruned_models import prunable_models
from tests.pruning_oracles import pruned_by_hand, relative_change

_FEW = settings(max_examples=50)
_MANY = settings(max_examples=500)
_DOUBLES = st.just(torch.float64)
_KINDS = ("ffn", "heads", "queries", "residual", "channels")


@st.composite
def _passes(draw: st.DrawFn) -> PruneChannels:
    return PruneChannels(
        ratio=draw(st.sampled_from([0.2, 0.5, 0.8])),
        importance=draw(st.sampled_from(["l1", "l2", "group_l2", "random"])),
        scope=tuple(draw(st.sets(st.sampled_from(_KINDS), min_size=1))),
        ranking=draw(st.sampled_from(["local", "global"])),
    )


def _assert_equals_blind_original(drawn: Drawn, pass_: Pass) -> None:
    program = capture(drawn.model, drawn.example)
    plan = pass_.plan(program)
    result = pass_.apply(program, plan).materialized()
    wellformed.check(result)
    oracle = pass_.oracle(program, plan)
    assert oracle is not None
    found = channels(program)
    gone = []
    for name, kept in plan.keep.items():  # type: ignore[attr-defined]
        group = found[name]
        chosen = torch.ones(group.size, dtype=torch.bool)
        chosen[kept] = False
        gone.append((group, chosen))
    by_hand = pruned_by_hand(gone)
    for call in (drawn.example, *drawn.others):
        inputs = program.signature.flatten((), call)
        reference = evaluate(program, inputs, override=by_hand)
        assert relative_change(reference, evaluate(result, inputs)) < 1e-9, str(plan)
        assert relative_change(reference, evaluate(oracle, inputs)) < 1e-9, f"oracle: {plan}"


@_FEW
@given(prunable_models(dtypes=_DOUBLES), _passes())
def test_the_pruned_program_is_the_original_with_blind_readers(
    drawn: Drawn, pass_: PruneChannels
) -> None:
    _assert_equals_blind_original(drawn, pass_)


@pytest.mark.slow
@_MANY
@given(prunable_models(dtypes=_DOUBLES), _passes())
def test_many_pruned_programs_are_their_originals_with_blind_readers(
    drawn: Drawn, pass_: PruneChannels
) -> None:
    _assert_equals_blind_original(drawn, pass_)
