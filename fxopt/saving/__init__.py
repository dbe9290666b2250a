"""Programs on disk: tensors in safetensors, the graph in JSON; no code, no pickle."""

from fxopt.saving.saving import (
    Saved,
    check_target,
    from_documents,
    load,
    save,
    state_of,
    to_documents,
)

__all__ = [
    "Saved",
    "check_target",
    "from_documents",
    "load",
    "save",
    "state_of",
    "to_documents",
]
