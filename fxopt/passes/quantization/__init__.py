"""Passes that round weights and activations to few bits."""
