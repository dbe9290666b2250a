"""The driver: what it rewrites, counts, keeps, inherits and refuses to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fxopt import wellformed
from fxopt.capture import capture
from fxopt.claim import Exact
from fxopt.errors import RewriteError
from fxopt.interpreter import evaluate
from fxopt.nodes import label
from fxopt.program import Program, Refusal
from fxopt.rewriting import Edit, Match, Rule, constant, hole, op, rewrite
from tests.rewriting.functions import calls, operators, program_of

aten = torch.ops.aten
X = torch.linspace(-1.0, 1.0, 6).view(2, 3)


class DropDoubleNegation(Rule):
    """-(-x) = x"""

    pattern = op(aten.neg.default, op(aten.neg.default, hole("x")))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        x: fx.Node = match["x"]
        return x


class SquareAsProduct(Rule):
    """x ** 2 = x * x"""

    pattern = op(aten.pow.Tensor_Scalar, hole("x"), 2)
    claim = Exact()

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.mul.Tensor, match["x"], match["x"])


def negated(times: int) -> Any:
    def function(x: Tensor) -> Tensor:
        for _ in range(times):
            x = -x
        return x * 3

    return function


def assert_same_values(before: Program, after: Program) -> None:
    wellformed.check(after)
    pairs = zip(evaluate(before, before.example), evaluate(after, after.example), strict=True)
    assert all(torch.equal(old, new) for old, new in pairs)


@pytest.mark.parametrize("times", [0, 1, 2, 5, 8])
def test_rules_run_to_the_fixed_point_and_every_firing_is_counted(times: int) -> None:
    before = program_of(negated(times), X)
    after = rewrite(before, [DropDoubleNegation()])
    assert operators(after) == ["neg"] * (times % 2) + ["mul"]
    assert after.changes.fired == ({"DropDoubleNegation": times // 2} if times > 1 else {})
    assert_same_values(before, after)
    again = rewrite(after, [DropDoubleNegation()])
    assert again.changes == after.changes


def test_one_rule_makes_work_for_another() -> None:
    class CosineIsEven(Rule):
        """cos(-x) = cos(x)"""

        pattern = op(aten.cos.default, op(aten.neg.default, hole("x")))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.cos.default, match["x"])

    before = program_of(lambda x: x.neg().neg().neg().cos() ** 2, X)
    after = rewrite(before, [SquareAsProduct(), CosineIsEven(), DropDoubleNegation()])
    assert operators(after) == ["cos", "mul"]
    assert after.changes.fired["SquareAsProduct"] == 1
    assert after.changes.fired["DropDoubleNegation"] + after.changes.fired["CosineIsEven"] == 2
    wellformed.check(after)


def test_a_deep_pattern_is_found_when_a_later_firing_completes_it() -> None:
    class Rename(Rule):
        """[relu(x), sigmoid(x)] = [tanh(x), sigmoid(x)]: an ancestor changes late."""

        pattern = (op(aten.sigmoid.default, hole("x")), op(aten.relu.default, hole("x")))

        def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
            return edit.call(aten.sigmoid.default, match["x"]), edit.call(
                aten.tanh.default, match["x"]
            )

    class Deep(Rule):
        """sin(cos(exp(tanh(x)))) = tanh(x)"""

        pattern = op(
            aten.sin.default,
            op(aten.cos.default, op(aten.exp.default, op(aten.tanh.default, hole("x")))),
        )

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.tanh.default, match["x"])

    before = program_of(lambda x: (x.relu().exp().cos().sin(), x.sigmoid()), X)
    after = rewrite(before, [Deep(), Rename()])
    assert after.changes.fired == {"Rename": 1, "Deep": 1}


def test_a_refusal_ends_when_its_cause_is_gone() -> None:
    class DropSine(Rule):
        """relu(sin(x)) = relu(x)"""

        pattern = op(aten.relu.default, op(aten.sin.default, hole("x")))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.relu.default, match["x"])

    class DropZeroTimes(Rule):
        """cos(sin(x)) = x: takes the other user of the sine away"""

        exclusive = False
        pattern = op(aten.cos.default, op(aten.sin.default, hole("x")))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            x: fx.Node = match["x"]
            return x

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return y.relu(), y.cos()

    after = rewrite(program_of(function, X), [DropSine(), DropZeroTimes()])
    assert after.changes.fired == {"DropSine": 1, "DropZeroTimes": 1}
    assert after.changes.refused == ()
    assert operators(after) == ["clone", "relu"], "an output must not become the input itself"


class OnlyLarge(SquareAsProduct):
    """x ** 2 = x * x where x has more than 6 entries"""

    def refuse(self, match: Match) -> str | None:
        return "too small to matter" if match["x"].meta["val"].ndim < 3 else None


def test_refusals_are_values_with_reason_and_node() -> None:
    before = program_of(lambda x: (x**2, x[None] ** 2), X)
    after = rewrite(before, [OnlyLarge()])
    assert after.changes.fired == {"OnlyLarge": 1}
    small = calls(before, aten.pow.Tensor_Scalar)[0]
    assert after.changes.refused == (Refusal("too small to matter", label(small)),)
    assert str(after.changes.refused[0]) == f"{label(small)}: too small to matter"


def test_refusals_alone_change_nothing_but_are_kept() -> None:
    before = program_of(lambda x: x**2, X)
    after = rewrite(before, [OnlyLarge()])
    assert after.graph is before.graph
    assert not after.changes.fired
    assert [refusal.reason for refusal in after.changes.refused] == ["too small to matter"]


def negated_and_read(x: Tensor) -> tuple[Tensor, Tensor]:
    y = -x
    return -y, y.exp()


def test_an_inner_value_that_is_used_elsewhere_is_spared() -> None:
    before = program_of(lambda x: (x.neg().neg(), x.neg().exp()), X)
    shared = rewrite(program_of(negated_and_read, X), [DropDoubleNegation()])
    assert shared.changes.fired == {}
    (refusal,) = shared.changes.refused
    assert refusal.reason == "the inner value neg is also used by exp"
    assert refusal.node == "neg_1"
    assert rewrite(before, [DropDoubleNegation()]).changes.fired == {"DropDoubleNegation": 1}


def test_an_inner_value_that_is_an_output_is_spared() -> None:
    after = rewrite(program_of(lambda x: (lambda y: (y, -y))(-x), X), [DropDoubleNegation()])
    assert [refusal.reason for refusal in after.changes.refused] == [
        "the inner value neg is also used by output"
    ]


def test_a_rule_may_waive_exclusiveness() -> None:
    class Shared(DropDoubleNegation):
        exclusive = False

    before = program_of(negated_and_read, X)
    after = rewrite(before, [Shared()])
    assert after.changes.fired == {"Shared": 1}
    assert operators(after) == ["clone", "neg", "exp"], "an output must not become the input itself"
    assert_same_values(before, after)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) ** 2


class LinearByHand(Rule):
    """linear(x, W, b) = x @ Wᵀ + b, W transposed now"""

    pattern = op(aten.linear.default, hole("x"), constant("w"), constant("b"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        weight = edit.constant("turned", edit.tensor(match["w"]).t().contiguous())
        product = edit.call(aten.matmul.default, match["x"], weight)
        return edit.call(aten.add.Tensor, product, match["b"])


def test_new_nodes_inherit_module_path_and_source_and_get_a_value() -> None:
    before = capture(Scaled(), (X,))
    (linear,) = calls(before, aten.linear.default)
    after = rewrite(before, [LinearByHand()])
    new = [node for node in calls(after) if node.target in (aten.matmul.default, aten.add.Tensor)]
    assert len(new) == 2
    for node in new:
        assert node.meta["module_path"] == linear.meta["module_path"] == "inner.0"
        assert node.meta["source"] == linear.meta["source"]
        assert list(node.meta["val"].shape)[1:] == [4]
        assert node.meta["val"].fake_mode is before.fake_mode


def test_new_state_stands_at_the_head_and_old_state_is_dropped() -> None:
    model = Scaled()
    after = rewrite(capture(model, (X,)), [LinearByHand()])
    kinds = [node.op for node in after.graph.nodes]
    assert kinds == sorted(kinds, key=["placeholder", "get_attr", "call_function", "output"].index)
    assert list(after.state) == ["inner.0.bias", "turned"]
    assert after.state["inner.0.bias"] is model.inner[0].bias
    torch.testing.assert_close(evaluate(after, (X,))[0], model(X))


def test_new_state_stands_at_the_head_when_the_first_operation_goes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Both()
    after = rewrite(capture(model, (X,)), [LinearByHand()])
    assert after.changes.fired == {"LinearByHand": 2}
    kinds = "".join(node.op[0] for node in after.graph.nodes)
    assert kinds == "p" + "g" * 4 + "c" * 4 + "o"
    torch.testing.assert_close(evaluate(after, (X,))[0], model(X))


def test_new_state_gets_a_name_of_its_own() -> None:
    class TwoLinears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_buffer("turned", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x) + self.turned

    after = rewrite(capture(TwoLinears(), (X,)), [LinearByHand()])
    assert sorted(set(after.state) - {"one.bias", "two.bias"}) == ["turned", "turned_1", "turned_2"]
    assert len(after.state) == 5


def test_a_name_of_new_state_never_stands_for_a_module_too() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Linear(3, 3)
            self.norm = nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.turned(x))

    after = rewrite(capture(Named(), (X,)), [LinearByHand()])
    assert "turned.bias" in after.state
    assert "turned" not in after.state
    assert "turned_1" in after.state


def test_the_input_program_is_left_as_it_was() -> None:
    before = capture(Scaled(), (X,))
    text, nodes = str(before.graph), list(before.graph.nodes)
    metas = [dict(node.meta) for node in nodes]
    state = dict(before.state)
    after = rewrite(before, [LinearByHand(), SquareAsProduct()])
    assert after.changes.fired == {"LinearByHand": 1, "SquareAsProduct": 1}
    assert str(before.graph) == text
    assert list(before.graph.nodes) == nodes
    assert [dict(node.meta) for node in nodes] == metas
    assert dict(before.state) == state
    assert not before.changes.fired


def test_skipped_nodes_stay() -> None:
    before = program_of(lambda x: (x**2, (x + 1) ** 2), X)
    first, second = calls(before, aten.pow.Tensor_Scalar)
    after = rewrite(before, [SquareAsProduct()], skip={first.name})
    assert after.changes.fired == {"SquareAsProduct": 1}
    assert [node.name for node in calls(after, aten.pow.Tensor_Scalar)] == [first.name]
    assert second.name not in {node.name for node in after.graph.nodes}
    everything = rewrite(before, [SquareAsProduct()], skip={first.name, second.name})
    assert everything.graph is before.graph


def test_replaced_nodes_are_paired_with_what_holds_their_value() -> None:
    before = program_of(lambda x: (x**2).sin() ** 2, X)
    first, second = (node.name for node in calls(before, aten.pow.Tensor_Scalar))
    after = rewrite(before, [SquareAsProduct()])
    one, two = (node.name for node in calls(after, aten.mul.Tensor))
    assert after.changes.replaced == {first: one, second: two}


def test_changes_chain_from_one_rewrite_to_the_next() -> None:
    class ProductAsSquareRoot(Rule):
        """x * x = sqrt(x⁴)"""

        pattern = op(aten.mul.Tensor, hole("x"), hole("x"))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            fourth = edit.call(aten.pow.Tensor_Scalar, match["x"], 4)
            return edit.call(aten.sqrt.default, fourth)

    before = program_of(lambda x: x**2, X)
    (old,) = calls(before)
    after = rewrite(rewrite(before, [SquareAsProduct()]), [ProductAsSquareRoot()])
    (new,) = calls(after, aten.sqrt.default)
    assert after.changes.fired == {"SquareAsProduct": 1, "ProductAsSquareRoot": 1}
    assert after.changes.replaced[old.name] == new.name


class SineAndCosine(Rule):
    """[sin(x), cos(x)] = [cos(pi/2 - x), sin(pi/2 - x)]"""

    pattern = (op(aten.sin.default, hole("x")), op(aten.cos.default, hole("x")))

    def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
        rest = edit.call(aten.rsub.Scalar, match["x"], torch.pi / 2)
        return edit.call(aten.tanh.default, rest), edit.call(aten.exp.default, rest)


@pytest.mark.parametrize("swapped", [False, True])
def test_several_outputs_are_replaced_in_topological_order(swapped: bool) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        if swapped:
            y = x.cos()
            z = y.abs()
            return x.sin() + z, y
        y = x.sin()
        z = y.abs()
        return z, x.cos() + y

    after = rewrite(program_of(function, X), [SineAndCosine()])
    wellformed.check(after)
    assert after.changes.fired == {"SineAndCosine": 1}
    order = {node: index for index, node in enumerate(after.graph.nodes)}
    assert all(order[use] < order[node] for node in order for use in node.all_input_nodes)
    assert "sin" not in operators(after)
    assert "cos" not in operators(after)


def test_an_operand_computed_after_the_first_output_is_a_refusal() -> None:
    class SineAndProduct(Rule):
        """[sin(x), x * y] = [tanh(x), y * x]: there is no place for it before sin(x)"""

        pattern = (op(aten.sin.default, hole("x")), op(aten.mul.Tensor, hole("x"), hole("y")))

        def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
            product = edit.call(aten.mul.Tensor, match["y"], match["x"])
            return edit.call(aten.tanh.default, match["x"]), product

    before = program_of(lambda x: x * x.sin().relu(), X)
    after = rewrite(before, [SineAndProduct()])
    assert after.changes.fired == {}
    (refusal,) = after.changes.refused
    assert refusal.reason == "the operand relu is computed after the output sin"


class Looping(Rule):
    """sin(x) = sin(x), for ever"""

    pattern = op(aten.sin.default, hole("x"))

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.sin.default, match["x"])


class ReturnsItsRoot(Looping):
    """sin(x) = sin(x), the same node"""

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return match.root


@pytest.mark.parametrize("rule", [Looping(), ReturnsItsRoot()], ids=lambda rule: rule.name)
def test_a_loop_is_stopped_with_its_rule_and_node(rule: Rule) -> None:
    with pytest.raises(RewriteError) as caught:
        rewrite(program_of(lambda x: x.sin(), X), [rule])
    text = str(caught.value)
    assert text.startswith(f"rule {rule.name} loops: the value of sin")
    assert text.endswith(
        "was rewritten 32 times in a row. Make the pattern not match its own result."
    )


def test_a_loop_of_two_rules_is_stopped() -> None:
    class Back(Rule):
        """x * x = x ** 2"""

        pattern = op(aten.mul.Tensor, hole("x"), hole("x"))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.pow.Tensor_Scalar, match["x"], 2)

    with pytest.raises(RewriteError, match="loops: the value of"):
        rewrite(program_of(lambda x: x**2, X), [SquareAsProduct(), Back()])


def test_a_long_chain_is_no_loop() -> None:
    after = rewrite(program_of(negated(100), X), [DropDoubleNegation()])
    assert after.changes.fired == {"DropDoubleNegation": 50}


def test_wrapping_the_root_itself_is_refused_with_advice() -> None:
    class Wrapping(Rule):
        """sin(x) = relu(sin(x))"""

        pattern = op(aten.sin.default, hole("x"))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.relu.default, match.root)

    with pytest.raises(RewriteError) as caught:
        rewrite(program_of(lambda x: x.sin(), X), [Wrapping()])
    assert str(caught.value) == (
        "rule Wrapping built relu_default on sin, the node that it replaces. Build that call anew "
        "with edit.call(root.target, *root.args), and make the pattern not match it again."
    )


@pytest.mark.parametrize(
    ("target", "args", "new"),
    [
        (aten.sum.dim_IntList, ([1],), "torch.float32(A,)"),
        (aten.to.dtype, (torch.float64,), "torch.float64(A, B)"),
        (aten.to.dtype, (torch.int64,), "torch.int64(A, B)"),
    ],
)
def test_the_two_sides_must_have_one_type(target: Any, args: tuple[Any, ...], new: str) -> None:
    class WrongType(Rule):
        """sin(x) = something else"""

        pattern = op(aten.sin.default, hole("x"))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(target, match["x"], *args)

    before = program_of(lambda x: x.sin(), X)
    rows, columns = map(str, before.signature.tensors[0].sizes)
    with pytest.raises(RewriteError) as caught:
        rewrite(before, [WrongType()])
    assert str(caught.value) == (
        f"rule WrongType replaced sin, a torch.float32({rows}, {columns}) on cpu, by a "
        f"{new.replace('A', rows).replace('B', columns)} on cpu; the two sides of a rule must have "
        "one type"
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_results_as_outputs(count: int) -> None:
    class WrongCount(SineAndCosine):
        def rewrite(self, match: Match, edit: Edit) -> Sequence[fx.Node]:
            return [edit.call(aten.sin.default, match["x"]) for _ in range(count)]

    with pytest.raises(RewriteError) as caught:
        rewrite(program_of(lambda x: (x.sin(), x.cos()), X), [WrongCount()])
    assert str(caught.value) == (
        f"rule WrongCount returned {count} values for the 2 of its pattern, at sin"
    )


def test_a_call_that_cannot_be_typed_is_shown() -> None:
    class Untypable(Rule):
        """sin(x) = x reshaped to what it can't be"""

        pattern = op(aten.sin.default, hole("x"))

        def rewrite(self, match: Match, edit: Edit) -> fx.Node:
            return edit.call(aten.linear.default, match["x"], match["x"], 3)

    with pytest.raises(RewriteError) as caught:
        rewrite(program_of(lambda x: x.sin(), X), [Untypable()])
    text = str(caught.value)
    assert text.startswith(
        "a rewrite at sin built a call that can't be typed: aten.linear.default("
    )
    assert caught.value.__cause__ is not None


