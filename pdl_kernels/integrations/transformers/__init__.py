"""Hugging Face transformers: losses for its models and its Trainer, and generation with a calibrated model."""

from pdl_kernels.integrations.transformers.callback import PDLCallback
from pdl_kernels.integrations.transformers.generation import CalibrationLogitsProcessor
from pdl_kernels.integrations.transformers.hooks import pdl_compute_loss, pdl_loss_function
from pdl_kernels.integrations.transformers.linear import use_pdl_linear_loss

__all__ = [
    "CalibrationLogitsProcessor",
    "PDLCallback",
    "pdl_compute_loss",
    "pdl_loss_function",
    "use_pdl_linear_loss",
]
