"""A study of forgetting: methods adapt one model to domains in turn, and are compared."""
