"""The oracle: real answers of the eager original, at several sizes, leaving it as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxopt.capture import capture
from fxopt.claim import Exact
from fxopt.errors import InputError
from fxopt.interpreter import evaluate
from fxopt.program import Mode, Program
from fxopt.verify import draws_alike, judge, output_names, run_model, run_program, trials
from tests.check import assert_state_equal

X = torch.linspace(-1.0, 1.0, 24).view(3, 8)


class Mixer(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids * mask + 1


def test_trials_are_the_example_and_two_other_sizes() -> None:
    ids, mask = torch.arange(24).view(3, 8), torch.ones(3, 8, dtype=torch.int64)
    model = Mixer()
    program = capture(model, (ids, mask))
    found, skipped = trials(program, run_model(model, program))
    assert skipped == ()
    assert found[0].what == "the example"
    assert all(torch.equal(a, b) for a, b in zip(found[0].inputs, (ids, mask), strict=True))
    sizes = [tuple(trial.inputs[0].shape) for trial in found]
    assert len(set(sizes)) == 3
    assert {batch for batch, _ in sizes} >= {1, 3}
    for trial in found:
        assert trial.inputs[0].shape == trial.inputs[1].shape, "sizes that were equal stay equal"
        assert set(trial.inputs[0].flatten().tolist()) <= set(range(24)), "ids stay real ids"
        assert torch.equal(trial.outputs[0], model(*trial.inputs))
    assert found[1].what == f"ids {sizes[1]}, mask {sizes[1]}"


def test_inputs_of_the_users_are_trials_too() -> None:
    model = nn.Linear(8, 2)
    program = capture(model, (X,))
    extra = torch.randn(9, 8)
    found, _ = trials(program, run_model(model, program), [(extra,)])
    assert found[1].what == "verify_inputs[0]"
    assert torch.equal(found[1].outputs[0], model(extra))


def test_inputs_that_the_original_rejects_are_the_users_to_mend() -> None:
    model = nn.Linear(8, 2)
    program = capture(model, (X.double(),))
    with pytest.raises(InputError) as caught:
        trials(program, run_model(model, program))
    text = str(caught.value)
    assert text.startswith("Linear itself rejects the example inputs: RuntimeError: ")
    assert text.endswith(". Give inputs that the model accepts.")
    program = capture(model, (X,))
    with pytest.raises(InputError, match=r"Linear itself rejects verify_inputs\[0\]: RuntimeError"):
        trials(program, run_model(model, program), [(torch.randn(3, 7),)])


class AtMostThree(nn.Module):
    """Rejects what a graph can't: more than three rows, decided outside the trace."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] > 3:
            raise ValueError(f"at most three rows, not {x.shape[0]}")
        return x * 2


def test_sizes_that_the_original_rejects_are_named() -> None:
    model = AtMostThree()
    program = capture(model, (X,))
    found, skipped = trials(program, run_model(model, program))
    assert len(found) + len(skipped) == 3
    (text,) = skipped
    assert text.startswith("not judged at x (4, ")
    assert text.endswith("): the original rejects it (at most three rows, not 4)")


def test_a_graph_without_dynamic_sizes_has_the_example_only() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(3, 8)

    model = Fixed()
    program = capture(model, (X,))
    assert program.signature.tensors[0].sizes == (3, 8)
    found, skipped = trials(program, run_model(model, program))
    assert [trial.what for trial in found] == ["the example"]
    assert skipped == ()


class Running(nn.Module):
    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(x.mean(0))
        return self.average


def test_a_model_that_writes_its_state_is_left_as_it_was() -> None:
    model = Running()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = capture(model, (X,))
    found, _ = trials(program, run_model(model, program))
    verdict, _ = judge(
        Exact(),
        found,
        [trial.outputs for trial in found],
        run_program(program),
        output_names(program),
    )
    assert_state_equal(model, before)
    assert verdict.holds, verdict.measured.text
    assert torch.equal(found[0].outputs[0], X.mean(0)), "an output that is state is kept by value"


def test_the_mode_of_the_original_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    model[1].eval()
    program = capture(model, (X,))
    run_model(model, program)((X,))
    assert [module.training for module in model.modules()] == [True, True, False]


def test_train_mode_draws_the_same_numbers_in_both_and_leaves_the_generator_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3))
    program = capture(model, (X,), "train")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found, _ = trials(program, run_model(model, program))
    verdict, _ = judge(
        Exact(),
        found,
        [trial.outputs for trial in found],
        run_program(program),
        output_names(program),
    )
    assert torch.equal(torch.rand(3), expected)
    assert verdict.holds, verdict.measured.text


def test_running_a_program_changes_no_buffer() -> None:
    model = Running()
    program = capture(model, (X,))
    (first,), (second,) = run_program(program)([(X,), (X,)])
    assert torch.equal(first, second)
    assert torch.equal(model.average, torch.zeros(8))
    assert torch.equal(evaluate(program, (X,))[0], first)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, x + 1), ["[0]", "[1]"]),
        (lambda x: {"logits": x, "hidden": (x, x)}, ["logits", "hidden'][0]", "hidden'][1]"]),
        (lambda x: {"a": None, "b": x}, ["b"]),
    ],
)
def test_outputs_have_readable_names(function: object, names: list[str]) -> None:
    from tests.rewriting.functions import program_of

    program = program_of(lambda x: function(x * 2), X)  # type: ignore[operator]
    assert output_names(program) == names


def test_two_programs_draw_alike_where_dropout_has_the_same_sizes() -> None:
    def program(width: int, mode: Mode) -> Program:
        model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 4))
        return capture(model, (torch.randn(2, 4),), mode)

    assert draws_alike(program(6, "train"), program(6, "train"))
    assert not draws_alike(program(6, "train"), program(3, "train"))
    assert draws_alike(program(6, "eval"), program(3, "eval"))
