"""nn.Module + inputs -> Program. The only room that calls torch.export."""

from fxopt.capture.attributes import attributes_kept
from fxopt.capture.capture import capture
from fxopt.capture.inputs import (
    decoder_start,
    derive_inputs,
    normalize_inputs,
    takes_decoder_ids,
)
from fxopt.capture.model_checks import (
    check_is_module,
    check_model,
    in_mode,
    is_compiled,
    uncompiled,
)
from fxopt.capture.surroundings import callers_device, callers_modes_off

__all__ = [
    "attributes_kept",
    "callers_device",
    "callers_modes_off",
    "capture",
    "check_is_module",
    "check_model",
    "decoder_start",
    "derive_inputs",
    "in_mode",
    "is_compiled",
    "normalize_inputs",
    "takes_decoder_ids",
    "uncompiled",
]
