"""The module that takes the original's place: a module in every way that callers rely on."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxopt
from fxopt.errors import InputError, ModelError, NotCapturedError, SaveError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two linears, one tied twice, a buffer of each kind, an attribute."""

    scale: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.width = 8
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 4, bias=False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, flag: bool = False) -> dict[str, Tensor]:
        y = self.last(self.second(self.first(x).relu()))
        return {"y": y * self.scale + self.offset, "x": x + 1}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def optimized(model: nn.Module | None = None, passes: str = "canonicalize") -> fxopt.Optimized:
    return fxopt.transform(model or net(), passes, example_inputs=(X,))


def assert_same(one: Any, other: Any) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_it_looks_like_the_original() -> None:
    model = net()
    opt = optimized(model)
    assert isinstance(opt, nn.Module)
    assert type(opt).__name__ == "OptimizedNet"
    assert inspect.signature(opt.forward) == inspect.signature(model.forward)
    assert opt.width == 8
    assert opt.device == torch.device("cpu")
    assert opt.dtype == torch.float32
    assert not opt.training
    assert_same(opt(X), model(X))
    assert_same(opt(x=X), model(X))
    with pytest.raises(AttributeError):
        opt.height  # noqa: B018


def test_attributes_of_a_transformers_model_are_carried() -> None:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    model = transformers.BertModel(config).eval()
    opt = fxopt.transform(model, "canonicalize")
    assert opt.config is config
    assert opt.main_input_name == "input_ids"
    assert opt.base_model_prefix == "bert"


def test_untouched_tensors_are_the_models_own() -> None:
    model = net()
    opt = optimized(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert all(parameter is own[name] for name, parameter in opt.named_parameters())
    assert opt.scale is model.scale  # type: ignore[comparison-overlap]
    assert opt.first.weight is opt.second.weight
    assert len(list(opt.parameters())) == len(list(model.parameters()))


def test_state_dict_has_the_models_keys_and_goes_round() -> None:
    model = net()
    opt = optimized(model)
    state = opt.state_dict()
    assert set(state) == set(model.state_dict())
    assert "offset" not in state
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    opt.load_state_dict(other.state_dict())
    assert_same(opt(X), other(X))
    assert_same(model(X), other(X))


def test_quantized_state_goes_round_too() -> None:
    opt = optimized(passes="int8-linear")
    expected = opt(X)
    twin = optimized(passes="int8-linear")
    assert any(tensor.dtype == torch.int8 for tensor in opt.state_dict().values())
    for tensor in twin.state_dict().values():
        tensor.zero_()
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(twin(X), expected)


def test_a_deep_copy_stands_alone() -> None:
    model = net()
    opt = optimized(model)
    twin = copy.deepcopy(opt)
    expected = model(X)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert_same(opt(X), expected)
    assert not torch.equal(twin(X)["y"], expected["y"])
    assert type(twin) is type(opt)
    assert twin.first.weight is twin.second.weight
    assert twin.width == 8
    assert str(twin.graph) == str(opt.graph)
    assert twin.report is opt.report


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()]
)
def test_another_dtype_is_refused(convert: Any) -> None:
    opt = optimized()
    with pytest.raises(ModelError) as caught:
        convert(opt)
    assert str(caught.value) == (
        "the graph was captured and judged in its own dtype; convert the original model first and "
        "transform it again"
    )
    assert opt.dtype == torch.float32


def test_to_another_device_moves_graph_and_signature() -> None:
    model = net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opt = optimized(model).to("meta")
    assert opt.device.type == "meta"
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert opt(X.to("meta"))["y"].shape == (3, 4)
    with pytest.raises(InputError, match=r"x is on cpu, but the model is on meta"):
        opt(X)


def test_to_the_same_device_changes_nothing() -> None:
    model = net()
    opt = optimized(model)
    assert opt.to("cpu") is opt
    assert opt.float() is opt
    assert_same(opt(X), model(X))


def test_eval_programs_refuse_to_train() -> None:
    opt = optimized()
    assert opt.eval() is opt
    with pytest.raises(ModelError) as caught:
        opt.train()
    assert str(caught.value) == (
        "this program was captured in eval mode and can't train: its dropout is gone and its norms "
        'are folded. Use fxopt.transform(model, ..., mode="train").'
    )
    assert not opt.training


def test_a_train_program_trains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,), mode="train")
    assert opt.train() is opt
    before = opt.get_buffer("1.num_batches_tracked").clone()
    opt(X)
    assert opt.get_buffer("1.num_batches_tracked") == before + 1
    assert model[1].num_batches_tracked == 0


