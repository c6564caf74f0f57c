"""The definition of Power-Law Decay Loss in plain float64 torch, short enough to check by eye."""

from reference.pdl import ReferenceStats, power_law_weights, reference_cross_entropy

__all__ = ["ReferenceStats", "power_law_weights", "reference_cross_entropy"]
