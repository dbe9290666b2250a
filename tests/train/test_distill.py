"""distill() trains: towards the teacher, with any optimizer, in any precision, touching no more."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxopt import ModelError, transform
from fxopt.device import Device, HalfChoice
from fxopt.errors import InputError, TrainError
from fxopt.train import Attention, Hidden, Logits, Task, distill
from tests.captured import trainable
from tests.train.models import Batch, bert, encoder, rows, state_of, text_batch

BATCHES = [text_batch(index) for index in range(3)]
STATES = {"output_hidden_states": True, "output_attentions": True}


def small(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3))


def vectors(count: int = 16) -> TensorDataset:
    return TensorDataset(torch.randn(count, 4, generator=torch.Generator().manual_seed(0)))


def learn(student: nn.Module, teacher: nn.Module, **options: Any) -> Any:
    given: dict[str, Any] = {"terms": [Logits()], "learning_rate": 0.01, "epochs": 2}
    return distill(student, teacher, DataLoader(vectors(), 4), **{**given, **options})


@pytest.mark.parametrize(
    ("terms", "width"),
    [
        ([Task(), Logits()], 16),
        ([Logits(temperature=1.0)], 8),
        ([Hidden()], 8),
        ([Hidden(distance="cosine")], 16),
        ([Attention()], 8),
        ([Attention(distance="mse")], 16),
        ([Task(0.1), Logits(), Hidden(), Attention()], 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])
def test_the_student_gets_closer_to_its_teacher(terms: Any, width: int, capture: bool) -> None:
    """On fixed data and a fixed seed; each term falls by itself."""
    teacher, student = bert(2, **STATES), bert(1, width, seed=1, **STATES)
    student = trainable(student, {**BATCHES[0], **STATES}) if capture else student
    before = state_of(teacher)
    done = distill(student, teacher, BATCHES, terms=terms, epochs=12, learning_rate=0.01)
    assert done.student is student
    assert done.terms == tuple(terms)
    losses = done.history.losses
    assert set(losses) == {"total", *(term.name for term in terms)}
    assert done.history.steps == 36
    assert sum(losses["total"][-3:]) < 0.7 * sum(losses["total"][:3])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(one.grad is None for one in [*teacher.parameters(), *student.parameters()])
    assert not any("projection" in name for name, _ in student.named_parameters())


def test_embeddings_models_learn_the_last_state() -> None:
    data = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    teacher, student = encoder(2), encoder(1, 8, seed=1)
    losses = distill(student, teacher, data, epochs=8, learning_rate=0.01).history.losses["hidden"]
    assert losses[-1] < 0.7 * losses[0]


def test_a_pruned_student_learns_from_what_it_was_cut_from() -> None:
    model = bert(2, **STATES)
    passes = "prune-channels{ratio=0.5}"
    pruned = trainable(model, {**BATCHES[0], **STATES}, passes)
    assert sum(one.numel() for one in pruned.parameters()) < sum(
        one.numel() for one in model.parameters()
    )
    terms = [Logits(), Hidden(), Attention()]
    done = distill(pruned, model, BATCHES, terms=terms, epochs=12, learning_rate=0.01)
    losses = done.history.losses["total"]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_nothing_is_learnt_from_itself() -> None:
    teacher = bert(2, **STATES).double()
    student = copy.deepcopy(teacher)
    before = state_of(student)
    terms = [Logits(), Hidden(), Attention()]
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    done = distill(student, teacher, BATCHES, terms=terms, optimizer=optimizer)
    assert max(done.history.losses["total"]) < 1e-12
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_accumulated_batches_are_one_large_batch(clip: float | None) -> None:
    """Also where the last step of the epoch has fewer batches."""
    data = vectors(16)
    students = []
    for size, accumulate, count in ((4, 2, 16), (8, 1, 16), (4, 3, 12), (12, 1, 12)):
        student = small(1).eval()
        student[2].p = 0.0
        part = TensorDataset(data.tensors[0][:count])
        distill(
            student, small(0), DataLoader(part, size), terms=[Logits()], epochs=3, clip=clip,
            accumulate=accumulate, optimizer=partial(torch.optim.SGD, lr=0.5),
        )  # fmt: skip
        students.append(state_of(student))
    for one, other in (students[:2], students[2:]):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


def test_the_default_optimizer_is_adamw_on_a_linear_schedule() -> None:
    """Against the loop written out."""
    teacher, student = small(0), small(1)
    other = copy.deepcopy(student)
    done = learn(student, teacher, seed=3, learning_rate=0.02, weight_decay=0.3, clip=0.05)
    decayed = [one for one in other.parameters() if one.ndim > 1]
    rest = [one for one in other.parameters() if one.ndim <= 1]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.3)
    rates = [0.02 * (8 - step) / 8 for step in range(8)]
    torch.manual_seed(3)
    other.train()
    for step, rate in enumerate(rates):
        (x,) = vectors().tensors
        for group in optimizer.param_groups:
            group["lr"] = rate
        if step % 4 == 0:
            torch.empty((), dtype=torch.int64).random_()  # what a DataLoader draws as it starts
        batch = x[4 * (step % 4) : 4 * (step % 4) + 4]
        with torch.no_grad():
            taught = (teacher.eval()(batch) / 2).log_softmax(-1)
        given = (other(batch) / 2).log_softmax(-1)
        loss = 4 * nn.functional.kl_div(given, taught, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        optimizer.step()
    assert done.history.learning_rates == pytest.approx(rates)
    for name, tensor in other.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor)


def test_the_linear_schedule_warms_up_and_ends_near_zero() -> None:
    rates = learn(small(1), small(0), epochs=10, learning_rate=1.0).history.learning_rates
    assert rates[:5] == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])
    assert rates[-1] == pytest.approx(1 / 36)
    assert len(rates) == 40


def test_any_optimizer_and_schedule() -> None:
    def cosine(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        assert steps == 8
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    free = {"learning_rate": None}
    student = small(1)
    instance = torch.optim.Adagrad(student.parameters(), lr=0.1)
    learn(student, small(0), optimizer=instance, schedule=cosine, **free)
    assert len(instance.param_groups) == 1
    assert instance.state
    own = torch.optim.lr_scheduler.ExponentialLR(instance, 0.5)
    rates = learn(student, small(0), optimizer=instance, schedule=own, **free)
    rates = rates.history.learning_rates
    assert rates[1:] == pytest.approx([rate / 2 for rate in rates[:-1]])
    made = learn(small(1), small(0), optimizer=partial(torch.optim.SGD, lr=0.2, momentum=0.9),
                 schedule="constant", **free)  # fmt: skip
    assert set(made.history.learning_rates) == {0.2}


def test_projections_leave_an_optimizer_handed_over() -> None:
    teacher, student = encoder(2), encoder(1, 8, seed=1)
    optimizer = torch.optim.AdamW(student.parameters(), 0.01)
    data = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    distill(student, teacher, data, terms=[Hidden()], optimizer=optimizer)
    assert len(optimizer.param_groups) == 1
    own = {id(one) for one in student.parameters()}
    assert {id(one) for one in optimizer.state} <= own


def test_all_draws_follow_from_the_seed_and_the_callers_stay() -> None:
    def run(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        random.seed(noise)
        student = small(1)
        torch.manual_seed(noise)
        before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        loader = DataLoader(vectors(), 4, shuffle=True)
        distill(student, small(0), loader, terms=[Logits()], epochs=2, seed=seed)
        torch.manual_seed(noise)
        after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        return state_of(student)

    first, same, other = run(1, 5), run(1, 6), run(2, 5)
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_the_callers_generators_are_where_they_were() -> None:
    student, teacher = small(1), small(0)
    state = torch.get_rng_state()
    learn(student, teacher)
    assert torch.equal(state, torch.get_rng_state())


def test_modes_are_put_back_and_the_teacher_does_not_draw() -> None:
    teacher, student = small(0).train(), small(1).eval()
    student[0].train()
    learn(student, teacher)
    assert all(module.training for module in teacher.modules())
    assert [module.training for module in student] == [True, False, False, False]


def test_the_dry_run_leaves_running_statistics() -> None:
    def cnn() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    student = cnn()
    learn(student, small(0), epochs=None, steps=1)
    assert int(student[1].num_batches_tracked) == 1


def test_evaluate_sees_the_student_in_eval_mode_each_epoch() -> None:
    lines: list[str] = []

    def evaluate(student: nn.Module) -> dict[str, float]:
        assert not any(module.training for module in student.modules())
        assert not student(torch.zeros(1, 4)).requires_grad
        torch.rand(3)
        return {"norm": sum(one.norm() for one in student.parameters())}  # type: ignore[dict-item]

    plain, watched = small(1), small(1)
    learn(plain, small(0), epochs=3)
    done = learn(watched, small(0), epochs=3, evaluate=evaluate, progress=lines.append, log_every=5)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name])
    found = [(one.epoch, one.step) for one in done.history.evaluations]
    assert found == [(1, 4), (2, 8), (3, 12)]
    assert lines[0] == str(done.history.evaluations[0])
    assert lines[1].startswith("step 5, epoch 2: loss ")
    assert lines[0].startswith("after epoch 1 (step 4): norm ")
    text = str(done)
    assert text.startswith("Logits(weight=1.0, temperature=2.0, next_token=None)\n12 steps; total ")
    assert text.count("after epoch") == 3


def test_steps_go_through_the_data_again_and_stop_within() -> None:
    done = learn(small(1), small(0), epochs=None, steps=6, evaluate=lambda student: {"one": 1})
    assert done.history.steps == 6
    assert [(one.epoch, one.step) for one in done.history.evaluations] == [(1, 4), (2, 6)]


def test_data_of_every_kind() -> None:
    x = vectors().tensors[0]
    teacher = small(0)
    for data, options in (
        (vectors(), {"batch_size": 4}),
        ([x[:4], x[4:8]], {}),
        ([(x[:4],), [x[4:8]]], {}),
        ([{"input": x[:4]}], {}),
    ):
        done = distill(small(1), teacher, data, terms=[Logits()], **options)  # type: ignore[arg-type]
        assert done.history.steps == len(data) // (4 if options else 1)


def test_a_dataset_is_shuffled_by_the_seed() -> None:
    class Seen(torch.utils.data.Dataset[Tensor]):
        order: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> Tensor:
            self.order.append(index)
            return torch.full((4,), float(index))

    orders = []
    for _ in range(2):
        Seen.order.clear()
        distill(small(1), small(0), Seen(), batch_size=4, terms=[Logits()], epochs=2)
        orders.append(list(Seen.order))
    assert orders[0] == orders[1]
    epochs = orders[0][4:16], orders[0][16:]  # after the dry run's batch
    assert epochs[0] != epochs[1]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)


@pytest.mark.parametrize("precision", ["mixed", "auto"])
def test_mixed_precision_puts_autocast_around_plain_models(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small(1)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.inner(x)
            seen.append((logits.dtype, logits.requires_grad))
            return logits  # type: ignore[no-any-return]

    choice = HalfChoice(torch.bfloat16, "because")
    monkeypatch.setattr(Device, "half", lambda self: choice)
    student, teacher = Watching(), Watching()
    done = learn(student, teacher, precision=precision)
    assert set(seen) == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert done.precision == "because"
    assert all(one.dtype == torch.float32 for one in student.parameters())


def test_float16_scales_the_loss_and_skips_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Device, "half", lambda self: HalfChoice(torch.float16, "because"))
    student, teacher = small(1), small(0)
    calls = []

    def burst(gradient: Tensor) -> Tensor:
        calls.append(gradient.dtype)
        return gradient * torch.inf if len(calls) == 4 else gradient

    student[3].weight.register_hook(burst)
    done = learn(student, teacher, precision="mixed", epochs=3)
    assert done.history.skipped == 1
    assert "1 skipped (overflow)" in str(done.history)
    assert all(one.isfinite().all() for one in student.parameters())
    assert done.history.losses["total"][-1] < done.history.losses["total"][0]
    rates = done.history.learning_rates
    assert rates[2] == rates[3], "the schedule waits for a skipped step"


def test_a_captured_student_in_float16_is_scaled_without_autocast() -> None:
    batch = text_batch(0)
    passes = "canonicalize, autocast{mode=mixed, dtype=float16, force=true}"
    opt = trainable(bert(1, seed=1), batch, passes)
    half = distill(opt, bert(), BATCHES, epochs=2, learning_rate=0.01)
    full = distill(bert(1, seed=1), bert(), BATCHES, epochs=2, learning_rate=0.01)
    assert half.precision == "as the student's passes placed the casts"
    assert half.history.losses["total"] == pytest.approx(full.history.losses["total"], rel=0.02)


def test_a_device_moves_both_models_and_each_batch() -> None:
    student, teacher = small(1), small(0)
    done = learn(student, teacher, device="cpu")
    assert done.history.steps == 8


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_on_a_gpu(precision: Any, tmp_path: Any) -> None:
    student, teacher = bert(1, seed=1), bert()
    options: dict[str, Any] = {"epochs": 4, "learning_rate": 0.01, "precision": precision}
    done = distill(
        student, teacher, BATCHES, device="cuda", checkpoint=tmp_path / "run.pt", **options
    )
    assert done.history.losses["total"][-1] < done.history.losses["total"][0]
    assert all(one.device.type == "cuda" for one in student.parameters())


def loader() -> Any:
    return DataLoader(vectors(), 4)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach()  # type: ignore[no-any-return]


def frozen() -> nn.Module:
    return small(1).requires_grad_(False)


def deferred() -> Any:
    return transform(small(1), "canonicalize", mode="train")


OPTION_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 1, "steps": 2}, "give epochs= or steps=, one of them"),
    ({"epochs": 0}, "epochs=0: must be an integer, 1 or above"),
    ({"steps": 2.0}, "steps=2.0: must be an integer, 1 or above"),
    ({"accumulate": True}, "accumulate=True: must be an integer, 1 or above"),
    ({"learning_rate": 0.0}, "learning_rate=0.0: must be a number above 0"),
    ({"weight_decay": -1}, "weight_decay=-1: must be a number 0 or above"),
    ({"clip": float("inf")}, "clip=inf: must be a number above 0"),
    ({"seed": -1}, "seed=-1: must be an integer, 0 or above"),
    ({"precision": "half"}, "precision='half': must be 'full', 'mixed' or 'auto'"),
    ({"evaluate": 3}, "evaluate=3: must be callable"),
    ({"progress": "print"}, "progress='print': must be callable"),
    ({"save_every": 2}, "save_every= and resume= need checkpoint=, the path of the file"),
    ({"resume": True}, "save_every= and resume= need checkpoint=, the path of the file"),
    (
        {"checkpoint": "/nowhere/at/all"},
        "checkpoint='/nowhere/at/all' must be a file in a folder that exists",
    ),
    (
        {"optimizer": torch.optim.SGD, "learning_rate": 0.1},
        "learning_rate= and weight_decay= are those of the default optimizer; set them in "
        "optimizer=, or leave that out",
    ),
    (
        {"optimizer": lambda groups: None},
        " returned NoneType; give an optimizer, or a callable that makes one of parameter groups: "
        "functools.partial(torch.optim.SGD, lr=1)",
    ),
    (
        {"schedule": "cosine"},
        "schedule='cosine': must be 'linear', 'constant', an LRScheduler of optimizer=, or a "
        "callable (optimizer, steps) that makes one",
    ),
    ({"schedule": lambda optimizer, steps: None}, " returned NoneType, no LRScheduler"),
    ({"batch_size": 4}, "batch_size= is for a Dataset; data= is a DataLoader, which makes the "
     "batches itself"),
    (
        {"distributed": True},
        "distributed=True, but torch.distributed isn't initialised: start with torchrun and call "
        "torch.distributed.init_process_group('gloo' or 'nccl') first",
    ),
    (
        {"evaluate": lambda student: "good"},
        "evaluate= returned 'good'; it must return a dict of numbers such as {'accuracy': 0.9}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "text"), OPTION_ERRORS, ids=range(len(OPTION_ERRORS)))
def test_a_wrong_option_is_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TrainError) as caught:
        distill(small(1), small(0), loader(), terms=[Logits()], **options)
    assert str(caught.value).endswith(text)


DATA_ERRORS: list[tuple[Any, str]] = [
    (vectors(), "data= is a Dataset: give batch_size= as well, or a DataLoader"),
    (
        torch.zeros(2, 4),
        "data= is one input (a Tensor), not an iterable of inputs. Give a list of them: [inputs]",
    ),
    (
        {"x": torch.zeros(2, 4)},
        "data= is one input (a dict), not an iterable of inputs. Give a list of them: [inputs]",
    ),
    (
        "data.csv",
        "data= must be an iterable of inputs (a list, a DataLoader, or a Dataset with "
        "batch_size=), not str",
    ),
    (
        iter([torch.zeros(2, 4)]),
        "data= is a generator or iterator, which gives its batches once: no epoch could be "
        "repeated and no run resumed. Give a list, a DataLoader or an IterableDataset",
    ),
    ([], "data= is empty: it gave no batch"),
    (
        ["text"],
        "a batch of data= must be a tensor, a tuple of positional arguments or a dict of keyword "
        "arguments, not str",
    ),
    (
        [torch.full((2, 4), torch.nan)],
        "the first batch gives logits that aren't finite; look for NaN in its values, in the "
        "student's weights and in the teacher's outputs",
    ),
    (
        [torch.zeros(2, 4), torch.full((2, 4), torch.nan)],
        "step 2: total, logits aren't finite. The checkpoint, if there is one, is from before. "
        "Lower the learning rate, clip gradients, or train in full precision",
    ),
]


@pytest.mark.parametrize(("data", "text"), DATA_ERRORS, ids=range(len(DATA_ERRORS)))
def test_wrong_data_are_said(data: Any, text: str) -> None:
    with pytest.raises(TrainError) as caught:
        distill(small(1), small(0), data, terms=[Logits()])
    assert str(caught.value) == text


def labelled(*labels: int) -> Batch:
    return {**text_batch(0), "labels": torch.tensor(labels)}


LABEL_ERRORS: list[tuple[list[Batch], str]] = [
    (
        [labelled(0, 1, 7, 2)],
        "a batch of data= has labels from 0 to 7, and BertForSequenceClassification has no class "
        "for one of them (Target 7 is out of bounds.). Labels count from 0 on; -100 doesn't count.",
    ),
    (
        [labelled(0, -1, -100, -100)],
        "a batch of data= has labels from -1 to 0, and BertForSequenceClassification has no class "
        "for one of them (Target -1 is out of bounds.). Labels count from 0 on; -100 doesn't "
        "count.",
    ),
    (
        [labelled(0, 1, 2, -100), labelled(0, 1, 2, 3)],
        "batch 1 of data= has labels from 0 to 3, and the student's logits have 3 classes: labels "
        "must be in 0 to 2, or -100 where they don't count",
    ),
    (
        [labelled(0, 1, 2, 2), labelled(-100, 1, 1, 2), labelled(-5, -100, 1, 2)],
        "batch 2 of data= has labels from -5 to 2, and the student's logits have 3 classes: labels "
        "must be in 0 to 2, or -100 where they don't count",
    ),
]


@pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])
@pytest.mark.parametrize(("data", "text"), LABEL_ERRORS, ids=range(len(LABEL_ERRORS)))
def test_labels_without_a_class_are_said_before_anything_is_trained(
    data: list[Batch], text: str, capture: bool
) -> None:
    teacher, student = bert(2), bert(1, seed=1)
    student = trainable(student, BATCHES[0]) if capture else student
    before, generator = (state_of(teacher), state_of(student)), torch.get_rng_state()
    with pytest.raises(InputError) as caught:
        distill(student, teacher, data, terms=[Task(), Logits()])
    assert str(caught.value) == text
    for model, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(state[name], now) for name, now in model.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


class Stream:
    """Batches that are read one after the other, as those of a DataLoader are."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches


