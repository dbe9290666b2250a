"""The loss on what models return: which terms, which positions, which projections, which errors."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from fxopt.errors import TrainError
from fxopt.train import Attention, DistillationLoss, Hidden, Logits, Task
from fxopt.train.losses import logits_divergence
from tests.captured import trainable
from tests.train.models import bert, encoder, text_batch

WITH_STATES = {"output_hidden_states": True}
WITH_ATTENTIONS = {"output_attentions": True}


def causal(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=41, n_embd=16, n_layer=1, n_head=2, n_positions=12, use_cache=False,
        bos_token_id=0, eos_token_id=0, initializer_range=0.7, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


class Fixed(nn.Module):
    """Returns what it was given, whatever the inputs."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.outputs


def test_terms_left_out_are_what_the_outputs_allow() -> None:
    batch = text_batch(1)
    unlabelled = {name: one for name, one in batch.items() if name != "labels"}
    teacher = bert()
    assert DistillationLoss(teacher).prepare(bert(1), batch).terms == (Task(), Logits())
    assert DistillationLoss(teacher).prepare(bert(1), unlabelled).terms == (Logits(),)
    assert DistillationLoss(encoder()).prepare(encoder(1), unlabelled).terms == (Hidden(),)
    with pytest.raises(TrainError) as caught:
        DistillationLoss(nn.Linear(2, 2))(torch.zeros(1, 2), torch.zeros(1, 2))
    assert str(caught.value) == (
        "both models return tensors without a name, which may be logits or states: say which with "
        "terms=[Logits()] or terms=[Hidden()]"
    )


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    teacher, student, batch = bert(4, **WITH_STATES, **WITH_ATTENTIONS), bert(2), text_batch(1)
    outputs = student(**batch, **WITH_STATES, **WITH_ATTENTIONS)
    terms = [Task(0.5), Logits(2.0, temperature=3.0), Hidden(0.25), Attention(4.0)]
    loss = DistillationLoss(teacher, terms)
    values = loss.losses(outputs, batch, loss.teach(batch))
    assert list(values) == ["task", "logits", "hidden", "attention"]
    weighted = sum(term.weight * values[term.name] for term in terms)
    torch.testing.assert_close(loss(outputs, batch), weighted)
    assert torch.equal(values["task"], outputs.loss)
    taught = teacher.eval()(**batch)
    expected = logits_divergence(outputs.logits, taught.logits, 3.0)
    assert torch.equal(values["logits"], expected)
    keep = batch["attention_mask"].bool()
    states = [
        functional.mse_loss(outputs.hidden_states[i][keep], taught.hidden_states[2 * i][keep])
        for i in range(3)
    ]
    torch.testing.assert_close(values["hidden"], torch.stack(states).mean())


@pytest.mark.parametrize("labelled", [False, True])
def test_per_token_logits_leave_padding_and_ignored_labels_out(labelled: bool) -> None:
    batch = text_batch(1)
    del batch["labels"]
    keep = batch["attention_mask"].bool()
    if labelled:
        batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] % 2 == 0, -100)
        keep = keep & (batch["labels"] != -100)
    own, other = torch.randn(2, 4, 6, 9)
    loss = DistillationLoss(Fixed({"logits": other}), [Logits()])
    expected = logits_divergence(own[keep], other[keep], 2.0)
    torch.testing.assert_close(loss({"logits": own}, batch), expected)


@pytest.mark.parametrize("next_token", [None, True, False])
def test_labels_of_a_causal_model_belong_to_the_position_before(next_token: bool | None) -> None:
    batch = text_batch(1)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 20, -100)
    batch["labels"][:, 0] = 1  # no position predicts it
    teacher, student = causal(0), causal(1)
    own, other = student(**batch).logits, teacher(**batch).logits
    has_label, mask = batch["labels"] != -100, batch["attention_mask"].bool()
    if next_token is False:
        expected = logits_divergence(own[mask & has_label], other[mask & has_label], 2.0)
    else:
        keep = (mask[:, :-1] & has_label[:, 1:]).nonzero(as_tuple=True)
        expected = logits_divergence(own[keep], other[keep], 2.0)
    loss = DistillationLoss(teacher, [Logits(next_token=next_token)])
    torch.testing.assert_close(loss(student(**batch), batch), expected)


