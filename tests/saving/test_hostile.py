"""Loading takes no more memory than the files allow, and no second, whatever the graph says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt.errors import SaveError
from fxopt.saving.call_types import CallTypes
from tests.saving.test_damage import forge, node, seal

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


class Branches(nn.Module):
    """Sizes in arithmetic, a tuple of results, a convolution, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        a = self.fc(x).reshape(x.shape[0] * 2, 2).relu()
        b = self.conv(y)
        return {"a": a, "b": [b, b.chunk(2, 1)[0]]}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pristine") / "saved"
    inputs = (torch.randn(3, 4), torch.randn(2, 2, 4, 4))
    fxopt.transform(Branches().eval(), ["int8-linear"], example_inputs=inputs).save(folder)
    return folder


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(pristine, tmp_path / "saved"))


def assert_bounded(pristine: Path, first: int, count: int) -> None:
    """Load hostile folders in a process of their own, which may fall, and say which one did it."""
    seeds = pristine.parent / "seed"
    command = [sys.executable, "-m", "tests.saving.hostile_run", str(pristine)]
    done = subprocess.run(
        [*command, str(first), str(count), str(seeds)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"seed {seeds.read_text()}: {done.stderr[-2000:]}"
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["wrong"] == []
    assert sum(summary["outcomes"].values()) == count


def test_hostile_folders_take_no_memory(pristine: Path) -> None:
    assert_bounded(pristine, 0, 120)


@pytest.mark.slow
def test_many_hostile_folders_take_no_memory(pristine: Path) -> None:
    assert_bounded(pristine, 1_000, 2_500)


@pytest.mark.parametrize(
    ("target", "args", "text"),
    [
        ("operator.mul", ["ab", 2**31], "computes a size from a str"),
        ("operator.mod", ["%2000000000d", 5], "computes a size from a str"),
        ("operator.add", [[1], [2]], "computes a size from a list"),
        ("operator.mul", [2**40, 2**40], "computes a size that is too large: 81 bits"),
        ("operator.mul", [2**63, 1], "computes a size that is too large: 64 bits"),
        ("operator.pow", [2.0, 99], "computes a size that is too large, from [2.0, 99]"),
        ("operator.getitem", ["abc", 1], "takes an item of something other than results"),
        ("aten.zeros.default", [[1] * 65], "makes a tensor of 65 axes"),
        ("aten.unbind.int", [{"node": "big"}], "takes a tensor into too many parts"),
        ("aten.split.Tensor", [{"node": "big"}, 1], "takes a tensor into too many parts"),
        ("aten.chunk.default", [{"node": "big"}, 2**31], "takes a tensor into too many parts"),
        ("aten.diff.default", [{"node": "big"}, 2**20], "1048576 for n, and at most 32 are taken"),
        ("aten.combinations.default", [{"node": "big"}, 33], "33 for r, and at most 32 are taken"),
        ("aten.affine_grid_generator.default", [{"node": "big"}] * 2 + [False], "instead found"),
        ("aten.softmax.int", [{"node": "big"}, 0, -1], "gives the number -1 for dtype"),
        ("aten.quantized_lstm_cell.default", [], "is no operator of torch"),
    ],
)
def test_what_would_take_memory_is_refused(
    saved: Path, target: str, args: list[Any], text: str
) -> None:
    def edit(graph: Any) -> None:
        relu = graph["nodes"].index(node(graph, "aten.relu.default"))
        blank = {"op": "call_function", "kwargs": {}, "module": "", "source": ""}
        graph["nodes"][relu:relu] = [
            {"name": "big", "target": "aten.zeros.default", "args": [[2**40]], **blank},
            {"name": "bomb", "target": target, "args": args, **blank},
        ]

    assert text in forge(saved, edit)


@pytest.mark.parametrize("target", [aten.linalg_matrix_power.default, aten.matrix_power.default])
@pytest.mark.parametrize("exponent", [*range(-9, 10), 2**62 - 1, 1 - 2**62])
def test_the_type_of_a_power_is_torchs_and_found_in_few_calls(target: Any, exponent: int) -> None:
    types = CallTypes(1)
    x = fx.Graph().placeholder("x")
    x.meta["val"] = types.mode.from_tensor(torch.empty(5, 3, 3))
    before = types.mode._calls
    found = types.of(x.graph.call_function(target, (x, exponent)))
    assert before - types.mode._calls < 100
    if abs(exponent) < 10:
        with types.mode:
            known = target(x.meta["val"], exponent)
        assert (found.dtype, found.shape) == (known.dtype, known.shape)
        assert found.stride() == known.stride()


def test_sizes_whose_expressions_explode_are_refused(saved: Path) -> None:
    def edit(graph: Any) -> None:
        at = graph["nodes"].index(node(graph, "operator.mul"))
        blank = {"op": "call_function", "kwargs": {}, "module": "", "source": ""}
        name = node(graph, "operator.mul")["args"][0]["node"]
        for index in range(40):
            target = "operator.mul" if index % 2 else "operator.add"
            args = [{"node": name}, {"node": name} if index % 2 else 1]
            name = f"size_{index}"
            graph["nodes"].insert(at, {"name": name, "target": target, "args": args, **blank})
            at += 1

    assert "computes sizes by expressions that are too long" in forge(saved, edit)


def test_text_that_would_become_much_memory_is_refused(saved: Path) -> None:
    path = saved / "graph.json"
    notes = f'"notes": [{"[]," * 3_000_000}[]]'
    path.write_text(re.sub(r'"notes": \[[^\]]*\]', notes, path.read_text(), count=1))
    seal(saved)
    with pytest.raises(SaveError, match="which take more memory than its folder's files allow"):
        fxopt.load(saved)


def test_a_config_that_counts_to_billions_is_refused(saved: Path) -> None:
    config = {"model_type": "bert", "num_labels": 2**31}
    text = forge(saved, lambda graph: graph.update(config=config), load=fxopt.load)
    assert "num_labels is 2147483648, and at most 131072 are read" in text
