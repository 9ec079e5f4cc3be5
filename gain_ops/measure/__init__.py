"""Bytes, perplexity and machines, measured."""
