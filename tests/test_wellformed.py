"""Every rule of the dialect, each with a program broken on purpose."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import BertConfig, BertModel

from fxopt import wellformed
from fxopt.capture import capture
from fxopt.errors import WellFormedError
from fxopt.program import Mode, Program
from fxopt.signature import TensorInput

aten = torch.ops.aten
Break = Callable[[fx.Graph, dict[str, fx.Node]], None]


class Block(nn.Module):
    """A linear, a buffer and an output of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x) + self.shift
        return y, y.reshape(x.shape[0] * 3)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture(Block().eval(), (torch.randn(2, 4),))


def broken(program: Program, break_: Break) -> Program:
    """A copy of the program, its graph edited by `break_(graph, {operator name: node})`."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, values))
    for old, node in values.items():
        node.meta = dict(old.meta)
    named = {}
    for node in graph.nodes:
        target = node.target
        is_overload = isinstance(target, torch._ops.OpOverload)
        named[target._schema.name if is_overload else str(target)] = node
    break_(graph, named)
    return replace(program, graph=graph)


def fault_of(program: Program) -> str:
    with pytest.raises(WellFormedError) as caught:
        wellformed.check(program)
    return str(caught.value)


def insert(graph: fx.Graph, after: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with graph.inserting_after(after):
        node = graph.call_function(target, args, kwargs)
    node.meta = dict(after.meta)
    return node


def test_what_capture_gives_is_well_formed(program: Program) -> None:
    wellformed.check(program)
    wellformed.check(broken(program, lambda graph, nodes: None))


def test_the_error_tells_what_where_which_line_neighbours_and_what_to_do(
    program: Program,
) -> None:
    def break_(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["aten::linear"].args = (*nodes["aten::linear"].args, 7)

    what, *lines = fault_of(broken(program, break_)).splitlines()
    assert what == "4 positional arguments where the operator takes 3."
    parts = [line.strip().partition(":")[0] for line in lines]
    assert parts == ["node", "module", "source", "input", "input", "input", "user", "fix"]
    texts = [line.partition(":")[2].strip() for line in lines]
    assert texts[0].endswith("= aten.linear.default(%x, %fc_weight, %fc_bias, 7)")
    assert texts[1] == "fc"
    assert "linear" in texts[2] or "self.fc(x)" in texts[2]
    assert texts[3].startswith("%x: f32[")
    assert texts[4] == "%fc_weight: f32[3, 4] = get_attr fc.weight"
    assert "aten.add.Tensor(%linear, %shift)" in texts[6]
    assert texts[7].startswith("the schema is aten::linear(Tensor input, Tensor weight")


def call_module(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    with graph.inserting_after(nodes["x"]):
        graph.call_module("fc", (nodes["x"],))


def python_function(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], torch.relu, nodes["aten::add"])


def tensor_arithmetic(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], operator.add, nodes["aten::add"], 1)


def item_of_tensor(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], operator.getitem, nodes["aten::add"], 0)


def control_flow(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], torch.ops.higher_order.cond, nodes["aten::add"])


def assertion(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], aten._assert_tensor_metadata.default, nodes["aten::add"])


def in_place(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], aten.relu_.default, nodes["aten::add"])


def write_to_activation(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["aten::add"], aten.copy_.default, nodes["aten::linear"], 0)


def compute_after_write(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["shift"], aten.copy_.default, nodes["shift"], nodes["shift"])


def read_after_write(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    last = insert(graph, nodes["output"].prev, aten.copy_.default, nodes["shift"], nodes["fc.bias"])
    insert(graph, last, aten.copy_.default, nodes["fc.bias"], nodes["shift"])


def return_written_state(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    insert(graph, nodes["output"].prev, aten.copy_.default, nodes["shift"], nodes["fc.bias"])
    nodes["output"].args = ((nodes["aten::add"], nodes["shift"]),)


def missing_value(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    del nodes["aten::add"].meta["val"]


def missing_path(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::add"].meta["module_path"] = None


def unknown_state(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["shift"].target = "shifted"


def other_shape_of_state(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["shift"].meta["val"] = nodes["fc.weight"].meta["val"]


def other_device_of_state(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["shift"].meta["val"] = torch.empty(3, device="meta")


def used_before_defined(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::linear"].append(nodes["x"])


def same_name(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::add"].name = "linear"


def nested_output(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["output"].args = ([[nodes["aten::add"]], nodes["aten::add"]],)


def output_of_a_size(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["output"].args = ((nodes["aten::add"], nodes["aten::sym_size"]),)


def fewer_outputs(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["output"].args = ((nodes["aten::add"],),)


def output_in_the_middle(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    with graph.inserting_after(nodes["aten::add"]):
        graph.output((nodes["aten::add"], nodes["aten::add"]))


def no_output(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    graph.erase_node(nodes["output"])


def another_input(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    with graph.inserting_after(nodes["x"]):
        graph.placeholder("y").meta = dict(nodes["x"].meta)


def other_input_rank(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["x"].meta["val"] = nodes["x"].meta["val"].reshape(-1)


def missing_argument(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::linear"].args = nodes["aten::linear"].args[:1]


def unknown_keyword(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::add"].kwargs = {"beta": 2}


def argument_twice(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::add"].kwargs = {"other": 2}


def wrong_type(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::linear"].args = (nodes["x"], "weight")


def tensor_for_a_size(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    nodes["aten::reshape"].args = (nodes["aten::add"], [nodes["x"]])


def bare_symbol(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
    size = nodes["x"].meta["val"].shape[0]
    nodes["aten::reshape"].args = (nodes["aten::add"], [size * 3])


@pytest.mark.parametrize(
    ("break_", "text"),
    [
        (call_module, "a node of kind call_module"),
        (python_function, "a Python function, "),
        (tensor_arithmetic, "operator.add on a tensor"),
        (item_of_tensor, "operator.getitem of f32[s0, 3]"),
        (control_flow, "a control-flow operator, cond, is called"),
        (assertion, "an assertion node"),
        (in_place, "aten.relu_.default writes to its argument"),
        (write_to_activation, "aten.copy_.default writes to its argument"),
        (compute_after_write, "a computation after a write to state"),
        (read_after_write, "%shift is read after it was written"),
        (return_written_state, "%shift is state that was written, and is returned"),
        (missing_value, 'meta["val"] is missing'),
        (missing_path, 'meta["module_path"] is missing'),
        (unknown_state, "the state has no entry 'shifted'"),
        (other_shape_of_state, "the fake value is f32[3, 4], the state entry f32[3]"),
        (other_device_of_state, "the fake value is on meta, the state entry on cpu"),
        (used_before_defined, "%x is used before it is defined"),
        (same_name, "a second node named linear"),
        (nested_output, "the output is not a flat tuple of tensor nodes"),
        (output_of_a_size, "the output is not a flat tuple of tensor nodes"),
        (fewer_outputs, "1 outputs where the model's output type holds 2 tensors"),
        (output_in_the_middle, "an output node before the end"),
        (no_output, "the graph of Block doesn't end in an output node"),
        (another_input, "has 2 placeholders (x, y), its signature 1 tensors (x)"),
        (other_input_rank, "the input is no x: torch.float32["),
        (missing_argument, "argument 'weight' is missing"),
        (unknown_keyword, "no argument is named beta"),
        (argument_twice, "argument 'other' is given twice"),
        (wrong_type, "argument 'weight' doesn't take 'weight' (str)"),
        (tensor_for_a_size, "argument 'shape' doesn't take ["),
        (bare_symbol, "argument 'shape' doesn't take ["),
    ],
)
def test_a_broken_rule_is_named(program: Program, break_: Break, text: str) -> None:
    fault = fault_of(broken(program, break_))
    # Symbols bear torch's own names in messages about one node.
    symbols = {str(size) for size in program.placeholders[0].meta["val"].shape}
    for symbol in symbols - {"4"}:
        fault = fault.replace(symbol, "s0")
    assert fault.startswith(text) or text in fault.splitlines()[0]


def test_state_that_nobody_reads(program: Program) -> None:
    extra = {f"extra{i}": torch.ones(1) for i in range(7)}
    fault = fault_of(replace(program, state={**program.state, **extra}))
    assert "reads the state extra0, extra1, extra2, extra3, extra4 and 2 more" in fault


def test_state_on_several_devices(program: Program) -> None:
    shift = program.state["shift"].to("meta")

    def break_(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        nodes["shift"].meta["val"] = shift

    changed = replace(broken(program, break_), state={**program.state, "shift": shift})
    fault = fault_of(changed)
    assert "is on several devices: " in fault
    assert "shift on meta" in fault


def test_a_fixed_size_that_the_signature_calls_dynamic(program: Program) -> None:
    (leaf,) = program.signature.tensors
    loose = TensorInput(leaf.path, leaf.dtype, leaf.device, (leaf.sizes[0], "4"))
    fault = fault_of(replace(program, signature=replace(program.signature, leaves=(loose,))))
    assert "', '4'))." in fault.splitlines()[0]


def test_dead_nodes_and_user_operators_are_allowed(program: Program) -> None:
    @torch.library.custom_op("fxopt_test::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    def add(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        insert(graph, nodes["aten::add"], torch.ops.fxopt_test.twice.default, nodes["aten::add"])

    wellformed.check(broken(program, add))


def test_what_a_write_gives_may_be_returned(program: Program) -> None:
    def return_a_write(graph: fx.Graph, nodes: dict[str, fx.Node]) -> None:
        place, value = nodes["shift"], nodes["fc.bias"]
        last = insert(graph, nodes["output"].prev, aten.copy_.default, place, value)
        last.meta["val"] = nodes["shift"].meta["val"]
        view = insert(graph, last, aten.alias.default, last)
        view.meta["val"] = last.meta["val"]
        nodes["output"].args = ((nodes["aten::add"], view),)

    wellformed.check(broken(program, return_a_write))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_dropout_that_is_on_is_allowed_in_both_modes(mode: Mode) -> None:
    class MonteCarlo(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    wellformed.check(capture(MonteCarlo(), (torch.ones(2, 3),), mode=mode))


def test_writes_of_batch_norm_are_allowed_at_the_end() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    wellformed.check(capture(model, (torch.randn(2, 3, 8, 8),), mode="train"))


def test_bert_base_is_checked_in_milliseconds() -> None:
    config = BertConfig(hidden_size=24, intermediate_size=24, vocab_size=30)
    ids = torch.ones(2, 5, dtype=torch.long)
    program = capture(BertModel(config).eval(), {"input_ids": ids, "attention_mask": ids})
    wellformed.check(program)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        wellformed.check(program)
        times.append(time.perf_counter() - start)
    assert len(program.graph.nodes) > 400
    assert min(times) < 0.03
