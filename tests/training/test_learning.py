"""What a captured model learns and keeps is what the eager one does, whatever it is made of."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxopt
from fxopt.capture import capture
from fxopt.pipeline import capturing
from fxopt.program import Program
from tests.training.pieces import PIECES, Composed, batch, composed, summed

aten = torch.ops.aten
PASSES = ("canonicalize", "fuse-linears", "fuse-conv-batch-norm", "fold-pruned")


def trained(models: list[Any], steps: int, labels: bool = True, start: int = 0) -> None:
    """Take the same steps of momentum descent with each of `models`."""
    for model in models:
        learning = [one for one in model.parameters() if one.requires_grad]
        optimizer = torch.optim.SGD(learning, 0.02, momentum=0.9)
        for index in range(start, start + steps):
            torch.manual_seed(index)
            optimizer.zero_grad()
            summed(model(**batch(index, size=5 + index % 3, labels=labels))).backward()
            optimizer.step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_state(model: nn.Module, opt: nn.Module) -> None:
    expected, own = state(model), state(opt)
    for name in expected.keys() & own.keys():
        torch.testing.assert_close(own[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)
    assert all(one.grad_fn is None for one in own.values())


def assert_same_outputs(expected: Any, got: Any) -> None:
    assert pytree.tree_structure(expected) == pytree.tree_structure(got)
    for one, other in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)


def is_trainable(model: nn.Module, labels: bool) -> bool:
    """Whether eager mode can: operators in place, one after the other, overwrite each other's."""
    try:
        trained([copy.deepcopy(model)], 1, labels)
    except RuntimeError:
        return False
    return True


def assert_learns_alike(model: Composed, passes: str, steps: int, labels: bool = True) -> None:
    """Train the eager model and its capture, evaluate both, train on, and compare all of it.

    A model that eager mode can't train either is refused.
    """
    if not is_trainable(model, labels):
        with pytest.raises(fxopt.ModelError, match="Composed itself can't be trained"):
            fxopt.transform(model, passes, example_inputs=batch(0, labels=labels), mode="train")
        return
    opt = fxopt.transform(model, passes, example_inputs=batch(0, labels=labels), mode="train")
    eager = copy.deepcopy(model)
    flags = [module.training for module in eager.modules()]
    opt = copy.deepcopy(opt)
    trained([eager, opt], steps, labels)
    assert_same_state(eager, opt)
    eager.eval()
    opt.eval()
    for call in (batch(90, labels=labels), batch(91, size=2, labels=False)):
        assert_same_outputs(eager(**call), opt(**call))
    for module, flag in zip(eager.modules(), flags, strict=True):
        module.training = flag
    opt.train()
    trained([eager, opt], 1, labels, start=40)
    assert_same_state(eager, opt)


@pytest.mark.parametrize("piece", PIECES)
def test_ten_steps_and_both_modes_are_the_eager_models(piece: str) -> None:
    auxiliary = piece in ("dropout", "quantizer", "batch norm", "frozen batch norm")
    model = composed("linear", piece, "linear", auxiliary=auxiliary)
    assert_learns_alike(model, "canonicalize, fuse-linears", 10)


@st.composite
def learning_models(draw: st.DrawFn) -> tuple[list[str], bool, bool, str]:
    pieces = draw(st.lists(st.sampled_from(sorted(PIECES)), min_size=1, max_size=4))
    passes = draw(st.permutations(PASSES))[: draw(st.integers(1, len(PASSES)))]
    return pieces, draw(st.booleans()), draw(st.booleans()), ", ".join(passes)


# A batch norm undoes the scale of the one before: its gradient is what is left of cancelled terms.
@example(
    drawn=(
        ["memory", "frozen batch norm", "stopped branch", "batch norm"],
        True,
        True,
        "fuse-linears",
    )
)
@given(drawn=learning_models())
@settings(max_examples=8)
def test_drawn_models_learn_alike(drawn: tuple[list[str], bool, bool, str]) -> None:
    pieces, auxiliary, labels, passes = drawn
    assert_learns_alike(composed(*pieces, auxiliary=auxiliary), passes, 3, labels)


@pytest.mark.slow
@given(drawn=learning_models())
@settings(max_examples=150)
def test_many_drawn_models_learn_alike(drawn: tuple[list[str], bool, bool, str]) -> None:
    pieces, auxiliary, labels, passes = drawn
    assert_learns_alike(composed(*pieces, auxiliary=auxiliary), passes, 4, labels)


