"""ComputeInHalf and CancelCasts: any chosen nodes, operator by operator and on drawn models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxopt import Sqnr, wellformed
from fxopt.capture import capture
from fxopt.interpreter import evaluate
from fxopt.passes.mixed_precision.half_precision import CancelCasts, ComputeInHalf, can_be_half
from fxopt.program import Program
from fxopt.rewriting import rewrite
from tests.architectures import Stateful, randomize
from tests.check import assert_close_to_model
from tests.models import Drawn, models
from tests.sweeps import in_parts

aten = torch.ops.aten
DTYPES = (torch.bfloat16, torch.float16)
FLOOR = {torch.bfloat16: Sqnr(30.0), torch.float16: Sqnr(40.0)}


class Call(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def lowered(
    program: Program, dtype: torch.dtype = torch.bfloat16, *targets: Any, cancel: bool = True
) -> Program:
    """`program` with every call, or every call of `targets`, in half precision."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    chosen = {node.name for node in nodes if not targets or node.target in targets}
    rules = [ComputeInHalf(chosen, dtype), *([CancelCasts(dtype)] if cancel else [])]
    result = rewrite(program, rules)
    wellformed.check(result)
    again = rewrite(result, [ComputeInHalf(chosen, dtype), CancelCasts(dtype)])
    assert str(again.graph) == str(result.graph)
    return result


def lines(program: Program) -> list[str]:
    """Each result as an expression; `float` and `half` are casts."""
    words = {torch.float32: "float", torch.bfloat16: "half", torch.float16: "half"}
    names: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        target = str(node.target).removeprefix("aten.").partition(".")[0]
        if node.op != "call_function":
            names[node] = str(node.target)
        elif node.target is aten.to.dtype:
            names[node] = f"{words[node.args[1]]}({names[node.args[0]]})"
        else:
            target = "item" if "getitem" in str(node.target) else target
            names[node] = f"{target}({', '.join(names[one] for one in node.all_input_nodes)})"
    return [names[result] for result in program.output.args[0]]  # type: ignore[union-attr]


