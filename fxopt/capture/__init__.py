"""nn.Module + inputs -> Program. The only room that calls torch.export."""

from fxopt.capture.attributes import attributes_kept
from fxopt.capture.capture import capture
from fxopt.capture.inputs import (
    decoder_start,
    derive_inputs,
    normalize_inputs,
    takes_decoder_ids,
)
from fxopt.capture.model_checks import check_is_module, check_model, in_mode

__all__ = [
    "attributes_kept",
    "capture",
    "check_is_module",
    "check_model",
    "decoder_start",
    "derive_inputs",
    "in_mode",
    "normalize_inputs",
    "takes_decoder_ids",
]
