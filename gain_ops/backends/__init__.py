"""What runs an op beside the reference and the Triton kernels: the compiled extension, its loading, the fakes."""
