"""Weights made cheaper with the least harm: rounded, made sparse, smoothed, reconstructed."""

from fxopt.weights.gptq import quantize_rows

__all__ = [
    "quantize_rows",
]
