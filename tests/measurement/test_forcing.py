"""Teacher forcing on given text: figures against a direct computation, faults that are seen."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.errors import MeasureError
from fxopt.measurement import Decoded, fidelity
from tests.generation.language_models import language_model, original, shared, text


def texts(rows: int, length: int, padding: int = 0, count: int = 2) -> list[dict[str, Tensor]]:
    """Batches of text, in the first row of which the first `padding` slots are padding."""
    batches = []
    for seed in range(count):
        ids = text(rows, length, seed)
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def directly(model: nn.Module, batches: list[dict[str, Tensor]], last: int) -> float:
    """exp of the mean loss of the last `last - 1` tokens by transformers' own loss."""
    loss, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            labels[:, : -(last - 1)] = -100
            judged = int((labels[:, 1:] != -100).sum())
            loss += judged * float(model(**batch, labels=labels).loss)
            count += judged
    return math.exp(loss / count)


def decoded(reference, candidate, batches, one_by_one: int) -> Decoded:  # type: ignore[no-untyped-def]
    found = fidelity(reference, candidate, batches, one_by_one=one_by_one).decoded
    assert found is not None
    return found


@given(
    rows=st.integers(1, 2),
    one_by_one=st.integers(2, 6),
    before=st.integers(1, 4),
    padding=st.integers(0, 1),
    optimised=st.booleans(),
)
def test_perplexities_are_those_of_transformers(
    rows: int, one_by_one: int, before: int, padding: int, optimised: bool
) -> None:
    model = original("Llama")
    batches = texts(rows, before + one_by_one, min(padding, before))
    found = decoded(model, shared("Llama")[optimised], batches, one_by_one)
    wanted = directly(model, batches, one_by_one)
    assert found.tokens == 2 * rows * one_by_one
    for pair in (found.perplexity, found.prefill_perplexity):
        assert pair is not None
        assert pair.reference == pytest.approx(wanted, rel=1e-5)
        assert pair.candidate == pytest.approx(wanted, rel=1e-5)
    assert found.greedy_match == 1.0
    assert found.kl <= found.kl_max < 1e-8
    assert found.sqnr_db > 90


@pytest.mark.parametrize("family", ["GPT2", "OPT", "Mistral", "Gemma2"])
@pytest.mark.parametrize("padding", [0, 3])
def test_families_read_padded_texts_alike(family: str, padding: int) -> None:
    model, opt = shared(family)
    for one in (model, opt):
        found = decoded(model, one, texts(2, 11, padding), 5)
        assert found.sqnr_db > 80
        assert found.greedy_match == 1.0


def test_a_head_that_was_shifted_costs_what_is_computed_directly() -> None:
    model = language_model("Llama")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += 0.1 * torch.randn_like(other.lm_head.weight)
    batches = texts(2, 9)
    found = decoded(model, other, batches, 4)
    with torch.no_grad():
        p, q = (
            torch.cat([one(**batch).logits[:, 5:].reshape(8, -1) for batch in batches])
            .double()
            .log_softmax(-1)
            for one in (model, other)
        )
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=1e-4)
    assert found.greedy_match == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.perplexity is not None
    assert found.perplexity.candidate == pytest.approx(directly(other, batches, 4), rel=1e-5)


def test_a_cache_that_loses_a_token_is_seen_in_steps_alone() -> None:
    model = language_model("Llama")
    broken = copy.deepcopy(model)
    forward = broken.forward

    def forgetting(*args, **options):  # type: ignore[no-untyped-def]
        output = forward(*args, **options)
        if options.get("past_key_values") is not None:
            for layer in output.past_key_values.layers:
                layer.keys[:, :, -1] = 0.0
        return output

    broken.forward = forgetting
    found = fidelity(model, broken, texts(2, 9), one_by_one=4)
    assert found.sqnr_db == math.inf
    assert found.decoded is not None
    assert found.decoded.sqnr_db < 40
    assert found.decoded.prefill_perplexity is not None
    assert found.decoded.perplexity is not None
    whole, steps = found.decoded.prefill_perplexity, found.decoded.perplexity
    assert whole.candidate == whole.reference
    assert abs(steps.candidate / steps.reference - 1) > 1e-4


def test_what_reads_no_text_is_told_in_a_note() -> None:
    model = original("Llama")
    found = fidelity(model, lambda **batch: model(**batch), texts(2, 9), one_by_one=4)
    assert found.decoded is None
    assert found.notes[-1].startswith("not read token by token: only a causal language model")


def test_one_token_has_no_perplexity() -> None:
    found = decoded(*shared("Llama"), texts(2, 9), 1)
    assert found.perplexity is found.prefill_perplexity is None
    assert "perplexity" not in dict(found.figures())


@pytest.mark.parametrize(
    ("one_by_one", "message"),
    [
        (0, "one_by_one=0: give how many tokens of each text are read one by one"),
        (True, "one_by_one=True: give how many"),
        (9, "one_by_one=9 with 9 tokens in batch 0: give fewer, so that at least one is read"),
    ],
)
def test_numbers_out_of_range_are_told(one_by_one: int, message: str) -> None:
    with pytest.raises(MeasureError, match=message):
        fidelity(*shared("Llama"), texts(2, 9), one_by_one=one_by_one)


def test_batches_that_are_no_text_are_told() -> None:
    batch = {**texts(2, 9)[0], "position_ids": torch.arange(9).expand(2, 9)}
    with pytest.raises(MeasureError, match=r"batch 0 of data must be text, .*, not position_ids"):
        fidelity(original("Llama"), original("Llama"), [batch], one_by_one=4)


def test_a_comparison_shows_what_writing_costs_and_is_worth() -> None:
    model, opt = shared("Llama")
    found = fxopt.compare(
        {"original": model, "fxopt": opt},
        texts(2, 9),
        repeats=3,
        seconds=0.02,
        energy=False,
        count=False,
        new_tokens=2,
        contexts=(0, 6),
        one_by_one=4,
    )
    shown = str(found)
    for column in (
        "first token",
        "tokens/s behind 0",
        "tokens/s behind 6",
        "cache/token",
        "SQNR of steps",
        "KL of steps",
        "greedy match",
        "perplexity of steps",
    ):
        assert column in shown
    assert type(found).from_json(found.to_json()) == found
    worth = found["fxopt"].fidelity
    assert worth is not None
    assert "of 16 tokens that were read one by one:" in str(worth)
    assert "read at once" in str(worth)
