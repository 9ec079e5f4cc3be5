"""Does it forget less: methods adapt one model to domains in turn, and are compared."""
