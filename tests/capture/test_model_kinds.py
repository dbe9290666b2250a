"""Models that arrive in another shape: taken with the right numbers, or refused with a way out.

Every way out that an error names is taken here, and leads to a result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
import transformers
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import fxopt
from fxopt.capture import capture
from fxopt.errors import CaptureError, FxoptError, InputError, ModelError
from tests.check import eager

X = torch.linspace(-1.0, 1.0, 12).view(3, 4)
IDS = torch.arange(24).view(2, 12) % 50


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().eval()


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
    )
    return transformers.BertModel(config).eval()


def taken(model: nn.Module, *inputs: Any, passes: Any = "canonicalize") -> fxopt.Optimized:
    """`model` transformed, and its numbers held against the model's own."""
    optimized = fxopt.transform(model, passes, example_inputs=inputs)
    torch.testing.assert_close(optimized(*inputs), eager(model, inputs, {}))
    return optimized


def refusal(model: Any, *inputs: Any, kind: type[FxoptError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        fxopt.transform(model, "canonicalize", example_inputs=inputs or (X,))
    return str(caught.value)


def hooks_of(model: nn.Module) -> list[int]:
    return [len(module._forward_hooks) for module in model.modules()]


def test_hooks_that_transformers_left_are_taken_and_none_is_left_behind() -> None:
    model = bert()
    call = {"input_ids": IDS, "output_hidden_states": True}
    optimized = fxopt.transform(model, "canonicalize", example_inputs=call)
    assert not sum(hooks_of(model))
    assert not getattr(model, "_output_capturing_hooks_installed", False)
    states = model(**call).hidden_states  # its own first call installs them
    assert sum(hooks_of(model))
    assert len(states) == 3
    for mine, theirs in zip(optimized(**call).hidden_states, states, strict=True):
        torch.testing.assert_close(mine, theirs)
    before = hooks_of(model)
    again = fxopt.transform(model, "canonicalize", example_inputs={"input_ids": IDS})
    assert hooks_of(model) == before
    torch.testing.assert_close(again(input_ids=IDS)[0], model(input_ids=IDS)[0])


def test_a_hook_of_the_user_is_refused_still() -> None:
    model = mlp()
    model.a.register_forward_hook(lambda module, args, output: None)
    assert refusal(model).startswith("module a has a hook (test_a_hook_of_the_user_is_refused")


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_torchscript_is_refused_and_its_source_is_taken(make: Any) -> None:
    text = refusal(make(mlp()))
    assert text.startswith("the model is TorchScript (")
    assert text.endswith("Transform the Python module that it was made from.")
    assert refusal(nn.Sequential(nn.Linear(4, 4), make(mlp()))).startswith("1 is TorchScript")
    taken(mlp(), X)


def test_an_exported_program_is_taken_as_its_module() -> None:
    rows = torch.export.Dim("rows")
    exported = torch.export.export(mlp(), (X,), dynamic_shapes=({0: rows},))
    assert refusal(exported) == (
        "transform needs an nn.Module, not ExportedProgram: pass its .module()."
    )
    optimized = taken(exported.module(), X)
    torch.testing.assert_close(optimized(X[:2]), mlp()(X[:2]))


def test_what_torch_ao_quantized_is_refused_and_the_float_model_taken() -> None:
    text = refusal(quantize_dynamic(mlp(), {nn.Linear}))
    assert text == (
        "a is a torch.ao.nn.quantized.dynamic.modules.linear.Linear: torch.ao has quantized it and "
        "packed its weight, which passes can't read. Transform the float model; fxopt.Int8Linear "
        "quantizes it."
    )
    fxopt.transform(mlp(), fxopt.Int8Linear(where="always"), example_inputs=(X,))


def test_a_quantized_tensor_is_refused_and_taken_dequantized() -> None:
    model = mlp()
    model.register_buffer("table", torch.quantize_per_tensor(X, 0.1, 0, torch.qint8))
    text = refusal(model)
    assert text.startswith("table is a quantized tensor (torch.qint8), which passes can't read.")
    assert text.endswith("or replace the tensor by its dequantize().")
    model.table = model.table.dequantize()
    taken(model, X)


class Halves(torch.Tensor):
    """A weight in two parts, as quantization libraries hold one."""

    one: Tensor
    two: Tensor

    @staticmethod
    def __new__(cls, one: Tensor, two: Tensor) -> Halves:
        return torch.Tensor._make_wrapper_subclass(cls, one.shape, dtype=one.dtype)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, one: Tensor, two: Tensor) -> None:
        self.one, self.two = one, two

    def dequantize(self) -> Tensor:
        return self.one + self.two

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].one), func(args[0].two))
        raise NotImplementedError(str(func))


