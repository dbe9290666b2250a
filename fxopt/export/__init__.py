"""The numerics-level program of an optimised module, written for other runtimes to run."""

from fxopt.export.interchange import to_onnx

__all__ = ["to_onnx"]
