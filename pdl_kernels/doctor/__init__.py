"""What `pdl-kernels doctor` finds out: the installation, and whether the loss is right and fast on this machine."""
