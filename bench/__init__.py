"""Benchmarks: interleaved comparisons, pytest-benchmark cases of the same callables, and their raw samples."""
