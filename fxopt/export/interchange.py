"""to_onnx: the numerics-level program as QDQ ONNX, for ONNX Runtime and its like."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

from fxopt.device import Device
from fxopt.errors import ExportError
from fxopt.export.files import LARGEST_IN_ONE_FILE, check_path, write
from fxopt.export.graph import onnx_graph
from fxopt.export.numerics import check_operators, numerics_program
from fxopt.export.operators import translations
from fxopt.optimized import Optimized
from fxopt.rewriting.option_annotations import DeviceName
from fxopt.rewriting.option_types import UnfitError
from fxopt.rewriting.options import fault

_OPSETS = range(20, 24)
_PACKAGES = ("onnx", "onnxscript")


def to_onnx(
    opt: Optimized,
    path: str | Path,
    *,
    opset: int = 21,
    external_data: bool | Literal["auto"] = "auto",
    device: str | Device | None = None,
) -> Path:
    """Write `opt` to `path` as an ONNX model and return the path.

    What is written is the program before any kernel of this machine: int8 weights with
    DequantizeLinear, static scales as QuantizeLinear / DequantizeLinear pairs, scales per token
    written out. Inputs, outputs and dynamic sizes keep readable names. The file holds no code and
    no path, and passes ONNX's checker; it appears complete or not at all. With `external_data`
    the tensors go to `<path>.data`; "auto" does so beyond 1 GiB. Products of int8 weights with
    activations quantized per token are written as MatMulInteger. bfloat16 stays bfloat16, for which
    ONNX Runtime has no products on a CPU.

    int8 weights beyond 7 bits are written as uint8, since runtimes saturate products of uint8 and
    int8 on CPUs without an int8 dot product; `device="cpu:avx512_vnni"` keeps them int8, for CPUs
    like that alone. The file's metadata says which under "fxopt.int8_weights".

    Raises `ExportError` for anything but an `Optimized`, an operator without an ONNX form, a
    missing package, an unknown opset or device, or a path that can't be written, and
    `NotCapturedError` where the graph doesn't exist yet.
    """
    if not isinstance(opt, Optimized):
        raise ExportError(
            f"to_onnx writes what fxopt.transform returns, not {type(opt).__name__}. "
            "fxopt.transform(model, [fxopt.Canonicalize()]) captures a model as it is."
        )
    if opset not in _OPSETS or isinstance(opset, bool):
        raise ExportError(
            f"opset={opset!r}: must be {_OPSETS[0]} (the first with Gelu) to {_OPSETS[-1]}"
        )
    if external_data not in (True, False, "auto"):
        raise ExportError(f"external_data={external_data!r}: must be True, False or 'auto'")
    try:
        described = DeviceName().take(device)
    except UnfitError as error:
        raise ExportError(str(fault("to_onnx", {"device": device}, str(error)))) from None
    target = check_path(path)
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"writing ONNX needs {' and '.join(missing)}: pip install 'fxopt[onnx]'")
    known = translations(opset).keys()
    program = numerics_program(opt, known)
    check_operators(program, known)
    large = program.parameter_bytes() > LARGEST_IN_ONE_FILE
    model = onnx_graph(program, opset, None if described is None else Device.parse(described))
    write(model, target, large if external_data == "auto" else external_data)
    return target
