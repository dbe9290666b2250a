"""In-place operators: which node writes, and the functional call in its place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxopt import wellformed
from fxopt.capture.writes import functional, writes
from fxopt.interpreter import evaluate
from tests.rewriting.functions import Function, calls, operators, program_of

aten = torch.ops.aten
X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def chained(x: Tensor) -> Tensor:
    y = x * 2
    y.add_(1).relu_().mul_(x)
    return y + 1


def through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 7.0
    y.view(-1)[3:5].mul_(10)
    return y


def view_taken_before_and_read_after(x: Tensor) -> Tensor:
    y = x * 2
    flat = y.view(-1)
    y.add_(5)
    return flat + 1


def filled_by_index(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.index_put_((torch.tensor([0, 2]),), x[0])
    return y


def masked(x: Tensor) -> Tensor:
    y = x.clone()
    return y.masked_fill_(x > 0, -9.0).softmax(-1)


def promoting(x: Tensor) -> Tensor:
    y = torch.ones(3, 4, dtype=torch.float32)
    y.mul_(x.double()).add_(x)
    return y


def written_twice_with_a_read_between(x: Tensor) -> Tensor:
    y = x + 0
    z = y.add_(1) * 3
    y.mul_(2)
    return z + y


def scalar_promotion(x: Tensor) -> Tensor:
    y = (x > 0).long()
    y += 2
    return y


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    chained,
    through_a_view,
    view_taken_before_and_read_after,
    filled_by_index,
    masked,
    promoting,
    written_twice_with_a_read_between,
    scalar_promotion,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_writes_to_the_graphs_own_memory_become_functional(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = program_of(function, X)
    wellformed.check(program)
    assert not any(writes(node) for node in calls(program))
    for x in (X, torch.randn(3, 4)):
        expected = function(x.clone())
        (output,) = evaluate(program, (x,))
        assert output.dtype == expected.dtype
        assert torch.equal(output, expected)


def test_local_writes_keep_the_dialect_undecomposed() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight).relu_()

    program = program_of(function, X, torch.randn(2, 4))
    assert operators(program) == ["linear", "relu"]


def test_an_input_that_the_model_writes_is_written_at_the_tail() -> None:
    def function(x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1

    program = program_of(function, X.clone())
    (write,) = calls(program, aten.copy_.default)
    assert write.args[0] in program.placeholders
    given = X.clone()
    (output,) = evaluate(program, (given,))
    assert torch.equal(output, X * 2 + 1)


class Graph:
    """y = x * 2, then whatever a test adds."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.x = self.graph.placeholder("x")
        self.x.meta["val"] = X
        self.y = self.call(aten.mul.Tensor, self.x, 2)

    def call(self, target: torch._ops.OpOverload, *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["val"] = X
        return node


def test_what_writes() -> None:
    g = Graph()
    assert writes(g.call(aten.add_.Tensor, g.y, 1))
    assert not writes(g.y)
    norm = (g.y, None, None, g.x, g.x)
    assert writes(g.call(aten.batch_norm.default, *norm, True, 0.1, 1e-5, False))
    assert not writes(g.call(aten.batch_norm.default, *norm, False, 0.1, 1e-5, False))
    stateless = (g.y, None, None, None, None)
    assert not writes(g.call(aten.batch_norm.default, *stateless, True, 0.1, 1e-5, False))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.relu_.default, aten.relu.default),
        (aten.masked_fill_.Scalar, aten.masked_fill.Scalar),
        (aten.__ior__.Scalar, aten.__or__.Scalar),
        (aten.zero_.default, aten.zeros_like.default),
        (aten.add.out, aten.add.Tensor),
        (aten.set_.source_Tensor, None),
        (aten.mul.Tensor, None),
    ],
)
def test_the_operator_without_the_write(
    target: torch._ops.OpOverload, expected: torch._ops.OpOverload | None
) -> None:
    g = Graph()
    assert functional(g.call(target, g.y, 1)) is expected


def test_a_function_is_not_changed_by_its_capture() -> None:
    given = X.clone()
    Function(chained)(given)
    program_of(chained, given)
    assert torch.equal(given, X)
