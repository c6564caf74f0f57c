"""What `pdl-kernels doctor` finds out: what is installed, and whether the loss is right and fast on this machine."""