@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.sampled_from([3, 9, -1]))
def test_labels_without_a_class_are_said_where_their_batch_comes(at: int, wrong: int) -> None:
    good = [labelled(0, 1, 2, -100) for _ in range(4)]
    data = [*good[:at], labelled(0, wrong, 2, 1), *good[at:]]
    low, high = min(0, wrong), max(2, wrong)
    with pytest.raises(InputError) as caught:
        distill(bert(1, seed=1), bert(2), Stream(data), terms=[Task(), Logits()], epochs=1)
    assert str(caught.value) == (
        f"batch {at} of data= has labels from {low} to {high}, and the student's logits have 3 "
        "classes: labels must be in 0 to 2, or -100 where they don't count"
    )
    found = distill(bert(1, seed=1), bert(2), Stream(good), terms=[Task(), Logits()], epochs=1)
    assert len(found.history.losses["total"]) == len(good)


MODEL_ERRORS: list[tuple[Any, str]] = [
    (lambda: "model", "the student must be an nn.Module, not str"),
    (frozen, "the student has no parameter to train: all are frozen"),
    (
        deferred,
        "the student has no graph yet, and so no parameters: give fxopt.transform its "
        "example_inputs, or call the student once",
    ),
    (
        Detached,
        "the loss reaches no parameter of the student: its outputs are detached, or all it learns "
        "from is frozen",
    ),
    (
        lambda: small(1).half(),
        "the student has float16 parameters to train, whose updates round to nothing. Train it in "
        "float32 with precision='mixed', or under the pass Autocast",
    ),
    (
        lambda: small(1).to("meta"),
        "the student is on meta, the teacher on cpu: give device= to move both",
    ),
]


