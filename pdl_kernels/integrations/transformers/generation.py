"""Hugging Face transformers: generating text with a calibrated model."""

import math
from typing import Any

from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor

from pdl_kernels.weights.calibration import calibration_bias


class CalibrationLogitsProcessor(LogitsProcessor):
    """logits - strength * log w in `generate`: a dial between natural text and rare tokens, without training again.

    With a model that was trained with the weights w, strength=1 undoes what they did to it (see `calibration_bias`), 0
    leaves it as it was trained, and values in between give some of it. With a model that was trained by plain cross
    entropy, strength=-1 does to it what training with w would: both optima are proportional to w(y) p(y|x).

    Args:
        table: (V,) weights > 0, as wide as the logits.
        strength: any finite number.

    Use: `model.generate(..., logits_processor=[CalibrationLogitsProcessor(table, strength=0.5)])`. `generate` runs it
    before the processors that cut or scale logits, such as temperature and top-p, and that is where it belongs.
    """

    def __init__(self, table: Tensor, strength: float = 1.0) -> None:
        if not math.isfinite(strength):
            raise ValueError(f"strength is {strength}; accepted is a finite number")
        self.bias = strength * calibration_bias(table)  # (V,)

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> Any:
        if scores.shape[-1] != len(self.bias):
            raise ValueError(f"table has {len(self.bias)} weights; accepted is {scores.shape[-1]}, the logits' width")
        if self.bias.device != scores.device:
            self.bias = self.bias.to(scores.device)
        return scores + self.bias.to(scores.dtype)
