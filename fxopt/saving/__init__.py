"""Programs on disk: tensors in safetensors, the graph in JSON; no code, no pickle."""

from fxopt.saving.saving import Saved, load, save

__all__ = ["Saved", "load", "save"]
