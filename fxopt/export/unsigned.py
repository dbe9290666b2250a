"""int8 constants of an ONNX graph as uint8, 128 higher."""

from __future__ import annotations

from typing import Any

import numpy as np

SHIFT = 128


def unsigned_constant(model: Any, name: str, values: Any) -> Any:
    """The initializer `name` of an `onnxscript.ir.Model`, uint8: `values` plus 128; made once."""
    from onnxscript import ir

    initializers = model.graph.initializers
    if name not in initializers:
        shifted = (np.asarray(values).astype(np.int16) + SHIFT).astype(np.uint8)
        initializers[name] = ir.Value(
            name=name,
            shape=ir.Shape(shifted.shape),
            type=ir.TensorType(ir.DataType.UINT8),
            const_value=ir.tensor(shifted, name=name),
        )
    return initializers[name]
