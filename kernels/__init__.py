"""Triton kernels, one file an operator; they import torch and triton only."""