def without(program: Program, target: Any) -> Program:
    """`program` with the calls of `target` left out, their first operand in their place."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    for node in list(graph.nodes):
        if node.target is target:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return program.with_graph(graph)


def broken_capture(monkeypatch: pytest.MonkeyPatch, target: Any) -> None:
    def broken(*args: Any, **options: Any) -> Program:
        return without(capture(*args, **options), target)

    monkeypatch.setattr(capturing, "capture_whole", broken)


@pytest.mark.parametrize(
    ("piece", "target", "where"),
    [
        ("stopped branch", aten.detach.default, "the gradient of body."),
        ("self gate", aten.detach.default, "the gradient of body."),
        ("batch norm", aten.copy_.default, "the buffer body.1."),
        ("memory", aten.copy_.default, "the buffer body.1.last after a call"),
    ],
)
def test_a_capture_that_learns_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, piece: str, target: Any, where: str
) -> None:
    broken_capture(monkeypatch, target)
    with pytest.raises(fxopt.EquivalenceError) as caught:
        fxopt.transform(composed(piece), "canonicalize", example_inputs=batch(0), mode="train")
    assert "the capture broke its claim" in str(caught.value)
    assert f"in {where}" in str(caught.value)


def test_a_model_that_eager_mode_cannot_train_is_refused_and_left_as_it_was() -> None:
    model = composed("batch norm", "relu", "relu")
    before = {name: one.detach().clone() for name, one in state(model).items()}
    with pytest.raises(fxopt.ModelError) as caught:
        fxopt.transform(model, "canonicalize", example_inputs=batch(0), mode="train")
    assert str(caught.value).startswith(
        "Composed itself can't be trained: its backward raises RuntimeError: one of the variables "
        "needed for gradient computation has been modified by an inplace operation: "
    )
    assert str(caught.value).endswith("Mend the model; mode='eval' needs no gradients.")
    for name, one in state(model).items():
        assert torch.equal(one, before[name])


def test_the_gradient_of_an_input_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_capture(monkeypatch, aten.detach.default)
    gate = PIECES["self gate"]()
    with pytest.raises(fxopt.EquivalenceError, match="in the gradient of the input x on the exam"):
        fxopt.transform(gate, "canonicalize", example_inputs=torch.randn(3, 4), mode="train")


def test_a_model_trains_the_same_when_it_is_captured_without_gradients() -> None:
    model = composed("stopped branch")
    with torch.no_grad():
        opt = fxopt.transform(model, "canonicalize", example_inputs=batch(0), mode="train")
    assert str(opt.graph).count("detach(") == 1


def test_a_model_in_eval_mode_is_put_in_train_mode_by_its_own_method() -> None:
    class Frozen(Composed):
        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.body[1].eval()
            return self

    torch.manual_seed(0)
    model = Frozen(["batch norm", "batch norm"]).eval()
    opt = fxopt.transform(model, "canonicalize", example_inputs=batch(0), mode="train")
    assert not any(module.training for module in model.modules())
    assert opt.program.written == {
        "body.2.running_mean",
        "body.2.running_var",
        "body.2.num_batches_tracked",
    }


def test_a_parameter_written_in_forward_is_refused() -> None:
    class Clamped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-1.0, 1.0)
            return super().forward(input)

    expected = r"Clamped writes to its parameter weight in forward \(at test_learning.py:\d+ .*\)"
    with pytest.raises(fxopt.CaptureError, match=expected):
        fxopt.transform(
            Clamped(3, 2), "canonicalize", example_inputs=torch.randn(4, 3), mode="train"
        )


def test_the_evaluation_program_is_saved_with_the_training_program(tmp_path: Any) -> None:
    model = composed("another branch in each mode", auxiliary=True)
    opt = fxopt.transform(model, "fuse-linears", example_inputs=batch(0), mode="train")
    opt.save(tmp_path / "saved")
    pickled = io.BytesIO()
    torch.save(opt, pickled)
    pickled.seek(0)
    restored = [fxopt.load(tmp_path / "saved"), torch.load(pickled, weights_only=False)]
    trained([model, *restored], 2)
    for one in restored:
        assert_same_outputs(model.eval()(**batch(5)), one.eval()(**batch(5)))
        with pytest.raises(fxopt.InputError, match="this call leaves out labels"):
            one(**batch(5, labels=False))


class Swapped(nn.Module):
    """Siblings that share their input in one mode only, others in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(3, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x) if self.training else self.two(x) * self.three(x)


