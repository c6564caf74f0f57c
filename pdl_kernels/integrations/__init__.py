"""Training and inference frameworks, one file each, imported only on demand."""
