"""The pipeline: what each step records, what custom passes may do, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import fxopt
from fxopt.capture import capture
from fxopt.claim import Claim, Close, Exact, Sqnr
from fxopt.errors import (
    EquivalenceError,
    InputError,
    NotCapturedError,
    PassError,
    RewriteError,
)
from fxopt.pipeline import nested
from fxopt.program import Program
from fxopt.rewriting import Edit, Match, Pass, Plan, Rule, hole, op, rewrite
from tests.captured import canonicalized
from tests.check import assert_state_equal

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()


class SquareAsProduct(Rule):
    """x ** 2 = x * x"""

    claim = Exact()
    pattern = op(aten.pow.Tensor_Scalar, hole("x"), 2)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.mul.Tensor, match["x"], match["x"])


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x**2).sum(-1)


def test_each_step_is_recorded_with_its_graph() -> None:
    opt = fxopt.transform(mlp(), "canonicalize, fuse-linears, int8-linear", example_inputs=(X,))
    records = [step.record for step in opt.steps]
    assert [record.name for record in records] == [
        "capture",
        "canonicalize",
        "fuse-linears",
        "int8-linear",
    ]
    assert records == list(opt.report.steps)
    assert records[1].firings == 0
    assert records[1].measured == "unchanged"
    assert records[3].fired == {"QuantizeLinear": 2}
    assert records[3].claim == str(fxopt.Int8Linear().claim)
    assert records[3].measured.endswith(" dB")
    assert records[3].holds
    assert records[3].bytes_after < records[3].bytes_before == records[0].bytes_after
    assert records[3].nodes_after > records[3].nodes_before
    assert all(record.milliseconds > 0 for record in records)
    assert set(records[3].changed) <= {node.name for node in opt.program.graph.nodes}
    assert "int8" in str(opt.steps[3].graph)
    assert "int8" not in str(opt.steps[2].graph)
    assert str(opt.steps[3].graph) == str(opt.graph) == records[3].graph


def test_the_graph_shows_its_difference_to_a_step() -> None:
    opt = fxopt.transform(mlp(), "int8-linear{exclude=0}", example_inputs=(X,))
    difference = opt.steps[0].graph.diff(opt.graph)
    assert "weight_int8" in difference
    assert opt.graph.diff(opt.steps[1].graph) == opt.graph.diff(opt.graph)
    assert "weight_int8" not in opt.graph.diff(opt.graph)


def test_refusals_reach_the_report() -> None:
    opt = fxopt.transform(mlp(), "int8-linear{exclude=0}", example_inputs=(X,))
    (refusal,) = opt.steps[-1].record.refused
    assert str(refusal) == "0 (linear): in exclude=('0',)"
    assert "in exclude=('0',)" in str(opt.report)


def test_a_rule_of_the_users_own_is_judged_like_ours() -> None:
    opt = fxopt.transform(Squares(), [SquareAsProduct(), "canonicalize"], example_inputs=(X,))
    record = opt.steps[1].record
    assert (record.name, record.spec) == ("rule", "SquareAsProduct()")
    assert record.fired == {"SquareAsProduct": 1}
    assert record.claim == "exact"
    assert "mul" in str(opt.graph)
    assert torch.equal(opt(X), Squares()(X))


@dataclass(frozen=True, repr=False)
class ProductsForSquares(Pass):
    """x ** 2 = x * x, at most so often."""

    most: int = 10
    name: ClassVar[str] = "products-for-squares"
    claim: Claim = Exact()

    def plan(self, program: Program) -> Plan:
        return Plan(repr(self))

    def apply(self, program: Program, plan: Plan) -> Program:
        return rewrite(program, [SquareAsProduct()], plan.excluded)


def test_a_pass_of_the_users_own_is_judged_like_ours() -> None:
    opt = fxopt.transform(Squares(), [ProductsForSquares(most=3)], example_inputs=(X,))
    record = opt.steps[1].record
    assert (record.name, record.spec) == ("products-for-squares", "ProductsForSquares(most=3)")
    assert record.fired == {"SquareAsProduct": 1}


def test_a_pass_that_edits_behind_the_drivers_back_is_refused() -> None:
    class Sneaky(ProductsForSquares):
        def apply(self, program: Program, plan: Plan) -> Program:
            graph = fx.Graph()
            graph.output(graph.graph_copy(program.graph, {}))
            return program.with_graph(graph)

    with pytest.raises(PassError) as caught:
        fxopt.transform(Squares(), [Sneaky()], example_inputs=(X,))
    assert str(caught.value) == (
        "Sneaky() returned another program without going through fxopt.rewriting.rewrite; only the "
        "driver may edit, since it counts and keeps metadata"
    )


def test_a_pass_that_swaps_state_behind_the_drivers_back_is_refused() -> None:
    class Swaps(ProductsForSquares):
        def apply(self, program: Program, plan: Plan) -> Program:
            state = {name: tensor * 2 for name, tensor in program.state.items()}  # type: ignore[operator]
            return replace(program, state=state)

    model = mlp()
    with pytest.raises(PassError) as caught:
        fxopt.transform(model, [Swaps()], example_inputs=(X,))
    assert "without going through fxopt.rewriting.rewrite" in str(caught.value)


def test_a_looping_rule_is_an_error_and_leaves_the_model() -> None:
    class Loop(SquareAsProduct):
        """x ** 2 = x ** 2"""

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.pow.Tensor_Scalar, match["x"], 2)

    with pytest.raises(RewriteError, match=r"rule Loop loops: the value of pow"):
        fxopt.transform(Squares(), [Loop()], example_inputs=(X,))


def test_verify_false_says_not_judged() -> None:
    opt = fxopt.transform(mlp(), "int8-linear", example_inputs=(X,), verify=False)
    assert [step.record.measured for step in opt.steps] == ["not judged", "not judged"]
    assert opt.report.end_to_end is None
    assert "not judged" in str(opt.report)


def test_the_whole_list_is_judged_end_to_end() -> None:
    opt = fxopt.transform(mlp(), "fuse-linears, int8-linear", example_inputs=(X,))
    assert opt.report.end_to_end is not None
    assert opt.report.end_to_end.startswith("sqnr >= ")
    assert opt.report.end_to_end.endswith(" dB over 3 inputs")


def test_inputs_of_the_users_are_judged_on_too() -> None:
    opt = fxopt.transform(
        mlp(),
        "int8-linear",
        example_inputs=(X,),
        verify_inputs=[(torch.randn(7, 8),), {"input": torch.randn(2, 8)}, torch.randn(5, 8)],
    )
    assert opt.report.end_to_end is not None
    assert opt.report.end_to_end.endswith("over 6 inputs")
    with pytest.raises(InputError):
        fxopt.transform(
            mlp(), "canonicalize", example_inputs=(X,), verify_inputs=[(torch.randn(7, 9),)]
        )


def test_a_budget_holds_or_breaks_the_whole_list() -> None:
    opt = fxopt.transform(mlp(), "int8-linear", example_inputs=(X,), budget=Sqnr(10.0))
    assert str(opt.report.end_to_end).startswith("sqnr >= 10 dB; measured ")
    with pytest.raises(EquivalenceError, match="the whole list broke its claim"):
        fxopt.transform(mlp(), "int8-linear", example_inputs=(X,), budget=Sqnr(80.0))


def test_a_claim_that_fails_names_pass_and_node() -> None:
    with pytest.raises(EquivalenceError) as caught:
        fxopt.transform(mlp(), "int8-linear{claim=sqnr(90)}", example_inputs=(X,))
    text = str(caught.value)
    assert text.startswith(
        "Int8Linear(claim=Sqnr(db=90.0)) broke its claim\n  claimed: sqnr >= 90 dB"
    )
    assert "guilty node" in text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_violation": "ignore"}, "on_violation='ignore': must be 'raise' or 'revert'"),
        ({"mode": "test"}, "mode='test': must be 'eval' or 'train'"),
    ],
)
def test_options_are_checked_first(options: dict[str, Any], text: str) -> None:
    with pytest.raises(PassError) as caught:
        fxopt.transform(mlp(), "canonicalize", example_inputs=(X,), **options)
    assert str(caught.value) == text


def test_wrong_passes_are_refused_before_the_capture() -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("captured too early")

    with pytest.raises(PassError):
        fxopt.transform(Untouchable(), [fxopt.Int8Linear], example_inputs=(X,))


def test_progress_is_told_before_each_long_step() -> None:
    lines: list[str] = []
    fxopt.transform(mlp(), "canonicalize, int8-linear", example_inputs=(X,), progress=lines.append)
    assert lines == ["capturing Sequential", "running Canonicalize()", "running Int8Linear()"]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    fxopt.transform(mlp(), "canonicalize, int8-linear", example_inputs=(X,))
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_the_model_and_its_inputs_are_left_as_they_were() -> None:
    class Everything(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x.mul_(2)
            return self.linear(x) * self.calls

    model = Everything().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = X.clone()
    opt = fxopt.transform(
        model, "canonicalize, int8-linear", example_inputs=(given,), measure_cost=True
    )
    assert torch.equal(given, X)
    assert model.training
    assert_state_equal(model, before)
    assert opt.report.steps[-1].holds
    assert opt.calls == 0, "measuring the result leaves its own buffers too"
    assert opt.report.latency_before is not None
    assert opt.report.latency_after is not None
    assert opt.report.latency_after.median > 0


def test_cost_is_not_measured_unless_asked_for() -> None:
    opt = fxopt.transform(mlp(), "canonicalize", example_inputs=(X,))
    assert opt.report.latency_before is None
    assert opt.report.memory_after is None


def test_notes_reach_the_report() -> None:
    opt = fxopt.transform(nn.Linear(8, 4), "canonicalize", example_inputs=(X[:, None],))
    (note,) = opt.report.notes
    assert note == "input axis 1 is fixed to 1; an example longer than 1 there keeps it dynamic"
    assert note in " ".join(str(opt.report).split())


def test_without_inputs_the_first_call_captures() -> None:
    model = mlp()
    opt = fxopt.transform(model, "int8-linear")
    assert not opt.is_captured
    for ask in ("graph", "report", "steps", "program", "lowering"):
        with pytest.raises(NotCapturedError) as caught:
            getattr(opt, ask)
        assert str(caught.value) == (
            "the graph doesn't exist yet: no example_inputs were given and none could be derived. "
            "Call the module once; the capture uses the inputs of that call."
        )
    assert fxopt.Int8Linear().claim.measure(model(X), opt(input=X)).holds
    assert opt.is_captured
    assert opt.steps[-1].record.fired == {"QuantizeLinear": 2}
    assert opt(torch.randn(5, 8)).shape == (5, 4)


def test_inputs_derived_from_a_config_capture_at_once() -> None:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
    )
    opt = fxopt.transform(transformers.BertModel(config), "canonicalize")
    assert opt.is_captured
    assert opt.config is config


def test_a_transformed_model_continues_from_its_program() -> None:
    model = mlp()
    once = fxopt.transform(model, "canonicalize", example_inputs=(X,))
    twice = fxopt.transform(once, "int8-linear", example_inputs=(X,))
    assert type(twice).__name__ == "OptimizedSequential"
    assert fxopt.Int8Linear().claim.measure(model(X), twice(X)).holds
    assert [step.record.name for step in twice.steps] == ["capture", "int8-linear"]
    assert torch.equal(once(X), model(X))
    assert "int8" not in str(once.graph)


def test_a_transformed_model_needs_no_inputs_again() -> None:
    once = fxopt.transform(mlp(), "canonicalize", example_inputs=(X,))
    twice = fxopt.transform(once, "int8-linear")
    assert twice.is_captured


def test_train_mode_keeps_gradients_and_dropout() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,), mode="train")
    assert opt.training
    assert opt.report.steps[0].holds
    opt(X).sum().backward()
    assert model[0].weight.grad is not None
    torch.manual_seed(1)
    expected = model.train()(X)
    torch.manual_seed(1)
    assert torch.equal(opt(X), expected)


def test_an_eval_program_records_no_gradients() -> None:
    opt = fxopt.transform(mlp(), "canonicalize", example_inputs=(X,))
    assert not opt(X.clone().requires_grad_()).requires_grad


def test_the_claim_of_the_capture_itself_is_recorded() -> None:
    opt = fxopt.transform(mlp(), "canonicalize", example_inputs=(X,))
    record = opt.steps[0].record
    assert record.claim == str(Close())
    assert record.holds
    assert record.fired == {"operations": capture(mlp(), (X,)).node_count()}


def test_what_was_captured_is_transformed_once_more_without_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not for a trial either, at a size of 1 that its guards leave to another program."""
    opt = canonicalized("llama")
    assert any(guard.origin == "helper" for guard in opt.program.signature.guards)

    def capture(*_: Any, **__: Any) -> None:
        raise AssertionError("captured")

    monkeypatch.setattr(nested, "capture", capture)
    again = fxopt.transform(opt, "fuse-linears")
    assert again.program.signature.guards[: len(opt.program.signature.guards)] == (
        opt.program.signature.guards
    )
