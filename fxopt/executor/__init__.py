"""A program of few rows as a list of instructions, which one call executes.

Generated code calls a small kernel at a time from Python, which takes longer than the kernel does.
Here sizes and memory are worked out once for each kind of call (`layout`), instructions are written
down as words (`instructions`), and compiled code that is the same for every program goes through
them (`fxopt/kernels/native/executor.h`). Nothing is compiled for a program.
"""

from fxopt.executor.executor import Executor, executor_of

__all__ = ["Executor", "executor_of"]
