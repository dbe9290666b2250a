"""Programs on disk: tensors in safetensors, the graph in JSON; no code, no pickle."""

from fxopt.saving.saving import Saved, check_target, from_document, load, save, to_document

__all__ = ["Saved", "check_target", "from_document", "load", "save", "to_document"]