def test_passes_that_cannot_be_carried_over_refuse_evaluation_and_leave_training(
    tmp_path: Any,
) -> None:
    x = torch.randn(4, 3)
    opt = fxopt.transform(Swapped(), "fuse-linears", example_inputs=x, mode="train")
    expected = (
        "this module has no evaluation mode: Swapped computes another graph in evaluation than in "
        "training, and the passes (fuse-linears) can't be carried over to it: it reads "
        "two_three.weight, which is no tensor of the training graph. Leave out the pass, or "
        "evaluate the original: model.load_state_dict(opt.state_dict()), model.eval()."
    )
    opt.save(tmp_path / "saved")
    for one in (opt, fxopt.load(tmp_path / "saved")):
        one(x).sum().backward()
        with pytest.raises(fxopt.ModelError) as caught:
            one.eval()
        assert str(caught.value) == expected
        assert one.training
    assert any(note.startswith("opt.eval() is refused: Swapped") for note in opt.report.notes)


class Optional(nn.Module):
    """Any number of arguments that may be left out."""

    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return sum(more.values(), nn.functional.dropout(x, 0.5, self.training))


def test_a_module_is_evaluated_with_so_many_sets_of_arguments_and_no_more() -> None:
    x = torch.randn(3, 2)
    opt = fxopt.transform(
        Optional(), "canonicalize", example_inputs={"x": x, "a": x}, mode="train"
    ).eval()
    for name in "bcdefghi":
        assert torch.equal(opt(x, **{name: x}), x + x)
    assert torch.equal(opt(x, b=x), x + x)
    with pytest.raises(fxopt.InputError) as caught:
        opt(x)
    assert str(caught.value) == (
        "this module was evaluated with 8 other sets of arguments already; (x) is one too many. "
        "Call it in fewer ways."
    )


def test_a_pruned_batch_norm_net_trains_and_predicts_without_labels() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(width, 8, 3) for width in (3, 8))
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = nn.functional.relu(norm(conv(x)), inplace=True)
            logits = self.head(x.mean((2, 3)))
            if labels is None:
                return logits
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    torch.manual_seed(0)
    example = {"x": torch.randn(4, 3, 8, 8), "labels": torch.tensor([0, 1, 1, 0])}
    passes = "prune-channels{ratio=0.5, scope=ffn|channels}"
    opt = fxopt.transform(Net(), passes, example_inputs=example, mode="train")
    assert opt.get_parameter("convs.1.weight").shape == (4, 4, 3, 3)
    assert opt.get_buffer("norms.0.running_var").shape == (4,)
    before = opt.get_buffer("norms.1.running_mean").clone()
    opt(**example)["loss"].backward()
    assert not torch.equal(opt.get_buffer("norms.1.running_mean"), before)
    opt.eval()
    assert torch.equal(opt(example["x"]), opt(**example)["logits"])


def test_frozen_weights_are_not_joined_with_trained_ones() -> None:
    class Heads(nn.Module):
        def __init__(self, bias: bool) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    frozen = Heads(True)
    frozen.two.requires_grad_(False)
    for model, why in (
        (frozen, "some of them are frozen, and would learn"),
        (Heads(False), "some of them have no bias, and would learn one"),
    ):
        opt = fxopt.transform(model, "fuse-linears", example_inputs=torch.ones(2, 3), mode="train")
        assert [refusal.reason for refusal in opt.report.steps[1].refused] == [why]
    evaluated = fxopt.transform(frozen.eval(), "fuse-linears", example_inputs=torch.ones(2, 3))
    assert evaluated.report.steps[1].fired == {"FuseSiblings": 1}


def test_a_frozen_norm_is_folded_where_nothing_of_it_is_trained() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.conv(x)).mean((2, 3)))

    x = torch.randn(2, 3, 5, 5)
    opt = fxopt.transform(Stem(), "fuse-conv-batch-norm", example_inputs=x, mode="train")
    (refusal,) = opt.report.steps[1].refused
    assert refusal.reason == "its weight is trained, and would take other steps folded"
    frozen = Stem()
    frozen.conv.requires_grad_(False)
    frozen.norm.requires_grad_(False)
    opt = fxopt.transform(frozen, "fuse-conv-batch-norm", example_inputs=x, mode="train")
    assert opt.report.steps[1].fired == {"FoldBatchNorm": 1}
    assert {name for name, one in opt.named_parameters() if one.requires_grad} == {
        "head.weight",
        "head.bias",
    }


def test_an_optimized_module_is_transformed_to_train_once_more() -> None:
    model = composed("another branch in each mode", auxiliary=True)
    once = fxopt.transform(model, "canonicalize", example_inputs=batch(0), mode="train")
    twice = fxopt.transform(once, "fuse-linears", mode="train")
    assert twice.report.steps[1].fired == {"FuseSiblings": 1}
    model.eval()
    for call in (batch(1), batch(1, labels=False)):
        assert_same_outputs(model(**call), twice.eval()(**call))
    trained([twice.train()], 1)
    assert not torch.allclose(twice.eval()(**call)[0], model(**call)[0])
