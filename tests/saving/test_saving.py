"""What is saved comes back bit for bit; what can't be saved or read says why."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fxopt.capture import capture
from fxopt.errors import SaveError
from fxopt.graph_text import text
from fxopt.interpreter import evaluate
from fxopt.program import Program
from fxopt.recipe import Recipe
from fxopt.saving import load, save

aten = torch.ops.aten


class Gates(nn.Module):
    """Constants of many kinds among its arguments, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.weight.data = self.fc.weight.data.t()
        self.register_buffer("steps", torch.arange(4))

    def forward(
        self, x: Tensor, *, scale: float = 2.0, pair: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Any]:
        y = torch.where(self.steps > 1, self.fc(x), -math.inf).to(torch.float64) * scale
        y = y.clamp(max=math.inf)
        if pair is not None:
            y = y + pair[0] + pair[1]
        return {"y": y, "parts": (y.split(2, -1)[1], [x[:, 1:3]]), "nothing": None}


def gates() -> Program:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    return capture(Gates().eval(), {"x": x, "scale": 0.5, "pair": (x, x[:1])})


def bert() -> tuple[nn.Module, Program]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = BertModel(config).eval()
    ids = torch.randint(0, 31, (2, 6))
    return model, capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def round_trip(program: Program, folder: Path) -> Program:
    save(program, folder)
    return load(folder).program


def assert_same(one: Program, other: Program, call: Mapping[str, Any] | None = None) -> None:
    assert text(one) == text(other)
    inputs = one.signature.flatten((), call) if call else list(one.example)
    assert other.signature.in_spec == one.signature.in_spec
    assert other.signature.out_spec == one.signature.out_spec
    for expected, output in zip(evaluate(one, inputs), evaluate(other, inputs), strict=True):
        assert expected.dtype == output.dtype
        assert torch.equal(expected, output)


def test_a_model_of_transformers_comes_back(tmp_path: Path) -> None:
    model, program = bert()
    loaded = round_trip(program, tmp_path / "saved")
    ids = torch.randint(0, 31, (3, 9))
    call = {"attention_mask": torch.ones_like(ids), "input_ids": ids}
    assert_same(program, loaded)
    assert_same(program, loaded, call)
    outputs = evaluate(loaded, loaded.signature.flatten((), call))
    result = loaded.signature.unflatten(outputs)
    with torch.no_grad():
        expected = model(**call)
    assert type(result) is type(expected)
    assert torch.equal(result.last_hidden_state, expected.last_hidden_state)


def test_constants_structures_and_layouts_come_back(tmp_path: Path) -> None:
    program = gates()
    loaded = round_trip(program, tmp_path / "saved")
    assert_same(program, loaded)
    assert loaded.signature.constants == {"scale": 0.5}
    weight = loaded.tensor("fc.weight")
    assert weight.stride() == (1, 4)
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad
    assert not loaded.tensor("steps").requires_grad
    outputs = loaded.signature.unflatten(evaluate(loaded, loaded.example))
    assert list(outputs) == ["y", "parts", "nothing"]
    assert outputs["nothing"] is None
    assert loaded.module_types == program.module_types
    assert loaded.pruned == program.pruned
    assert [n.meta["source"] for n in loaded.graph.nodes if n.op == "call_function"] == [
        n.meta["source"] for n in program.graph.nodes if n.op == "call_function"
    ]


