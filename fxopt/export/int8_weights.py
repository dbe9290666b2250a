"""Int8 weights in a form that is multiplied exactly wherever the file is read.

    dq(W int8, s)                 =  dq(W + 128 uint8, s, 128)
    MatMulInteger(q, W int8, z)   =  MatMulInteger(q, W + 128 uint8, z, 128)

A CPU without an int8 dot product adds two products of uint8 and int8 in 16 bits that saturate
(vpmaddubsw), in ONNX Runtime and OpenVINO alike, unless 255 * 2 * |W| <= 32 767. So a weight of
integer products stays int8 where it lies within [-64, 64], or where the file is written for a
device with such an instruction; else it becomes uint8, for which ONNX Runtime has an exact product
on every CPU and OpenVINO computes in float32. One that float products read becomes uint8 always:
with `session.x64quantprecision` ONNX Runtime makes it uint8 itself and then can't run the file.
Measured on Zen 3, one thread, 256 x 768 x 768: ONNX Runtime uint8 3.1 ms, int8 2.3, float32 5.5.
Sources: ONNX Runtime, "Quantize ONNX Models" (U8S8 and saturation); oneDNN, "Nuances of int8
Computations".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fxopt.device import Device
from fxopt.export.unsigned import unsigned_constant

LARGEST_EXACT = 64
"""The largest magnitude of int8 weights whose products with uint8 saturate nowhere."""

METADATA = "fxopt.int8_weights"
"""The key under which a file says on which CPUs its int8 products are exact."""

_EVERYWHERE = "exact on every CPU"
_VIEWS = ("Transpose", "Unsqueeze", "Squeeze", "Reshape")
_PRODUCTS = ("MatMul", "Gemm")
_ZERO_POINTS = {"DequantizeLinear": 2, "MatMulInteger": 3}
"""What reads a weight -> the place of the weight's zero point among its inputs."""


def write_int8_weights(model: Any, target: Device | None) -> str | None:
    """Put the int8 weights of an `onnxscript.ir.Model` in a form that is exact on `target`, on
    every CPU where that is None. Returns what the file has to say of it, None without weights."""
    relied_on = None if target is None or not target.accelerates(torch.int8) else target
    said = None
    for weight in _int8_constants(model):
        narrow = _largest(weight) <= LARGEST_EXACT
        for node, place in [*weight.uses()]:
            readers = [*_readers(node, place)]
            if not readers or not all(map(_takes_unsigned, readers)):
                continue
            said = said or _EVERYWHERE
            if not all(map(_is_integer, readers)) or not (narrow or relied_on):
                _make_unsigned(model, weight, (node, place), readers)
            elif relied_on is not None and not narrow:
                said = (
                    f"exact with an int8 dot product, wrong without: written for {relied_on.spec}"
                )
    return said


def _int8_constants(model: Any) -> list[Any]:
    from onnxscript import ir

    values = model.graph.initializers.values()
    return [v for v in values if v.dtype == ir.DataType.INT8 and v.const_value is not None]


def _readers(node: Any, place: int) -> Iterator[Any]:
    """What reads a value that `node` reads at `place`: that node, or what reads its views of it."""
    if node.op_type not in _VIEWS:
        yield node
        return
    for user, at in node.outputs[0].uses():
        yield from _readers(user, at)


def _takes_unsigned(reader: Any) -> bool:
    """Whether a reader multiplies or dequantizes an int8 weight, with constant zero points."""
    place = _ZERO_POINTS.get(reader.op_type)
    given = reader.inputs[place] if place is not None and place < len(reader.inputs) else None
    return place is not None and (given is None or given.const_value is not None)


def _is_integer(reader: Any) -> bool:
    """Whether runtimes multiply in integers what this reader of a weight gives to products."""
    if reader.op_type == "MatMulInteger":
        return True
    uses = reader.outputs[0].uses()
    products = [product for user, at in uses for product in _readers(user, at)]
    return bool(products) and all(
        product.op_type in _PRODUCTS and any(_is_dequantized(x, reader) for x in product.inputs[:2])
        for product in products
    )


def _is_dequantized(value: Any, other_than: Any) -> bool:
    node = value.producer()
    while node is not None and node.op_type in _VIEWS:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear" and node is not other_than


def _largest(weight: Any) -> int:
    return int(np.abs(weight.const_value.numpy().astype(np.int16)).max(initial=0))


def _make_unsigned(model: Any, weight: Any, use: tuple[Any, int], readers: list[Any]) -> None:
    """Let `use` read the weight plus 128, and `readers` take it off again by their zero points."""
    from onnxscript import ir

    node, at = use
    values = weight.const_value.numpy()
    node.replace_input_with(at, unsigned_constant(model, f"{weight.name}_uint8", values))
    for view in _views(node):
        view.outputs[0].dtype = ir.DataType.UINT8
    for reader in readers:
        place = _ZERO_POINTS[reader.op_type]
        reader.resize_inputs(max(len(reader.inputs), place + 1))
        given = reader.inputs[place]
        old = np.int8(0) if given is None else given.const_value.numpy()
        shape = reader.inputs[1].shape if reader.op_type == "DequantizeLinear" else ()
        zeros = np.broadcast_to(old, tuple(map(int, shape)))
        name = f"{reader.outputs[0].name}_zero_point"
        reader.replace_input_with(place, unsigned_constant(model, name, zeros))


def _views(node: Any) -> Iterator[Any]:
    if node.op_type in _VIEWS:
        yield node
        for user, _ in node.outputs[0].uses():
            yield from _views(user)
