"""Gradients judged: a rewrite that answers right and learns wrong is caught and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt.capture import capture
from fxopt.claim import Close, Exact, Sqnr
from fxopt.interpreter import evaluate
from fxopt.passes import Canonicalize, FuseLinears
from fxopt.program import Program
from fxopt.verify import Trial, judge_gradients
from tests.models import Attention, ParallelLinears
from tests.training.pieces import batch, composed

aten = torch.ops.aten
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A norm on batch statistics (its bias before it has no gradient), dropout and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.body, self.dropout = (
            nn.Sequential(Attention(8, 2, False, True), nn.GELU()),
            nn.Dropout(),
        )
        self.wide = ParallelLinears(8, [(4, True), (7, False)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(self.first(x).reshape(-1, 8)).view(x.shape)
        y = self.wide(self.dropout(self.body(x)))
        return y.softmax(-1), x


def program() -> Program:
    return capture(Net(), (X,), "train")


def trial(of: Program) -> Trial:
    return Trial("the example", of.example, ())


def call(graph: fx.Graph, target: Any, like: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = dict(like.meta)
    return node


def with_detached_share(before: Program, share: float, of: str = "") -> Program:
    """The program with x in place of x, of whose gradient `share` is lost.

    (1 - share) x + share detach(x) has the value of x, which is the state `of` or, where none is
    named, what the GELU gives.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(before.graph, {}))
    if of:
        (x,) = (node for node in graph.find_nodes(op="get_attr", target=of))
    else:
        (x,) = graph.find_nodes(op="call_function", target=aten.gelu.default)
    users = list(x.users)
    with graph.inserting_before(x.next):
        kept = call(graph, aten.mul.Tensor, x, x, 1.0 - share)
        cut = call(graph, aten.detach.default, x, x)
        mixed = call(graph, aten.add.Tensor, x, kept, cut, alpha=share)
    for user in users:
        user.replace_input_with(x, mixed)
    return before.with_graph(graph)


