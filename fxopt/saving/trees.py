"""The calling convention as JSON: forward's parameters, input and output structure.

Only structures that can be rebuilt without running code found in a file: dict, OrderedDict, list,
tuple, and the ModelOutput classes of transformers, by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch.utils._pytree as pytree

from fxopt.errors import SaveError
from fxopt.guards import Guard, GuardOrigin, Tree, check_tree
from fxopt.saving.values import decode, encode, field, read_device, read_dtype, strings, texts
from fxopt.signature import Range, Signature, TensorInput

_MODULE = re.compile(r"transformers(\.\w+)*\.modeling_\w+")
_SEQUENCES = {"list": list, "tuple": tuple}
_MAPPINGS = {"dict": dict, "ordered_dict": OrderedDict}
_KINDS = {kind.name: kind for kind in inspect._ParameterKind}
_LEAF = pytree.tree_structure(0)


@dataclasses.dataclass(frozen=True)
class Unsaved:
    """Stands for a default value of `forward` that has no JSON form; it equals nothing."""

    text: str

    def __repr__(self) -> str:
        return self.text


def encode_signature(signature: Signature) -> dict[str, Any]:
    """The signature as JSON; `SaveError` for structures that can't be rebuilt from a name."""
    return {
        "forward": [_encode_parameter(p) for p in signature.forward.parameters.values()],
        "in_spec": _encode_spec(signature.in_spec, "input"),
        "out_spec": _encode_spec(signature.out_spec, "output"),
        "leaves": [_encode_leaf(leaf) for leaf in signature.leaves],
        "ranges": {name: [bounds.low, bounds.high] for name, bounds in signature.ranges.items()},
        "out_constants": [
            [index, encode(value, f"output {index}")]
            for index, value in signature.out_constants.items()
        ],
        "zeros": dict(signature.zeros),
        "guards": [[guard.holds, guard.origin, guard.source] for guard in signature.guards],
        "added": sorted(signature.added),
    }


def decode_signature(data: dict[str, Any]) -> Signature:
    """The signature that `encode_signature` wrote."""
    leaves = tuple(_decode_leaf(leaf) for leaf in field(data, "leaves", list))
    in_spec = _decode_spec(field(data, "in_spec", dict))
    out_spec = _decode_spec(data.get("out_spec"))
    constants = {int(i): decode(value, {}) for i, value in field(data, "out_constants", list)}
    if in_spec.type is not dict or in_spec.num_leaves != len(leaves):
        raise SaveError("the saved signature doesn't fit its own arguments")
    if any(not 0 <= index < out_spec.num_leaves for index in constants):
        raise SaveError("the saved signature names an output that doesn't exist")
    tensors = [leaf for leaf in leaves if isinstance(leaf, TensorInput)]
    ranks = [len(tensor.sizes) for tensor in tensors]
    # Folders of earlier versions name no guards, and took every constant for one of the capture's.
    added = texts(data, "added") if "added" in data else list(in_spec.context)
    return Signature(
        forward=inspect.Signature([_decode_parameter(p) for p in field(data, "forward", list)]),
        in_spec=in_spec,
        leaves=leaves,
        ranges={name: _decode_range(b) for name, b in field(data, "ranges", dict).items()},
        out_spec=out_spec,
        out_constants=constants,
        zeros=strings(data, "zeros"),
        guards=tuple(_decode_guard(guard, ranks) for guard in data.get("guards", [])),
        added=frozenset(added),
    )


def _decode_guard(data: Any, ranks: Sequence[int]) -> Guard:
    holds, origin, source = data
    if origin not in typing.get_args(GuardOrigin) or not isinstance(source, str):
        raise SaveError(f"the saved signature holds the guard {data!r:.80}")
    tree = _decode_tree(holds)
    try:
        check_tree(tree, ranks)
    except ValueError as error:
        raise SaveError(f"the saved signature holds {error}") from error
    return Guard(tree, origin, source)


def _decode_tree(data: Any) -> Tree:
    return tuple(map(_decode_tree, data)) if isinstance(data, list) else data


def _encode_parameter(parameter: inspect.Parameter) -> dict[str, Any]:
    data: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
    if parameter.default is not inspect.Parameter.empty:
        try:
            data["default"] = encode(parameter.default, parameter.name)
        except SaveError:
            data["unsaved_default"] = repr(parameter.default)[:200]
    return data


