"""The command that measures everything on a GPU: its parts, the proof, and their helpers."""
