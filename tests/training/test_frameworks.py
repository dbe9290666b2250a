"""Under transformers.Trainer and accelerate a captured model trains as the eager one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from tests.captured import trainable
from tests.training.models import Batch, bert, causal_batch, gpt2, loss_of, text_batch

EXAMPLES = 22
"""Not a multiple of the batch of 4, so that the last batch is smaller."""


class Rows(torch.utils.data.Dataset[Batch]):
    """The rows of one large batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return int(next(iter(self.batch.values())).shape[0])

    def __getitem__(self, index: int) -> Batch:
        return {name: tensor[index] for name, tensor in self.batch.items()}


def trainer(
    model: Any, folder: Path, rows: Rows, kind: type = transformers.Trainer, **options: Any
) -> Any:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
        **options,
    }
    return kind(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda result: {
            "accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())
        },
    )


def losses(used: Any) -> list[float]:
    return [entry["loss"] for entry in used.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_trains_evaluates_and_predicts(tmp_path: Path, accumulation: int) -> None:
    rows = Rows(text_batch(0, EXAMPLES))
    model = bert()
    opt = trainable(model, text_batch(1))
    results = []
    for name, one in (("eager", model), ("captured", opt)):
        used = trainer(one, tmp_path / name, rows, gradient_accumulation_steps=accumulation)
        # The eager model is told how many labels a whole step has, the captured one isn't.
        used.model_accepts_loss_kwargs = False
        used.train()
        predicted = used.predict(rows)
        results.append((losses(used), used.evaluate(), predicted))
    (expected, metrics, predictions), (got, own_metrics, own_predictions) = results
    assert got == pytest.approx(expected, rel=1e-3)
    assert own_metrics["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert own_metrics["eval_accuracy"] == metrics["eval_accuracy"]
    assert own_predictions.predictions.shape == (EXAMPLES, 3)
    assert own_predictions.predictions == pytest.approx(predictions.predictions, abs=1e-2)


def test_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    rows = Rows(text_batch(0, EXAMPLES))
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(trainable(bert(), text_batch(1)), tmp_path, rows, **options)
    whole.train()
    again = trainer(trainable(bert(seed=5), text_batch(1)), tmp_path, rows, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again)[3:] == pytest.approx(losses(whole)[3:], rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor)


def test_the_saved_checkpoint_opens_in_the_original_architecture(tmp_path: Path) -> None:
    rows = Rows(text_batch(0, EXAMPLES))
    opt = trainable(bert(), text_batch(1))
    used = trainer(opt, tmp_path, rows)
    used.train()
    used.save_model(str(tmp_path / "saved"))
    opt.config.save_pretrained(tmp_path / "saved")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = text_batch(2)
    torch.testing.assert_close(loaded.eval()(**batch).logits, opt.eval()(**batch).logits)


def test_trainer_decays_the_same_parameters(tmp_path: Path) -> None:
    model = gpt2()
    opt = trainable(model, causal_batch(0))
    rows = Rows(causal_batch(0, EXAMPLES))
    groups = []
    for one in (model, opt):
        optimizer = trainer(one, tmp_path, rows).create_optimizer()
        names = {id(parameter): name for name, parameter in one.named_parameters()}
        groups.append([{names[id(p)] for p in group["params"]} for group in optimizer.param_groups])
    assert groups[0] == groups[1]
    assert "transformer.h.0.ln_1.weight" in groups[1][1]


class TiedTrainer(transformers.Trainer):
    """How Trainer saves a module with tied weights that is no PreTrainedModel: each tensor once.

    safetensors refuses tensors that share memory, and Trainer hands it the whole state_dict.
    """

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        once = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        kept = {name: one for name, one in self.model.state_dict().items() if name in once}
        super()._save(output_dir, kept)


def test_tied_weights_are_saved_once_and_resumed(tmp_path: Path) -> None:
    rows = Rows(causal_batch(0, EXAMPLES))
    options = {"save_strategy": "steps", "save_steps": 3}
    with pytest.raises(RuntimeError, match="Some tensors share memory"):
        trainer(trainable(gpt2(), causal_batch(1)), tmp_path, rows, **options).train()
    whole = trainer(trainable(gpt2(), causal_batch(1)), tmp_path, rows, TiedTrainer, **options)
    whole.train()
    again = trainer(trainable(gpt2(5), causal_batch(1)), tmp_path, rows, TiedTrainer, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again)[3:] == pytest.approx(losses(whole)[3:], rel=1e-5)
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor)


def test_the_number_of_items_is_taken_where_the_example_held_it() -> None:
    assert not trainable(bert(), text_batch(0)).accepts_loss_kwargs
    example = {**causal_batch(0), "num_items_in_batch": torch.tensor(20)}
    assert trainable(gpt2(), example).accepts_loss_kwargs


def test_accelerate_prepares_accumulates_clips_and_resumes(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(model: Any, upto: int, start: int = 0) -> tuple[Any, list[float]]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        loader = DataLoader(Rows(text_batch(0, EXAMPLES)), batch_size=4)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        if start:
            accelerator.load_state(tmp_path / "state")
        seen = []
        for index, batch in enumerate(loader):
            if not start <= index < upto:
                continue
            torch.manual_seed(index)
            with accelerator.accumulate(model):
                loss = loss_of(model(**batch))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
            if index == 1 and not start and upto > 2:
                accelerator.save_state(tmp_path / "state")
        return accelerator.unwrap_model(model), seen

    model = bert()
    opt = trainable(model, text_batch(1))
    _, expected = run(model, 0)
    _, expected = run(model, 6)
    trained, got = run(opt, 6)
    assert trained is opt
    assert got == pytest.approx(expected, rel=1e-3)
    _, resumed = run(trainable(bert(seed=5), text_batch(1)), 6, start=2)
    assert resumed == pytest.approx(got[2:], rel=1e-4)
