"""Tables, plots, targets and predictions of results."""
