"""Fidelity: every figure against a plain formula, whatever the batches, and its refusals."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from fxopt.errors import MeasureError
from fxopt.measurement import agreement
from fxopt.measurement.fidelity import fidelity, fidelity_all


def identity(x: Tensor) -> Tensor:
    return x


def noisy(x: Tensor) -> Tensor:
    return x + 0.1 * torch.sin(37.0 * x)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    features=st.integers(2, 9),
    piece=st.sampled_from([1, 10, 1 << 20]),
)
def test_the_figures_are_those_of_the_formulas(
    seed: int, sizes: list[int], features: int, piece: int
) -> None:
    batches = [draws(seed + i, size, features) for i, size in enumerate(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "_PIECE_ELEMENTS", piece)
        found = fidelity(identity, noisy, batches)
    ref = torch.cat(batches)
    out = noisy(ref)
    p, q = ref.softmax(-1), out.softmax(-1)
    cosine = nn.functional.cosine_similarity(ref, out, dim=-1)
    assert found.rows == sum(sizes)
    assert found.batches == len(sizes)
    noise = ((out - ref) ** 2).sum().item()
    assert found.sqnr_db == pytest.approx(10 * math.log10((ref**2).sum().item() / noise))
    assert found.cosine_mean == pytest.approx(cosine.mean().item())
    assert found.cosine_min == pytest.approx(cosine.min().item())
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert found.top1_agreement == (ref.argmax(-1) == out.argmax(-1)).double().mean().item()


@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_padding_changes_no_figure(seed: int, lengths: list[int]) -> None:
    rows = [draws(seed + i, length, 5) for i, length in enumerate(lengths)]
    padded = torch.full((len(lengths), max(lengths), 5), 1e6, dtype=torch.float64)
    mask = torch.zeros(padded.shape[:2], dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = row, 1

    def model(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": x}

    def other(x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"logits": noisy(x) + 7 * (1 - attention_mask.unsqueeze(-1))}

    found = fidelity(model, other, [{"x": padded, "attention_mask": mask}])
    plain = fidelity(identity, noisy, [torch.cat(rows)])
    assert found.rows == plain.rows == sum(lengths)
    assert found.sqnr_db == pytest.approx(plain.sqnr_db)
    assert found.cosine_min == pytest.approx(plain.cosine_min)
    assert found.kl == pytest.approx(plain.kl)
    assert found.top1_agreement == plain.top1_agreement


def test_a_model_is_faithful_to_itself() -> None:
    found = fidelity(identity, identity, [draws(0, 4, 3)])
    assert (found.sqnr_db, found.kl, found.top1_agreement) == (math.inf, 0.0, 1.0)
    assert found.cosine_min == pytest.approx(1.0)


@dataclass
class Named:
    logits: Tensor


@pytest.mark.parametrize(
    ("wrap", "name", "has_kl"),
    [
        (lambda x: x, "output", True),
        (lambda x: (x, None), "output", True),
        (lambda x: {"loss": x.sum(), "hidden": x, "logits": x}, "logits", True),
        (lambda x: SequenceClassifierOutput(logits=x), "logits", True),
        (lambda x: BaseModelOutput(last_hidden_state=x), "last_hidden_state", False),
        (lambda x: [x.float().numpy()], "output", True),
    ],
)
def test_outputs_of_any_type_are_read(wrap: Any, name: str, has_kl: bool) -> None:
    found = fidelity(lambda x: wrap(x), lambda x: wrap(noisy(x)), [draws(0, 4, 3)])
    assert found.output == name
    assert (found.kl is not None) == has_kl
    assert found.sqnr_db == pytest.approx(fidelity(identity, noisy, [draws(0, 4, 3)]).sqnr_db)


def test_batches_are_called_as_they_come() -> None:
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    x = draws(0, 4, 3)
    for batch in ((x, x), [x, x], {"x": x, "y": x}):
        assert fidelity(add, add, [batch]).rows == 4


def test_images_and_numbers_have_a_row_for_each_example() -> None:
    assert fidelity(identity, noisy, [draws(0, 2, 3, 4, 4)]).rows == 2
    numbers = fidelity(identity, noisy, [draws(0, 6)])
    assert (numbers.rows, numbers.cosine_mean, numbers.kl) == (6, None, None)
    assert math.isfinite(numbers.sqnr_db)


def test_a_nan_of_the_candidate_can_not_hide() -> None:
    def broken(x: Tensor) -> Tensor:
        return torch.where(x == x.max(), math.nan, x)

    found = fidelity(identity, broken, [draws(0, 4, 3)])
    assert (found.sqnr_db, found.kl, found.cosine_mean) == (-math.inf, math.inf, None)
    assert found.top1_agreement == 0.75
    assert found.notes == ("the candidate holds NaN or infinity in 1 rows",)


def test_rows_that_the_reference_spoils_are_left_out_and_counted() -> None:
    x = draws(0, 4, 3)
    x[1, 2] = math.nan
    found = fidelity(identity, identity, [x])
    assert found.rows == 3
    assert found.sqnr_db == math.inf
    assert "1 rows are left out: the reference itself holds NaN" in found.notes[0]


def test_equally_masked_logits_are_equal() -> None:
    x = draws(0, 4, 3)
    x[:, 0] = -math.inf
    found = fidelity(identity, identity, [x])
    assert (found.sqnr_db, found.kl, found.rows) == (math.inf, 0.0, 4)


@pytest.fixture(scope="module")
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@given(lengths=st.lists(st.integers(2, 6), min_size=1, max_size=3), left=st.booleans())
def test_perplexity_is_that_of_the_loss_within_the_mask(
    gpt2: GPT2LMHeadModel, lengths: list[int], left: bool
) -> None:
    gpt2.train()
    ids = torch.randint(0, 50, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        mask[i, -length:] = mask[i, : length if not left else None] = 0
        mask[i, slice(6 - length, 6) if left else slice(0, length)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    found = fidelity(gpt2, gpt2, [batch])
    assert gpt2.training
    gpt2.eval()
    with torch.no_grad():
        losses = gpt2(**batch).logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for i in range(len(lengths)):
        for t in range(1, 6):
            if mask[i, t] and mask[i, t - 1]:
                total -= losses[i, t - 1, ids[i, t]].item()
                count += 1
    assert found.perplexity is not None
    assert found.perplexity.reference == pytest.approx(math.exp(total / count))
    assert found.perplexity.candidate == pytest.approx(math.exp(total / count))


def test_no_perplexity_without_a_causal_model() -> None:
    ids = torch.randint(0, 5, (2, 4))
    table = draws(0, 5, 5)
    batch = {"input_ids": ids}
    assert fidelity(lambda input_ids: table[input_ids], identity_of(table), [batch]).perplexity is (
        None
    )


def identity_of(table: Tensor) -> Any:
    return lambda input_ids: table[input_ids]


def test_classes_are_scored_by_the_labels() -> None:
    x = torch.eye(3).repeat(4, 1)
    labels = x.argmax(-1).clone()
    labels[0] = -100

    def swapped(x: Tensor) -> Tensor:
        return x[:, [1, 0, 2]]

    found = fidelity(identity, swapped, [x[:6], x[6:]], labels=[labels[:6], labels[6:]])
    assert found.accuracy is not None
    assert (found.accuracy.reference, found.accuracy.candidate) == (1.0, pytest.approx(4 / 11))
    assert found.classification is not None
    assert found.classification["2"] == {
        "precision": 1.0,
        "recall": 1.0,
        "f1-score": 1.0,
        "support": 4.0,
    }
    own = fidelity(identity, swapped, [{"x": x, "labels": labels}])
    assert own.accuracy == found.accuracy
    assert own.classification == found.classification


def test_labels_of_what_is_no_classifier_are_not_dropped_in_silence() -> None:
    def hidden(x: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=x)

    found = fidelity(hidden, hidden, [draws(0, 2, 3)], labels=[torch.tensor([0, 1])])
    assert found.notes == ("the labels were not used: what is compared are no logits",)


def test_metrics_are_asked_of_both_models() -> None:
    data = [draws(0, 4, 3), draws(1, 4, 3)]

    def spread(model: Any, batches: list[Tensor]) -> float:
        return sum(float(model(x).std()) for x in batches)

    found = fidelity(identity, noisy, data, metric=spread)
    assert found.metrics["spread"].reference == spread(identity, data)
    assert found.metrics["spread"].candidate == spread(noisy, data)
    several = fidelity(
        identity,
        noisy,
        data,
        metric={"s": spread, "many": lambda model, batches: {"a": 1, "b": torch.tensor(2.0)}},
    )
    assert list(several.metrics) == ["s", "a", "b"]
    text = str(several)
    assert "fidelity of output: 8 rows in 2 batches" in text
    assert "b               2 (reference 2)" in text


def test_all_candidates_share_one_run_of_the_reference() -> None:
    calls = []

    def reference(x: Tensor) -> Tensor:
        calls.append(1)
        return x

    def failing(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    errors: dict[str, Exception] = {}
    found = fidelity_all(
        reference,
        {"noisy": noisy, "failing": failing, "same": identity},
        (draws(i, 2, 3) for i in range(3)),
        failed=errors.__setitem__,
    )
    assert list(found) == ["noisy", "same"]
    assert len(calls) == 3
    assert str(errors["failing"]) == "no kernel"
    assert found["noisy"] == fidelity(identity, noisy, [draws(i, 2, 3) for i in range(3)])
    with pytest.raises(RuntimeError, match="no kernel"):
        fidelity(reference, failing, [draws(0, 2, 3)])


def test_no_batch_and_no_output_is_kept() -> None:
    seen: list[weakref.ref[Tensor]] = []

    def watched(x: Tensor) -> Tensor:
        seen.append(weakref.ref(x))
        return x

    def alive() -> int:
        return sum(ref() is not None for ref in seen)

    def stream() -> Iterator[Tensor]:
        for i in range(9):
            assert alive() <= 3  # the batch before and what the two models made of it
            yield watched(draws(i, 4, 3))

    labels = (torch.zeros(4, dtype=torch.int64) for _ in range(9))
    fidelity(lambda x: watched(x + 1), lambda x: watched(x + 2), stream(), labels=labels)
    assert len(seen) == 27
    assert alive() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": draws(0, 2, 3)}, "data is one input (a Tensor), not an iterable of inputs"),
        ({"data": 3}, "data must be an iterable of inputs (a list, a DataLoader)"),
        ({"data": []}, "data gave no batch at all"),
        ({"data": iter([1]), "metric": lambda m, d: 1.0}, "a list_iterator can be read once only"),
        ({"metric": {"f1": 3}}, "'f1' is int"),
        ({"metric": lambda m, d: "high"}, "the metric 'metric' returned 'high' for the reference"),
        ({"labels": []}, "labels ended after 0 batches and the other went on"),
        ({"labels": [torch.zeros(3)]}, "the labels of batch 0 are torch.float32 [3], and the logi"),
        ({"candidate": lambda x: x[:1]}, "candidate returned [1, 3] for batch 0 where the"),
        ({"candidate": lambda x: {"n": 1}}, "candidate returned dict without a floating-point"),
    ],
)
def test_what_can_not_be_used_is_said(arguments: dict[str, Any], message: str) -> None:
    given_: dict[str, Any] = {"candidate": identity, "data": [draws(0, 2, 3)], **arguments}
    with pytest.raises(MeasureError) as error:
        fidelity(identity, given_.pop("candidate"), given_.pop("data"), **given_)
    assert message in str(error.value)


def test_a_report_without_scikit_learn_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MeasureError, match=r"pip install 'fxopt\[report\]', or leave labels= out"):
        fidelity(identity, identity, [draws(0, 2, 3)], labels=[torch.tensor([0, 1])])
