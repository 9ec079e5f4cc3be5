"""Kernels that are tried out: measured beside those that ship, and run by no op."""
