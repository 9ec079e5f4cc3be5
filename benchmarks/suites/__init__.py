"""The measurements, one suite a file."""
