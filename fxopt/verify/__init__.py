"""Oracle, judge and bisection: every step is shown to compute the same thing."""

from fxopt.verify.bisect import Blame, blame, judge_nodes
from fxopt.verify.gradients import judge_gradients, judge_learning
from fxopt.verify.judge import Verdict, compare, compose, judge
from fxopt.verify.oracle import (
    RunAll,
    Trial,
    draws_alike,
    is_random,
    one_by_one,
    output_names,
    run_model,
    run_program,
    state_kept,
    trials,
)

__all__ = [
    "Blame",
    "RunAll",
    "Trial",
    "Verdict",
    "blame",
    "compare",
    "compose",
    "draws_alike",
    "is_random",
    "judge",
    "judge_gradients",
    "judge_learning",
    "judge_nodes",
    "one_by_one",
    "output_names",
    "run_model",
    "run_program",
    "state_kept",
    "trials",
]
