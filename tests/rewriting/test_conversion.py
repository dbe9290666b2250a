"""Conversions: types that change inside the graph, in one walk."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fxopt import wellformed
from fxopt.capture import capture
from fxopt.errors import RewriteError
from fxopt.interpreter import evaluate
from fxopt.nodes import source_line
from fxopt.optimized import graph_module
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.rewriting import Build, Conversion, convert
from tests.rewriting.functions import calls, operators, program_of

aten = torch.ops.aten


class MLP(nn.Module):
    """x + fc2(gelu(fc1 x)), by way of a shape that is spelled with symbolic sizes."""

    def __init__(self, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(4, width), nn.Linear(width, 4)]) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for up, down in self.layers:  # type: ignore[misc]
            hidden = nn.functional.gelu(up(x))
            batch, length = hidden.shape[:2]
            hidden = hidden.reshape(batch * length, -1).view(batch, length, -1)
            x = x + down(hidden)
        return x


class Keep(Conversion):
    """The entries of each named tensor that stay, by (axis, indices)."""

    def __init__(self, kept: dict[str, tuple[int, Tensor]], recipes: bool = False) -> None:
        self.kept = kept
        self.recipes = recipes
        self.asked: list[str] = []

    def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
        name = str(node.target)
        self.asked.append(name)
        if name not in self.kept:
            return tensor
        axis, index = self.kept[name]
        assert isinstance(tensor, Tensor)
        cut = tensor.detach().index_select(axis, index)
        if not self.recipes:
            return cut
        return Recipe(lambda t: t.index_select(axis, index), (tensor,), cut.shape, cut.dtype,
                      cut.device)  # fmt: skip


class Cut(Keep):
    """Keep, with sizes spelled in views inferred."""

    def call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
    ) -> fx.Node | None:
        if node.target not in (aten.view.default, aten.reshape.default):
            return None
        return build(node.target, args[0], [*args[1][:-1], -1])


def halved(width: int, layer: int = 0) -> dict[str, tuple[int, Tensor]]:
    index = torch.arange(0, width, 2)
    up, down = f"layers.{layer}.0", f"layers.{layer}.1"
    return {f"{up}.weight": (0, index), f"{up}.bias": (0, index), f"{down}.weight": (1, index)}


def mlp(**options: Any) -> tuple[MLP, Program]:
    torch.manual_seed(0)
    model = MLP(**options)
    return model, capture(model, (torch.randn(2, 3, 4),))


@pytest.mark.parametrize("recipes", [False, True])
def test_a_hidden_width_is_halved_and_computes_what_the_sliced_weights_do(recipes: bool) -> None:
    model, before = mlp()
    after = convert(before, Cut(halved(8), recipes), "Cut")
    wellformed.check(after)
    assert operators(after) == operators(before)
    assert after.state["layers.0.0.weight"].shape == (4, 4)
    assert after.state["layers.0.1.bias"] is before.state["layers.0.1.bias"]
    up, down = model.layers[0]  # type: ignore[misc]
    for shape in ((2, 3, 4), (1, 5, 4)):
        x = torch.randn(shape)
        hidden = nn.functional.gelu(up(x))[..., ::2]
        wanted = x + nn.functional.linear(hidden, down.weight[:, ::2], down.bias)
        torch.testing.assert_close(evaluate(after, (x,)), [wanted])
    assert before.state["layers.0.0.weight"] is model.layers[0][0].weight  # type: ignore[index]


def test_types_are_computed_anew_where_an_operand_changed_and_kept_elsewhere() -> None:
    _, before = mlp(depth=2)
    after = convert(before, Cut(halved(8, layer=1)), "Cut")
    old = {node.name: node.meta["val"] for node in before.graph.nodes}
    widths = []
    for node in after.graph.nodes:
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.shape[-1:] != old[node.name].shape[-1:]:
            widths.append((node.name, value.shape[-1]))
        else:
            assert node.op in ("get_attr", "output") or value is old[node.name], node
    assert {width for _, width in widths} == {4}
    assert "linear_2" in {name for name, _ in widths}
    sizes = [node.meta["val"] for node in calls(after, aten.sym_size.int)]
    assert sizes
    assert all(isinstance(size, torch.SymInt) for size in sizes)


def test_names_and_origins_are_kept_and_counted() -> None:
    _, before = mlp()
    after = convert(before, Cut(halved(8)), "Cut")
    assert [node.name for node in after.graph.nodes] == [node.name for node in before.graph.nodes]
    views = len(calls(before, aten.view.default)) + len(calls(before, aten.reshape.default))
    assert views == 2
    assert after.changes.fired == {"Cut": 3}  # both spell the last size as -1 already
    assert after.changes.replaced == {}
    for old, new in zip(before.graph.nodes, after.graph.nodes, strict=True):
        for key in ("module_path", "source", "nn_module_stack", "stack_trace"):
            assert new.meta.get(key) == old.meta.get(key)
    assert all(source_line(node) for node in calls(after, aten.linear.default))


def test_a_conversion_may_report_its_own_count() -> None:
    conversion = Cut(halved(8))
    conversion.fired = 1
    assert convert(mlp()[1], conversion, "Cut").changes.fired == {"Cut": 1}


def test_one_that_changes_nothing_returns_the_same_program() -> None:
    _, before = mlp()
    assert convert(before, Conversion(), "Nothing") is before
    once = convert(before, Cut(halved(8)), "Cut")
    kept = Keep({})
    assert convert(once, kept, "Cut") is once
    assert kept.asked == [str(n.target) for n in before.graph.nodes if n.op == "get_attr"]

    class Rebuild(Conversion):
        """Each call again as it is"""

        def call(
            self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
        ) -> fx.Node | None:
            return build(node.target, *args, **kwargs)

    assert convert(before, Rebuild(), "Rebuild") is before


class Elsewhere(Conversion):
    """neg(x) = sub(mul(x, 0), x), and abs(x) = x"""

    def call(
        self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
    ) -> fx.Node | None:
        if node.target is aten.abs.default:
            operand: fx.Node = args[0]
            return operand
        if node.target is not aten.neg.default:
            return None
        return build(aten.sub.Tensor, build(aten.mul.Tensor, args[0], 0), args[0])


def test_another_target_takes_another_name_which_is_recorded() -> None:
    x = torch.rand(2, 3)
    before = program_of(lambda x: ((-x).abs() * 2 - x).neg() * 3, x)
    after = convert(before, Elsewhere(), "Elsewhere")
    wellformed.check(after)
    # The first subtraction of the model is called `sub`: nothing else may take that name.
    names = {node.name: node.target for node in calls(after)}
    assert {"mul", "sub", "mul_1"} <= set(names)
    assert set(after.changes.replaced) == {"neg", "abs_1", "neg_1"}
    assert after.changes.replaced["abs_1"] == after.changes.replaced["neg"]
    assert all(names[new] is aten.sub.Tensor for new in after.changes.replaced.values())
    assert after.changes.fired == {"Elsewhere": 3}
    torch.testing.assert_close(evaluate(after, (x,)), [(-x * 2 - x).neg() * 3])


def test_parameters_stay_parameters_in_training() -> None:
    torch.manual_seed(0)
    model = MLP()
    model.layers[0][1].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    before = capture(model, (torch.randn(2, 3, 4),), "train")
    for recipes in (False, True):
        after = convert(before, Cut(halved(8), recipes), "Cut")
        module = graph_module(after)
        trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        assert trained == {name: p.requires_grad for name, p in model.named_parameters()}
        assert list(module.named_buffers()) == []
        outputs = evaluate(after.materialized(), (torch.randn(2, 3, 4),))
        assert outputs[0].requires_grad


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 6, bias=False)
            self.again = nn.Linear(4, 6, bias=False)
            self.again.weight = self.up.weight
            self.down = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x) + self.again(x))  # type: ignore[no-any-return]

    before = capture(Tied(), (torch.randn(2, 4),))
    index = torch.tensor([0, 5])
    after = convert(before, Keep({"up.weight": (0, index), "down.weight": (1, index)}), "Cut")
    wellformed.check(after)
    assert dict(after.aliases) == dict(before.aliases) == {"again.weight": "up.weight"}
    assert graph_module(after).state_dict()["again.weight"].shape == (2, 4)


def read_twice(program: Program) -> Program:
    """The program with a second node for the first weight, read by its second user."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    weight = next(n for n in graph.nodes if n.target == "weight")
    with graph.inserting_after(weight):
        other = graph.get_attr("weight")
    other.meta = dict(weight.meta)
    list(weight.users)[1].replace_input_with(weight, other)
    return program.with_graph(graph)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) * (self.weight.sin() + self.weight.cos()).sum()


