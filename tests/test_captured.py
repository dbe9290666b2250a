"""What tests share is captured once, is not to be written to, and is of no other model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import captured
from tests.captured import assert_untouched, case, program_of, trainable


class Scaled(nn.Module):
    """A factor that no printout of the model shows, and two linears."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.first(x))) * self.factor


def _tied(model: Scaled) -> None:
    model.second.weight = model.first.weight


def _other_weight(model: Scaled) -> None:
    with torch.no_grad():
        model.first.weight[0, 0] = 0.25


CHANGES: dict[str, Callable[[Scaled], object]] = {
    "a weight": _other_weight,
    "a tie": _tied,
    "what trains": lambda model: model.first.weight.requires_grad_(False),
    "an attribute": lambda model: setattr(model, "factor", 2.0),
    "the mode of a part": lambda model: model.norm.eval(),
    "a buffer": lambda model: model.norm.running_mean.fill_(1.0),
    "a dtype": lambda model: model.double(),
}


def test_equal_models_are_captured_once_and_train_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "_TRAINABLE", {})
    x = torch.ones(3, 4)
    one, other = trainable(Scaled(), (x,)), trainable(Scaled(), (x,))
    assert len(captured._TRAINABLE) == 1
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in other.parameters())
    assert all(parameter.any() for parameter in trainable(Scaled(), (x,)).parameters())


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_model_is_told_apart(change: Callable[[Scaled], object]) -> None:
    model = Scaled()
    change(model)
    assert captured._identity(model) != captured._identity(Scaled())
    assert captured._identity(Scaled()) == captured._identity(Scaled())


def test_other_inputs_are_told_apart() -> None:
    x = torch.ones(3, 4)
    others = [(x + 1,), (x.double(),), (x[:2],), {"x": x}, (x, 1)]
    assert len({captured._digest(inputs) for inputs in [(x,), *others]}) == 1 + len(others)


def test_a_shared_model_is_not_to_be_written_to() -> None:
    shared = case("mlp")
    program = program_of(shared.model, shared.example)
    assert program is captured.captured("mlp")
    assert program_of(shared.model, dict(shared.example)) is not program
    weight = next(shared.model.parameters())
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(AssertionError, match=r"a test wrote to .* of the shared model mlp"):
        assert_untouched()
    with torch.no_grad():
        weight.copy_(captured._SEEN["mlp"][1][next(iter(shared.model.state_dict()))])
    assert_untouched()
