"""Damaged and hostile folders: a clear error each, and nothing that was found is executed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from fxopt.capture import capture
from fxopt.errors import SaveError
from fxopt.interpreter import evaluate
from fxopt.optimized import graph_module
from fxopt.saving import load, save

FILES = ("graph.json", "manifest.json", "report.json", "tensors.safetensors")


class Small(nn.Module):
    """A linear whose output is a ModelOutput."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> BaseModelOutput:
        y = self.fc(x).reshape(x.shape[0] * 2, 2).relu()
        return BaseModelOutput(last_hidden_state=y)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pristine") / "saved"
    save(
        capture(Small().eval(), (torch.randn(3, 4),)),
        folder,
        lowering="lower",
        report_json='{"steps": []}',
    )
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def fault_of(folder: Path, load: Callable[[Path], Any] = load) -> str:
    with pytest.raises(SaveError) as caught:
        load(folder)
    return str(caught.value)


def seal(folder: Path) -> None:
    """Make the manifest agree with the files, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def forge(folder: Path, edit: Callable[[Any], object], load: Callable[[Path], Any] = load) -> str:
    """The error that loading gives after `edit(graph)` on the graph file, checksums made good."""
    graph = json.loads((folder / "graph.json").read_text())
    edit(graph)
    (folder / "graph.json").write_text(json.dumps(graph))
    seal(folder)
    return fault_of(folder, load)


def node(graph: Any, target: str) -> Any:
    return next(node for node in graph["nodes"] if node["target"] == target)


def test_folders_that_hold_no_program(saved: Path, tmp_path: Path) -> None:
    assert "there is no folder" in fault_of(tmp_path / "nowhere")
    assert "holds no saved program: it has no manifest.json" in fault_of(tmp_path)


@pytest.mark.parametrize("name", ["graph.json", "tensors.safetensors", "report.json"])
def test_missing_truncated_and_changed_files(saved: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[:-1])
    assert f"{name} has {len(content) - 1} bytes, and {len(content)} were saved" in fault_of(saved)
    (saved / name).write_bytes(content[:-1] + b"?")
    assert f"{name} is damaged: its SHA-256 isn't the one that was saved" in fault_of(saved)
    (saved / name).unlink()
    assert f"{name} is missing; copy the whole folder" in fault_of(saved)


def test_manifests_that_are_wrong(saved: Path) -> None:
    path = saved / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text("{")
    assert "manifest.json is damaged: JSONDecodeError" in fault_of(saved)
    path.write_text("[" * 50_000)
    assert "manifest.json is damaged: RecursionError" in fault_of(saved)
    path.write_text(" " * 100_000)
    assert "has 100000 bytes; at most 65536 are read" in fault_of(saved)
    path.write_text(json.dumps({**manifest, "format": 99}))
    assert "is of format 99, and this fxopt reads format 1" in fault_of(saved)
    path.write_text(json.dumps({**manifest, "files": {"../../etc/passwd": {}}}))
    assert "lists the files ['../../etc/passwd']" in fault_of(saved)
    files = {name: entry for name, entry in manifest["files"].items() if name != "report.json"}
    path.write_text(json.dumps({**manifest, "files": files}))
    assert "report.json isn't listed in the manifest" in fault_of(saved)
    del manifest["torch"]
    path.write_text(json.dumps(manifest))
    assert "lacks 'torch'" in fault_of(saved)


def test_the_error_names_the_versions_that_saved(saved: Path) -> None:
    fault = forge(saved, lambda graph: graph.pop("nodes"))
    assert f"torch {torch.__version__}) can't be loaded: the saved graph lacks 'nodes'" in fault


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("aten.linear.missing", "is no operator of torch"),
        ("aten.no_such_operator.default", "is no operator of torch"),
        ("aten.from_file.default", "is no operator of torch"),
        ("aten.save.default", "is no operator of torch"),
        ("aten.__class__.mro", "is no operator of torch"),
        ("aten.relu_.default", "writes to its arguments"),
        ("aten.add.out", "writes to its arguments"),
        ("os.system", "is no operator's name"),
        ("builtins.eval", "is no operator's name"),
        ("operator.methodcaller", "is no operator's name"),
        ("torch.ops.load_library", "only operators of aten, fxopt, transformers are loaded"),
        ("higher_order.cond.default", "only operators of aten, fxopt, transformers are loaded"),
        ("aten.linear.default; import os", "is no operator's name"),
        ("", "is no operator's name"),
    ],
)
def test_targets_that_no_graph_may_call(saved: Path, target: str, text: str) -> None:
    def edit(graph: Any) -> None:
        node(graph, "aten.relu.default")["target"] = target

    assert text in forge(saved, edit)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("args", [{"node": "later"}], "uses the node 'later' before it is defined"),
        ("args", [{"pickle": "gASVAAAA"}], "a value of unknown kind 'pickle'"),
        ("args", [{"dtype": "load"}], "names 'load', which is no torch dtype"),
        ("args", [{"layout": "float32"}], "names 'float32', which is no torch layout"),
        ("args", [{"device": "cuda:99"}], "this machine has no such device"),
        ("args", [{"device": "privateuse"}], "names the unknown device 'privateuse'"),
        ("args", [{"float": "1e9"}], "holds the float '1e9'"),
        ("args", [{"slice": [1]}], "a value of unknown kind 'slice'"),
        ("args", [{"node": "x", "dtype": "float32"}], "a value that can't be read"),
        ("args", [10**40], "holds an integer of 133 bits"),
        ("args", ["x"], "the saved graph can't be typed"),
        ("args", {}, "'args' of the saved graph is {}"),
        ("kwargs", {"self=__import__('os')": 1}, "which is no name"),
        ("name", "x", "holds the node name 'x' twice"),
        ("name", "a b", "holds the node name 'a b' twice, or a bad name"),
        ("op", "call_module", "a node of kind 'call_module'"),
        ("module", 3, "'module' of the saved graph is 3"),
    ],
)
def test_nodes_that_are_wrong(saved: Path, key: str, value: Any, text: str) -> None:
    def edit(graph: Any) -> None:
        node(graph, "aten.relu.default")[key] = value

    assert text in forge(saved, edit)


def test_the_name_of_a_tensor_never_becomes_code(saved: Path) -> None:
    hostile = 'x"), __import__("os").abort(), ("\\'
    before = evaluate(load(saved).program, [torch.ones(2, 4)])
    graph = json.loads((saved / "graph.json").read_text())
    graph["tensors"][hostile] = graph["tensors"].pop("fc.bias")
    node(graph, "fc.bias")["target"] = hostile
    (saved / "graph.json").write_text(json.dumps(graph))
    seal(saved)
    module = graph_module(load(saved).program)
    assert torch.equal(module(torch.ones(2, 4))[0], before[0])


def test_names_of_inputs_that_would_become_code_are_refused(saved: Path) -> None:
    def rename_input(graph: Any) -> None:
        node(graph, "x")["target"] = "x=__import__('os').abort()"

    assert "which is no name" in forge(saved, rename_input)


def test_sizes_that_explode_are_refused(saved: Path) -> None:
    def edit(graph: Any) -> None:
        mul = node(graph, "operator.mul")
        mul["target"], mul["args"] = "operator.pow", [9, 99999999]

    assert "computes a size that is too large" in forge(saved, edit)


def test_graphs_that_are_not_well_formed_are_refused(saved: Path) -> None:
    def edit(graph: Any) -> None:
        graph["tensors"]["unread"] = graph["tensors"]["fc.bias"]

    assert "holds a graph that is not well-formed: no node of Small reads" in forge(saved, edit)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda tensors: tensors["fc.bias"].update(shape=[5]), "the graph file expects torch.flo"),
        (lambda tensors: tensors["fc.bias"].update(dtype="int8"), "expects torch.int8[4]"),
        (lambda tensors: tensors["fc.bias"].update(stored="../x"), "'fc.bias' is missing from"),
        (lambda tensors: tensors["fc.bias"].update(order=[7]), "has the impossible layout [7]"),
        (lambda tensors: tensors["fc.bias"].update(parameter=1), "'parameter' of the saved graph"),
        (lambda tensors: tensors.pop("fc.bias"), "reads the tensor 'fc.bias', which wasn't saved"),
        (lambda tensors: tensors.pop("example::0"), "0 example tensors were saved for 1 inputs"),
    ],
)
def test_tensor_entries_that_are_wrong(saved: Path, edit: Callable[[Any], Any], text: str) -> None:
    assert text in forge(saved, lambda graph: edit(graph["tensors"]))


def test_a_tensor_file_with_a_huge_header_is_refused(saved: Path) -> None:
    content = (saved / "tensors.safetensors").read_bytes()
    (saved / "tensors.safetensors").write_bytes((2**62).to_bytes(8, "little") + content[8:])
    seal(saved)
    assert "tensors.safetensors can't be read: " in fault_of(saved)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"model_output": "os.system", "fields": []}, "is no ModelOutput of transformers"),
        (
            {"model_output": "transformers.modeling_outputs.warnings", "fields": []},
            "is no ModelOutput of transformers",
        ),
        (
            {"model_output": "transformers.modeling_utils.PreTrainedModel", "fields": []},
            "is no ModelOutput of transformers",
        ),
        (
            {"model_output": "transformers.models.nope.modeling_nope.Output", "fields": []},
            "isn't in the installed transformers",
        ),
        (
            {
                "model_output": "transformers.modeling_outputs.BaseModelOutput",
                "fields": [["a", None]],
            },
            "has fields that BaseModelOutput lacks",
        ),
        ({"namedtuple": "x"}, "lacks 'model_output'"),
        ({"list": [None, None]}, "1 outputs where the model's output type holds 2 tensors"),
    ],
)
def test_output_structures_that_are_wrong(saved: Path, spec: Any, text: str) -> None:
    assert text in forge(saved, lambda graph: graph["signature"].update(out_spec=spec))


@pytest.mark.parametrize("depth", [3_000, 100_000])
def test_deep_nesting_is_refused(saved: Path, depth: int) -> None:
    graph = (saved / "graph.json").read_text()
    nested = '{"list": [' * depth + "null" + "]}" * depth
    (saved / "graph.json").write_text(
        graph.replace('"out_spec": {', f'"out_spec": {nested}, "x": {{')
    )
    seal(saved)
    assert "graph.json is damaged: RecursionError" in fault_of(saved)


@pytest.mark.parametrize("key", ["name", "mode", "signature", "nodes", "aliases", "lowering"])
@pytest.mark.parametrize("value", [7, [[]], {"a": 7}])
def test_any_other_json_is_an_error_too(saved: Path, key: str, value: Any) -> None:
    assert str(saved) in forge(saved, lambda graph: graph.update({key: value}))


@settings(max_examples=60)
@given(
    name=st.sampled_from(FILES),
    position=st.floats(0, 1, exclude_max=True),
    flip=st.integers(1, 255),
    truncate=st.booleans(),
    sealed=st.booleans(),
)
def test_random_damage_is_an_error_or_harmless(
    pristine: Path,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    position: float,
    flip: int,
    truncate: bool,
    sealed: bool,
) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("damaged") / "saved"))
    content = bytearray((folder / name).read_bytes())
    index = int(position * len(content))
    if truncate:
        del content[index:]
    else:
        content[index] ^= flip
    (folder / name).write_bytes(content)
    intended = sealed and name != "manifest.json"
    if intended:
        seal(folder)
    try:
        loaded = load(folder).program
    except SaveError:
        return
    if intended:
        return  # a change whose checksum was made good is a program of its own
    original = load(pristine).program
    inputs = list(original.example)
    for one, other in zip(evaluate(original, inputs), evaluate(loaded, inputs), strict=True):
        assert torch.equal(one, other)