def test_a_tensor_with_operators_of_its_own_is_refused_and_taken_dequantized() -> None:
    model = mlp()
    weight = model.a.weight.detach()
    model.a.weight = nn.Parameter(Halves(weight, 0 * weight), requires_grad=False)
    text = refusal(model)
    assert text.startswith(f"a.weight is a {__name__}.Halves, a tensor with operators of its own")
    assert text.endswith(
        "or replace the parameter by nn.Parameter(weight.dequantize(), requires_grad=False)."
    )
    model.a.weight = nn.Parameter(model.a.weight.dequantize(), requires_grad=False)
    taken(model, X)


def test_a_subclass_by_name_alone_is_plain() -> None:
    class Named(nn.Parameter):
        pass

    model = mlp()
    model.a.weight = Named(model.a.weight.detach())
    taken(model, X)


def test_a_model_of_inference_mode_is_refused_and_its_copy_taken() -> None:
    with torch.inference_mode():
        model = mlp()
    text = refusal(model)
    assert text.startswith("a.weight is an inference tensor: the model was built or loaded under")
    assert "Transform copy.deepcopy(model), made outside of inference mode." in text
    taken(copy.deepcopy(model), X)


def test_a_lazy_model_is_refused_until_it_ran() -> None:
    model = nn.Sequential(nn.LazyLinear(2)).eval()
    assert refusal(model) == (
        "0.weight has no shape yet: the model has lazy modules that never ran. Call the model once "
        "on real inputs, then transform it."
    )
    model(X)
    taken(model, X)


def test_a_sparse_weight_is_refused_and_taken_dense() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.w @ x.t()).t()

    model = Sparse().eval()
    assert refusal(model) == (
        "w has the layout torch.sparse_coo, and passes read dense weights alone. Replace it by its "
        "to_dense()."
    )
    model.w = nn.Parameter(model.w.to_dense(), requires_grad=False)
    taken(model, X)
    text = refusal(mlp(), X.to_sparse(), kind=InputError)
    assert text.startswith("example input x is of layout torch.sparse_coo, and a graph takes dense")


def test_a_float8_buffer_is_taken_and_its_nan_found() -> None:
    class Scaled(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(4).to(torch.float8_e4m3fn))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.to(x.dtype)

    model = Scaled().eval()
    taken(model, X)
    model.scale = torch.full((4,), torch.nan).to(torch.float8_e4m3fn)
    assert refusal(model).startswith("scale holds 4 NaN of 4 entries")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_distributed_wrapper_is_refused_and_what_it_wraps_taken() -> None:
    model = nn.parallel.DistributedDataParallel(mlp())
    text = refusal(model)
    assert text.startswith("the model is a DistributedDataParallel, which spreads a model over")
    assert text.endswith("Transform what it wraps (its .module), and wrap the result.")
    taken(model.module, X)


def test_what_torch_compile_wrapped_is_transformed_and_judged_eagerly() -> None:
    def never(graph: Any, inputs: Any) -> Any:
        raise AssertionError("the reference was compiled")

    model = mlp()
    optimized = fxopt.transform(
        torch.compile(model, backend=never), "canonicalize", example_inputs=(X,)
    )
    assert list(optimized.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(optimized(X), model(X))
    assert optimized.report.notes[0].startswith("torch.compile's wrapper was taken off")
    inside = nn.Sequential(mlp()).eval()
    inside[0].compile(backend=never)
    fxopt.transform(inside, "canonicalize", example_inputs=(X,))


def test_vmap_is_written_out() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda row: self.norm(self.linear(row)))(x)

    torch.manual_seed(0)
    model = Mapped().eval()
    x = torch.randn(3, 5, 4)
    optimized = taken(model, x)
    torch.testing.assert_close(optimized(2 * x), model(2 * x))


def test_a_derivative_in_forward_is_refused_with_its_own_advice() -> None:
    class Slope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.func.grad(lambda z: (z * z).sum())(x)

    class WrittenOut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    text = refusal(Slope(), X, kind=CaptureError)
    assert "try: torch.func.grad, vjp and jvp can't be captured inside forward: write the" in text
    torch.testing.assert_close(taken(WrittenOut(), X)(X), Slope()(X))