@pytest.mark.parametrize(("make", "text"), MODEL_ERRORS, ids=range(len(MODEL_ERRORS)))
def test_wrong_models_are_said(make: Any, text: str) -> None:
    with pytest.raises(TrainError) as caught:
        distill(make(), small(0), loader(), terms=[Logits()])
    assert str(caught.value) == text


def test_a_student_that_shares_parameters_with_its_teacher_is_refused() -> None:
    teacher = small(0)
    x = vectors().tensors[0]
    student = transform(teacher, "canonicalize", example_inputs=(x,), mode="train")
    with pytest.raises(TrainError) as caught:
        distill(student, teacher, loader(), terms=[Logits()])
    assert str(caught.value) == (
        "student and teacher share 4 of 4 parameters to be trained, such as 0.weight: the teacher "
        "would change with the student. fxopt.transform shares what no pass touches; "
        "copy.deepcopy(student) has its own"
    )
    distill(copy.deepcopy(student), teacher, loader(), terms=[Logits()])


def test_a_student_captured_in_eval_mode_is_refused() -> None:
    student = transform(small(1), "canonicalize", example_inputs=(vectors().tensors[0],))
    with pytest.raises(ModelError, match="captured in eval mode and can't train"):
        distill(student, small(0), loader(), terms=[Logits()])


