"""Autograd around the backends: one file per operation, saving what backward needs."""