def run(function: Any, *inputs: Tensor, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    program = capture(Call(function), inputs)
    return evaluate(lowered(program, dtype), inputs)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_casts_stay_at_the_edges_and_are_made_once() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(x)
        return y.exp(), (y.view(4, 3) @ x).sin()

    assert lines(lowered(capture(Call(function), (X,)))) == [
        "float(exp(tanh(half(inputs_0))))",
        "float(sin(matmul(reshape(tanh(half(inputs_0))), half(inputs_0))))",
    ]


def test_several_results_are_taken_apart() -> None:
    def function(x: Tensor) -> Any:
        left, right = x.split(2, -1)
        return left.sin(), right.relu(), x.max(-1), torch.var_mean(x, -1)[1]

    program = capture(Call(function), (X,))
    result = lowered(program)
    found = lines(result)
    assert found[0] == "float(sin(item(split(half(inputs_0)))))"
    assert found[2:4] == ["float(item(max(half(inputs_0))))", "item(max(half(inputs_0)))"]
    assert [value.dtype for value in evaluate(result, (X,))] == [
        value.dtype for value in evaluate(program, (X,))
    ]


def test_what_is_returned_in_place_stays_as_it_is() -> None:
    def function(x: Tensor) -> Any:
        left, right = x.split(2, -1)
        return left.sin(), right

    result = lowered(capture(Call(function), (X,)))
    assert lines(result) == ["float(sin(half(item(split(inputs_0)))))", "item(split(inputs_0))"]
    (refusal,) = result.changes.refused
    assert refusal.reason == (
        "it is returned as a view of an input or of state, which a rounded copy isn't"
    )


def test_only_what_is_chosen_is_taken() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.sin(torch.relu(torch.exp(x)).t()).cos()

    program = capture(Call(function), (X,))
    chosen = (aten.exp.default, aten.sin.default)
    assert lines(lowered(program, torch.bfloat16, *chosen)) == [
        "cos(float(sin(transpose(relu(exp(half(inputs_0)))))))"
    ]


def test_a_cast_of_what_was_half_cancels_through_copies_and_splits() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(x.bfloat16().float().reshape(4, 3).transpose(0, 1).contiguous())
        return tuple(piece.bfloat16() for piece in y.chunk(2, -1))

    program = capture(Call(function), (X,))
    result = rewrite(program, [CancelCasts(torch.bfloat16)])
    wellformed.check(result)
    copies = "chunk(relu(contiguous(transpose(reshape(half(inputs_0))))))"
    # Two results of their own before, and two now: no pieces of one.
    assert lines(result) == [f"item({copies})", f"clone(item({copies}))"]
    for wanted, got in zip(evaluate(program, (X,)), evaluate(result, (X,)), strict=True):
        assert torch.equal(wanted, got)


def test_rounding_that_is_not_undone_stays() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.bfloat16().float().exp().bfloat16(), x.half().float().bfloat16()

    program = capture(Call(function), (X,))
    assert not rewrite(program, [CancelCasts(torch.bfloat16)]).changes.fired


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_that_operators_are_given_become_half(dtype: torch.dtype) -> None:
    def function(x: Tensor, ids: Tensor) -> Tensor:
        weights = torch.softmax(x, -1, torch.float32) + ids.to(torch.float32)
        return weights.sum(-1, dtype=torch.float32) * x.to(torch.float32)[:, 0]

    ids = torch.arange(12).view(3, 4)
    program = capture(Call(function), (X, ids))
    result = lowered(program, dtype)
    computed = [node for node in result.graph.nodes if node.op == "call_function"]
    last = result.output.args[0][0]  # type: ignore[index]
    widened = [node for node in computed if node.meta["val"].dtype == torch.float32]
    assert widened == [last]
    wanted, got = evaluate(program, (X, ids)), evaluate(result, (X, ids))
    assert FLOOR[dtype].measure(wanted[0], got[0]).holds


def test_batch_norm_keeps_float32_statistics() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 4, 4)
    for mode in ("eval", "train"):
        program = capture(model, (x,), mode=mode)  # type: ignore[arg-type]
        result = lowered(program)
        norm = next(node for node in result.graph.nodes if "batch_norm" in str(node.target))
        kinds = [operand.meta["val"].dtype for operand in norm.all_input_nodes]
        assert kinds == [torch.bfloat16, *[torch.float32] * 4]
        assert_close_to_model(Sqnr(30.0), model.train(mode == "train"), result.materialized(), (x,))


def test_numbers_stay_float32() -> None:
    def function(x: Tensor, scale: Tensor) -> Tensor:
        return x * scale + scale.exp()

    inputs = (X, torch.tensor(0.3))
    result = lowered(capture(Call(function), inputs))
    assert lines(result) == ["float(add(mul(half(inputs_0), inputs_1), exp(inputs_1)))"]


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "fill",
    [
        lambda x: x.masked_fill(x < 0, LEAST),
        lambda x: torch.where(x < 0, LEAST, x),
        lambda x: torch.where(x < 0, torch.full((), LEAST), x),
        lambda x: x.masked_fill(x < 0, torch.full((), LEAST)),
        lambda x: torch.full_like(x, LEAST),
        lambda x: nn.functional.pad(x, (0, 1), value=LEAST),
    ],
    ids=["masked_fill", "where", "where tensor", "masked_fill tensor", "full_like", "pad"],
)
def test_numbers_that_are_stored_stay_finite(dtype: torch.dtype, fill: Any) -> None:
    (output,) = run(fill, X, dtype=dtype)
    assert output.isfinite().all()
    assert output.min() == torch.finfo(dtype).min


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_that_are_stored_stay(dtype: torch.dtype) -> None:
    (output,) = run(lambda x: torch.where(x < 0, torch.full((), -math.inf), x), X, dtype=dtype)
    assert torch.equal(output.isinf(), X < 0)
    (output,) = run(lambda x: x.masked_fill(x < 0, -math.inf), X, dtype=dtype)
    assert torch.equal(output.isinf(), X < 0)


