"""Models and inputs for the command line, from what lies on the disk."""

from fxopt.loading.loading import Loaded, TextBatches, load_model
from fxopt.loading.texts import real_sentences

__all__ = ["Loaded", "TextBatches", "load_model", "real_sentences"]
