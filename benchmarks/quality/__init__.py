"""Does Power-Law Decay Loss do what its paper claims? Three tasks, from data to scores: `python -m benchmarks.quality`."""