def attend(q: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, q, q, mask, scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [LEAST, -math.inf, -1e9])
def test_rows_that_see_nothing_keep_their_values(dtype: torch.dtype, hidden: float) -> None:
    q = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2))
    mask = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    mask[:, :, 3] = hidden
    mask[:, :, :, 4] = hidden
    wanted = attend(q, mask)
    (got,) = run(attend, q, mask, dtype=dtype)
    assert got.isfinite().all()
    if dtype == torch.float16 and math.isfinite(hidden):
        # Beside -65504 the scores still count: the row is no longer their plain mean.
        wanted[:, :, 3] = got[:, :, 3]
    assert FLOOR[dtype].measure(wanted, got).holds


def test_one_mask_is_prepared_once_for_all_layers() -> None:
    def function(q: Tensor, mask: Tensor) -> Tensor:
        return attend(attend(q, mask).sin(), mask)

    inputs = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 5)
    result = lowered(capture(Call(function), inputs))
    targets = [node.target for node in result.graph.nodes]
    assert targets.count(aten.clamp.default) == targets.count(aten.isinf.default) == 1


def test_written_state_is_read_anew_at_each_call() -> None:
    model, x = randomize(Stateful()), torch.randn(3, 8)
    result = lowered(capture(model, (x,)))
    assert {"average", "calls"} <= set(result.state)
    assert "average_bfloat16" not in result.state


def test_training_casts_parameters_at_each_call() -> None:
    program = capture(nn.Linear(4, 4).train(), (X,), mode="train")
    result = lowered(program)
    assert dict(result.state) == dict(program.state)
    assert lines(result) == ["float(linear(half(input), half(weight), half(bias)))"]


def test_a_constant_that_two_nodes_read_is_stored_once_and_stays_trainable() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight) @ self.weight.t()

    result = lowered(capture(Twice(), (X,)))
    assert lines(result) == [
        "float(matmul(matmul(half(x), weight_bfloat16), transpose(weight_bfloat16)))"
    ]
    stored = result.materialized().state["weight_bfloat16"]
    assert isinstance(stored, nn.Parameter)
    assert stored.dtype == torch.bfloat16


def test_other_dtypes_are_refused() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    result = lowered(capture(Call(function), (X, X.double())))
    (refusal,) = result.changes.refused
    assert refusal.reason == "its operand inputs_1 is torch.float64; only float32 is rounded"


def test_what_can_be_half_is_known() -> None:
    def function(x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        rows = x.shape[0]  # a node that reads x and makes no tensor
        return x.sin(), ids + rows, ids.to(torch.float32), x.bfloat16(), x > 0, ids / 2

    program = capture(Call(function), (X, torch.arange(3)))
    names = {node.name for node in program.graph.nodes if can_be_half(node)}
    assert names == {"sin", "to", "gt"}


@in_parts(20)
@given(models(), st.sampled_from(DTYPES), st.data())
def test_any_nodes_of_any_model_can_be_chosen(
    drawn: Drawn, dtype: torch.dtype, data: st.DataObject
) -> None:
    program = capture(drawn.model, drawn.example)
    names = sorted(node.name for node in program.graph.nodes if can_be_half(node))
    chosen = data.draw(st.sets(st.sampled_from(names))) if names else set()
    result = rewrite(program, [ComputeInHalf(chosen, dtype), CancelCasts(dtype)])
    wellformed.check(result)
    refused = len(result.changes.refused)
    assert result.changes.fired.get("ComputeInHalf", 0) + refused == len(chosen)
    redundant = [
        node
        for node in result.graph.nodes
        if node.target is aten.to.dtype
        and node.args[1] == dtype
        and any(
            other.target is aten.to.dtype and other.args[1] == dtype
            for other in node.args[0].users
            if other is not node
        )
    ]
    assert not redundant, "a value is cast twice"
    for call in (drawn.example, *drawn.others):
        assert_close_to_model(Sqnr(20.0), drawn.model, result.materialized(), call)
