"""Passes that compute in half precision what it serves."""
