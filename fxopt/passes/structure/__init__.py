"""Passes that keep the numbers: constants, duplicates, fusions, folded norms."""