def test_saving_what_was_loaded_writes_the_same_graph(tmp_path: Path) -> None:
    save(gates(), tmp_path / "one")
    save(load(tmp_path / "one").program, tmp_path / "two")
    one, two = (tmp_path / name / "graph.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_lowering_and_report_come_back(tmp_path: Path) -> None:
    save(gates(), tmp_path / "saved", lowering="lower{strict=true}", report_json='{"a": 1}')
    saved = load(tmp_path / "saved")
    assert saved.lowering == "lower{strict=true}"
    assert saved.report_json == '{"a": 1}'
    save(gates(), tmp_path / "saved")
    saved = load(str(tmp_path / "saved"))
    assert (saved.lowering, saved.report_json) == (None, None)


def test_a_fresh_process_computes_the_same_bits(tmp_path: Path) -> None:
    _, program = bert()
    save(program, tmp_path / "saved")
    code = (
        "import sys, torch; from fxopt.saving import load; from fxopt.interpreter import evaluate\n"
        "program = load(sys.argv[1] + '/saved').program\n"
        "torch.save(evaluate(program, program.example), sys.argv[1] + '/outputs.pt')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        check=True,
    )
    outputs = torch.load(tmp_path / "outputs.pt")
    for expected, output in zip(evaluate(program, program.example), outputs, strict=True):
        assert torch.equal(expected, output)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
    config.eos_token_id = 0
    model = GPT2LMHeadModel(config).eval()
    program = capture(model, {"input_ids": torch.randint(0, 500, (2, 5))})
    loaded = round_trip(program, tmp_path / "saved")
    assert_same(program, loaded)
    assert loaded.aliases == program.aliases
    assert loaded.aliases
    size = (tmp_path / "saved" / "tensors.safetensors").stat().st_size
    assert size < program.parameter_bytes() + 20_000


def test_views_of_one_tensor_are_saved_apart(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    whole = torch.randn(8, 4)
    model.weight = nn.Parameter(whole[2:6])
    model.bias = nn.Parameter(whole[0])
    program = capture(model.eval(), (torch.randn(2, 4),))
    loaded = round_trip(program, tmp_path / "saved")
    assert_same(program, loaded)
    twice = replace(program, state={"weight": whole[2:6], "bias": whole[2]})
    assert_same(twice, round_trip(twice, tmp_path / "saved"))


def test_recipes_are_computed(tmp_path: Path) -> None:
    program = capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    weight = program.tensor("weight")
    recipe = Recipe(torch.neg, (weight,), weight.shape, weight.dtype, weight.device)
    loaded = round_trip(replace(program, state={**program.state, "weight": recipe}), tmp_path / "s")
    assert torch.equal(loaded.tensor("weight"), -weight)


def test_train_mode_and_its_writes_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    program = capture(model, (torch.randn(2, 3, 8, 8),), mode="train")
    loaded = round_trip(program, tmp_path / "saved")
    assert loaded.mode == "train"
    assert_same(program, loaded)


def test_a_batch_of_one_stays_dynamic(tmp_path: Path) -> None:
    program = capture(nn.Linear(4, 2).eval(), (torch.randn(1, 4),))
    loaded = round_trip(program, tmp_path / "saved")
    assert_same(program, loaded)
    assert evaluate(loaded, [torch.randn(7, 4)])[0].shape == (7, 2)


def test_defaults_without_a_json_form_come_back_as_text(tmp_path: Path) -> None:
    class Defaulted(nn.Module):
        def forward(self, x: Tensor, activation: Any = torch.relu, *rest: Any) -> Tensor:
            return activation(x)

    loaded = round_trip(capture(Defaulted(), (torch.ones(2),)), tmp_path / "saved")
    default = loaded.signature.forward.parameters["activation"].default
    assert "relu" in repr(default)
    assert loaded.signature.flatten((torch.ones(2),), {})[0].shape == (2,)


def test_operators_of_other_namespaces_need_consent(tmp_path: Path) -> None:
    @torch.library.custom_op("fxopt_saving::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    program = capture(Twice(), (torch.ones(2),))
    save(program, tmp_path / "saved")
    with pytest.raises(SaveError) as caught:
        load(tmp_path / "saved")
    assert "calls fxopt_saving.twice.default, and only operators of aten" in str(caught.value)
    assert "load(..., namespaces=('fxopt_saving',))" in str(caught.value)
    assert_same(program, load(tmp_path / "saved", namespaces=("fxopt_saving",)).program)


def test_a_folder_of_something_else_is_never_overwritten(tmp_path: Path) -> None:
    program = capture(nn.ReLU(), (torch.ones(2),))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        SaveError, match=r"holds something other than a saved program \(notes.txt\)"
    ):
        save(program, tmp_path)
    save(program, tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(SaveError, match="it is not overwritten"):
        save(program, tmp_path / "saved")
    with pytest.raises(SaveError, match="exists and is no folder"):
        save(program, tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "saved"]


def test_an_empty_folder_and_missing_parents_are_filled(tmp_path: Path) -> None:
    program = capture(nn.ReLU(), (torch.ones(2),))
    (tmp_path / "empty").mkdir()
    save(program, tmp_path / "empty")
    save(program, tmp_path / "a" / "b")
    assert_same(load(tmp_path / "empty").program, load(tmp_path / "a" / "b").program)


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = gates()
    save(program, tmp_path / "saved", lowering="old")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("fxopt.saving.folder.write_json", full)
    with pytest.raises(SaveError, match="can't be written: no space left on device"):
        save(program, tmp_path / "saved", lowering="new")
    assert load(tmp_path / "saved").lowering == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


Point = namedtuple("Point", ["x", "y"])


class Named(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return Point(x + 1, x + 2)


class Ordered(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(b=x + 1, a=[x + 2, None])


def test_an_ordered_dict_comes_back(tmp_path: Path) -> None:
    loaded = round_trip(capture(Ordered(), (torch.ones(2),)), tmp_path / "saved")
    result = loaded.signature.unflatten(evaluate(loaded, loaded.example))
    assert type(result) is OrderedDict
    assert list(result) == ["b", "a"]
    assert result["a"][1] is None


def test_an_output_class_of_the_users_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as caught:
        save(capture(Named(), (torch.ones(2),)), tmp_path / "saved")
    assert "the model's output is a " in str(caught.value)
    assert "only dict, OrderedDict, list, tuple and the output classes of transformers" in str(
        caught.value
    )
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.eye(2).to_sparse(), "steps is a tensor of layout torch.sparse_coo"),
        (torch.empty(2, 2, device="meta"), "steps is on the meta device, without values"),
        (torch.nn.UninitializedBuffer(), "steps is a UninitializedBuffer"),
    ],
)
def test_tensors_that_are_not_plain_are_refused(tmp_path: Path, tensor: Any, text: str) -> None:
    from fxopt.saving.tensors import write_tensors

    with pytest.raises(SaveError, match=text):
        write_tensors(tmp_path / "t.safetensors", {"steps": tensor}, ())


def test_a_reserved_tensor_name_is_refused(tmp_path: Path) -> None:
    from fxopt.saving.tensors import write_tensors

    with pytest.raises(SaveError, match="is reserved"):
        write_tensors(tmp_path / "t", {"example::0": torch.ones(1)}, (torch.ones(1),))


def with_argument(program: Program, value: Any) -> Program:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(program.graph, values))
    for old, node in values.items():
        node.meta = dict(old.meta)
        if node.target is aten.relu.default:
            node.target = aten.pow.Tensor_Scalar
            node.args = (node.args[0], value)
    return program.with_graph(graph)


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, complex(1, -2), 2**63 - 1, True])
def test_numbers_come_back(tmp_path: Path, value: Any) -> None:
    program = with_argument(capture(nn.ReLU(), (torch.ones(2),)), value)
    loaded = round_trip(program, tmp_path / "saved")
    (node,) = (n for n in loaded.graph.nodes if n.op == "call_function")
    assert node.args[1] == value
    assert type(node.args[1]) is type(value)


def test_nan_comes_back(tmp_path: Path) -> None:
    program = with_argument(capture(nn.ReLU(), (torch.ones(2),)), math.nan)
    loaded = round_trip(program, tmp_path / "saved")
    (node,) = (n for n in loaded.graph.nodes if n.op == "call_function")
    assert math.isnan(node.args[1])
    json.loads((tmp_path / "saved" / "graph.json").read_text(), parse_constant=pytest.fail)


def test_an_argument_without_a_json_form_is_refused(tmp_path: Path) -> None:
    class Level(int):
        pass

    program = with_argument(capture(nn.ReLU(), (torch.ones(2),)), Level(2))
    with pytest.raises(SaveError, match="an argument of relu is 2, a Level; pass the plain value"):
        save(program, tmp_path / "saved")
    program = with_argument(capture(nn.ReLU(), (torch.ones(2),)), 2**70)
    with pytest.raises(SaveError, match="holds an integer of 71 bits; 64 can be saved"):
        save(program, tmp_path / "saved")