def test_an_embedding_with_max_norm_bounds_its_rows_as_eager_does() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4, max_norm=1.0), nn.Linear(4, 4)).eval()
    weight = model[0].weight.detach().clone()
    optimized = fxopt.transform(model, "canonicalize", example_inputs=(IDS,))
    assert torch.equal(model[0].weight, weight)
    got = [optimized(IDS), optimized(IDS[:1]), optimized(IDS)]
    assert torch.equal(model[0].weight, weight)
    expected = [model(IDS), model(IDS[:1]), model(IDS)]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(optimized.state_dict()["0.weight"], model[0].weight.detach())
    with pytest.raises(
        CaptureError, match=r"writes to its parameter 0\.weight in forward"
    ) as caught:
        fxopt.transform(model, "canonicalize", example_inputs=(IDS,), mode="train")
    assert "set max_norm=None for the training" in str(caught.value)
    model[0].max_norm = None
    fxopt.transform(model, "canonicalize", example_inputs=(IDS,), mode="train")


def test_a_forward_with_an_exception_of_its_own_is_judged_where_it_answers() -> None:
    class ThreeRowsError(Exception):
        pass

    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and x.shape[0] != 3:
                raise ThreeRowsError("three rows, please")
            return x * 2

    notes = taken(Strict(), X).report.notes
    assert any(note.endswith("the original rejects it (three rows, please)") for note in notes)
    with pytest.raises(InputError, match=r"itself rejects .*: ThreeRowsError: three"):
        fxopt.transform(Strict(), "canonicalize", example_inputs=(X,), verify_inputs=[(X[:1],)])


def llava() -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    text = transformers.LlamaConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=5, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_a_cache_that_the_text_config_asks_for_is_no_output() -> None:
    model = llava()
    ids = torch.arange(12, 32).view(2, 10)
    ids[:, 1:5] = 5
    call = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}
    optimized = fxopt.transform(model, "canonicalize", example_inputs=call)
    torch.testing.assert_close(optimized(**call).logits, model(**call).logits)
    assert optimized.report.notes[0].startswith("captured with use_cache=False")


@dataclass
class Pair:
    left: Tensor
    right: Tensor


class TakesPair(nn.Module):
    def forward(self, pair: Pair) -> Tensor:
        return pair.left - 2 * pair.right


class GivesPair(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x * 2, x + 1)


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class TakesHolder(nn.Module):
    def forward(self, x: Tensor, held: Holder) -> Tensor:
        return x + held.value


def test_an_unregistered_dataclass_is_refused_and_taken_once_registered() -> None:
    text = refusal(TakesPair(), Pair(X, X), kind=InputError)
    assert text == (
        "example input pair is a Pair, which torch can't look into, so that the tensors in it "
        "would be constants. Register it once, with torch.export.register_dataclass(Pair), or give "
        "its tensors in a tuple or dict."
    )
    text = refusal(GivesPair(), X, kind=CaptureError)
    assert "register the type once with torch.export.register_dataclass" in text
    torch.export.register_dataclass(Pair)
    optimized = taken(TakesPair(), Pair(X, X + 1))
    torch.testing.assert_close(optimized(Pair(X[:2], X[1:])), X[:2] - 2 * X[1:])
    given = fxopt.transform(GivesPair(), "canonicalize", example_inputs=(X,))(X)
    assert isinstance(given, Pair)
    torch.testing.assert_close(given.right, X + 1)


def test_an_object_that_hides_tensors_is_refused_and_taken_once_registered() -> None:
    text = refusal(TakesHolder(), X, Holder(X), kind=InputError)
    assert "example input held is a Holder, which torch can't look into" in text
    assert "torch.utils._pytree.register_pytree_node(Holder, ..., flatten_with_keys_fn=...)" in text
    pytree.register_pytree_node(
        Holder,
        lambda held: ([held.value], None),
        lambda values, _: Holder(*values),
        flatten_with_keys_fn=lambda held: ([(pytree.GetAttrKey("value"), held.value)], None),
    )
    optimized = taken(TakesHolder(), X, Holder(X))
    torch.testing.assert_close(optimized(X, Holder(-X)), 0 * X)


def test_a_capture_that_fails_writes_no_buffer() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * 2 if x.sum() > 0 else x

    model = Counts()
    with pytest.raises(CaptureError):
        capture(model, (X,))
    assert model.calls == 0
