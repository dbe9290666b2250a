"""Passes that give regions of a graph to kernels of this device."""
