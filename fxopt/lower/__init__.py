"""Lowering: a program becomes a compiled callable. The only room that calls torch.compile."""

from fxopt.lower.compilation import Compiled, Lowered, compile_program
from fxopt.lower.lower import Lower

__all__ = ["Compiled", "Lower", "Lowered", "compile_program"]
