"""Measured: times, memory and correctness of gain_ops beside its peers; `python -m benchmarks`."""
