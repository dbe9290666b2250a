"""PruneChannels on drawn models: the pruned program is the original with blind readers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from fxopt import wellformed
from fxopt.analyses.channels import channels
from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import PassError
from fxopt.interpreter import evaluate
from fxopt.pass_list import parse_passes
from fxopt.passes.pruning.prune_channels import PruneChannels
from fxopt.program import Program
from fxopt.rewriting import Pass
from tests.models import Drawn
from tests.pruned_models import prunable_models
from tests.pruning_oracles import pruned_by_hand, relative_change
from tests.sweeps import in_parts

_FEW = in_parts(50)
_MANY = in_parts(500, one_in=5)
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


def test_fisher_prunes_and_refits_by_what_the_answer_feels() -> None:
    found = {"uniform": 0.0, "fisher": 0.0}
    for seed in range(3):
        program, model, batch = _classifier(seed)
        before = model(**batch).logits
        for weighting in found:
            pass_ = PruneChannels(importance="obs", reconstruct=True, weighting=weighting)  # type: ignore[arg-type]
            pruned = pass_.apply(program, pass_.plan(program))
            (after,) = evaluate(pruned, program.signature.flatten((), batch))
            found[weighting] += _divergence(before, after)
    assert found["fisher"] < 0.75 * found["uniform"]


def test_a_weighting_that_weighs_nothing_is_an_error() -> None:
    with pytest.raises(PassError, match=r"give one of 'uniform', 'fisher'"):
        PruneChannels(reconstruct=True, weighting="hessian")  # type: ignore[arg-type]
    with pytest.raises(PassError, match=r"reconstruct=False\): give importance=\"obs\""):
        PruneChannels(weighting="fisher")
    assert parse_passes("prune-channels{importance=obs, weighting=fisher}") == (
        PruneChannels(importance="obs", weighting="fisher"),
    )


def _classifier(seed: int) -> tuple[Program, nn.Module, dict[str, Tensor]]:
    """A classifier of its first token, given batches that are padding for the most part."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=100,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=5,
        initializer_range=0.3,
    )
    model = BertForSequenceClassification(config).eval().requires_grad_(False)
    mask = torch.ones(256, 12, dtype=torch.int64)
    mask[:, 2:] = 0
    batch = {"input_ids": torch.randint(0, 100, (256, 12)), "attention_mask": mask}
    program = capture(model, batch)
    return replace(program, calibration=Calibration([batch], program.signature)), model, batch


def _divergence(before: Tensor, after: Tensor) -> float:
    before, after = before.log_softmax(-1), after.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())
