"""Which axes of which tensors are the same channels, followed through the whole graph."""

from fxopt.analyses.channels.dims import Dim
from fxopt.analyses.channels.groups import Channels, Group, GroupKind, Place, Reader, channels
from fxopt.analyses.channels.walk import Walk

__all__ = [
    "Channels",
    "Dim",
    "Group",
    "GroupKind",
    "Place",
    "Reader",
    "Walk",
    "channels",
]