def test_a_name_that_is_read_twice_is_converted_once() -> None:
    before = read_twice(capture(Shared(), (torch.randn(2, 3),)))

    class Once(Keep):
        """Keep, remembered by name"""

        def __init__(self) -> None:
            super().__init__({"weight": (0, torch.tensor([1, 2]))})
            self.known: Tensor | Recipe | None = None

        def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
            self.known = self.known if self.known is not None else super().constant(node, tensor)
            return self.known

    after = convert(before, Once(), "Cut")
    wellformed.check(after)
    assert after.changes.fired == {"Cut": 1}
    with pytest.raises(RewriteError) as caught:
        convert(before, Keep({"weight": (0, torch.tensor([1, 2]))}), "Cut")
    assert str(caught.value) == (
        "Cut gives weight_1 another tensor than an earlier node that reads weight too; convert "
        "each state name once and return the same object again"
    )


def test_a_call_that_no_longer_fits_is_named_with_its_operands_and_line() -> None:
    _, before = mlp()
    only_up = {name: cut for name, cut in halved(8).items() if "0.0" in name}
    with pytest.raises(RewriteError) as caught:
        convert(before, Cut(only_up), "Cut")
    text = str(caught.value)
    assert "a rewrite at layers.0.1 (linear_1) built a call that can't be typed:" in text
    assert "aten.linear.default(f32[s" in text
    assert ", 4], f32[4, 8], f32[4]): " in text
    assert "\n  from " in text
    assert text.endswith("  x = x + down(hidden)")
    assert caught.value.__cause__ is not None


