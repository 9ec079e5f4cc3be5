"""What a run would need, counted without running it."""
