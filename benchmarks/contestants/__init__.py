"""Who is compared: the layers and models of gain_ops, and those of others."""
