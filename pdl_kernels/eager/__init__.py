"""The loss in plain torch, a few rows at a time: for CPU, and for devices without Triton."""
