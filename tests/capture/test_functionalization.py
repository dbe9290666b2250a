"""In-place operators leave the graph of their out-of-place twin, and nothing is decomposed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import fxopt
from fxopt import wellformed
from fxopt.capture import capture
from fxopt.capture.writes import writes
from fxopt.graph_text import text
from fxopt.interpreter import evaluate
from fxopt.passes import Canonicalize
from fxopt.program import Program
from tests.rewriting.functions import calls, program_of

aten = torch.ops.aten

Step = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
"""A step in place, which returns what it has written, and its out-of-place twin."""


def _set_column(x: Tensor) -> Tensor:
    x[:, 1] = x[:, 2]
    return x


def _raise_column(x: Tensor) -> Tensor:
    x[:, 0] += 1
    return x


def _scale_rows(x: Tensor) -> Tensor:
    x[..., 1:3].mul_(2)
    return x


def _through_transposed(x: Tensor) -> Tensor:
    x.transpose(1, 2).add_(torch.arange(4.0))
    return x


def _through_flat(x: Tensor) -> Tensor:
    x.flatten(1)[:, 2:9].copy_(x[:, 0, :1])
    return x


def _read_behind(x: Tensor) -> Tensor:
    view = x[:, 0]
    x.add_(1)
    return x.mul_(view.unsqueeze(1).clone())


def _pieces(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first.add_(second)
    return x


def _halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return torch.cat([first + second, second], 1)


def _one_of_unbound(x: Tensor) -> Tensor:
    x.unbind(1)[2].relu_()
    return x


def _residual(x: Tensor) -> Tensor:
    y = torch.tanh(x)
    y += x
    return y


def _filled(x: Tensor) -> Tensor:
    x[:, :, 0].fill_(3)
    x[:, :, 1].zero_()
    return x


def _filled_apart(x: Tensor) -> Tensor:
    x = x.select_scatter(aten.full_like(x[:, :, 0], 3), 2, 0)
    return x.select_scatter(aten.zeros_like(x[:, :, 1]), 2, 1)


def _named_anew(x: Tensor) -> Tensor:
    x.unsqueeze_(1)
    x.mul_(2)
    return x.squeeze_(1)


STEPS: dict[str, Step] = {
    "relu": (lambda x: x.relu_(), lambda x: x.relu()),
    "relu6": (lambda x: functional.relu6(x, inplace=True), functional.relu6),
    "silu": (lambda x: functional.silu(x, inplace=True), functional.silu),
    "hardswish": (lambda x: functional.hardswish(x, inplace=True), functional.hardswish),
    "leaky_relu": (
        lambda x: functional.leaky_relu(x, 0.2, inplace=True),
        lambda x: functional.leaky_relu(x, 0.2),
    ),
    "dropout": (lambda x: functional.dropout(x, 0.5, False, True), lambda x: x),
    "add": (lambda x: x.add_(x), lambda x: x.add(x)),
    "scaled add": (lambda x: x.add_(1, alpha=2), lambda x: x.add(1, alpha=2)),
    "out": (lambda x: torch.mul(x, 2, out=x), lambda x: torch.mul(x, 2)),
    "clamp": (lambda x: x.clamp_(-1, 1), lambda x: x.clamp(-1, 1)),
    "masked": (lambda x: x.masked_fill_(x > 1, 0.0), lambda x: x.masked_fill(x > 1, 0.0)),
    "put": (
        lambda x: x.index_put_((torch.tensor([0]),), x[1].clone()),
        lambda x: x.index_put((torch.tensor([0]),), x[1]),
    ),
    "set column": (_set_column, lambda x: x.select_scatter(x[:, 2], 1, 1)),
    "raise column": (_raise_column, lambda x: x.select_scatter(x[:, 0] + 1, 1, 0)),
    "scale rows": (_scale_rows, lambda x: x.slice_scatter(x[..., 1:3] * 2, 2, 1, 3)),
    "transposed": (
        _through_transposed,
        lambda x: (x.transpose(1, 2) + torch.arange(4.0)).permute(0, 2, 1),
    ),
    "flat": (
        _through_flat,
        lambda x: (
            x.flatten(1)
            .slice_scatter(torch.ops.aten.copy(x.flatten(1)[:, 2:9], x[:, 0, :1]), 1, 2, 9)
            .reshape(x.shape)
        ),
    ),
    "read behind": (_read_behind, lambda x: (x + 1) * (x + 1)[:, 0].unsqueeze(1).clone()),
    "pieces": (_pieces, _halves),
    "unbound": (_one_of_unbound, lambda x: x.select_scatter(x.unbind(1)[2].relu(), 1, 2)),
    "residual": (_residual, lambda x: torch.tanh(x) + x),
    "filled": (_filled, _filled_apart),
    "named anew": (_named_anew, lambda x: (x.unsqueeze(1) * 2).squeeze(1)),
}
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "linear": lambda x: functional.linear(x, torch.eye(6)),
    "norm": lambda x: functional.layer_norm(x, [6]),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x, x),
}


class Steps(nn.Module):
    """A start, then steps with a batch norm between any two, in place or not."""

    def __init__(self, start: str, names: Sequence[str], in_place: bool) -> None:
        super().__init__()
        self.start, self.names, self.in_place = start, names, in_place
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in names)

    def forward(self, x: Tensor) -> Any:
        y = STARTS[self.start](x)
        for name, norm in zip(self.names, self.norms, strict=True):
            y = norm(STEPS[name][0 if self.in_place else 1](y))
        return STEPS[self.names[0]][0 if self.in_place else 1](y)

    def extra_repr(self) -> str:
        return f"{self.start}, {self.names}, in_place={self.in_place}"


def text_of(program: Program) -> str:
    """The canonical graph, but for the node that it asks for the sizes of a reshape."""
    lines = str(text(Canonicalize().apply(program, Canonicalize().plan(program)))).splitlines()
    kept = "\n".join(line for line in lines if "sym_size" not in line)
    return re.sub(r"reshape\((%\w+), .*\)", r"reshape(\1)", kept)


def assert_same_as_twin(start: str, names: Sequence[str]) -> None:
    x = torch.randn(3, 4, 6)
    model = Steps(start, names, True).eval()
    program = capture(model, (x,))
    wellformed.check(program)
    assert not any(map(writes, calls(program)))
    assert text_of(program) == text_of(capture(Steps(start, names, False).eval(), (x,)))
    for other in (x, torch.randn(5, 4, 6)):
        with torch.no_grad():
            expected = model(other.clone())
        torch.testing.assert_close(evaluate(program, (other,))[0], expected)


@pytest.mark.parametrize("name", STEPS)
def test_each_step_in_place_leaves_the_graph_of_its_twin(name: str) -> None:
    assert_same_as_twin("clone", [name])


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(list(STARTS)),
    st.lists(st.sampled_from(list(STEPS)), min_size=2, max_size=6),
)
def test_drawn_steps_in_place_leave_the_graph_of_their_twin(start: str, names: list[str]) -> None:
    assert_same_as_twin(start, names)


class Swap(nn.Module):
    """Two buffers that change places at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(4))
        self.register_buffer("two", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        old = self.one.clone()
        self.one.copy_(self.two)
        self.two.copy_(old)
        return x + self.one


def test_buffers_that_change_places_are_read_before_they_are_written() -> None:
    opt = fxopt.transform(Swap().eval(), [Canonicalize()], example_inputs=torch.zeros(2, 4))
    eager, x = Swap(), torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(opt(x), eager(x))


def test_a_write_that_no_view_leads_back_from_is_torchs_to_undo() -> None:
    def windows(x: Tensor) -> Tensor:
        y = x.clone()
        y.as_strided((2, 2), (1, 2)).mul_(2)
        return y

    x = torch.randn(3, 4)
    program = program_of(windows, x)
    wellformed.check(program)
    assert torch.equal(evaluate(program, (x,))[0], windows(x))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x.add_(1),
    "double": lambda x: x.mul_(2),
    "zero": lambda x: x.zero_(),
    "none": lambda x: x,
}


class Places(nn.Module):
    """Where x is positive, written to: two columns of a matrix that no node has."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = torch.where(x > 0)
        WRITES[self.names[0]](rows)
        WRITES[self.names[1]](columns)
        return rows, columns + rows


@settings(max_examples=8, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(list(WRITES)), min_size=2, max_size=2))
def test_results_in_one_memory_are_written_each_apart(names: list[str]) -> None:
    model = Places(names).eval()
    program = capture(model, (torch.randn(4, 5),))
    wellformed.check(program)
    assert not any(map(writes, calls(program)))
    for x in (torch.randn(4, 5), torch.ones(3, 2)):
        for found, wanted in zip(evaluate(program, (x,)), model(x), strict=True):
            assert torch.equal(found, wanted)