class Counting(DropDoubleNegation):
    """-(-x) = x, and how often it was asked"""

    def __init__(self) -> None:
        self.asked = 0

    def match(self, node: fx.Node) -> Match | None:
        self.asked += 1
        return super().match(node)


def asked(times: int) -> int:
    rule = Counting()
    rewrite(program_of(negated(times), X), [rule])
    return rule.asked


def test_the_work_is_linear_in_the_graph() -> None:
    small, large = asked(40), asked(80)
    assert large <= 2.2 * small
    assert large <= 4 * 80


def test_an_untouched_graph_is_looked_at_once_per_node() -> None:
    rule = Counting()
    rewrite(program_of(lambda x: (-x).exp(), X), [rule])
    assert rule.asked == 1


def test_rules_that_look_anywhere_see_every_operation() -> None:
    class Seeing(Rule):
        """nothing = nothing"""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def targets(self) -> tuple[Any, ...]:
            return ()

        def match(self, node: fx.Node) -> Match | None:
            self.seen.append(node.op)
            return None

    rule = Seeing()
    program = capture(Scaled(), (X,))
    rewrite(program, [rule])
    assert rule.seen == ["call_function"] * program.node_count()


class DropAgain(Rule):
    """dropout(x, 0.5) = dropout(x, 0.25)"""

    pattern = op(aten.dropout.default, hole("x"), 0.5, True)

    def rewrite(self, match: Match, edit: Edit) -> fx.Node:
        return edit.call(aten.dropout.default, match["x"], 0.25, True)


def test_a_random_root_is_not_drawn_beside_its_replacement() -> None:
    program = capture(nn.Sequential(nn.Dropout(0.5)).train(), (torch.randn(2, 3),), "train")
    result = rewrite(program, (DropAgain(),))

    draws = [node for node in result.graph.nodes if node.target is aten.dropout.default]
    assert [node.args[1] for node in draws] == [0.25]
