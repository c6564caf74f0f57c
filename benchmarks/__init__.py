"""Measures the loss and its peers: `python -m benchmarks --help`."""
