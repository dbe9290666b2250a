"""Lowering: a program becomes a compiled callable. The only room that calls torch.compile."""

from fxopt.lower.compilation import compile_program
from fxopt.lower.lower import Lower
from fxopt.lower.lowering import Lowered, Lowering

__all__ = ["Lower", "Lowered", "Lowering", "compile_program"]
