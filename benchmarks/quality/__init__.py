"""Does Power-Law Decay Loss do what its paper claims? `python -m benchmarks.quality`; docs/evidence.md."""
