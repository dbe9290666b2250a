"""A captured model trains as the eager one does: gradients, steps, checkpoints, loss scaling."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.captured import trainable
from tests.training.models import (
    Batch,
    bert,
    causal_batch,
    classifier,
    gpt2,
    image_batch,
    loss_of,
    text_batch,
)

Make = Callable[[], Any]
Batches = Callable[..., Batch]
CASES: dict[str, tuple[Make, Batches]] = {
    "bert": (bert, text_batch),
    "cnn": (classifier, image_batch),
    "gpt2, tied": (gpt2, causal_batch),
}
OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}
cases = pytest.mark.parametrize(("make", "batches"), CASES.values(), ids=CASES)


def step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, seed: int) -> float:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    loss = loss_of(model(**batch))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def assert_same_gradients(model: nn.Module, opt: nn.Module) -> None:
    expected = dict(model.named_parameters())
    own = dict(opt.named_parameters())
    assert {name for name, one in expected.items() if one.grad is not None} <= set(own)
    for name, parameter in own.items():
        other = expected[name].grad
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


@cases
def test_gradients_are_those_of_the_eager_model(make: Make, batches: Batches) -> None:
    model = make()
    opt = trainable(model, batches(0))
    for batch in (batches(1), batches(2, size=7)):
        model.zero_grad()
        opt.zero_grad()
        for one in (model, opt):
            torch.manual_seed(3)
            loss_of(one(**batch)).backward()
        assert_same_gradients(model, opt)


@cases
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_steps_track_the_eager_model(make: Make, batches: Batches, make_optimizer: Any) -> None:
    model = make()
    opt = trainable(model, batches(0))
    before = {name: one.detach().clone() for name, one in opt.named_parameters()}
    optimizers = [make_optimizer(one.parameters()) for one in (model, opt)]
    for index in range(5):
        batch = batches(index, size=3 if index == 4 else 4)
        losses = [
            step(one, batch, optimizer, index)
            for one, optimizer in zip((model, opt), optimizers, strict=True)
        ]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    expected = model.state_dict()
    for name, tensor in opt.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
    assert any(not torch.equal(before[name], one) for name, one in opt.named_parameters())


@cases
def test_gradients_accumulate(make: Make, batches: Batches) -> None:
    model = make()
    opt = trainable(model, batches(0))
    for one in (model, opt):
        torch.manual_seed(0)
        for index in range(3):
            (loss_of(one(**batches(index))) / 3).backward()
    assert_same_gradients(model, opt)
    opt.zero_grad()
    assert all(parameter.grad is None for parameter in opt.parameters())


def test_frozen_parameters_stay() -> None:
    model = bert()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    opt = trainable(model, text_batch(0))
    frozen = {name for name, one in opt.named_parameters() if not one.requires_grad}
    assert frozen
    assert all(name.startswith("bert.") for name in frozen)
    before = {name: one.detach().clone() for name, one in opt.named_parameters()}
    optimizer = torch.optim.SGD([one for one in opt.parameters() if one.requires_grad], 0.1)
    step(opt, text_batch(0), optimizer, 0)
    changed = {name for name, one in opt.named_parameters() if not torch.equal(before[name], one)}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_a_parameter_may_be_frozen_after_the_capture() -> None:
    opt = trainable(bert(), text_batch(0))
    opt.get_parameter("classifier.weight").requires_grad_(False)
    loss_of(opt(**text_batch(0))).backward()
    assert opt.get_parameter("classifier.weight").grad is None
    assert opt.get_parameter("classifier.bias").grad is not None


def test_tied_weights_stay_tied() -> None:
    opt = trainable(gpt2(), causal_batch(0))
    step(opt, causal_batch(0), torch.optim.SGD(opt.parameters(), 0.1), 0)
    embedding = opt.get_parameter("transformer.wte.weight")
    assert opt.get_parameter("lm_head.weight") is embedding
    assert copy.deepcopy(opt).get_parameter("lm_head.weight") is not embedding
    assert len(list(opt.parameters())) == len(list(gpt2().parameters()))


def test_training_the_optimized_module_trains_the_original() -> None:
    model = bert()
    opt = fxopt.transform(model, "canonicalize", example_inputs=text_batch(0), mode="train")
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in opt.named_parameters())
    step(opt, text_batch(0), torch.optim.AdamW(opt.parameters(), 0.01), 0)
    batch = text_batch(1)
    assert torch.equal(opt.eval()(**batch).logits, model.eval()(**batch).logits)


@cases
def test_trained_weights_go_back_into_the_original_architecture(
    make: Make, batches: Batches
) -> None:
    opt = trainable(make(), batches(0))
    optimizer = torch.optim.SGD(opt.parameters(), 0.1)
    for index in range(2):
        step(opt, batches(index), optimizer, index)
    model = make()
    model.load_state_dict(opt.state_dict())
    batch = batches(7)
    expected = model.eval()(**batch)["logits"]
    torch.testing.assert_close(opt.eval()(**batch)["logits"], expected)


@cases
def test_training_goes_on_from_a_checkpoint(make: Make, batches: Batches) -> None:
    def resumed(checkpoint: io.BytesIO) -> tuple[Any, torch.optim.Optimizer]:
        checkpoint.seek(0)
        saved = torch.load(checkpoint)
        opt = trainable(make(), batches(0))
        optimizer = torch.optim.AdamW(opt.parameters(), 0.01)
        opt.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return opt, optimizer

    opt = trainable(make(), batches(0))
    optimizer = torch.optim.AdamW(opt.parameters(), 0.01)
    for index in range(2):
        step(opt, batches(index), optimizer, index)
    checkpoint = io.BytesIO()
    torch.save({"model": opt.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    twin, other = resumed(checkpoint)
    for index in range(2, 5):
        losses = [step(opt, batches(index), optimizer, index)]
        losses.append(step(twin, batches(index), other, index))
        assert losses[0] == losses[1]
    for name, tensor in opt.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


def test_a_deep_copy_trains_alone_and_keeps_its_mode() -> None:
    opt = trainable(classifier(), image_batch(0))
    twin = copy.deepcopy(opt.eval())
    assert not twin.training
    assert copy.deepcopy(opt.train()).training
    expected = opt.eval()(**image_batch(1))["logits"]
    twin.train()
    step(twin, image_batch(0), torch.optim.SGD(twin.parameters(), 0.5), 0)
    assert torch.equal(opt(**image_batch(1))["logits"], expected)
    assert not torch.equal(twin.eval()(**image_batch(1))["logits"], expected)


def test_the_same_device_keeps_parameters_and_another_keeps_gradients_and_mode() -> None:
    model = classifier()
    opt = fxopt.transform(model, "canonicalize", example_inputs=image_batch(0), mode="train")
    own = list(opt.parameters())
    assert all(one is other for one, other in zip(opt.to("cpu").parameters(), own, strict=True))
    loss_of(opt(**image_batch(0))).backward()
    moved = opt.eval().to("meta")
    assert not moved.training
    assert all(one.device.type == "meta" and one.grad is not None for one in moved.parameters())
    assert all(one.device.type == "cpu" and one.grad is not None for one in model.parameters())
    batch = {name: tensor.to("meta") for name, tensor in image_batch(0).items()}
    assert moved(**batch)["logits"].shape == (4, 3)


def test_evaluation_between_steps_writes_nothing() -> None:
    opt = trainable(classifier(), image_batch(0))
    step(opt, image_batch(0), torch.optim.SGD(opt.parameters(), 0.1), 0)
    state = {name: tensor.clone() for name, tensor in opt.state_dict().items()}
    batch = image_batch(1, size=1)
    first, second = (opt.eval()(**batch)["logits"] for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, opt.state_dict()[name]) for name, tensor in state.items())
    opt.train()
    assert not torch.equal(opt(**image_batch(1))["logits"], opt(**image_batch(1))["logits"])


def test_gradients_follow_the_callers_grad_mode_in_both_modes() -> None:
    opt = trainable(bert(), text_batch(0))
    for mode in (True, False):
        assert opt.train(mode)(**text_batch(0)).logits.requires_grad
        with torch.no_grad():
            assert not opt(**text_batch(0)).logits.requires_grad


class Scaled:
    """One step of mixed precision's recipe: scale, backward, unscale, clip, step, update."""

    def __init__(self, opt: nn.Module, scale: float) -> None:
        self.opt = opt
        self.optimizer = torch.optim.SGD(opt.parameters(), 0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    def step(self, batch: Batch, inject: float | None = None) -> bool:
        """Whether the parameters changed; `inject` is put into one gradient."""
        before = [one.detach().clone() for one in self.opt.parameters()]
        self.optimizer.zero_grad()
        self.scaler.scale(loss_of(self.opt(**batch))).backward()
        if inject is not None:
            gradient: Any = self.opt.get_parameter("classifier.weight").grad
            gradient[0, 0] = inject
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.opt.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        pairs = zip(before, self.opt.parameters(), strict=True)
        return any(not torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_loss_scaling_skips_an_overflow_and_recovers(bad: float) -> None:
    """The skipped step halves the scale; the next one trains, and `growth_interval` (3) good steps
    after the overflow the scale is back where it was."""
    scaled = Scaled(trainable(bert(), text_batch(0)), 2.0**10)
    assert scaled.step(text_batch(0))
    assert not scaled.step(text_batch(1), inject=bad)
    assert scaled.scaler.get_scale() == 2.0**9
    scales = []
    for index in range(3):
        assert scaled.step(text_batch(index))
        scales.append(scaled.scaler.get_scale())
    assert scales == [2.0**9, 2.0**9, 2.0**10]
    assert all(one.isfinite().all() for one in scaled.opt.parameters())


def test_the_evaluation_graph_can_be_optimized_further() -> None:
    opt = trainable(bert(), text_batch(0))
    step(opt, text_batch(0), torch.optim.SGD(opt.parameters(), 0.1), 0)
    served = fxopt.transform(opt.eval(), "fuse-linears, int8-linear")
    assert "dropout" not in str(served.graph)
    batch = text_batch(1)
    expected = opt(**batch).logits.detach()
    assert fxopt.Sqnr(15.0).measure(expected, served(**batch).logits).holds


def test_graph_and_program_are_those_of_the_mode() -> None:
    opt = trainable(bert(), text_batch(0))
    assert "dropout" in str(opt.graph)
    assert opt.program.mode == "train"
    opt.eval()
    assert "dropout" not in str(opt.graph)
    assert opt.program.mode == "eval"
    assert opt.program.state["classifier.weight"] is opt.get_parameter("classifier.weight")


def test_it_is_saved_in_the_mode_it_is_in(tmp_path: Any) -> None:
    opt = trainable(bert(), text_batch(0))
    opt.save(tmp_path / "training")
    opt.eval().save(tmp_path / "evaluation")
    training, evaluation = (fxopt.load(tmp_path / name) for name in ("training", "evaluation"))
    batch = text_batch(1)
    expected = opt(**batch).logits
    assert training.training
    assert torch.equal(training.eval()(**batch).logits, expected)
    assert torch.equal(evaluation(**batch).logits, expected)
    with pytest.raises(fxopt.ModelError, match="captured in eval mode and can't train"):
        evaluation.train()


def test_the_mode_asked_for_before_the_capture_holds_after_it() -> None:
    x = torch.randn(3, 8)

    def deferred() -> Any:
        return fxopt.transform(nn.Sequential(nn.Dropout(0.5)), "canonicalize", mode="train")

    assert torch.equal(deferred().eval()(x), x)
    for opt in (deferred(), deferred().train()):
        assert not torch.equal(opt(x), x)
        assert opt.training


def test_torch_compile_takes_both_modes() -> None:
    opt = trainable(bert(dropout=0.0), text_batch(0))
    torch._dynamo.reset()
    for mode in (True, False):
        opt.train(mode)
        compiled = torch.compile(opt, backend="eager", fullgraph=True)
        expected = opt(**text_batch(1)).logits
        torch.testing.assert_close(compiled(**text_batch(1)).logits, expected)


def test_gradient_checkpointing_is_refused_with_its_reason() -> None:
    with pytest.raises(fxopt.ModelError) as caught:
        trainable(bert(), text_batch(0)).gradient_checkpointing_enable()
    assert str(caught.value) == (
        "a captured graph can't switch gradient checkpointing on: its module boundaries are gone. "
        "Train with gradient_checkpointing=False; Lower() recomputes what is cheap."
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mixed", "half"])
def test_a_lowered_program_with_dropout_is_judged_without_it(mode: str) -> None:
    torch.compiler.reset()
    opt = fxopt.transform(
        bert(dropout=0.1),
        f"canonicalize, fuse-linears, autocast{{mode={mode}, force=true}}, lower",
        example_inputs=CASES["bert"][1](0),
        mode="train",
        measure_cost=False,
    )
    record = opt.report.steps[-1]

    assert record.name == "lower"
    assert record.holds
    opt(**CASES["bert"][1](1))["loss"].backward()
    assert all(parameter.grad is not None for parameter in opt.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batches"), [CASES["bert"], CASES["cnn"]], ids=["bert", "cnn"])
def test_a_lowered_program_trains(make: Make, batches: Batches) -> None:
    """With a smaller last batch, and an evaluation without gradients; dropout off, since Inductor
    draws numbers of its own."""
    torch.compiler.reset()
    model = bert(dropout=0.0) if make is bert else make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    opt = fxopt.transform(
        copy.deepcopy(model),
        "canonicalize, lower",
        example_inputs=batches(0),
        mode="train",
        measure_cost=False,
    )
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, 0.9) for one in (model, opt)]
    for index, size in enumerate((4, 4, 3)):
        batch = batches(index, size=size)
        pairs = zip((model, opt), optimizers, strict=True)
        losses = [step(one, batch, optimizer, index) for one, optimizer in pairs]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    batch = batches(7)
    with torch.no_grad():
        expected: Tensor = model.eval()(**batch)["logits"]
        got: Tensor = opt.eval()(**batch)["logits"]
    assert not got.requires_grad
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-3)
