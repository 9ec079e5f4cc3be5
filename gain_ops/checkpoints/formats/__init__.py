"""Containers of checkpoints: folders of safetensors, and GGUF."""
