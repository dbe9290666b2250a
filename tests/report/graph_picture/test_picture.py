"""The picture of real graphs: what is drawn, how it is folded, and that nothing overlaps."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from fxopt.capture import capture
from fxopt.report import GraphPicture, PictureNode, picture
from fxopt.report.graph_picture.boxes import Box, Op, operations
from fxopt.report.graph_picture.drawing import draw
from fxopt.report.graph_picture.layout import lay_out
from fxopt.report.graph_picture.nesting import build


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    ids = torch.randint(0, 50, (2, 8))
    return capture(
        BertModel(config).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )


def boxes_of(box: Box) -> list[Box]:
    return [box] + [
        inner for child in box.children if isinstance(child, Box) for inner in boxes_of(child)
    ]


def chain(count: int, module: str = "") -> GraphPicture:
    """`x -> relu -> relu ...`, all in one module."""
    nodes = [PictureNode("x", "x", "", "float32[2]", (), kind="input")]
    for number in range(count):
        nodes.append(PictureNode(f"n{number}", "relu", module, "float32[2]", (nodes[-1].name,)))
    return GraphPicture("Chain", tuple(nodes))


def test_nodes_of_a_real_graph(bert):
    shown = picture(bert, frozenset({"linear"}))
    by_name = {node.name: node for node in shown.nodes}
    linear = by_name["linear"]
    assert (linear.op, linear.module) == ("linear", "encoder.layer.0.attention.self.query")
    assert linear.changed
    assert linear.shape.startswith("float32[")
    assert linear.weights[0].endswith("query.weight: float32[16, 16]")
    assert by_name["input_ids"].kind == "input"
    assert shown.modules["encoder.layer.0"] == "BertLayer"
    assert sum(node.changed for node in shown.nodes) == 1


def test_inputs_name_drawn_nodes_that_came_before(bert):
    seen: set[str] = set()
    for node in picture(bert).nodes:
        assert seen.issuperset(node.inputs), node
        seen.add(node.name)


def test_layers_collapse_and_a_changed_layer_stands_apart(bert):
    titles = {(box.title, box.times) for box in boxes_of(build(picture(bert)).root)}
    assert ("encoder.layer.0", 3) in titles
    changed = frozenset({"linear_6"})
    titles = {(box.title, box.times) for box in boxes_of(build(picture(bert, changed)).root)}
    assert {("0", 1), ("1", 1), ("2", 1)} <= titles


def test_every_operation_is_drawn_or_stands_for_equal_ones(bert):
    shown = picture(bert)
    root = build(shown).root
    drawn = {node.name for op in operations(root) for node in op.nodes}
    missing = {node.module.split(".")[2] for node in shown.nodes if node.name not in drawn}
    assert missing == {"1", "2"}


def test_edges_lead_between_drawn_operations_and_never_back(bert):
    boxes = build(picture(bert))
    drawn = set(operations(boxes.root))
    assert all({source, target} <= drawn for source, target in boxes.edges)
    fed = {target for _, target in boxes.edges}
    sources = {op.nodes[0].op for op in drawn - fed if op.kind == "output"}
    assert not sources


def test_what_only_moves_data_is_one_node():
    nodes = (
        PictureNode("x", "x", "", "float32[2]", (), kind="input"),
        PictureNode("a", "view", "", "float32[2]", ("x",)),
        PictureNode("b", "transpose", "", "float32[2]", ("a",)),
        PictureNode("c", "view", "", "float32[2]", ("b",)),
        PictureNode("d", "relu", "", "float32[2]", ("c",)),
    )
    labels = [op.label for op in operations(build(GraphPicture("Views", nodes)).root)]
    assert labels == ["x", "view ×2 · transpose", "relu"]


def test_a_shared_module_called_twice_gets_two_boxes():
    names = ["shared", "between", "shared"]
    nodes = [PictureNode("x", "x", "", "float32[2]", (), kind="input")]
    for number, module in enumerate(names):
        for op in ("linear", "relu"):
            nodes.append(PictureNode(f"{op}{number}", op, module, "float32[2]", (nodes[-1].name,)))
    root = build(GraphPicture("Twice", tuple(nodes))).root
    assert [box.title for box in boxes_of(root)[1:]] == names


def test_small_modules_fold_in_large_graphs_only():
    small = build(chain(8, "norm")).root
    assert isinstance(small.children[-1], Box)
    large = build(chain(60, "norm")).root
    assert [child.label for child in large.children] == ["x", "norm · 60 operations"]


@pytest.mark.parametrize("changed", [frozenset(), frozenset({"linear_6"})])
def test_nothing_overlaps_and_everything_lies_in_its_box(bert, changed):
    drawing = lay_out(build(picture(bert, changed)))
    places = {placed.item: placed for placed in drawing.placed}
    for placed in drawing.placed:
        assert placed.x >= -0.01
        assert placed.x + placed.width <= drawing.width + 0.01
        if not isinstance(placed.item, Box):
            continue
        children = [places[child] for child in placed.item.children]
        for child in children:
            assert child.x >= placed.x
            assert child.y >= placed.y
            assert child.x + child.width <= placed.x + placed.width + 0.01
            assert child.y + child.height <= placed.y + placed.height + 0.01
        for index, one in enumerate(children):
            for other in children[index + 1 :]:
                apart_x = one.x + one.width <= other.x or other.x + other.width <= one.x
                apart_y = one.y + one.height <= other.y or other.y + other.height <= one.y
                assert apart_x or apart_y


def test_data_flows_downwards(bert):
    assert all(wire.y2 >= wire.y1 for wire in lay_out(build(picture(bert))).wires)


def test_a_flat_graph_of_two_thousand_operations_is_drawn():
    nodes = chain(2000).nodes
    nodes = tuple(
        PictureNode(n.name, "linear" if n.kind == "op" else n.op, "", n.shape, n.inputs, n.kind)
        for n in nodes
    )
    svg, _ = draw(GraphPicture("Deep", nodes))
    assert svg.count("<rect") == 2002
    assert len(svg) < 2_000_000


def test_a_model_without_modules_or_operations():
    class Same(nn.Module):
        def forward(self, x):
            return x + 0

    svg, _ = draw(picture(capture(Same(), (torch.ones(2, 2),))))
    assert svg.startswith("<svg")
    empty, _ = draw(GraphPicture("Empty", ()))
    assert empty.startswith("<svg")


def test_label_of_a_module_that_holds_one_operation():
    shown = GraphPicture("One", (PictureNode("l", "linear", "a.query", "f", ()),), {"a": "A"})
    (child,) = build(shown).root.children
    assert isinstance(child, Op)
    assert child.label == "a.query · linear"