def _decode_parameter(data: Any) -> inspect.Parameter:
    default: Any = inspect.Parameter.empty
    if "unsaved_default" in data:
        default = Unsaved(field(data, "unsaved_default", str))
    elif "default" in data:
        default = decode(data["default"], {})
    kind = _KINDS[field(data, "kind", str)]
    return inspect.Parameter(field(data, "name", str), kind, default=default)


def _encode_leaf(leaf: TensorInput | object) -> dict[str, Any]:
    if not isinstance(leaf, TensorInput):
        return {"constant": encode(leaf, "a constant argument")}
    return {
        "path": leaf.path,
        "dtype": str(leaf.dtype).removeprefix("torch."),
        "device": str(leaf.device),
        "sizes": list(leaf.sizes),
    }


def _decode_leaf(data: Any) -> TensorInput | object:
    if "constant" in data:
        constant: object = decode(data["constant"], {})
        return constant
    sizes: list[Any] = field(data, "sizes", list)
    if not all(type(size) in (int, str) for size in sizes):
        raise SaveError(f"the saved signature holds the sizes {sizes!r:.80}")
    return TensorInput(
        path=field(data, "path", str),
        dtype=read_dtype(field(data, "dtype", str)),
        device=read_device(field(data, "device", str)),
        sizes=tuple(sizes),
    )


def _decode_range(bounds: Any) -> Range:
    low, high = bounds
    if type(low) is not int or not (high is None or type(high) is int):
        raise SaveError(f"the saved signature holds the bounds {bounds!r:.40}")
    return Range(low, high)


def _encode_spec(spec: pytree.TreeSpec, role: str) -> Any:
    if spec.type is None:
        return None
    children = [_encode_spec(child, role) for child in spec.children()]
    for name, kind in _SEQUENCES.items():
        if spec.type is kind:
            return {name: children}
    for name, kind in _MAPPINGS.items():
        if spec.type is kind:
            keys = [encode(key, f"a key of the {role}") for key in spec.context]
            return {name: [list(pair) for pair in zip(keys, children, strict=True)]}
    module, name = spec.type.__module__, spec.type.__qualname__
    if not _is_model_output(spec.type) or not _MODULE.fullmatch(module):
        raise SaveError(
            f"the model's {role} is a {module}.{name}, and only dict, OrderedDict, list, tuple and "
            "the output classes of transformers can be saved. Let forward take or return one of "
            "these, and transform the model again."
        )
    fields = [list(pair) for pair in zip(spec.context, children, strict=True)]
    return {"model_output": f"{module}.{name}", "fields": fields}


def _decode_spec(data: Any) -> pytree.TreeSpec:
    if data is None:
        return _LEAF
    for name, kind in _SEQUENCES.items():
        if name in data:
            return pytree.TreeSpec(kind, None, [_decode_spec(c) for c in field(data, name, list)])
    for name, kind in _MAPPINGS.items():
        if name in data:
            return _keyed(kind, field(data, name, list))
    kind = _model_output(field(data, "model_output", str))
    pairs: list[Any] = field(data, "fields", list)
    known = {known.name for known in dataclasses.fields(kind)}
    if not {key for key, _ in pairs} <= known:
        raise SaveError(f"the saved output has fields that {kind.__name__} lacks")
    return _keyed(kind, pairs)


def _keyed(kind: type, pairs: list[Any]) -> pytree.TreeSpec:
    keys = [decode(key, {}) for key, _ in pairs]
    return pytree.TreeSpec(kind, keys, [_decode_spec(child) for _, child in pairs])


def _model_output(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    if not _MODULE.fullmatch(module) or not kind.isidentifier():
        raise SaveError(f"the saved output type {name!r:.80} is no ModelOutput of transformers")
    try:
        found = getattr(importlib.import_module(module), kind, None)
    except ImportError as error:
        raise SaveError(
            f"the saved output type {name} isn't in the installed transformers: {error}"
        ) from error
    if not _is_model_output(found):
        raise SaveError(f"the saved output type {name!r:.80} is no ModelOutput of transformers")
    return found


def _is_model_output(kind: Any) -> bool:
    from transformers.utils.generic import (
        ModelOutput,  # heavy, and only models of transformers need it
    )

    return isinstance(kind, type) and issubclass(kind, ModelOutput) and kind is not ModelOutput
