"""to_onnx: what ONNX Runtime answers against the module itself, names, files and refusals."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import fxopt
from fxopt import kernels
from fxopt.claim import sqnr
from fxopt.export import interchange
from fxopt.passes.linear_layers.linear_rule import LinearRule
from tests.architectures import ARCHITECTURES
from tests.captured import canonicalized, case
from tests.check import tensors_of

ops = torch.ops.fxopt
aten = torch.ops.aten

Written: TypeAlias = tuple[fxopt.Optimized, Path]
"""A module and the file of it."""

FORMS = {
    "fp32": "canonicalize, fuse-linears",
    "dynamic": "canonicalize, fuse-linears, int8-linear{where=always}",
    "weight-only": "canonicalize, int8-linear{mode=weight_only, where=always}",
}


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Left alone, ONNX Runtime rounds the activations of weight-only products to int8 too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    loaded = session(path)
    given = {each.name: inputs[each.name].numpy() for each in loaded.get_inputs()}
    return [torch.from_numpy(output) for output in loaded.run(None, given)]


def fused(path: Path, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of the file."""
    session(path, folder / "fused.onnx")
    return [node.op_type for node in onnx.load(folder / "fused.onnx").graph.node]


def assert_same_numbers(
    opt: nn.Module, model: nn.Module, path: Path, inputs: Mapping[str, Tensor], claim: fxopt.Sqnr
) -> None:
    """Within the claim of the float model, and no farther from it than the module is."""
    with torch.no_grad():
        reference, own = tensors_of(model(**inputs)), tensors_of(opt(**inputs))
    for expected, mine, found in zip(reference, own, run(path, inputs), strict=True):
        assert claim.measure(expected, found).holds
        assert sqnr(expected, found) >= min(sqnr(expected, mine), 90.0) - 3.0


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """An architecture in one of the forms, and the file of it, written once."""

    @functools.cache
    def write(name: str, form: str) -> Written:
        opt = fxopt.transform(canonicalized(name), FORMS[form])
        path = tmp_path_factory.mktemp("written") / "model.onnx"
        return opt, fxopt.to_onnx(opt, path)

    return write


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_architectures_at_other_sizes(
    name: str, form: str, written: Callable[[str, str], Written], tmp_path: Path
) -> None:
    shared = case(name)
    opt, path = written(name, form)
    floor = {"fp32": 90.0, "dynamic": 16.0, "weight-only": 26.0}[form]
    assert len(shared.others) >= 2
    for inputs in shared.others:
        assert_same_numbers(opt, shared.model, path, inputs, fxopt.Sqnr(floor))
    assert ("MatMulInteger" in fused(path, tmp_path)) == (form == "dynamic")


def test_kernels_are_left_out(tmp_path: Path) -> None:
    shared = case("bert")
    passes = "canonicalize, int8-linear{where=always}, select-kernels, prepack"
    opt = fxopt.transform(canonicalized("bert"), passes)
    assert any(node.target in kernels.KERNEL_LEVEL for node in opt.program.graph.nodes)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    assert_same_numbers(opt, shared.model, path, shared.others[0], fxopt.Sqnr(16.0))


@pytest.mark.parametrize("bias", [True, False])
def test_half_weights_are_cast_where_they_are_multiplied(bias: bool, tmp_path: Path) -> None:
    model = nn.Linear(8, 6, bias=bias)
    with torch.no_grad():
        model.weight.copy_(model.weight.to(torch.bfloat16))
    x = torch.randn(3, 8)
    opt = fxopt.transform(model, [fxopt.HalfLinear(weight_only=True)], example_inputs=(x,))
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    assert_same_numbers(opt, model, path, {"input": x}, fxopt.Sqnr(90.0))


# Static scales, by hand


@dataclass(frozen=True)
class Scheme:
    """How an activation is rounded: zero point dtype, and whether it is calibrated off centre."""

    dtype: torch.dtype
    affine: bool


