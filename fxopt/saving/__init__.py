"""Programs on disk: tensors in safetensors, the graph in JSON; no code, no pickle."""

from fxopt.saving.further import decode_further, first_of, tensors_of
from fxopt.saving.saving import Saved, check_target, from_document, load, save, to_document

__all__ = [
    "Saved",
    "check_target",
    "decode_further",
    "first_of",
    "from_document",
    "load",
    "save",
    "tensors_of",
    "to_document",
]
