"""Autograd and torch's operators for both losses, and what the two share."""