def without_detach(before: Program) -> Program:
    graph = fx.Graph()
    graph.output(graph.graph_copy(before.graph, {}))
    for node in graph.find_nodes(op="call_function", target=aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return before.with_graph(graph)


def test_a_program_has_the_gradients_of_itself() -> None:
    before = program()
    verdict = judge_gradients(Exact(), before, before, trial(before))
    assert verdict is not None
    assert verdict.holds
    assert verdict.measured.value == 0.0


@pytest.mark.parametrize("pass_", [Canonicalize(), FuseLinears()])
def test_passes_keep_the_gradients(pass_: Any) -> None:
    before = program()
    after = pass_.apply(before, pass_.plan(before))
    verdict = judge_gradients(pass_.claim, before, after, trial(before))
    assert verdict is not None
    assert verdict.holds, (verdict.where, verdict.measured)


@pytest.mark.parametrize("share", [1.0, 0.2, 0.002])
def test_a_lost_gradient_is_caught_and_named(share: float) -> None:
    before = program()
    verdict = judge_gradients(Exact(), before, with_detached_share(before, share), trial(before))
    assert verdict is not None
    assert not verdict.holds
    assert verdict.claim == Close()
    assert verdict.where.startswith("the gradient of body.0.")


@pytest.mark.parametrize(("share", "holds"), [(0.2, False), (0.002, True)])
def test_the_claim_of_the_pass_is_the_bound(share: float, holds: bool) -> None:
    before = program()
    after = with_detached_share(before, share)
    verdict = judge_gradients(Sqnr(30.0), before, after, trial(before))
    assert verdict is not None
    assert verdict.holds is holds


CANCELLED = "body.1.norm.weight"
"""All but a ten thousandth of its gradient cancels: a batch norm after it undoes any scale."""


def cancelling(seed: int = 4) -> Program:
    model = composed("stopped branch", "batch norm", auxiliary=True, seed=seed)
    return capture(model, batch(0), "train")


def gradient(of: Program, name: str) -> Tensor:
    """That of the sum of squares of all outputs, in the precision of the program."""
    weight = of.tensor(name)
    outputs = [one for one in evaluate(of, of.example) if one.requires_grad]
    return torch.autograd.grad(sum(one.square().sum() for one in outputs), weight)[0]


def test_a_gradient_whose_terms_cancel_may_be_off_by_their_rounding() -> None:
    before = cancelling()
    after = FuseLinears().apply(before, FuseLinears().plan(before))
    verdict = judge_gradients(Close(), before, after, trial(before))
    assert verdict is not None
    assert verdict.holds, (verdict.where, verdict.measured)
    old, new = gradient(before, CANCELLED), gradient(after, CANCELLED)
    assert not Close().measure(old, new).holds


@pytest.mark.parametrize(
    ("of", "share"),
    [
        (CANCELLED, 1.0),
        ("body.0.weight", 0.001),
        ("body.1.norm.bias", -0.001),
        ("body.2.weight", 0.001),
        ("head.weight", -0.001),
        ("auxiliary.bias", 1.0),
    ],
)
def test_a_wrong_gradient_is_caught_beside_one_that_cancels(of: str, share: float) -> None:
    before = cancelling()
    fused = FuseLinears().apply(before, FuseLinears().plan(before))
    joined = of not in fused.state
    after = with_detached_share(before if joined else fused, share, of)
    verdict = judge_gradients(Close(), before, after, trial(before))
    assert verdict is not None
    assert not verdict.holds
    assert verdict.where == f"the gradient of {of}"


def test_a_lost_branch_of_a_gradient_is_caught_beside_one_that_cancels() -> None:
    before = cancelling()
    graph = fx.Graph()
    graph.output(graph.graph_copy(before.graph, {}))
    (weight,) = graph.find_nodes(op="get_attr", target="auxiliary.weight")
    (linear,) = weight.users
    hidden = linear.args[0]
    with graph.inserting_before(linear):
        linear.replace_input_with(hidden, call(graph, aten.detach.default, hidden, hidden))
    after = before.with_graph(graph)
    for broken in (after, without_detach(before)):
        verdict = judge_gradients(Close(), before, broken, trial(before))
        assert verdict is not None
        assert not verdict.holds
        assert verdict.where.startswith("the gradient of body.")


class Faint(nn.Module):
    """A branch whose gradients are a millionth of the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.strong, self.faint = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.strong(x) + 1e-6 * self.faint(x)


def test_what_rounding_leaves_of_zero_is_the_less_the_finer_the_dtype() -> None:
    before = capture(Faint().double(), (X.double(),), "train")
    broken = with_detached_share(before, 0.1, "faint.weight")
    verdict = judge_gradients(Close(), before, broken, trial(before))
    assert verdict is not None
    assert not verdict.holds
    assert verdict.where == "the gradient of faint.weight"


def test_a_bias_before_a_batch_norm_is_not_judged_in_bfloat16() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x))
            return self.one(x) * self.two(x)

    before = capture(Joined().bfloat16(), (X.reshape(-1, 8).bfloat16(),), "train")
    after = FuseLinears().apply(before, FuseLinears().plan(before))
    assert after.changes.fired
    verdict = judge_gradients(Close(), before, after, trial(before))
    assert verdict is not None
    assert verdict.holds, (verdict.where, verdict.measured)
    assert verdict.where != "the gradient of first.bias"


def test_gradients_of_inputs_are_judged_where_no_parameter_trains() -> None:
    frozen = capture(nn.Sequential(nn.Linear(8, 8), nn.GELU()).requires_grad_(False), (X,), "train")
    verdict = judge_gradients(Exact(), frozen, frozen, trial(frozen))
    assert verdict is not None
    assert verdict.where == "the gradient of the input input"
    assert verdict.holds
    for share in (1.0, 0.002):
        broken = with_detached_share(frozen, share)
        verdict = judge_gradients(Exact(), frozen, broken, trial(frozen))
        assert verdict is not None
        assert not verdict.holds


def test_nothing_is_judged_where_nothing_trains() -> None:
    embedding = nn.Embedding(4, 2).requires_grad_(False)
    frozen = capture(embedding, (torch.tensor([1, 2]),), "train")
    assert judge_gradients(Exact(), frozen, frozen, trial(frozen)) is None


def test_judging_leaves_state_gradients_and_generators_alone() -> None:
    before = program()
    state = {name: before.tensor(name).detach().clone() for name in before.state}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    judge_gradients(Exact(), before, before, trial(before))
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in state.items():
        assert torch.equal(before.tensor(name), tensor)
        assert before.tensor(name).grad is None
