"""The CUDA backend and the loading of its extension, what a backend offers, and the choice of a GEMM's operands."""
