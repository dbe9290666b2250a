"""Models side by side: what each costs, what it is worth, and which are worth choosing."""

from fxopt.comparison.comparing import compare
from fxopt.comparison.pareto import pareto_front
from fxopt.comparison.record import Comparison, Failure, Front, Quality, Row

__all__ = ["Comparison", "Failure", "Front", "Quality", "Row", "compare", "pareto_front"]
