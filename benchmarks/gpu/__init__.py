"""The one command for a GPU: its parts, the proof, and what they need."""
