"""The evaluation graph of a train-mode program computes what the model computes in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt import wellformed
from fxopt.capture import capture
from fxopt.claim import Close
from fxopt.eval_graph import evaluation_mode
from fxopt.graph_text import text
from fxopt.interpreter import evaluate
from fxopt.program import Program
from tests.architectures import randomize
from tests.models import Drawn, LinearBatchNorm, conv_models, models, sequence_models

IMAGES = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
SEQUENCES = IMAGES[:, 0]


class DropPath(nn.Module):
    """Stochastic depth as transformers writes it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = 0.7 + torch.rand((x.shape[0], *[1] * (x.ndim - 1)))
        kept.floor_()
        return x.div(0.7) * kept


class StochasticDepth(nn.Module):
    """Stochastic depth as torchvision writes it."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        noise = torch.empty((x.shape[0], *[1] * (x.ndim - 1)), dtype=x.dtype)
        return x * noise.bernoulli_(0.7).div_(0.7)


class Attention(nn.Module):
    """Attention whose dropout follows the mode."""

    def forward(self, x: Tensor) -> Tensor:
        p = 0.3 if self.training else 0.0
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=p)


class NativeDropout(nn.Module):
    """A dropout that gives the mask as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.native_dropout(x, 0.4, self.training)


class Counter(nn.Module):
    """A counter that counts in every mode."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


class SharedNorm(nn.Module):
    """One batch norm called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).relu())


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "dropout": (lambda: nn.Dropout(0.5), IMAGES),
    "dropout of everything": (lambda: nn.Dropout(1.0), IMAGES),
    "dropout in place": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5, True)), IMAGES),
    "channel dropout": (lambda: nn.Dropout2d(0.5), IMAGES),
    "alpha dropout": (lambda: nn.AlphaDropout(0.5), IMAGES),
    "dropout with its mask": (NativeDropout, IMAGES),
    "batch norm": (lambda: nn.BatchNorm2d(4), IMAGES),
    "batch norm that is not affine": (lambda: nn.BatchNorm2d(4, affine=False), IMAGES),
    "batch norm twice": (SharedNorm, IMAGES),
    "batch norm without statistics": (
        lambda: nn.Sequential(
            nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.Dropout()
        ),
        IMAGES,
    ),
    "norm and dropout": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)), IMAGES),
    "norm and dropout in place": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5, inplace=True)), IMAGES
    ),
    "norm and channel dropout": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Dropout2d(0.5)), IMAGES
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES),
    "attention": (Attention, IMAGES),
    "drop path": (DropPath, IMAGES),
    "stochastic depth": (StochasticDepth, IMAGES),
    "stochastic depth behind a norm": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), StochasticDepth(), DropPath()), IMAGES
    ),
    "randomized leaky relu": (nn.RReLU, IMAGES),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 12, 0.5, batch_first=True), SEQUENCES
    ),
    "counter": (Counter, IMAGES),
}  # fmt: skip


def programs(name: str) -> tuple[nn.Module, Program, Tensor]:
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = randomize(make())
    return model, capture(model, (x,), "train"), x


def outputs_of(result: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(result)]


@pytest.mark.parametrize("name", MODELS)
def test_each_construct_is_switched_to_evaluation(name: str) -> None:
    model, program, x = programs(name)
    before = str(program.graph)
    derived = evaluation_mode(program)
    assert derived.mode == "eval"
    assert derived.notes == program.notes
    assert str(program.graph) == before
    assert all(tensor is program.state[key] for key, tensor in derived.state.items())
    got = evaluate(derived, [x])
    for expected, output in zip(outputs_of(model.eval()(x)), got, strict=True):
        torch.testing.assert_close(output, expected)


def test_recurrent_layers_drop_nothing_between_them() -> None:
    model = nn.LSTM(6, 4, 2, dropout=0.5, batch_first=True).eval()
    derived = evaluation_mode(capture(model, (SEQUENCES,), "train"))
    (expected, _) = model(SEQUENCES)
    torch.testing.assert_close(evaluate(derived, [SEQUENCES])[0], expected.detach())


def test_running_statistics_are_read_and_not_written() -> None:
    _, program, _ = programs("batch norm twice")
    assert program.written == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    derived = evaluation_mode(program)
    assert derived.written == frozenset()
    assert [line.strip() for line in text(derived).splitlines() if "batch_norm" in line] == [
        f"%norm{suffix}: f32[s0, 4, s1, s2] = batch_norm({x}, norm.weight: f32[4], "
        "norm.bias: f32[4], norm.running_mean: f32[4], norm.running_var: f32[4], False, 0.1, "
        "1e-05, False)"
        for suffix, x in (("", "%x"), ("_1", "%relu"))
    ]


def test_what_is_written_in_every_mode_still_is() -> None:
    _, program, _ = programs("counter")
    assert evaluation_mode(program).written == {"calls"}


def test_a_program_captured_in_eval_mode_is_its_own_evaluation() -> None:
    program = capture(nn.Linear(6, 2).eval(), (SEQUENCES,))
    assert evaluation_mode(program) is program


class Noisy(nn.Module):
    """Random numbers that are no dropout, and a gate that isn't rescaled."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * torch.bernoulli(x, 0.5)


def test_other_random_operators_stay_and_are_named() -> None:
    derived = evaluation_mode(capture(Noisy(), (SEQUENCES,), "train"))
    assert derived.notes == (
        "in evaluation mode too, random numbers are drawn at randn_like, bernoulli: the training "
        "graph doesn't tell whether the model switches them off",
    )
    assert derived.node_count() >= 4
    wellformed.check(derived)


def test_a_mask_scaled_by_another_rate_is_no_dropout() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (torch.empty_like(x).bernoulli_(0.5) / 0.25)

    derived = evaluation_mode(capture(Gate(), (SEQUENCES,), "train"))
    assert "random numbers are drawn at" in derived.notes[0]


def regularized() -> st.SearchStrategy[Drawn]:
    """Drawn models, most of which end in a batch norm and a dropout."""
    return st.one_of(
        sequence_models(
            last=lambda width: nn.Sequential(LinearBatchNorm(width, True), nn.Dropout(0.3))
        ),
        conv_models(
            last=lambda channels: nn.Sequential(nn.BatchNorm2d(channels), nn.Dropout2d(0.3))
        ),
        models(),
    )


def assert_agrees(expected: Any, got: Any) -> None:
    for one, other in zip(outputs_of(expected), outputs_of(got), strict=True):
        measured = Close().measure(one, other)
        assert measured.holds, measured.text


@given(drawn=regularized(), passes=st.sampled_from(["canonicalize", "canonicalize, fuse-linears"]))
def test_both_modes_of_drawn_models_are_the_models(drawn: Drawn, passes: str) -> None:
    opt = fxopt.transform(drawn.model, passes, example_inputs=drawn.example, mode="train")
    assert opt.training
    for call in (drawn.example, *drawn.others):
        assert_agrees(drawn.model.eval()(**call), opt.eval()(**call))
    statistics = {name: buffer.clone() for name, buffer in drawn.model.named_buffers()}
    torch.manual_seed(1)
    expected = drawn.model.train()(**drawn.example)
    torch.manual_seed(1)
    assert_agrees(expected, opt.train()(**drawn.example))
    own = dict(opt.named_buffers())
    for name, buffer in drawn.model.named_buffers():
        if name in own:
            torch.testing.assert_close(own[name], buffer)
            buffer.copy_(statistics[name])
