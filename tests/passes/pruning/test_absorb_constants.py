"""AbsorbConstants: the same outputs, and nothing that was absorbed is read any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fxopt import wellformed
from fxopt.analyses.constant_channels import constant_channels
from fxopt.capture import capture
from fxopt.claim import Claim, Close
from fxopt.errors import RewriteError
from fxopt.interpreter import evaluate
from fxopt.passes.pruning.absorb_constants import AbsorbConstants
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Rule, RulePass, rewrite
from tests.architectures import randomize
from tests.check import check
from tests.idle_channels import idle
from tests.pruned_models import prunable_models
from tests.sweeps import in_parts

aten = torch.ops.aten


@dataclass(frozen=True, repr=False)
class Absorb(RulePass):
    """The rule as a pass of its own."""

    name: ClassVar[str] = "absorb"
    claim: Claim = Close(1e-5)

    def rules(self, program: Program) -> Sequence[Rule]:
        return (AbsorbConstants(program),)


class Beside(nn.Module):
    """`layer` on x beside channels that are 0.5, 0 and -1, along `axis`."""

    def __init__(self, layer: nn.Module, axis: int, channels: int) -> None:
        super().__init__()
        self.layer, self.axis = layer, axis
        shape = [1] * (2 if axis == -1 else -axis)
        shape[axis] = 3
        self.register_buffer("constants", torch.tensor([0.5, 0.0, -1.0]).reshape(shape))
        shape[axis] = channels - 3
        self.register_buffer("shift", torch.zeros(shape))

    constants: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.shift
        fill = self.constants + 0.0 * x.narrow(self.axis, 0, 1)
        return self.layer(torch.cat([fill, x], self.axis))


class Product(nn.Module):
    """x @ V, or x @ Wᵀ."""

    def __init__(self, *shape: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.kernel)


_LAYERS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(7, 4), -1, (2, 4)),
    "linear of tokens": (lambda: nn.Linear(7, 4), -1, (2, 3, 4)),
    "no bias": (lambda: nn.Linear(7, 4, bias=False), -1, (2, 3, 4)),
    "addmm": (lambda: Conv1D(4, 7), -1, (2, 3, 4)),
    "matmul": (lambda: Product(7, 4, function=torch.matmul), -1, (2, 3, 4)),
    "mm": (lambda: Product(7, 4, function=torch.mm), -1, (2, 4)),
    "transposed": (lambda: Product(4, 7, function=lambda x, w: x @ w.t()), -1, (2, 3, 4)),
    "linear of a transposed": (
        lambda: Product(7, 4, function=lambda x, v: functional.linear(x, v.t())),
        -1,
        (2, 3, 4),
    ),
    "conv1d": (lambda: nn.Conv1d(7, 4, 3), -2, (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(7, 4, 3, stride=2, bias=False), -3, (2, 4, 6, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(7, 4, 3, padding="valid"), -3, (2, 4, 6, 5)),
    "conv2d of one tap": (lambda: nn.Conv2d(7, 4, 1, padding="same"), -3, (2, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(7, 4, 2), -4, (2, 4, 3, 4, 3)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), -3, (2, 5, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, groups=8), -3, (2, 5, 6, 5)),
}


def _beside(name: str) -> tuple[nn.Module, tuple[Tensor]]:
    make, axis, shape = _LAYERS[name]
    torch.manual_seed(0)
    model = Beside(make(), axis, shape[axis] + 3)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval(), (torch.randn(shape),)


@pytest.mark.parametrize("name", _LAYERS)
def test_every_layer_takes_constants_up(name: str) -> None:
    model, inputs = _beside(name)
    result = check(Absorb(), model, inputs, {"AbsorbConstants": 1})
    wide = capture(model.double(), (inputs[0].double(),))
    absorbed = rewrite(wide, (AbsorbConstants(wide),))
    assert absorbed.changes.fired == {"AbsorbConstants": 1}
    assert_equal(wide, absorbed, wide.example, 1e-12)
    assert_unread(absorbed, wide)
    (kept,) = (name for name in result.state if name.endswith("_absorbed") and "bias" not in name)
    assert kept.startswith("layer.")


def assert_equal(
    program: Program, result: Program, inputs: Sequence[Tensor], tolerance: float
) -> None:
    outputs = zip(evaluate(program, inputs), evaluate(result, inputs), strict=True)
    for expected, output in outputs:
        if expected.numel():
            error = float((output - expected).detach().abs().max())
            assert error <= tolerance * max(1.0, float(expected.detach().abs().max()))


def assert_unread(result: Program, before: Program) -> None:
    """What `before` knew of the inputs of layers that fired has no effect any more."""
    facts = {node.name: known for node, known in constant_channels(before).items()}

    def spoil(node: Any, value: Any) -> Any:
        reads = [u for u in node.users if any("_absorbed" in n.name for n in u.all_input_nodes)]
        if node.op != "call_function" or node.name not in facts or len(reads) < len(node.users):
            return value
        refused = {refusal.node for refusal in result.changes.refused}
        if any(user.name in refusal for user in reads for refusal in refused):
            return value
        known, axis = facts[node.name], -1
        if "conv" in str(reads[0].target):
            axis = 1 - reads[0].args[1].meta["val"].ndim
        constant = known.channels(axis, value.shape[axis]).mask
        shape = [1] * value.ndim
        shape[axis] = -1
        return torch.where(constant.reshape(shape), value + 100.0, value)

    inputs = before.example
    pairs = zip(evaluate(before, inputs), evaluate(result, inputs, spoil), strict=True)
    for expected, output in pairs:
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


@in_parts(30)
@given(prunable_models(), st.integers(0, 2**16))
def test_outputs_stay(drawn: Any, seed: int) -> None:
    program = capture(idle(drawn.model, seed), drawn.example)
    result = rewrite(program, (AbsorbConstants(program),))
    wellformed.check(result)
    again = rewrite(result, (AbsorbConstants(result),))
    fired = result.changes.fired.get("AbsorbConstants", 0)
    assert again.changes.fired.get("AbsorbConstants", 0) == fired
    wide = next(iter(program.state.values())).dtype == torch.float64
    for call in (drawn.example, *drawn.others):
        inputs = program.signature.flatten((), call)
        assert_equal(program, result, inputs, 1e-12 if wide else 1e-5)


def test_nothing_is_computed_when_it_is_planned() -> None:
    model, inputs = _beside("linear")
    program = capture(model, inputs)
    result = rewrite(program, (AbsorbConstants(program),))
    made = {name: one for name, one in result.state.items() if name.endswith("_absorbed")}
    assert sorted(made) == ["layer.bias_absorbed", "layer.weight_absorbed"]
    assert all(isinstance(one, Recipe) for one in made.values())
    assert made["layer.weight_absorbed"].sources[0] is program.state["layer.weight"]
    assert made["layer.weight_absorbed"].requires_grad


def test_the_sum_is_rounded_once() -> None:
    model, inputs = _beside("linear")
    half = model.bfloat16()
    result = check_only(half, (inputs[0].bfloat16(),))
    wide = half.layer.weight[:, [0, 2]].double() @ torch.tensor([0.5, -1.0]).double()
    expected = (half.layer.bias.double() + wide).bfloat16()
    assert torch.equal(result.tensor("layer.bias_absorbed"), expected)
    weight = half.layer.weight.detach().clone()
    weight[:, [0, 2]] = 0.0
    kept = result.tensor("layer.weight_absorbed")
    assert torch.equal(kept[:, [0, 2, 3, 4]], weight[:, [0, 2, 3, 4]])


def check_only(model: nn.Module, inputs: tuple[Tensor, ...], **only: Tensor) -> Program:
    program = capture(model, inputs)
    return rewrite(program, (AbsorbConstants(program, only=only or None),))


def test_only_what_is_asked_for_is_absorbed() -> None:
    model, inputs = _beside("linear of tokens")
    mask = torch.tensor([True] + [False] * 6)
    result = check_only(model, inputs, linear=mask)
    weight = result.tensor("layer.weight_absorbed")
    assert weight.any(0).tolist() == [False] + [True] * 6
    assert check_only(model, inputs, other=mask).changes.fired == {}
    assert check_only(model, inputs, linear=~mask & False).changes.fired == {}


def test_a_mask_of_another_length_is_an_error() -> None:
    model, inputs = _beside("linear")
    with pytest.raises(RewriteError, match=r"only\['linear'\] is of shape \(3,\).*reads 7 chan"):
        check_only(model, inputs, linear=torch.ones(3, dtype=torch.bool))


def test_zero_columns_need_no_rewrite() -> None:
    model, inputs = _beside("linear")
    with torch.no_grad():
        model.layer.weight[:, :3] = 0.0
    result = check(Absorb(), model, inputs, 0)
    assert not result.changes.refused


class Shared(nn.Module):
    """One linear on a constant beside x, and on x alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        return self.layer(hidden), self.layer(x), self.layer(hidden.sin())


