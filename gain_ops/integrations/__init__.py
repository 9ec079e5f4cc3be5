"""Other libraries, each optional and each in one file; nothing here is imported by ``import gain_ops``."""
