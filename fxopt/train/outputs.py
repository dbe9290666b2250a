"""What a model returned, read by name: ModelOutput, dict, named tuple, dataclass, tuple, tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from fxopt.errors import TrainError

Side = Literal["student", "teacher"]

_HOW = {
    "hidden_states": (
        "Have them returned with config.output_hidden_states = True, set before fxopt.transform "
        "captures the model"
    ),
    "attentions": (
        "Have them returned with config.output_attentions = True on a model loaded with "
        "attn_implementation='eager', set before fxopt.transform captures the model"
    ),
    "logits": "For a model that gives embeddings use terms=[Hidden()]",
    "loss": (
        "Put labels into the batch, and into the example_inputs of a captured student, or leave "
        "Task() out"
    ),
}


def named_outputs(outputs: Any) -> dict[str, Any]:
    """{name: value} of what isn't None; tuples of nothing but None count as missing.

    A tensor, and the first of a plain tuple, is called both "logits" and "last_hidden_state": only
    the term that reads it knows what it is.
    """
    if isinstance(outputs, Tensor):
        return {"logits": outputs, "last_hidden_state": outputs}
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    elif hasattr(outputs, "_asdict"):
        named = outputs._asdict()
    elif is_dataclass(outputs):
        named = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    elif isinstance(outputs, Sequence) and outputs and isinstance(outputs[0], Tensor):
        named = {"logits": outputs[0], "last_hidden_state": outputs[0]}
    else:
        raise TrainError(
            f"a model returned {type(outputs).__name__}, in which no outputs can be found; let it "
            "return a tensor, a tuple of tensors, a dict or a ModelOutput"
        )
    return {name: value for name, value in named.items() if _is_there(value)}


def required(outputs: Mapping[str, Any], name: str, side: Side, term: str) -> Any:
    """`outputs[name]`. Raises `TrainError` that says what `side` returned and how to get it."""
    if name not in outputs:
        raise TrainError(
            f"the term {term} needs {name}, and the {side} returned only "
            f"{', '.join(outputs) or 'nothing'}. {_HOW[name]}."
        )
    return outputs[name]


def _is_there(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(part is not None for part in value)
    return value is not None
