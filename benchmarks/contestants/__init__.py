"""Who is compared: layers and models, ours and others'."""
