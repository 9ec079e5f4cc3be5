"""Gains on a whole model: put on, saved, absorbed."""
