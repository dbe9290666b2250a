"""Oracle, judge and bisection: every step is shown to compute the same thing."""

from fxopt.verify.attributes import note_on_attributes
from fxopt.verify.bisect import Blame, blame, judge_nodes
from fxopt.verify.edges import with_edges
from fxopt.verify.gradients import judge_gradients, judge_learning
from fxopt.verify.judge import Verdict, compare, compose, judge
from fxopt.verify.oracle import (
    RunAll,
    Trial,
    call_model,
    draws_alike,
    is_random,
    model_kept,
    one_by_one,
    output_names,
    run_model,
    run_program,
    state_kept,
    trials,
    writes,
)
from fxopt.verify.sizes import shapes_text

__all__ = [
    "Blame",
    "RunAll",
    "Trial",
    "Verdict",
    "blame",
    "call_model",
    "compare",
    "compose",
    "draws_alike",
    "is_random",
    "judge",
    "judge_gradients",
    "judge_learning",
    "judge_nodes",
    "model_kept",
    "note_on_attributes",
    "one_by_one",
    "output_names",
    "run_model",
    "run_program",
    "shapes_text",
    "state_kept",
    "trials",
    "with_edges",
    "writes",
]
