"""Functions on tensors, one family a file."""
