"""Lowering: a program becomes a compiled callable. The only room that calls torch.compile."""

from fxopt.lower.compilation import Lowered, compile_program
from fxopt.lower.lower import Lower

__all__ = ["Lower", "Lowered", "compile_program"]
