"""Power-Law Decay Loss: a token-frequency-weighted cross entropy for language models, fused in Triton."""

import torch

from pdl_kernels.backends import MINIMUM_TORCH, dotted, version_tuple

__version__ = "0.1.0"

if version_tuple(torch.__version__) < MINIMUM_TORCH:
    raise ImportError(f"pdl_kernels needs torch >= {dotted(MINIMUM_TORCH)}, and torch {torch.__version__} is installed")

from pdl_kernels.data.tokenizers import special_token_ids
from pdl_kernels.losses.functional import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.losses.modules import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss
from pdl_kernels.losses.normalizer import global_normalizer
from pdl_kernels.options import LossStats
from pdl_kernels.weights.calibration import calibration_bias
from pdl_kernels.weights.counts import TokenCounts
from pdl_kernels.weights.description import describe
from pdl_kernels.weights.power_law import PowerLawWeighting, power_law_weights
from pdl_kernels.weights.recipes import (
    ClassBalancedWeighting,
    IDFWeighting,
    InverseFrequencyWeighting,
    SmoothedInverseWeighting,
    SquareRootInverseFrequencyWeighting,
)
from pdl_kernels.weights.saved import load_weights, save_weights
from pdl_kernels.weights.schedule import WeightSchedule

__all__ = [
    "ClassBalancedWeighting",
    "IDFWeighting",
    "InverseFrequencyWeighting",
    "LossStats",
    "PDLCrossEntropyLoss",
    "PDLLinearCrossEntropyLoss",
    "PowerLawWeighting",
    "SmoothedInverseWeighting",
    "SquareRootInverseFrequencyWeighting",
    "TokenCounts",
    "WeightSchedule",
    "calibration_bias",
    "describe",
    "global_normalizer",
    "load_weights",
    "pdl_cross_entropy",
    "pdl_linear_cross_entropy",
    "power_law_weights",
    "save_weights",
    "special_token_ids",
]