def test_mixed_precision_is_refused_where_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = trainable(small(1), (vectors().tensors[0],))
    with pytest.raises(TrainError) as caught:
        learn(opt, small(0), precision="mixed")
    assert str(caught.value) == (
        "precision='mixed' is for a plain module; a captured student computes in what its passes "
        "chose. Add 'autocast{mode=mixed}' to them, and leave precision out"
    )
    monkeypatch.setattr(Device, "half", lambda self: HalfChoice(None, "no unit"))
    with pytest.raises(TrainError) as caught:
        learn(small(1), small(0), precision="mixed")
    assert str(caught.value) == (
        "precision='mixed' gains nothing here: no unit. Use precision='full'"
    )
    assert learn(small(1), small(0), precision="auto").precision == "no unit"


def test_foreign_optimizers_and_schedules_are_refused() -> None:
    student, other = small(1), small(2)
    foreign = torch.optim.SGD(other.parameters(), 0.1)
    own = torch.optim.SGD(student.parameters(), 0.1)
    options: dict[str, Any] = {"terms": [Logits()]}
    with pytest.raises(TrainError) as caught:
        distill(student, small(0), loader(), optimizer=foreign, **options)
    assert str(caught.value) == (
        "optimizer= holds 4 parameters that aren't the student's. Make it over "
        "student.parameters(), after the student was moved to its device"
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(foreign)
    with pytest.raises(TrainError) as caught:
        distill(student, small(0), loader(), optimizer=own, schedule=schedule, **options)
    assert str(caught.value) == "schedule= belongs to another optimizer than optimizer="
    with pytest.raises(TrainError) as caught:
        distill(student, small(0), loader(), optimizer=own, device="meta", **options)
    assert str(caught.value) == (
        "the student is on cpu and device='meta': move it there before the optimizer is made, or "
        "give optimizer= as a callable"
    )
    narrow, wide = nn.Linear(4, 2), nn.Linear(4, 3)
    own = torch.optim.SGD(narrow.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(own)
    with pytest.raises(TrainError) as caught:
        distill(narrow, wide, loader(), terms=[Hidden()], optimizer=own, schedule=schedule)
    assert str(caught.value) == (
        "schedule= doesn't know the projections that learn as well: give it as a callable "
        "(optimizer, steps)"
    )


def test_a_stream_needs_steps_or_a_constant_rate() -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter([vectors().tensors[0][:4]] * 3)

    with pytest.raises(TrainError) as caught:
        distill(small(1), small(0), Stream(), terms=[Logits()])
    assert str(caught.value) == (
        "the schedule must know the number of steps, and the data have no length: give steps= "
        "instead of epochs=, or schedule='constant'"
    )
    done = distill(small(1), small(0), Stream(), terms=[Logits()], schedule="constant")
    assert done.history.steps == 3
    assert distill(small(1), small(0), Stream(), terms=[Logits()], steps=5).history.steps == 5


def test_rows_of_a_dataset_become_keyword_batches() -> None:
    done = distill(bert(1, seed=1), bert(), rows(12), batch_size=4, terms=[Task(), Logits()])
    assert done.history.steps == 3
