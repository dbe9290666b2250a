"""Program to text: typed, deterministic, short; and the difference of two programs.

    Net(x: f32[s0, 8]) -> f32[s0, 4]

    # block.0  Block
      %fc1: f32[s0, 16] = linear(%x, fc1.weight: f32[16, 8], fc1.bias: f32[16])
      %act: f32[s0, 16] = relu(%fc1)

    return %head

How to read it. A comment opens each stretch of operations of one module: its path and class.
Modules without children (a linear, a norm) are printed with their parent; the last operation of one
bears its name, earlier ones `name.operator`. Names are resolved as in nested scopes: `%fc1` is
looked up in the module at hand, then outward; a leading dot is an absolute name. State is written
where it is read, relative to the module, with its type. Sizes are expressions of the input sizes
`s0, s1, ...`; the nodes that compute them and those that take a tuple apart (`%max[1]`) have no
line of their own.

No name depends on a node's number in the graph, so a rewrite changes the lines it touches only.
"""

from fxopt.graph_text.difference import diff
from fxopt.graph_text.rendering import GraphText, text
from fxopt.graph_text.types import describe, dtype_text, operator_name, type_text

__all__ = ["GraphText", "describe", "diff", "dtype_text", "operator_name", "text", "type_text"]