class StaticLinear(LinearRule):
    """x @ Wᵀ + b ~ dq(q(x; s, z)) @ dq(q(W))ᵀ + b"""

    claim = fxopt.Sqnr(16.0)

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def rewrite(self, match: fxopt.Match, edit: fxopt.Edit) -> fx.Node:
        linear = match["linear"]
        scale = edit.constant("scale", torch.tensor(12.0 / 255))
        middle = 128 if self.scheme.dtype == torch.uint8 else 0
        shift = middle - (17 if self.scheme.affine else 0)
        zero = edit.constant("zero", torch.tensor(shift, dtype=self.scheme.dtype))
        q = edit.call(ops.quantize.default, linear.x, scale, zero)
        x = edit.call(ops.dequantize.default, q, scale, torch.float32, zero)
        values, rows = kernels.quantize_weight(edit.tensor(linear.weight))
        weight = edit.call(
            ops.dequantize.default,
            edit.constant("weight_int8", values),
            edit.constant("weight_scale", rows),
            torch.float32,
        )
        return edit.call(aten.linear.default, x, weight, linear.bias)


SCHEMES = {
    "affine-uint8": Scheme(torch.uint8, True),
    "symmetric-int8": Scheme(torch.int8, False),
    "affine-int8": Scheme(torch.int8, True),
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_static_scales_become_integer_products(scheme: str, rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 6)).eval()
    x = torch.randn(*(5, 7)[: rank - 1], 24)
    opt = fxopt.transform(model, [StaticLinear(SCHEMES[scheme])], example_inputs=x)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    for rows in (3, 9):
        spread = 1.0 if rows == 3 else 5.0  # 5: many saturate
        inputs = {"input": spread * torch.randn(rows, *(4,)[: rank - 2], 24)}
        (found,) = run(path, inputs)
        with torch.no_grad():
            assert sqnr(opt(inputs["input"]), found) > 60.0
    written = [node.op_type for node in onnx.load(path).graph.node]
    assert written.count("QuantizeLinear") == 2
    assert written.count("DequantizeLinear") == 4
    made = fused(path, tmp_path)
    assert made.count("MatMulIntegerToFloat") == 2
    assert "DequantizeLinear" not in made
    types = {v.name: v.data_type for v in onnx.load(path).graph.initializer}
    zeros = [n.input[2] for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"]
    assert {types[name] for name in zeros} == {onnx.TensorProto.UINT8}


def test_int8_linear_static(tmp_path: Path) -> None:
    try:
        pass_ = fxopt.Int8Linear(mode="static", where="always")  # type: ignore[arg-type]
    except fxopt.PassError:
        pytest.skip("this Int8Linear has no static mode")
    shared = case("bert")
    opt = fxopt.transform(canonicalized("bert"), [pass_], verify=False)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    for inputs in shared.others:
        with torch.no_grad():
            reference, own = tensors_of(shared.model(**inputs)), tensors_of(opt(**inputs))
        for expected, mine, found in zip(reference, own, run(path, inputs), strict=True):
            assert sqnr(expected, found) >= sqnr(expected, mine) - 3.0
    made = fused(path, tmp_path)
    assert "MatMulIntegerToFloat" in made or "QLinearMatMul" in made


class AffineLinear(LinearRule):
    """x @ Wᵀ + b ~ dq(q(x)) @ dq(q(W))ᵀ + b, q with a scale and a zero point per token"""

    claim = fxopt.Sqnr(16.0)

    def rewrite(self, match: fxopt.Match, edit: fxopt.Edit) -> fx.Node:
        linear = match["linear"]
        token = edit.call(ops.quantize_per_token_affine.default, linear.x)
        q, scale, zero = (edit.item(token, index) for index in range(3))
        x = edit.call(ops.dequantize.default, q, scale, torch.float32, zero)
        values, rows = kernels.quantize_weight(edit.tensor(linear.weight))
        made = [edit.constant(f"weight_{i}", tensor) for i, tensor in enumerate((values, rows))]
        weight = edit.call(ops.dequantize.default, *made, torch.float32)
        return edit.call(aten.linear.default, x, weight, linear.bias)


def test_a_zero_point_per_token_becomes_an_integer_product(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    opt = fxopt.transform(model, [AffineLinear()], example_inputs=torch.randn(5, 7, 24))
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    x = torch.cat([torch.randn(3, 4, 24) + 2, torch.zeros(3, 1, 24)], 1)
    with torch.no_grad():
        assert sqnr(opt(x), run(path, {"input": x})[0]) > 60.0
    assert fused(path, tmp_path).count("MatMulInteger") == 2


class GroupedWeight(LinearRule):
    """x @ Wᵀ + b ~ x @ dq(q(W [N, K/g, g]; s [N, K/g, 1]))ᵀ + b"""

    claim = fxopt.Sqnr(16.0)

    def rewrite(self, match: fxopt.Match, edit: fxopt.Edit) -> fx.Node:
        linear = match["linear"]
        groups = (linear.out_features, linear.in_features // 8, 8)
        values, scales = kernels.quantize_weight(edit.tensor(linear.weight).reshape(-1, 8))
        weight = edit.call(
            ops.dequantize.default,
            edit.constant("groups", values.reshape(groups)),
            edit.constant("scales", scales.reshape(*groups[:2], 1)),
            torch.float32,
        )
        shape = [linear.out_features, linear.in_features]
        weight = edit.call(aten.reshape.default, weight, shape)
        return edit.call(aten.linear.default, linear.x, weight, linear.bias)


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_groups_become_blocks_where_the_opset_has_them(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(24, 6).eval()
    opt = fxopt.transform(model, [GroupedWeight()], example_inputs=torch.randn(5, 24))
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx", opset=opset)
    x = torch.randn(3, 24)
    with torch.no_grad():
        assert sqnr(opt(x), run(path, {"input": x})[0]) > 90.0
    written = [node.op_type for node in onnx.load(path).graph.node]
    assert ("DequantizeLinear" in written) == (opset >= 21)


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_int4_weights_are_written_as_int8_in_blocks(scheme: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48)).eval(), torch.randn(5, 64)
    opt = fxopt.transform(model, [fxopt.Int4Linear(scheme=scheme)], example_inputs=x)
    assert any(node.target is ops.unpack_int4.default for node in opt.program.graph.nodes)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    with torch.no_grad():
        assert sqnr(opt(x[:3]), run(path, {"input": x[:3]})[0]) > 90.0
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    # ONNX's zero points are integers, of the values' type: others are subtracted by themselves.
    assert (nodes[0] == "DequantizeLinear") == (scheme == "symmetric")


# Names, sizes, files


def dimensions(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_inputs_outputs_and_sizes_keep_their_names(
    written: Callable[[str, str], Written],
) -> None:
    graph = onnx.load(written("bert", "fp32")[1]).graph
    assert {value.name: dimensions(value) for value in graph.input} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["attention_mask_batch", "length"],
        "token_type_ids": ["batch", "length"],
    }
    assert {value.name: dimensions(value) for value in graph.output} == {
        "last_hidden_state": ["batch", "length", 32],
        "pooler_output": ["batch", 32],
    }


class Names(nn.Module):
    """An output that is an input, one given twice, and names that meet inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, weight: Tensor, mul: Tensor) -> dict[str, Any]:
        scaled = weight * self.weight + mul
        return {"weight": weight, "mul": scaled, "pair": [scaled, torch.tanh(scaled)]}


def test_no_two_values_share_a_name(tmp_path: Path) -> None:
    model = Names().eval()
    inputs = {"weight": torch.randn(3, 4), "mul": torch.randn(3, 4)}
    opt = fxopt.transform(model, ["canonicalize"], example_inputs=inputs)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx")
    assert [value.name for value in onnx.load(path).graph.output] == [
        "weight_output",
        "mul_output",
        "pair[0]",
        "pair[1]",
    ]
    for expected, found in zip(tensors_of(model(**inputs)), run(path, inputs), strict=True):
        assert torch.allclose(expected, found, atol=1e-6)


def test_the_file_tells_nothing_of_the_machine(
    written: Callable[[str, str], Written],
) -> None:
    _, path = written("llama", "dynamic")
    content = path.read_bytes()
    here = str(Path(__file__).parents[2])
    for trace in (
        str(path.parent),
        here,
        "site-packages",
        ".py",
        "self.",
        "transformers.",
        "torch.",
    ):
        assert trace.encode() not in content, trace


def test_tensors_beside_the_graph(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(3, 64)
    opt = fxopt.transform(model, ["canonicalize"], example_inputs=x)
    path = fxopt.to_onnx(opt, tmp_path / "model.onnx", external_data=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 4096 < (tmp_path / "model.onnx.data").stat().st_size
    assert torch.allclose(model(x), run(path, {"input": x})[0], atol=1e-5)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    opt = small()
    path = tmp_path / "model.onnx"
    path.write_text("old")
    assert fxopt.to_onnx(opt, str(path)) == path
    onnx.checker.check_model(str(path))
    assert list(tmp_path.iterdir()) == [path]


# Refusals


def small(passes: Any = ("canonicalize",)) -> fxopt.Optimized:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    return fxopt.transform(model, list(passes), example_inputs=torch.randn(3, 8))


def refused(opt: Any, path: Path, **options: Any) -> str:
    with pytest.raises(fxopt.ExportError) as caught:
        fxopt.to_onnx(opt, path, **options)
    return str(caught.value)


def test_what_is_no_optimized_module(tmp_path: Path) -> None:
    text = refused(nn.Linear(2, 2), tmp_path / "model.onnx")
    assert text.startswith("to_onnx writes what fxopt.transform returns, not Linear.")


def test_what_isnt_captured_yet(tmp_path: Path) -> None:
    opt = fxopt.transform(nn.Linear(2, 2), ["canonicalize"])
    with pytest.raises(fxopt.NotCapturedError, match="Call the module once"):
        fxopt.to_onnx(opt, tmp_path / "model.onnx")


def test_unknown_options(tmp_path: Path) -> None:
    opt, path = small(), tmp_path / "model.onnx"
    assert refused(opt, path, opset=18) == "opset=18: must be 20 (the first with Gelu) to 23"
    text = refused(opt, path, external_data="always")
    assert text == "external_data='always': must be True, False or 'auto'"


def test_paths_that_cant_be_written(tmp_path: Path) -> None:
    opt = small()
    text = refused(opt, tmp_path)
    assert text == f"{tmp_path} is a folder; give the path of a file, such as model.onnx"
    text = refused(opt, tmp_path / "missing" / "model.onnx")
    assert text == f"there is no folder {tmp_path / 'missing'}; make it, then export again"


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    text = refused(small(), tmp_path / "model.onnx")
    assert text == "writing ONNX needs onnxscript: pip install 'fxopt[onnx]'"


def test_nothing_stays_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("bad graph")

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    text = refused(small(), tmp_path / "model.onnx")
    assert text.startswith("the exported graph is no valid ONNX (bad graph); nothing was written.")
    assert not list(tmp_path.iterdir())


class Unknown(fxopt.Rule):
    """relu(x) = int8_product(...): a kernel where the numerics should be"""

    claim = fxopt.Sqnr(1.0)
    pattern = fxopt.op(aten.relu.default, fxopt.hole("x"))

    def rewrite(self, match: fxopt.Match, edit: fxopt.Edit) -> fx.Node:
        return edit.call(torch.ops.aten.lgamma.default, match["x"])


def test_an_operator_that_onnx_lacks(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    opt = fxopt.transform(model, [Unknown()], example_inputs=torch.randn(3, 8), verify=False)
    text = refused(opt, tmp_path / "model.onnx")
    assert text.startswith("Sequential can't be written as ONNX: No ONNX function found for")
    assert "lgamma" in text
    assert not list(tmp_path.iterdir())


def test_a_numerics_operator_without_translation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = interchange.translations

    def fewer(opset: int) -> dict[Any, Any]:
        table = dict(full(opset))
        del table[ops.quantize_per_token.default]
        return table

    monkeypatch.setattr(interchange, "translations", fewer)
    text = refused(small(["int8-linear{where=always}"]), tmp_path / "model.onnx")
    assert text == (
        "0 (quantize_per_token_default) calls fxopt.quantize_per_token.default, which has no "
        "ONNX form. Export a module transformed without the pass that put it there."
    )


def test_a_loaded_module_with_kernels(tmp_path: Path) -> None:
    small(["prepack"]).save(tmp_path / "saved")
    text = refused(fxopt.load(tmp_path / "saved"), tmp_path / "model.onnx")
    assert "calls fxopt.packed_linear" in text
    assert "the steps before it are not kept in a loaded" in text


def test_a_weight_that_prepack_laid_out_anew(tmp_path: Path) -> None:
    case = ARCHITECTURES["gpt2"]()
    opt = fxopt.transform(case.model, ["prepack"], example_inputs=case.example)
    text = refused(opt, tmp_path / "model.onnx")
    assert "weight out anew, and the original is not kept" in text


def test_a_program_that_writes_its_buffers(tmp_path: Path) -> None:
    case = ARCHITECTURES["stateful"]()
    opt = fxopt.transform(case.model, ["canonicalize"], example_inputs=case.example)
    text = refused(opt, tmp_path / "model.onnx")
    assert text.startswith("Stateful writes to its buffers average, calls on each call")


def test_a_program_in_train_mode(tmp_path: Path) -> None:
    opt = fxopt.transform(
        nn.Linear(4, 4), ["canonicalize"], example_inputs=torch.randn(3, 4), mode="train"
    )
    assert "was captured in train mode" in refused(opt, tmp_path / "model.onnx")