def test_an_output_keeps_its_shape() -> None:
    _, before = mlp()
    kept = {"layers.0.1.weight": (0, torch.tensor([0])), "layers.0.1.bias": (0, torch.tensor([0]))}
    assert convert(before, Keep(kept), "Cut").changes.fired  # broadcast over the residual
    model = nn.Sequential(nn.Linear(4, 6))
    before = capture(model, (torch.randn(2, 4),))
    index = torch.tensor([0, 3])
    with pytest.raises(RewriteError) as caught:
        convert(before, Keep({"0.weight": (0, index), "0.bias": (0, index)}), "Cut")
    text = str(caught.value)
    assert text.startswith("Cut makes output 0, 0 (linear), a f32[s")
    assert ", 2] where the model's is a f32[s" in text
    assert "leave the axes and dtypes that reach one as they are\n  from " in text


def test_an_output_keeps_its_dtype() -> None:
    class Double(Conversion):
        """Every parameter in float64"""

        def constant(self, node: fx.Node, tensor: Tensor | Recipe) -> Tensor | Recipe:
            assert isinstance(tensor, Tensor)
            return tensor.double()

    before = capture(Shared(), (torch.randn(2, 3),))
    # A zero-dimensional float64 doesn't promote a float32 tensor: the product keeps its type.
    after = convert(before, Double(), "Double")
    assert [n.meta["val"].dtype for n in calls(after, aten.sin.default)] == [torch.float64]

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.weight

    with pytest.raises(RewriteError, match=r"output 0, add, a f64\[.* where the model's is a f32"):
        convert(capture(Plus(), (torch.randn(2, 3),)), Double(), "Double")


def test_what_a_conversion_returns_is_checked() -> None:
    class Old(Conversion):
        """The node itself, of the old graph"""

        def call(
            self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
        ) -> fx.Node | None:
            return node

    with pytest.raises(RewriteError) as caught:
        convert(program_of(lambda x: x.sin(), torch.rand(3)), Old(), "Old")
    assert str(caught.value) == (
        "Old returned sin for sin; return a node made by build, one of the new operands, or None"
    )


def test_what_nobody_reads_any_more_is_dropped_and_counted() -> None:
    class Identity(Conversion):
        """linear(x, W, b) = x"""

        def call(
            self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], build: Build
        ) -> fx.Node | None:
            build(aten.sin.default, args[0])
            operand: fx.Node = args[0]
            return operand if node.target is aten.linear.default else None

    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    after = convert(capture(model, (torch.randn(2, 4),)), Identity(), "Identity")
    wellformed.check(after)
    assert operators(after) == ["relu", "relu"]
    assert dict(after.state) == {}
    assert after.changes.fired == {"Identity": 1, "dead nodes": 3}
    assert after.changes.replaced == {"linear": "relu"}


captured = functools.cache(mlp)


@given(st.integers(1, 3), st.lists(st.integers(0, 9), min_size=1, unique=True), st.data())
def test_drawn_cuts_compute_what_masked_readers_do(
    depth: int, kept: list[int], data: st.DataObject
) -> None:
    model, before = captured(width=10, depth=depth)
    layer = data.draw(st.integers(0, depth - 1))
    index = torch.tensor(sorted(kept))
    named = {name: (axis, index) for name, (axis, _) in halved(10, layer).items()}
    after = convert(before, Cut(named), "Cut")
    wellformed.check(after)
    weight = f"layers.{layer}.1.weight"
    masked = torch.zeros(4, 10)
    masked[:, index] = model.get_parameter(weight).detach()[:, index]
    x = torch.randn(data.draw(st.integers(1, 3)), 2, 4)
    wanted = torch.func.functional_call(model, {weight: masked}, (x,))
    torch.testing.assert_close(evaluate(after, (x,)), [wanted])


def seconds(work: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(3))


def test_the_work_is_linear_in_the_graph() -> None:
    def cost(depth: int) -> float:
        _, before = mlp(depth=depth)
        kept = {name: cut for i in range(depth) for name, cut in halved(8, i).items()}
        return seconds(lambda: convert(before, Cut(kept), "Cut"))

    assert cost(16) <= 8 * cost(4)


class Renamed(Conversion):
    """State under other names."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def name(self, node: fx.Node) -> str:
        return self.names.get(str(node.target), str(node.target))


def test_state_takes_another_name() -> None:
    program = capture(MLP().eval(), (torch.randn(2, 3, 4),))
    names = {"layers.0.0.weight": "layers.0.0.other"}
    renamed = convert(program, Renamed(names), "Rename")
    wellformed.check(renamed)
    assert renamed.state["layers.0.0.other"] is program.state["layers.0.0.weight"]
    assert "layers.0.0.weight" not in renamed.state
    with pytest.raises(RewriteError, match="which is taken"):
        convert(program, Renamed({"layers.0.0.weight": "layers.0.1.weight"}), "Rename")
