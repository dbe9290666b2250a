"""A model file that appears complete or not at all, large tensors beside it."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

from fxopt.errors import ExportError

# Protocol buffers end at 2 GiB; half of it leaves room for the graph and for readers that copy.
LARGEST_IN_ONE_FILE = 1 << 30


def check_path(path: str | Path) -> Path:
    """`path`, if a file can be written there. Raises `ExportError`."""
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; give the path of a file, such as model.onnx")
    if not target.parent.is_dir():
        raise ExportError(f"there is no folder {target.parent}; make it, then export again")
    return target


def write(model: Any, target: Path, external: bool) -> None:
    """Write an `onnxscript.ir.Model`, checked by ONNX's own checker before it appears.

    With `external` the tensors go to `<name>.data` beside it. Raises `ExportError`.
    """
    import onnx
    from onnxscript import ir

    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    data = f"{target.name}.data" if external else None
    try:
        partial.mkdir()
        written = partial / target.name
        ir.save(model, written, external_data=data)
        onnx.checker.check_model(str(written), full_check=True)
        if data is not None and (partial / data).exists():
            (partial / data).replace(target.with_name(data))
        written.replace(target)
    except OSError as error:
        raise ExportError(f"{target} can't be written: {error}") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"the exported graph is no valid ONNX ({str(error).strip().splitlines()[0]}); nothing "
            "was written. Try another opset."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
