"""What several test files share: small models and files, the cases of parity, processes."""
