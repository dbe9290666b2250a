"""torch as it is, torch.compile, and torchao under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.systems.system import Call, Inputs, System, Workload, first

_CONFIGS = {
    "dynamic": "Int8DynamicActivationInt8WeightConfig",
    "weight-only": "Int8WeightOnlyConfig",
}


def eager(dtype: torch.dtype | None = None) -> Callable[[Workload], Call]:
    """The model as it is, or with its parameters in `dtype`."""

    def prepare(workload: Workload) -> Call:
        model = workload.model if dtype is None else _converted(workload.model, dtype)
        return lambda inputs: first(model(**inputs))

    return prepare


def autocast(dtype: torch.dtype, *, compiled: bool = False) -> Callable[[Workload], Call]:
    """The model in float32 under `torch.autocast`, a region for each call, as it is documented.

    `compiled` compiles model and region together, with freezing, which casts the weights once.
    """

    def prepare(workload: Workload) -> Call:
        model = InAutocast(workload.model, dtype)
        if compiled:
            return _compile(model, workload.inputs, freezing=True)
        return lambda inputs: first(model(**inputs))

    return prepare


class InAutocast(nn.Module):
    """A model whose every call is a region of `torch.autocast`, on the device of its weights."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype
        self.device_type = next(model.parameters()).device.type

    def forward(self, **inputs: Tensor) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            return self.model(**inputs)


def compiled(
    dtype: torch.dtype | None = None,
    *,
    freezing: bool = True,
    int8: Literal["dynamic", "weight-only"] | None = None,
    keep: tuple[str, ...] = (),
) -> Callable[[Workload], Call]:
    """`torch.compile`, with freezing (which packs weights for oneDNN), parameters in `dtype`.

    `int8` quantizes the linear layers with torchao first: "dynamic" is int8 weights and int8
    activations with a scale a token, "weight-only" int8 weights; `keep` are names of layers that
    stay as they are.
    """

    def prepare(workload: Workload) -> Call:
        model = _converted(workload.model, dtype or torch.float32)
        if int8 is not None:
            _quantize(model, _CONFIGS[int8], keep)
        return _compile(model, workload.inputs, freezing)

    return prepare


def _quantize(model: nn.Module, config: str, keep: tuple[str, ...]) -> None:
    import torchao.quantization as torchao

    def chosen(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] not in keep

    torchao.quantize_(model, getattr(torchao, config)(), filter_fn=chosen)


def _compile(model: nn.Module, inputs: Inputs, freezing: bool) -> Call:
    def run(**inputs: Tensor) -> Any:
        return model(**inputs)

    # Dynamo keeps its compilations by code object, a few for each, and would run the next eagerly:
    # every system gets a code object of its own. Its memory of sizes goes by file and line, so a
    # second size would be compiled for any size, and slower.
    run.__code__ = run.__code__.replace()
    call = torch.compile(run, fullgraph=True, dynamic=False)
    with _frozen(freezing):
        call(**inputs)
    return lambda inputs: first(call(**inputs))


@contextmanager
def _frozen(freezing: bool) -> Iterator[None]:
    import torch._inductor.config as inductor

    with inductor.patch(freezing=freezing):
        yield


def _converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with its parameters in `dtype`; buffers keep theirs, as in `from_pretrained`."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data = parameter.data.to(dtype)
    return twin


EAGER = System("torch eager fp32", eager())
EAGER_BF16 = System("torch eager bf16", eager(torch.bfloat16))
COMPILE_FP32 = System("torch.compile fp32, freezing", compiled())
COMPILE_BF16 = System("torch.compile bf16, freezing", compiled(torch.bfloat16))
AUTOCAST_BF16 = System("torch.autocast bf16 (eager)", autocast(torch.bfloat16))
AUTOCAST_BF16_COMPILE = System(
    "torch.autocast bf16 + torch.compile, freezing", autocast(torch.bfloat16, compiled=True)
)
TORCHAO_INT8 = System(
    "torchao int8 dynamic + compile", compiled(freezing=False, int8="dynamic"), ("torchao",)
)
TORCHAO_INT8_FROZEN = System(
    "torchao int8 dynamic + compile, freezing", compiled(int8="dynamic"), ("torchao",)
)
TORCHAO_INT8_BF16 = System(
    "torchao int8 dynamic, bf16 + compile",
    compiled(torch.bfloat16, freezing=False, int8="dynamic"),
    ("torchao",),
)
TORCHAO_INT8_KEPT_HEAD = System(
    "torchao int8 dynamic but the head, bf16 + compile",
    compiled(torch.bfloat16, freezing=False, int8="dynamic", keep=("lm_head",)),
    ("torchao",),
)
TORCHAO_WEIGHT_ONLY = System(
    "torchao int8 weight-only, bf16 + compile, freezing",
    compiled(torch.bfloat16, int8="weight-only"),
    ("torchao",),
)
