"""Finds the neurons in which forgetting conflicts with keeping, and unlearns by training only those."""

__version__ = "0.1.0"