def test_another_reader_of_the_weight_keeps_the_old_one() -> None:
    model = randomize(Shared())
    with torch.no_grad():
        model.first.weight[2] = 0.0
        model.first.bias[2] = 0.7
    result = check(Absorb(), model, (torch.randn(3, 4),), 2)
    assert {"layer.weight", "layer.bias"} <= set(result.state)
    absorbed = [name for name in result.state if "_absorbed" in name]
    assert sorted(absorbed) == [
        "layer.bias_absorbed",
        "layer.bias_absorbed_1",
        "layer.weight_absorbed",
    ], "readers that lose the same channels share a weight; the constants differ"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(7, 4, 3, padding=1), "the convolution's padding puts zeros beside them"),
        (nn.Conv2d(7, 4, 3, padding="same"), "the convolution's padding puts zeros beside them"),
        (nn.ConvTranspose2d(7, 4, 3), "the positions of a transposed convolution"),
    ],
)
def test_a_border_takes_zeros_alone(layer: nn.Module, reason: str) -> None:
    model = randomize(Beside(layer, -3, 7))
    model.constants.copy_(torch.tensor([0.5, 0.0, -1.0]).reshape(3, 1, 1))
    result = check(Absorb(), model, (torch.randn(2, 4, 6, 5),), 1)
    (refusal,) = result.changes.refused
    assert refusal.reason.startswith("2 constant channels aren't zero, and " + reason)
    weight = result.tensor("layer.weight_absorbed")
    columns = weight.movedim(0 if isinstance(layer, nn.ConvTranspose2d) else 1, 0).flatten(1)
    assert columns.any(1).tolist() == [True, False, *[True] * 5]
    model.constants.fill_(0.5)
    result = check(Absorb(), model, (torch.randn(2, 4, 6, 5),), 0)
    assert reason in result.changes.refused[0].reason


