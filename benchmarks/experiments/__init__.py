"""Experimental kernels: measured beside the shipped ones, and run by no op."""
