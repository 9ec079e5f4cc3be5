"""The CUDA backend and the loading of its extension, the fakes, and the choice of a GEMM's operands."""
