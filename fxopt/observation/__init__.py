"""Observation: what the calibration inputs show of a program's values, kept in bounded memory."""

from fxopt.observation.extremes import Extremes, extremes, past_range
from fxopt.observation.histogram import RangeMethod
from fxopt.observation.observation import Observation, calibration_warnings, observe
from fxopt.observation.observers import (
    ChannelMagnitude,
    ChannelRange,
    Histogram,
    MinMax,
    Observer,
    Rows,
    SecondMoment,
)

__all__ = [
    "ChannelMagnitude",
    "ChannelRange",
    "Extremes",
    "Histogram",
    "MinMax",
    "Observation",
    "Observer",
    "RangeMethod",
    "Rows",
    "SecondMoment",
    "calibration_warnings",
    "extremes",
    "observe",
    "past_range",
]