def test_a_narrower_student_learns_a_projection_of_each_pair() -> None:
    batch = text_batch(1)
    teacher, student = encoder(4, 16, **WITH_STATES), encoder(2, 8, seed=1, **WITH_STATES)
    loss = DistillationLoss(teacher, [Hidden()])
    with pytest.raises(TrainError) as caught:
        loss(student(**batch), batch)
    assert str(caught.value) == (
        "hidden states 0_0 of the student have width 8, the teacher's 16: a projection must learn "
        "between them. Call loss.prepare(student, batch) before the optimizer is made, and give it "
        "[*student.parameters(), *loss.parameters()]"
    )
    student.train()
    assert loss.prepare(student, batch) is loss
    assert student.training
    assert [tuple(one.shape) for one in loss.parameters()] == [(16, 8)] * 3
    assert list(loss.projections) == ["0_0", "1_2", "2_4"]
    loss(student(**batch), batch).backward()
    assert all(one.grad is not None and one.grad.any() for one in loss.parameters())


def test_embeddings_models_compare_the_last_state() -> None:
    batch = {name: one for name, one in text_batch(1).items() if name != "labels"}
    teacher, student = encoder(2), encoder(1, seed=1)
    loss = DistillationLoss(teacher, [Hidden()])
    keep = batch["attention_mask"].bool()
    expected = functional.mse_loss(
        student(**batch).last_hidden_state[keep], teacher(**batch).last_hidden_state[keep]
    )
    torch.testing.assert_close(loss(student(**batch), batch), expected)
    assert loss(teacher(**batch), batch) == 0


def test_padding_changes_no_term() -> None:
    """What stands in the padded positions, keys and queries, is never compared."""
    teacher = bert(2, **WITH_STATES, **WITH_ATTENTIONS).eval()
    student = bert(1, seed=1, **WITH_STATES, **WITH_ATTENTIONS).eval()
    loss = DistillationLoss(teacher, [Logits(), Hidden(), Attention()])
    batch = text_batch(1)
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), 7)
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    expected = loss(student(**batch), batch)
    torch.testing.assert_close(loss(student(**other), other), expected)


def test_pruned_heads_are_compared_on_average() -> None:
    batch = text_batch(1)
    probabilities = torch.rand(4, 4, 6, 6).softmax(-1)
    teacher = Fixed({"attentions": (probabilities,)})
    loss = DistillationLoss(teacher, [Attention()])
    half = {"attentions": (probabilities.unflatten(1, (2, 2)).mean(2),)}
    assert abs(loss(half, batch).item()) < 1e-6


def test_every_kind_of_output_is_read() -> None:
    own, other = torch.randn(2, 4, 3)
    pair = namedtuple("pair", "logits")
    expected = logits_divergence(own, other, 2.0)
    for wrap in (lambda x: x, lambda x: (x, None), lambda x: {"logits": x}, pair):
        loss = DistillationLoss(Fixed(wrap(other)), [Logits()])
        assert torch.equal(loss(wrap(own), torch.zeros(4, 1)), expected)


def test_a_captured_student_gives_the_same_loss() -> None:
    teacher, model = bert(2, **WITH_STATES), bert(1, 8, seed=1, **WITH_STATES)
    batch = text_batch(1)
    opt = trainable(model, text_batch(0))
    loss = DistillationLoss(teacher, [Task(), Logits(), Hidden()]).prepare(opt, batch)
    expected = loss(model(**batch), batch)
    torch.testing.assert_close(loss(opt(**batch), batch), expected)


def test_the_teacher_is_no_part_of_the_loss_but_moves_with_it() -> None:
    teacher = bert().train()
    loss = DistillationLoss(teacher)
    assert not list(loss.parameters())
    assert not loss.state_dict()
    loss(bert(1)(**text_batch(0)), text_batch(0))
    assert all(module.training for module in teacher.modules())
    assert not any(one.grad is not None for one in teacher.parameters())
    loss.to("meta")
    assert all(one.device.type == "meta" for one in teacher.parameters())


