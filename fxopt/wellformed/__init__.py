"""The written list of what a program may contain, checked between any two passes.

    nodes      placeholder (tensors), get_attr, call_function, output; names unique; every argument
               is defined earlier in the same graph; one output at the end, a flat tuple of tensors
    calls      aten overloads, fxopt:: overloads, overloads that others registered with
               torch.library, getitem of tuples, and the size arithmetic of `SIZE_FUNCTIONS`; no
               control-flow operator, no assertion (`operators.assertions`)
    arguments  what the operator's schema asks for: arity, names and types
    writes     no operator writes to its arguments, except `aten.copy_` to state, in the tail of the
               graph; what it has written is not read again
    metadata   `val` (fake value), `module_path` and `source` on every node but the output
    state      each get_attr names an entry of that shape, dtype and device; all entries are used;
               all of one device, scalars aside
    signature  one placeholder for each tensor of the signature, of its dtype, rank and fixed sizes

A node that nobody uses is allowed: a rule that replaces a node may leave its inputs behind, and
dropping them is a pass of its own.
"""

from fxopt.wellformed.dialect import SIZE_FUNCTIONS
from fxopt.wellformed.rules import check

__all__ = ["SIZE_FUNCTIONS", "check"]
