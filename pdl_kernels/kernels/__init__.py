"""Triton kernels of the loss, their launch choices and nothing else. Importing this package needs Triton."""
