"""Which layer of the student learns from which layer of the teacher."""

from __future__ import annotations

from fxopt.errors import TrainError
from fxopt.train.terms import Layers


def state_pairs(student: int, teacher: int) -> Layers:
    """Hidden states of the same relative depth, both ends included: (0, 0), ..., (last, last).

    State 0 is the embedding, so that i of n layers pairs with round(i m / n) of m: the uniform map
    of TinyBERT (arXiv:1909.10351, section 4.1).
    """
    last = max(student - 1, 1)
    return tuple((index, _nearest(index * (teacher - 1), last)) for index in range(student))


def layer_pairs(student: int, teacher: int) -> Layers:
    """Layers without an embedding before them: layer i of n ends at the relative depth (i + 1)/n.

    At least the first of the teacher's layers, where the student has more.
    """
    return tuple(
        (index, max(_nearest((index + 1) * teacher, student) - 1, 0)) for index in range(student)
    )


def checked_pairs(pairs: Layers, student: int, teacher: int, term: str) -> Layers:
    """`pairs`, unless one lies outside what the models returned: then `TrainError`."""
    for own, other in pairs:
        if not (0 <= own < student and 0 <= other < teacher):
            raise TrainError(
                f"{term}(layers=...) holds ({own}, {other}), but the student returned indices 0 "
                f"to {student - 1} and the teacher 0 to {teacher - 1}"
            )
    return pairs


def _nearest(numerator: int, denominator: int) -> int:
    """The integer nearest to the quotient, half up: round() goes to the even one."""
    return (2 * numerator + denominator) // (2 * denominator)
