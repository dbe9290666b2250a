"""What a capture takes, keeps and leaves as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from fxopt import wellformed
from fxopt.capture import capture
from fxopt.errors import InputError, NotCapturedError
from fxopt.interpreter import evaluate
from fxopt.program import Program
from tests.check import assert_state_equal, eager, tensors_of
from tests.rewriting.functions import Function, calls, operators

aten = torch.ops.aten
X = torch.linspace(-1.0, 1.0, 12).view(3, 4)


def assert_faithful(model: nn.Module, program: Program, *args: Any, **kwargs: Any) -> Any:
    """The program is well-formed and answers exactly as the eager model; returns its answer."""
    wellformed.check(program)
    expected = eager(model, args, kwargs)
    output = program.signature.unflatten(evaluate(program, program.signature.flatten(args, kwargs)))
    assert type(output) is type(expected)
    for old, new in zip(tensors_of(expected), tensors_of(output), strict=True):
        assert old.dtype == new.dtype
        torch.testing.assert_close(new, old, equal_nan=True)
    return output


def bert(**options: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        **options,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


IDS = torch.arange(24).view(2, 12) % 50


@pytest.mark.parametrize(
    "inputs", [X, (X,), [X], {"input": X}, OrderedDict(input=X)], ids=lambda v: type(v).__name__
)
def test_inputs_come_as_tensor_tuple_list_or_mapping(inputs: Any) -> None:
    model = nn.Linear(4, 2)
    program = capture(model, inputs)
    (tensor,) = program.signature.tensors
    assert tensor.path == "input"
    assert_faithful(model, program, X)
    assert_faithful(model, program, input=torch.randn(5, 4))


def test_a_batch_encoding_is_a_mapping() -> None:
    batch = transformers.BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    model = bert()
    program = capture(model, batch)
    assert program.signature.names == ("input_ids", "attention_mask")
    assert_faithful(model, program, **batch)


def test_keywords_come_in_any_order_and_none_is_leaving_out() -> None:
    model = bert()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    program = capture(model, {"attention_mask": mask, "input_ids": IDS, "inputs_embeds": None})
    assert_faithful(model, program, input_ids=IDS, attention_mask=mask)
    assert_faithful(model, program, attention_mask=mask, input_ids=IDS, position_ids=None)
    assert_faithful(model, program, IDS, mask)


def test_a_model_output_comes_back_as_one_with_the_same_keys() -> None:
    model = bert()
    output = assert_faithful(model, capture(model, {"input_ids": IDS}), input_ids=IDS)
    assert isinstance(output, BaseModelOutputWithPoolingAndCrossAttentions)
    assert list(output) == ["last_hidden_state", "pooler_output"]


def test_constant_arguments_are_fixed_in_the_graph() -> None:
    model = bert(attn_implementation="eager")
    program = capture(model, {"input_ids": IDS, "return_dict": False, "output_attentions": True})
    assert program.signature.constants == {"return_dict": False, "output_attentions": True}
    given = {"input_ids": IDS, "return_dict": False, "output_attentions": True}
    output = assert_faithful(model, program, **given)
    assert isinstance(output, tuple)
    with pytest.raises(InputError, match=r"leaves out return_dict, so that .* captured with False"):
        program.signature.flatten((IDS,), {})
    with pytest.raises(InputError) as caught:
        program.signature.flatten((IDS,), {"return_dict": False, "output_attentions": False})
    assert str(caught.value) == (
        "output_attentions is False in this call, but the graph was captured with True. Transform "
        "the model again with example_inputs that hold the new value."
    )


class Nested(nn.Module):
    def forward(self, pair: Any, named: Any, scale: float = 1.0) -> Any:
        left, right = pair
        return {
            "sum": left + right,
            "scaled": [named["a"] * scale, (named["b"],)],
            "none": None,
            "n": 3,
        }


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model = Nested()
    call = {"pair": (X, X + 1), "named": {"a": X, "b": X - 1}, "scale": 2.0}
    program = capture(model, call)
    assert [tensor.path for tensor in program.signature.tensors] == [
        "pair[0]",
        "pair[1]",
        "named['a']",
        "named['b']",
    ]
    output = assert_faithful(model, program, **call)
    assert list(output) == ["sum", "scaled", "none", "n"]
    assert output["none"] is None
    assert output["n"] == 3
    assert isinstance(output["scaled"], list)
    assert isinstance(output["scaled"][1], tuple)


class Summing(nn.Module):
    def forward(self, *tensors: Tensor, **named: Tensor) -> Tensor:
        return sum(tensors) + sum(named.values())  # type: ignore[return-value]


def test_variadic_arguments_are_taken() -> None:
    model = Summing()
    program = capture(model, (X, X * 2))
    assert_faithful(model, program, X, X)
    with pytest.raises(InputError, match="nested otherwise than at capture"):
        program.signature.flatten((X,), {})
    program = capture(model, {"a": X, "b": X})
    assert_faithful(model, program, b=X, a=X + 1)


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    model = Difference()
    program = capture(model, (X, X))
    assert_faithful(model, program, X, X + 1)
    assert_faithful(model, program, X + 1, X)


def test_every_size_is_dynamic_that_can_be() -> None:
    model = bert()
    program = capture(model, {"input_ids": IDS})
    (tensor,) = program.signature.tensors
    assert all(isinstance(size, str) for size in tensor.sizes)
    for batch, length in ((1, 5), (7, 12), (3, 31)):
        assert_faithful(
            model, program, input_ids=torch.arange(batch * length).view(batch, length) % 50
        )
    assert program.notes == ()


def test_sizes_that_the_model_fixes_are_numbers() -> None:
    program = capture(nn.Linear(4, 2), (X,))
    (tensor,) = program.signature.tensors
    assert isinstance(tensor.sizes[0], str)
    assert tensor.sizes[1] == 4
    with pytest.raises(
        InputError, match=r"input has size 5 on axis 1, but the model fixes it to 4"
    ):
        program.signature.flatten((torch.randn(3, 5),), {})


def test_a_batch_of_one_stays_dynamic() -> None:
    model = bert()
    program = capture(model, {"input_ids": IDS[:1]})
    assert program.example[0].shape == (1, 12)
    assert isinstance(program.signature.tensors[0].sizes[0], str)
    assert_faithful(model, program, input_ids=IDS)
    assert_faithful(model, program, input_ids=IDS[:1])


def test_a_length_of_one_is_fixed_and_a_note_says_so() -> None:
    program = capture(nn.Linear(4, 2), (torch.randn(3, 1, 4),))
    assert program.signature.tensors[0].sizes[1] == 1
    assert program.notes == (
        "input axis 1 is fixed to 1; an example longer than 1 there keeps it dynamic",
    )


def test_a_length_that_a_loop_over_time_fixes_is_noted() -> None:
    program = capture(nn.LSTM(4, 3, batch_first=True).eval(), (torch.randn(2, 9, 4),))
    assert program.signature.tensors[0].sizes[1:] == (9, 4)
    assert program.notes == (
        "the model fixes the size of input to 9 on axis 1: a call with another needs a program of "
        "its own",
    )
    with pytest.raises(InputError, match="has size 7 on axis 1, but the model fixes it to 9"):
        program.signature.flatten((torch.randn(2, 7, 4),), {})


def test_a_first_axis_of_one_that_is_no_batch_is_fixed() -> None:
    class Squeezed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(4, 3) * 2

    model = Squeezed()
    program = capture(model, (torch.randn(1, 4, 3),))
    assert program.signature.tensors[0].sizes == (1, 4, 3)
    assert "axis 0 is fixed to 1" in program.notes[0]
    assert_faithful(model, program, torch.randn(1, 4, 3))


def test_an_example_without_entries_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        capture(nn.Linear(4, 2), (torch.randn(0, 4),))
    assert str(caught.value) == (
        "example input input has shape (0, 4) and so no entries; capture and judgement need at "
        "least one row. The result accepts empty batches."
    )


def test_parameters_are_shared_and_tied_ones_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    model = Tied()
    program = capture(model, (torch.arange(6).view(2, 3),))
    assert dict(program.state) == {"embedding.weight": model.embedding.weight}
    assert program.state["embedding.weight"] is model.embedding.weight
    assert dict(program.aliases) == {"head.weight": "embedding.weight"}
    (attribute,) = [node for node in program.graph.nodes if node.op == "get_attr"]
    assert len(attribute.users) == 2
    assert_faithful(model, program, torch.arange(8).view(4, 2))


def test_a_shared_submodule_is_captured_once_per_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x).relu())

    model = Shared()
    program = capture(model, (X,))
    one, two = calls(program, aten.linear.default)
    assert one.args[1] is two.args[1]
    assert one.meta["module_path"] == two.meta["module_path"] == "block"
    assert set(program.state) == {"block.weight", "block.bias"}
    assert_faithful(model, program, X)


class Counter(nn.Module):
    steps: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("total", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.total.mul_(0.5).add_(x.mean(0))
        return x * self.steps + self.total


def test_buffers_that_the_model_writes_become_copies_at_the_tail() -> None:
    model = Counter()
    program = capture(model, (X,))
    wellformed.check(program)
    assert model.steps.item() == 0
    tail = [node for node in program.graph.nodes if node.op == "call_function"][-2:]
    assert [node.target for node in tail] == [aten.copy_.default] * 2
    assert {node.args[0].target for node in tail} == {"steps", "total"}  # type: ignore[union-attr]
    schemas = [node.target._schema for node in calls(program) if node not in tail]  # type: ignore[union-attr]
    assert not any(schema.is_mutable for schema in schemas)
    assert program.non_persistent == {"total"}
    assert program.state["steps"] is model.steps
    twin = copy.deepcopy(model)
    expected = twin(X)
    torch.testing.assert_close(evaluate(program, (X,))[0], expected)
    assert model.steps.item() == 0


def _checked_sizes(x: Tensor) -> Tensor:
    token = aten._functional_assert_scalar(x.shape[1] == 4, "four columns", torch.ones(1))
    return x * token


def _checked_entries(x: Tensor) -> Tensor:
    token = aten._functional_assert_async(x.isfinite().all(), "finite", torch.ones(1))
    return x * token


def _checked_in_place(x: Tensor) -> Tensor:
    aten._assert_async(x.isfinite().all())
    aten._assert_scalar(x.shape[1] == 4, "four columns")
    return x * torch.ones(1)


@pytest.mark.parametrize("function", [_checked_sizes, _checked_entries, _checked_in_place])
def test_assertions_are_gone_and_their_tokens_are_what_they_took(
    function: Callable[[Tensor], Tensor],
) -> None:
    program = capture(Function(function), (X,))
    assert [str(node.target) for node in calls(program)] == ["aten.ones.default", "aten.mul.Tensor"]
    assert_faithful(Function(function), program, X)


def test_dropout_is_gone_in_eval_and_kept_in_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.AlphaDropout(0.1)).train()
    assert operators(capture(model, (X,), "eval")) == ["linear"]
    program = capture(model.eval(), (X,), "train")
    assert "dropout" in operators(program)
    assert program.mode == "train"
    wellformed.check(program)


def test_batch_norm_in_train_mode_updates_its_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    program = capture(model, (X,), "train")
    wellformed.check(program)
    written = {
        str(node.args[0].target)  # type: ignore[union-attr]
        for node in calls(program, aten.copy_.default)
    }
    assert written == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    (output,) = evaluate(program, (X,))
    torch.testing.assert_close(output, copy.deepcopy(model).train()(X))
    assert output.requires_grad
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_batch_norm_in_eval_mode_writes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    program = capture(model, (torch.randn(2, 2, 5, 5),))
    assert operators(program) == ["conv2d", "batch_norm", "relu"]
    assert "1.num_batches_tracked" not in program.state


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), Counter())
    model.train(training)
    model[2].train(not training)
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    for mode in ("eval", "train"):
        capture(model, (X,), mode)  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == flags
    assert_state_equal(model, before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_example_is_left_as_it_was() -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 0).mul_(2)

    given = X.clone()
    capture(Overwrites(), (given,))
    assert torch.equal(given, X)


def test_a_no_grad_region_is_inlined() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.one(x)
            return self.two(y)

    model = Frozen()
    program = capture(model, (X,))
    assert_faithful(model, program, X)
    assert operators(program) == ["linear", "linear"]
    program = capture(model, (X,), "train")
    wellformed.check(program)
    evaluate(program, (X,))[0].sum().backward()
    assert model.one.weight.grad is None
    assert model.two.weight.grad is not None


def test_a_disabled_autocast_region_is_inlined() -> None:
    class Careful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return x.float() * 2

    model = Careful()
    program = capture(model, (X,))
    assert_faithful(model, program, X)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    program = capture(model, (X.to(dtype),))
    assert program.signature.tensors[0].dtype == dtype
    assert_faithful(model, program, X.to(dtype))


def test_integer_weights() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.arange(12, dtype=torch.int8).view(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.long() % 5

    model = Table()
    program = capture(model, (torch.arange(8).view(2, 4),))
    assert_faithful(model, program, torch.arange(12).view(3, 4))


def test_literal_tensors_become_state() -> None:
    class Literal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0, 2.0, 3.0, 4.0])

    model = Literal()
    program = capture(model, (X,))
    assert_faithful(model, program, X)
    assert len(program.state) == 1


def test_every_operation_knows_its_module_and_source_line() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.GELU(), nn.LayerNorm(4)))
    program = capture(model, (X,))
    found = {
        node.name.rpartition("_")[0] or node.name: (node.meta["module_path"], node.meta["source"])
        for node in calls(program)
    }
    assert [path for path, _ in found.values()] == ["0", "1.0", "1.1"]
    assert program.module_types == {
        "": "Sequential",
        "0": "Linear",
        "1": "Sequential",
        "1.0": "GELU",
        "1.1": "LayerNorm",
    }
    mine = capture(Counter(), (X,))
    sources = {node.meta["source"] for node in calls(mine)}
    assert any(source.startswith("test_capture.py:") for source in sources)
    assert any(source.endswith("return x * self.steps + self.total") for source in sources)


@dataclass
class Registered:
    value: Tensor
    count: int


torch.export.register_dataclass(Registered, serialized_type_name="tests.Registered")


def test_a_registered_output_type_comes_back() -> None:
    class Wraps(nn.Module):
        def forward(self, x: Tensor) -> Registered:
            return Registered(x * 2, 7)

    model = Wraps()
    output = assert_faithful(model, capture(model, (X,)), X)
    assert isinstance(output, Registered)
    assert output.count == 7


def test_decoders_are_captured_without_their_cache_and_a_note_says_so() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=40, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    program = capture(model, {"input_ids": IDS % 40})
    assert program.notes == ("captured with use_cache=False: the key/value cache is not an output",)
    assert program.signature.constants == {"use_cache": False}
    output = assert_faithful(model, program, input_ids=IDS % 40, use_cache=False)
    assert list(output) == ["logits"]


def test_a_model_without_tensors_at_all_says_so() -> None:
    with pytest.raises(InputError) as caught:
        capture(nn.Identity(), ("text",))
    assert str(caught.value) == "example_inputs hold no tensor; give at least one"


def test_inputs_that_cannot_be_derived_are_asked_for() -> None:
    with pytest.raises(NotCapturedError, match=r"no example inputs can be derived from Linear"):
        capture(nn.Linear(2, 2))


def test_derived_inputs_are_used_when_none_are_given() -> None:
    model = bert()
    program = capture(model)
    assert program.signature.names == ("input_ids", "attention_mask", "token_type_ids")
    mask = torch.ones_like(IDS)
    assert_faithful(model, program, input_ids=IDS, attention_mask=mask)
    types = torch.zeros_like(IDS)
    assert_faithful(model, program, input_ids=IDS, attention_mask=mask, token_type_ids=types)