def _reason(layer: nn.Module) -> str:
    model = Beside(layer, -1, 7).eval()
    (refusal,) = check(Absorb(), model, (torch.randn(2, 4),), 0).changes.refused
    return refusal.reason


def test_what_has_no_constant_weight_is_refused() -> None:
    weights = torch.randn(7, 7)
    masked = Product(7, 7, function=lambda x, w: functional.linear(x, w * weights))
    assert "its operand mul_1 is computed, and only state can" in _reason(masked)
    scaled = Product(7, 7, function=lambda x, w: torch.addmm(w[0], x, w, alpha=2.0))
    assert "alpha, beta" in _reason(scaled)

    class Written(nn.Module):
        table: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(5, 7))

        def forward(self, x: Tensor) -> Tensor:
            result = functional.linear(x, self.table)
            self.table.add_(1.0)
            return result

    assert "layer.table is written by the model" in _reason(Written())


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model, inputs = _beside("linear")
    program = capture(model, inputs)
    with torch.no_grad():
        model.layer.weight[1, 2] = torch.nan
    (refusal,) = rewrite(program, (AbsorbConstants(program),)).changes.refused
    assert refusal.reason == "its weight layer.weight holds NaN or infinity"


def test_a_product_of_activations_is_no_reader() -> None:
    product = Product(1, function=lambda x, _: x @ x.mT)
    result = check(Absorb(), Beside(product, -1, 7).eval(), (torch.randn(2, 3, 4),), 0)
    assert not result.changes.refused


def test_a_rule_serves_two_programs() -> None:
    model, inputs = _beside("linear")
    program = capture(model, inputs)
    rule = AbsorbConstants(program)
    first, second = (rewrite(program, (rule,)) for _ in range(2))
    assert str(first.graph) == str(second.graph)
    assert first.changes.fired == second.changes.fired
