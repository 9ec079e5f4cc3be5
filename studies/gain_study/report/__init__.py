"""A study's results: metrics, tables, plots, pages."""
