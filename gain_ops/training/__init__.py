"""A language model adapted to a domain, from loading to the report."""
