"""Modules with a gain."""
