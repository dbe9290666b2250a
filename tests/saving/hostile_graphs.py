"""Folders that no `save` wrote: graphs drawn from the format's grammar, and saved ones mutated.

Everything follows from a seed, so that a bad one can be made again.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fxopt.wellformed import SIZE_FUNCTIONS

_INTS = (0, 1, -1, 2, 3, 7, 64, 2**16, 2**24, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
_CONSTANTS = ("x", "ab" * 40, "%2000000000d", None, True, 0.5, -1e300, {"float": "inf"}, [], [[]])
_TORCH = ({"dtype": "float16"}, {"dtype": "int64"}, {"device": "cpu"}, {"layout": "strided"})
_SIZES = (0, 1, 2, 3, 5, 2**16, 2**31, 2**40, 2**62, "s3", "s4", "2*s3", "s3*s4 + 1", "(s3 + 1)*s4")
_LOOPS = (
    *("unbind.int", "split.Tensor", "chunk.default", "unsafe_chunk.default"),
    *("tensor_split.sections", "hsplit.int", "broadcast_tensors.default", "meshgrid.default"),
    *("lstm.input", "gru.input", "rnn_tanh.input", "combinations.default", "one_hot.default"),
    *("repeat.default", "expand.default", "zeros.default", "full.default", "arange.default"),
    *("reshape.default", "linalg_matrix_power.default", "block_diag.default", "einsum.default"),
    *("stft.default", "unfold.default", "cat.default", "stack.default", "vander.default"),
    *("pad.default", "bincount.default", "nonzero.default", "where.default", "eye.default"),
)


def hostile_folder(pristine: Path, folder: Path, seed: int) -> None:
    """Make `folder` a saved one whose checksums are right and whose content is drawn by `seed`."""
    draw = random.Random(seed)
    shutil.copytree(pristine, folder)
    if seed % 2:
        graph = json.loads((folder / "graph.json").read_text())
        graph = _drawn(graph, draw)
        (folder / "graph.json").write_text(json.dumps(graph))
    else:
        _mutate(folder, draw)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        content = (folder / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _operators() -> list[torch._ops.OpOverload]:
    """The functional operators of aten."""
    found = []
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, _, name = qualified.partition("::")
        packet, _, overload = name.partition(".")
        if namespace != "aten" or not torch._C._dispatch_has_kernel(qualified):
            continue
        target = getattr(getattr(torch.ops.aten, packet), overload or "default")
        if not target._schema.is_mutable:
            found.append(target)
    return sorted(found, key=str)


_ATEN = _operators()


def _drawn(template: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Random calls on the inputs and the state of `template`, and on huge tensors and sizes."""
    nodes = [node for node in template["nodes"] if node["op"] in ("placeholder", "get_attr")]
    for leaf in template["signature"]["leaves"]:
        if "sizes" in leaf and draw.random() < 0.2:
            leaf["sizes"] = [draw.choice(_SIZES) for _ in leaf["sizes"]]
    inputs = [node["name"] for node in nodes if node["op"] == "placeholder"]
    for index, (target, args) in enumerate(_prelude(inputs[0], draw)):
        nodes.append(_node(f"p{index}", "call_function", target, args))
    names = [node["name"] for node in nodes]
    for index in range(draw.randrange(1, 5)):
        draws = _size_call if draw.random() < 0.3 else _operator_call
        nodes.append(_node(f"n{index}", "call_function", *draws(names, draw)))
        names.append(f"n{index}")
    nodes.append(_node("output", "output", "output", [{"tuple": [_ref(names[-1])]}]))
    return {**template, "nodes": nodes}


def _prelude(source: str, draw: random.Random) -> list[tuple[str, list[Any]]]:
    """A size, a sum over it, and a tensor of zeros of a huge size, seen in one or two axes."""
    count = draw.choice((2**8, 2**20, 2**33, 2**50))
    return [
        ("aten.sym_size.int", [_ref(source), 0]),
        ("operator.add", [_ref("p0"), draw.choice(_INTS)]),
        ("aten.zeros.default", [[count]]),
        ("aten.reshape.default", [_ref("p2"), [-1, draw.choice((1, 4, 256))]]),
        ("aten.unsqueeze.default", [_ref("p3"), draw.choice((0, 1))]),
    ]


