"""Times, memory and correctness of gain_ops beside its peers, measured: `python -m benchmarks`."""
