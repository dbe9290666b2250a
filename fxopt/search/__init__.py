"""Search over passes and their options, for the cheapest list that keeps a metric."""

from fxopt.errors import SearchError
from fxopt.search.found import Candidate, Found, TrialRecord
from fxopt.search.objectives import Measured
from fxopt.search.search import search
from fxopt.search.space import Slot, Space
from fxopt.search.standard import standard_space

__all__ = [
    "Candidate",
    "Found",
    "Measured",
    "SearchError",
    "Slot",
    "Space",
    "TrialRecord",
    "search",
    "standard_space",
]
