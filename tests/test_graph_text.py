"""The text of a graph is a golden format: typed, short, the same in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from syrupy.assertion import SnapshotAssertion
from torch import Tensor, fx, nn

from fxopt.capture import capture
from fxopt.graph_text import GraphText, describe, diff, dtype_text, text, type_text
from fxopt.program import Changes, Program

aten = torch.ops.aten


class Attention(nn.Module):
    """Self-attention of one head, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return scores.masked_fill(mask[:, None, :], -1e9).softmax(-1) @ self.value(x)


class Layer(nn.Module):
    """Attention and a norm, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, mask))


class Encoder(nn.Module):
    """A stack of layers whose output also tells the largest value of each row."""

    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.head = nn.Linear(width, 11)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, mask)
        values, indices = x.max(-1)
        return {"logits": self.head(x), "largest": (values, indices)}


def encoder(depth: int) -> Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    return capture(Encoder(depth), {"ids": ids, "mask": ids < 3})


def with_relu_for_softmax(program: Program) -> Program:
    """The program with every softmax replaced by a relu, as a pass would do it."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, values)
    graph.output(result)
    replaced = {}
    for old, node in values.items():
        node.meta = dict(old.meta)
        if node.target is aten.softmax.int:
            with graph.inserting_before(node):
                new = graph.call_function(aten.relu.default, (node.args[0],))
            new.meta = dict(node.meta)
            replaced[node.name] = new.name
            node.replace_all_uses_with(new)
            graph.erase_node(node)
    return replace(program.with_graph(graph), changes=Changes(replaced=replaced))


def test_text_of_an_encoder(snapshot: SnapshotAssertion) -> None:
    assert text(encoder(2)) == snapshot


def test_equal_layers_are_printed_once_when_collapsed(snapshot: SnapshotAssertion) -> None:
    assert text(encoder(5), collapse=True) == snapshot


def test_a_layer_that_differs_is_not_collapsed() -> None:
    program = encoder(4)
    norms = [n for n in program.graph.nodes if n.target is aten.layer_norm.default]
    norms[2].args = (*norms[2].args[:4], 1e-3, *norms[2].args[5:])
    collapsed = text(program, collapse=True)
    assert "# layers.1: as layers.0, each on the result of the one before" in collapsed
    assert "# layers.2  Layer" in collapsed
    assert "0.001" in collapsed
    assert "# layers.3  Layer" in collapsed


def test_layers_that_read_other_values_are_not_collapsed() -> None:
    class Skipping(Encoder):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            first = self.layers[0](self.embedding(ids), mask)
            second = self.layers[1](first, mask)
            return self.layers[2](first, mask) + second

    ids = torch.ones(2, 5, dtype=torch.long)
    collapsed = text(capture(Skipping(3), (ids, ids > 0)), collapse=True)
    assert "# layers.1: as layers.0, each on the result of the one before" in collapsed
    assert "# layers.2.attention  Attention" in collapsed


def test_diff_shows_a_change_of_all_layers_once(snapshot: SnapshotAssertion) -> None:
    before = encoder(4)
    assert diff(before, with_relu_for_softmax(before)) == snapshot


def test_diff_of_a_program_with_itself_is_empty() -> None:
    program = encoder(2)
    assert diff(program, program) == ""
    assert diff(program, encoder(2)) == ""


def test_removing_an_operation_changes_no_other_line() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (((x + 1) + 2) + 3) + 4

    before = capture(Adds(), (torch.ones(3),))
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(before.graph, values))
    for old, node in values.items():
        node.meta = dict(old.meta)
    first = next(node for node in graph.nodes if node.op == "call_function")
    first.replace_all_uses_with(first.args[0])
    graph.erase_node(first)
    changed = diff(before, before.with_graph(graph)).splitlines()
    assert [line for line in changed if line.startswith(("-", "+"))][2:] == [
        "-  %add: f32[s0] = add(%x, 1)",
        "-  %add_1: f32[s0] = add(%add, 2)",
        "+  %add_1: f32[s0] = add(%x, 2)",
    ]


def test_names_are_looked_up_as_in_nested_scopes() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.relu() + y

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.scale = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            shifted = x.relu()
            return self.scale(self.inner(x, shifted)) + shifted

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer = Outer()
            self.inner = nn.ModuleList([Inner(), Inner()])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](self.outer(x), x)

    printed = text(capture(Root(), (torch.ones(2, 3),)))
    # Within outer, %relu is outer's own; from the leafless root, outer's sum has a longer name.
    assert "%inner: f32[s0, 3] = add(%inner.relu, %relu)" in printed
    assert "relu(%outer.add)" in printed


def test_a_name_hidden_by_an_inner_one_is_written_absolute() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x).relu() + y

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x.relu())

    printed = text(capture(Root(), (torch.ones(2, 3),)))
    assert "%add: f32[s0, 3] = add(%relu, %.relu)" in printed


def test_train_mode_and_state_writes_are_shown() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    printed = text(capture(model, (torch.randn(2, 3, 8, 8),), mode="train"))
    assert "# train mode" in printed
    assert "copy_(1.running_mean: f32[4], " in printed


def test_another_process_prints_the_same() -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.test_graph_text import encoder, text\n"
        "sys.stdout.write(text(encoder(2)))"
    )
    root = Path(__file__).parent.parent
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == text(encoder(2))


def test_graph_text_is_the_value_that_people_print() -> None:
    before = encoder(2)
    after = with_relu_for_softmax(before)
    graph = GraphText(before)
    assert str(graph) == text(before)
    assert repr(graph) == graph.collapsed() == text(before, collapse=True)
    step = SimpleNamespace(graph=GraphText(after))
    for other in (after, GraphText(after), step):
        assert graph.diff(other) == diff(before, after)


def test_describe_needs_no_well_formed_node() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, device="meta")
    call = graph.call_function(aten.sum.dim_IntList, (x, [0]), {"dtype": torch.float64})
    assert describe(x) == "%x: f32[2, 3] = placeholder x"
    assert describe(call) == f"%{call.name} = aten.sum.dim_IntList(%x, [0], dtype=f64)"
    assert describe(graph.call_method("relu", (x,))) == "%relu = relu(%x)"


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "f32"),
        (torch.bfloat16, "bf16"),
        (torch.int64, "i64"),
        (torch.uint8, "u8"),
        (torch.bool, "bool"),
        (torch.complex64, "complex64"),
    ],
)
def test_dtype_names(dtype: torch.dtype, name: str) -> None:
    assert dtype_text(dtype) == name


def test_types_of_values_that_are_no_tensors() -> None:
    one = torch.ones(2)
    assert type_text((one, [one, 3])) == "(f32[2], (f32[2], int))"
    assert type_text(True) == "bool"
    assert type_text(1.5) == "float"
    assert type_text(None) == "none"
