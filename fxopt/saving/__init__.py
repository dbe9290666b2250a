"""Programs on disk: tensors in safetensors, the graph in JSON; no code, no pickle."""

from fxopt.saving.further import decode_further, first_of, tensors_of
from fxopt.saving.saving import (
    Saved,
    check_target,
    decode_beside,
    document_beside,
    from_document,
    load,
    save,
    tensors_beside,
    to_document,
)

__all__ = [
    "Saved",
    "check_target",
    "decode_beside",
    "decode_further",
    "document_beside",
    "first_of",
    "from_document",
    "load",
    "save",
    "tensors_beside",
    "tensors_of",
    "to_document",
]
