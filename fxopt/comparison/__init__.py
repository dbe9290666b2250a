"""Models side by side: what each costs, what it is worth, and which are worth choosing."""

from fxopt.comparison.comparing import compare
from fxopt.comparison.comparison import Comparison
from fxopt.comparison.fields import Failure, Front, Quality, Row
from fxopt.comparison.pareto import pareto_front

__all__ = ["Comparison", "Failure", "Front", "Quality", "Row", "compare", "pareto_front"]
