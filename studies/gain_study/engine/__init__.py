"""A study's runs: settings, texts, methods, records."""