def test_labels_are_kept_from_a_model_that_takes_none() -> None:
    class Plain(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return functional.one_hot(input_ids, 41).float()

    batch = {"input_ids": text_batch(0)["input_ids"], "labels": text_batch(0)["labels"]}
    assert DistillationLoss(Plain(), [Logits()])(Plain()(batch["input_ids"]), batch) == 0
    unlabelled = {name: one for name, one in text_batch(0).items() if name != "labels"}
    opt = trainable(bert(1), unlabelled)
    assert DistillationLoss(opt, [Logits()])(opt.eval()(**unlabelled), text_batch(0)) == 0


MASK = {"attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.mark.parametrize(
    ("terms", "own", "other", "batch", "text"),
    [
        (
            [Hidden()],
            {"logits": torch.zeros(2, 3)},
            {"hidden_states": (torch.zeros(2, 6, 4),)},
            {},
            "the term Hidden() needs hidden_states, and the student returned only logits. Have "
            "them returned with config.output_hidden_states = True, set before fxopt.transform "
            "captures the model.",
        ),
        (
            [Attention()],
            {"attentions": (None, None), "logits": torch.zeros(2, 3)},
            {"logits": torch.zeros(2, 3)},
            {},
            "the term Attention() needs attentions, and the student returned only logits. Have "
            "them returned with config.output_attentions = True on a model loaded with "
            "attn_implementation='eager', set before fxopt.transform captures the model.",
        ),
        (
            [Task()],
            {"logits": torch.zeros(2, 3)},
            {"logits": torch.zeros(2, 3)},
            {},
            "the term Task() needs loss, and the student returned only logits. Put labels into the "
            "batch, and into the example_inputs of a captured student, or leave Task() out.",
        ),
        (
            [Logits()],
            {"logits": torch.zeros(2, 3)},
            {"last_hidden_state": torch.zeros(2, 3)},
            {},
            "the term Logits() needs logits, and the teacher returned only last_hidden_state. For "
            "a model that gives embeddings use terms=[Hidden()].",
        ),
        (
            [Logits()],
            {"logits": torch.zeros(2, 3)},
            {"logits": torch.zeros(2, 4)},
            {},
            "logits of the student have shape (2, 3), the teacher's (2, 4); both must have the "
            "same rows and classes",
        ),
        (
            [Logits()],
            {"logits": torch.zeros(2, 7, 3)},
            {"logits": torch.zeros(2, 7, 3)},
            MASK,
            "attention_mask has shape (2, 6), but the logits have shape (2, 7, 3), so that padding "
            "can't be told. Leave attention_mask out of the batch, or give it the shape of the "
            "tokens",
        ),
        (
            [Hidden()],
            {"last_hidden_state": torch.zeros(2, 7, 3)},
            {"last_hidden_state": torch.zeros(2, 7, 3)},
            MASK,
            "attention_mask has shape (2, 6), but the hidden states have shape (2, 7, 3), so that "
            "padding can't be told. Leave attention_mask out of the batch, or give it the shape of "
            "the tokens",
        ),
        (
            [Logits()],
            "text",
            {"logits": torch.zeros(2, 3)},
            {},
            "a model returned str, in which no outputs can be found; let it return a tensor, a "
            "tuple of tensors, a dict or a ModelOutput",
        ),
        (
            [Logits()],
            {"logits": torch.zeros(2, 3, device="meta")},
            {"logits": torch.zeros(2, 3)},
            {},
            "logits of the student are on meta, the teacher's on cpu. Move the teacher: "
            "loss.to('meta')",
        ),
    ],
)
def test_outputs_that_do_not_fit_are_said(
    terms: Any, own: Any, other: Any, batch: Any, text: str
) -> None:
    with pytest.raises(TrainError) as caught:
        DistillationLoss(Fixed(other), terms)(own, batch)
    assert str(caught.value) == text


def test_a_teacher_must_be_a_module() -> None:
    with pytest.raises(TrainError) as caught:
        DistillationLoss(SimpleNamespace())  # type: ignore[arg-type]
    assert str(caught.value) == "the teacher must be an nn.Module, not SimpleNamespace"
