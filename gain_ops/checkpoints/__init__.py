"""Absorbing gains into checkpoints on disk, file by file, without loading a model."""
