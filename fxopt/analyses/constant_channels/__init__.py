"""Which entries of a program's values are constants, whatever its inputs are."""

from fxopt.analyses.constant_channels.analysis import constant_channels
from fxopt.analyses.constant_channels.known import Known

__all__ = ["Known", "constant_channels"]
