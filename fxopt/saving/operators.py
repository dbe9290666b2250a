"""Names of call targets, and the short list of what a loaded graph may call.

A name from a file is looked up among registered operators only, never imported or evaluated:

    aten, fxopt, transformers         operators that write to nothing (aten.copy_ to state aside)
    operator.*, math.*, torch.sym_*   the size arithmetic of `wellformed.SIZE_FUNCTIONS`
    other namespaces                  only where the caller of `load` names them

Operators of TorchScript that live in the aten namespace without a dispatcher entry (aten.save,
aten.open) and those that touch files are refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection
from typing import Any

import torch

from fxopt.errors import SaveError
from fxopt.wellformed import SIZE_FUNCTIONS

# Where each namespace registers its operators; torch's own are there from the start.
_TRUSTED = {
    "aten": "torch",
    "fxopt": "fxopt.kernels",
    "transformers": "transformers.integrations.moe",
}
_TOUCHES_FILES_OR_PROCESS = frozenset({"aten::from_file", "aten::_print"})
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
    if not torch._C._dispatch_has_kernel(full) or qualified in _TOUCHES_FILES_OR_PROCESS:
        raise SaveError(
            f"the saved graph calls {name}, which is no operator of torch {torch.__version__} "
            "that a graph may call. It may come from another version of torch or fxopt."
        )
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if target._schema.is_mutable and target is not torch.ops.aten.copy_.default:
        raise SaveError(f"the saved graph calls {name}, which writes to its arguments")
    return target  # type: ignore[no-any-return]


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.split(".")
    if len(parts) != 3 or not all(_NAME.fullmatch(part) for part in parts):
        raise SaveError(f"the saved graph calls {name!r:.80}, which is no operator's name")
    return parts[0], parts[1], parts[2]
