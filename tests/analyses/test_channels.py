"""What the analysis of channels says of drawn models, against what is true of them by force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxopt.analyses.channels import channels
from fxopt.capture import capture
from fxopt.recipe import materialize
from tests.models import Drawn
from tests.pruned_models import prunable_models
from tests.pruning_oracles import reaches_output, refusal_is_justified, strays
from tests.sweeps import in_parts

_DOUBLES = st.just(torch.float64)
_FEW = in_parts(60)
_MANY = in_parts(500, one_in=5)


def _assert_sound(drawn: Drawn, data: st.DataObject) -> None:
    """Channels that can be cut feed nothing but their readers, and their readers need them."""
    program = capture(drawn.model, drawn.example)
    found = channels(program)
    for group in found.cuttable:
        if not group.producers or not group.readers:
            continue
        some = data.draw(st.sets(st.integers(0, group.size - 1), min_size=1), label=group.name)
        chosen = torch.zeros(group.size, dtype=torch.bool)
        chosen[list(some)] = True
        stray = next(strays(program, found, group, chosen, program.example), None)
        assert stray is None, f"{group} is read elsewhere: {stray}"
        inputs = program.example
        assert not reaches_output(program, group, chosen, inputs, blind=True), str(group)
        assert reaches_output(program, group, chosen, inputs, blind=False), f"{group}: nothing read"


def _assert_refusals_justified(drawn: Drawn) -> None:
    """A group that can't be cut is the caller's, or has a way out beside its readers."""
    program = capture(drawn.model, drawn.example)
    found = channels(program)
    for group in found.groups:
        if group.refusals and any(
            isinstance(materialize(program.state[place.name]), torch.nn.Parameter)
            for place in group.places
        ):
            ends = (0, group.size - 1)  # a cumulative sum passes the last one on to nobody
            assert any(refusal_is_justified(program, found, group, one) for one in ends), str(group)


@_FEW
@given(prunable_models(dtypes=_DOUBLES), st.data())
def test_channels_that_can_be_cut_feed_their_readers_only(
    drawn: Drawn, data: st.DataObject
) -> None:
    _assert_sound(drawn, data)


@_FEW
@given(prunable_models(dtypes=_DOUBLES))
def test_what_cannot_be_cut_has_a_way_out(drawn: Drawn) -> None:
    _assert_refusals_justified(drawn)


@pytest.mark.slow
@_MANY
@given(prunable_models(dtypes=_DOUBLES), st.data())
def test_the_same_of_many_models(drawn: Drawn, data: st.DataObject) -> None:
    _assert_sound(drawn, data)
    _assert_refusals_justified(drawn)
