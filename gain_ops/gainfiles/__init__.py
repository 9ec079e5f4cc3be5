"""Gain files, without a model."""
