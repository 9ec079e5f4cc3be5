"""Helpers that know nothing of gains: files, DTensors, words."""
