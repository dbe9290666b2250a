"""Passes that take channels, heads or weights out of a model."""
