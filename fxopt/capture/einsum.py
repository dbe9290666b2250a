"""Which einsum is a linear layer."""

from __future__ import annotations

from typing import Literal


def linear_form(x: str, weight: str, output: str) -> Literal["nk", "kn"] | None:
    """How a matrix `weight` is laid out where `x,weight->output` is x @ Wᵀ over x's last axis.

    None where it is something else: it sums over another axis, repeats one, or moves axes.
    """
    labels = x.replace("...", "")
    if len(weight) != 2 or not x or len(set(labels)) != len(labels) or "." in weight:
        return None
    kept, summed = x[:-1], x[-1]
    if summed not in weight or weight[0] == weight[1]:
        return None
    free = weight.replace(summed, "")
    if free in labels or output != kept + free:
        return None
    return "nk" if weight[1] == summed else "kn"


def written_out(equation: str) -> tuple[list[str], str]:
    """The labels of each operand, and those of the result; left out, it has what occurs once."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        labels = inputs.replace("...", "").replace(",", "")
        once = sorted(label for label in set(labels) if labels.count(label) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    return inputs.split(","), output
