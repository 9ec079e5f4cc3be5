"""The CUDA backend, what a backend offers and why it cannot run, GEMMs composed, and what is known of their times."""
