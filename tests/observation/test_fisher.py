"""Fisher information: draws whose second moment is the outputs' sensitivity to an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxopt.calibration import Calibration
from fxopt.capture import capture
from fxopt.errors import CalibrationError
from fxopt.observation.fisher import output_gradients
from fxopt.operators.linears import as_linear
from fxopt.program import Program


class Classifier(nn.Module):
    """Two layers, the first token's logits; what the second layer gives at others is unread."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.named = named
        self.up, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.drop(torch.tanh(self.up(x))))[:, 0]
        return {"logits": y} if self.named else y


X = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1)).double()


def program_of(model: nn.Module, mode: Any = "eval") -> Program:
    program = capture(model, (X,), mode=mode)
    return replace(program, calibration=Calibration([(X[:4],), (X[4:],)], program.signature))


def up_of(program: Program) -> Any:
    return next(node for node in program.graph.nodes if as_linear(node) is not None)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_second_moment_is_the_curvature_of_the_divergence(named: bool, mode: Any) -> None:
    model = Classifier(named).double()
    program = program_of(model.train(mode == "train"), mode)
    node = up_of(program)
    inputs = {node: as_linear(node).x}
    total = torch.zeros(2, 4, 4, dtype=torch.float64)
    draws = 1500
    for seed in range(draws):
        x, gradient = next(iter(output_gradients(program, inputs, seed)))[node]
        assert torch.equal(x, X[:4])
        total += gradient[0].unsqueeze(2) * gradient[0].unsqueeze(1)
    model.eval()
    y = model.up(X[0]).detach()

    def answer(y: Tensor) -> Tensor:
        return model.head(torch.tanh(y))[0]

    before = answer(y).detach()

    def loss(y: Tensor) -> Tensor:
        after = answer(y)
        if not named:
            return (after - before).square().sum() / 2
        target = before.softmax(-1)
        return (target * (before.log_softmax(-1) - after.log_softmax(-1))).sum()

    hessian = torch.func.hessian(loss)(y)
    assert not bool(total[1].any()), "a token that isn't read is felt"
    torch.testing.assert_close(total[0] / draws, hessian[0, :, 0, :], rtol=0.15, atol=0.01)


def test_draws_follow_from_the_seed_and_leave_the_model_alone() -> None:
    model = Classifier(named=True).double().eval()
    program = program_of(model)
    node = up_of(program)

    def draws(seed: int) -> list[Tensor]:
        return [
            seen[node][1] for seen in output_gradients(program, {node: as_linear(node).x}, seed)
        ]

    state = torch.get_rng_state()
    first, again, other = draws(0), draws(0), draws(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [one.shape for one in first] == [(4, 2, 4), (2, 2, 4)]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(one.grad is None and one.requires_grad for one in model.parameters())


def test_nan_is_refused() -> None:
    program = program_of(Classifier(named=True).double().eval())
    program = replace(
        program, calibration=Calibration([(X.clone().fill_(torch.nan),)], program.signature)
    )
    node = up_of(program)
    with pytest.raises(CalibrationError, match=r"batch 0 gives 60 NaN of 60 values at x"):
        list(output_gradients(program, {node: as_linear(node).x}, 0))
