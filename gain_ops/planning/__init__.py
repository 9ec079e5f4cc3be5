"""The ways to adapt a model, and what a run of each would need, counted without running it."""
