"""Names of call targets, and the short list of what a loaded graph may call.

A name from a file is looked up among registered operators only, never imported or evaluated:

    aten, fxopt, transformers         operators that write to nothing (aten.copy_ to state aside)
    operator.*, math.*, torch.sym_*   the size arithmetic of `wellformed.SIZE_FUNCTIONS`
    other namespaces                  only where the caller of `load` names them

Operators of TorchScript that live in the aten namespace without a dispatcher entry (aten.save,
aten.open) and those that touch files are refused. So are those that torch can't type without
running them, and internal ones that don't check their arguments: some read past the end of a list.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._decomp import decomposition_table

from fxopt.errors import SaveError
from fxopt.wellformed import SIZE_FUNCTIONS

# Where each namespace registers its operators; torch's own are there from the start.
_TRUSTED = {
    "aten": "torch",
    "fxopt": "fxopt.kernels",
    "transformers": "transformers.integrations.moe",
}
_TOUCHES_FILES_OR_PROCESS = frozenset({"aten::from_file", "aten::_print"})
_TYPED_BY = ("Meta", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_INTERNAL = frozenset(
    (
        *("__and__", "__or__", "__xor__", "_weight_norm", "_pad_enum", "_pad_circular"),
        *("_convolution_mode", "_scaled_dot_product_attention_math", "_shape_as_tensor"),
    )
)
"""Internal operators made of others that graphs do hold."""
_FOREIGN = (
    *("quantized_", "fbgemm_", "choose_qparams", "sparse_", "_sparse_", "to_sparse", "_nested_"),
    *("to_mkldnn", "mkldnn_", "cudnn_", "_cudnn_", "miopen_", "_test_"),
)
_NAMES_OF_FUNCTIONS = {function: name for name, function in SIZE_FUNCTIONS.items()}
_NAME = re.compile(r"\w+")


def name_of(target: Any, where: str) -> str:
    """The saved name of a call target; `SaveError`, naming `where`, if it has none."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target in _NAMES_OF_FUNCTIONS:
        return _NAMES_OF_FUNCTIONS[target]
    raise SaveError(f"{where} calls {target!r:.80}, which can't be saved")


def resolve(name: str, namespaces: Collection[str] | None = ()) -> Callable[..., Any]:
    """The call target of a saved name; raises `SaveError` for whatever isn't on the list.

    `namespaces` are those of a user's own operators; None allows any.
    """
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    namespace, packet, overload = _parts(name)
    if namespace in _TRUSTED:
        importlib.import_module(_TRUSTED[namespace])
    elif namespaces is not None and namespace not in namespaces:
        raise SaveError(
            f"the saved graph calls {name}, and only operators of {', '.join(_TRUSTED)} are loaded "
            "unasked. If you trust the file, import the module that registers the operator and "
            f"give load(..., namespaces=({namespace!r},))."
        )
    qualified = f"{namespace}::{packet}"
    full = qualified if overload == "default" else f"{qualified}.{overload}"
    target = None
    if torch._C._dispatch_has_kernel(full) and qualified not in _TOUCHES_FILES_OR_PROCESS:
        target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if target is None or (namespace == "aten" and not _is_safe_to_type(target, packet, full)):
        raise SaveError(
            f"the saved graph calls {name}, which is no operator of torch {torch.__version__} "
            "that a graph may call. It may come from another version of torch or fxopt."
        )
    if target._schema.is_mutable and target is not torch.ops.aten.copy_.default:
        raise SaveError(f"the saved graph calls {name}, which writes to its arguments")
    return target  # type: ignore[no-any-return]


def _is_safe_to_type(target: Any, packet: str, full: str) -> bool:
    """Whether torch finds the type of a call without running it, whatever its arguments are."""
    if packet.startswith(_FOREIGN):
        return False
    if not packet.startswith("_") or packet in _INTERNAL or target._schema.is_mutable:
        return True
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return target in decomposition_table or any(has_kernel(full, key) for key in _TYPED_BY)


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.split(".")
    if len(parts) != 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise SaveError(f"the saved graph calls {name!r:.80}, which is no operator's name")
    return parts[0], parts[1], parts[2]
