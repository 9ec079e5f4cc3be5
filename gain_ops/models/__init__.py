"""Gains on a model: put on, saved, absorbed."""
