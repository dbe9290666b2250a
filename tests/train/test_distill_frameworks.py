"""The same loss in the loops that users have: transformers.Trainer and accelerate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from fxopt.train import DistillationLoss, Hidden, Logits, Task, distill
from tests.captured import trainable
from tests.train.models import Rows, bert, rows, text_batch

STATES = {"output_hidden_states": True}
TERMS = [Task(), Logits(temperature=3.0), Hidden()]
STEPS, RATE = 4, 0.02


class DistillationTrainer(transformers.Trainer):
    """A Trainer whose loss is that of a distillation; projections learn in its optimizer."""

    def __init__(self, *args: Any, distillation: DistillationLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        outputs = model(**inputs)
        loss = self.distillation(outputs, inputs)
        return (loss, outputs) if return_outputs else loss


def student(capture: bool) -> Any:
    model = bert(1, 8, seed=1, **STATES)
    return trainable(model, {**text_batch(0), **STATES}) if capture else model


def whole(data: Rows) -> DataLoader[Any]:
    """All rows in one batch, so that their order doesn't matter."""
    return DataLoader(data, len(data))


def prepared(model: nn.Module, data: Rows) -> tuple[DistillationLoss, torch.optim.Optimizer]:
    loss, batch = DistillationLoss(bert(2, **STATES), TERMS), next(iter(whole(data)))
    torch.manual_seed(0)
    loss.prepare(model, batch)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], RATE)
    # A Trainer zeroes the gradients of its model only.
    optimizer.register_step_post_hook(lambda *_: loss.zero_grad())
    return loss, optimizer


def expected(capture: bool, data: Rows) -> Any:
    """What distill makes of the same student; its seed draws the same projections."""
    one = student(capture)
    distill(
        one, bert(2, **STATES), whole(data), terms=TERMS, epochs=STEPS, schedule="constant",
        optimizer=partial(torch.optim.SGD, lr=RATE), clip=None,
    )  # fmt: skip
    return one


def assert_close(one: nn.Module, other: nn.Module) -> None:
    wanted = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])
def test_a_trainer_learns_what_distill_does(tmp_path: Path, capture: bool) -> None:
    data, model = rows(8), student(capture)
    loss, optimizer = prepared(model, data)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_train_epochs=STEPS,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        max_grad_norm=0.0,  # a Trainer clips without the projections
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data,
        optimizers=(optimizer, constant), distillation=loss,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[-1]
    assert_close(model, expected(capture, data))


@pytest.mark.parametrize("capture", [False, True], ids=["plain", "captured"])
def test_accelerate_learns_what_distill_does(capture: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    data, model = rows(8), student(capture)
    loss, optimizer = prepared(model, data)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_model, optimizer, loader = accelerator.prepare(model, optimizer, whole(data))
    loss.to(accelerator.device)
    prepared_model.train()
    for _ in range(STEPS):
        for batch in loader:
            with accelerator.accumulate(prepared_model):
                accelerator.backward(loss(prepared_model(**batch), batch))
                optimizer.step()
                optimizer.zero_grad()
    assert_close(accelerator.unwrap_model(prepared_model), expected(capture, data))
