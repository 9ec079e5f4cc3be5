"""Gains folded into checkpoints on disk."""