def test_containers_of_layer_norms_keep_their_type() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LayerNorm(8)))
    for opt in (optimized(model), copy.deepcopy(optimized(model))):
        kept = [name for name, part in opt.named_modules() if isinstance(part, nn.LayerNorm)]
        assert kept == ["1.0"]
        assert "(0): LayerNormTensors()" in repr(opt)
        assert torch.equal(opt(X), model(X))
        assert set(opt.state_dict()) == set(model.state_dict())


def test_buffers_that_a_call_writes_are_its_own() -> None:
    class Counter(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = Counter()
    opt = fxopt.transform(model, "canonicalize", example_inputs=(X,))
    assert torch.equal(opt(X), X)
    assert torch.equal(opt(X), X * 2)
    assert model.calls == 0
    assert opt.calls == 2


@pytest.mark.parametrize("passes", ["canonicalize", "fuse-linears, int8-linear", "prepack"])
def test_torch_compile_and_export_take_it(passes: str) -> None:
    opt = optimized(passes=passes)
    expected = opt(X)
    torch._dynamo.reset()
    compiled = torch.compile(opt, backend="eager", fullgraph=True)
    exported = torch.export.export(opt, (X,)).module()
    for output in (compiled(X), exported(X)):
        assert list(output) == list(expected)
        for name in expected:
            torch.testing.assert_close(output[name], expected[name])


@pytest.mark.parametrize("passes", ["canonicalize", "int8-linear"])
def test_save_and_load(tmp_path: Path, passes: str) -> None:
    opt = optimized(passes=passes)
    opt.save(tmp_path / "saved")
    loaded = fxopt.load(tmp_path / "saved")
    assert str(loaded.graph) == str(opt.graph)
    assert str(loaded.report) == str(opt.report)
    assert list(inspect.signature(loaded.forward).parameters) == ["x", "flag"]
    for x in (X, torch.randn(5, 8)):
        assert_same(loaded(x), opt(x))
    assert set(loaded.state_dict()) == set(opt.state_dict())


def test_a_file_that_is_no_saved_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaveError):
        fxopt.load(tmp_path / "nothing here")


def test_what_is_not_captured_cannot_be_copied_moved_or_saved(tmp_path: Path) -> None:
    opt = fxopt.transform(net(), "canonicalize")
    for act in (copy.deepcopy, lambda o: o.to("cpu"), lambda o: o.save(tmp_path / "x")):
        with pytest.raises(NotCapturedError, match="Call the module once"):
            act(opt)
    assert "OptimizedNet" in repr(opt)


def test_the_first_call_captures_with_positionals_and_keywords() -> None:
    model = net()
    for call in (lambda o: o(X), lambda o: o(x=X), lambda o: o(X, flag=True)):
        opt = fxopt.transform(model, "canonicalize")
        assert_same(call(opt), model(X))
        assert opt.is_captured


def test_calls_that_do_not_fit_are_refused() -> None:
    opt = optimized()
    with pytest.raises(InputError, match=r"x has dtype torch.float64"):
        opt(X.double())
    with pytest.raises(InputError, match=r"missing a required argument: 'x'"):
        opt()
    with pytest.raises(InputError, match=r"this call adds flag"):
        opt(X, flag=True)


def test_an_empty_batch_is_taken() -> None:
    assert optimized()(X[:0])["y"].shape == (0, 4)


def test_it_prints() -> None:
    opt = optimized()
    assert str(opt.graph).startswith("Net(x: f32[s0, 8])")
    assert "canonicalize" in str(opt.report).lower()
    assert str(opt.steps[1]).startswith("Canonicalize(): ")


def test_the_program_is_that_of_the_present_tensors() -> None:
    opt = copy.deepcopy(optimized())
    assert opt.program.state["first.weight"] is opt.first.weight
    assert opt.lowering is None


def test_a_pickle_computes_the_same() -> None:
    opt = optimized()
    assert torch.equal(pickle.loads(pickle.dumps(opt))(X)["y"], opt(X)["y"])


class NamesOfItsOwn(nn.Module):
    """Attributes that the optimised module has a meaning of its own for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.name](x)  # type: ignore[misc]


@pytest.mark.parametrize("name", ["report", "steps", "program"])
def test_models_with_parts_of_the_same_names_run(name: str) -> None:
    model = NamesOfItsOwn(name)
    opt = optimized(model)
    assert torch.equal(opt(X), model(X))
    assert set(opt.state_dict()) == set(model.state_dict())
    assert f"{name}.weight" in str(opt.graph)


def test_names_that_torch_fx_keeps_for_itself_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        optimized(NamesOfItsOwn("graph"))
    assert str(caught.value) == (
        "NamesOfItsOwn has a part named 'graph', a name that torch.fx keeps for itself. Rename it, "
        "or wrap the model in another nn.Module."
    )
    wrapped = nn.Sequential(NamesOfItsOwn("graph"))
    assert torch.equal(optimized(wrapped)(X), wrapped(X))