def _node(name: str, op: str, target: str, args: list[Any]) -> dict[str, Any]:
    return {
        "name": name, "op": op, "target": target, "args": args, "kwargs": {},
        "module": "", "source": "",
    }  # fmt: skip


def _ref(name: str) -> dict[str, str]:
    return {"node": name}


def _size_call(names: list[str], draw: random.Random) -> tuple[str, list[Any]]:
    target = draw.choice(sorted(SIZE_FUNCTIONS))
    return target, [_anything(names, draw) for _ in range(draw.randrange(1, 4))]


def _operator_call(names: list[str], draw: random.Random) -> tuple[str, list[Any]]:
    if draw.random() < 0.4:
        packet, _, overload = draw.choice(_LOOPS).partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload)
    else:
        operator = draw.choice(_ATEN)
    args = []
    for argument in operator._schema.arguments:
        if argument.kwarg_only:
            break
        args.append(_argument(str(argument.type), names, draw))
    return str(operator), args


def _argument(kind: str, names: list[str], draw: random.Random) -> Any:
    if draw.random() < 0.05:
        return _anything(names, draw)
    if kind.startswith("Optional"):
        inner = kind.removeprefix("Optional[").removesuffix("]")
        return None if draw.random() < 0.4 else _argument(inner, names, draw)
    if kind.startswith("List"):
        inner = kind.removeprefix("List[").removesuffix("]")
        return [_argument(inner, names, draw) for _ in range(draw.randrange(1, 4))]
    drawn: Mapping[str, Callable[[], Any]] = {
        "Tensor": lambda: _ref(draw.choice(names)),
        "int": lambda: draw.choice(_INTS),
        "SymInt": lambda: draw.choice(_INTS),
        "number": lambda: draw.choice((*_INTS, 0.5, 1e300)),
        "float": lambda: draw.choice((0.0, 0.5, 1e300)),
        "bool": lambda: draw.random() < 0.5,
        "str": lambda: draw.choice(("ij,jk->ik", "constant", "mean", "none", "a" * 1000)),
    }
    return drawn[kind]() if kind in drawn else _anything(names, draw)


def _anything(names: list[str], draw: random.Random) -> Any:
    kind = draw.randrange(6)
    if kind < 2:
        return _ref(draw.choice(names))
    if kind == 2:
        return draw.choice(_INTS)
    if kind == 3:
        return draw.choice(_CONSTANTS + _TORCH)
    if kind == 4:
        return [_anything(names, draw) for _ in range(draw.randrange(3))]
    return {"tuple": [_anything(names, draw) for _ in range(draw.randrange(3))]}


def _mutate(folder: Path, draw: random.Random) -> None:
    """Change a few values of the graph, or bytes of one of the files."""
    kind = draw.randrange(4)
    if kind == 0:
        path = folder / draw.choice(("graph.json", "tensors.safetensors", "report.json"))
        content = bytearray(path.read_bytes())
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(min(len(content), 4000))] = draw.randrange(256)
        path.write_bytes(bytes(content))
        return
    graph = json.loads((folder / "graph.json").read_text())
    names = [node["name"] for node in graph["nodes"]]
    for _ in range(draw.randrange(1, 6)):
        owner, key = _place(graph, draw)
        old = owner[key]
        if kind == 1 and isinstance(old, list):
            owner[key] = old * draw.choice((0, 2, 100)) + [_anything(names, draw)]
        elif kind == 2 and isinstance(old, int):
            owner[key] = draw.choice(_INTS)
        else:
            owner[key] = _anything(names, draw)
    (folder / "graph.json").write_text(json.dumps(graph))


def _place(graph: dict[str, Any], draw: random.Random) -> tuple[Any, Any]:
    """A random place inside `graph`, as a container and a key or an index."""
    nodes = graph.get("nodes")
    inner: Any = nodes if draw.random() < 0.6 and isinstance(nodes, list) and nodes else graph
    while True:
        value = inner
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            return value, key
