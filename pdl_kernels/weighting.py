"""From token counts to weights."""

import math

import torch
from torch import Tensor


def power_law_weights(counts: Tensor, alpha: float = 1.0, eps: float = 1e-7) -> Tensor:
    """The paper's weights: w(t) = 1 / (freq(t) + eps) ** alpha.

    Args:
        counts: (V,) how often each vocabulary entry occurs among the training targets; any real dtype, >= 0. As long
            as the model's output layer, not as the tokenizer.
        alpha: strength >= 0; 0 gives weights of 1.
        eps: added to every count, in tokens, >= 0. The paper's defaults are alpha=1 and eps=1e-7: an entry never
            counted then weighs 1e7 and can own a whole batch, so count what is trained on, EOS included.

    Returns:
        (V,) float32 on the device of `counts`, computed in float64.

    Raises:
        ValueError: counts that are not 1-D, negative or not finite; alpha or eps negative or not finite; a weight that
            would be infinite (eps=0 with a count of 0) or beyond float32.
        TypeError: counts that are no real tensor.

    >>> power_law_weights(torch.tensor([100, 4, 0]), alpha=0.5, eps=1.0).tolist()  # doctest: +ELLIPSIS
    [0.0995..., 0.447..., 1.0]

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    if not isinstance(counts, Tensor) or counts.is_complex():
        kind = counts.dtype if isinstance(counts, Tensor) else type(counts).__name__
        raise TypeError(f"counts are {kind}; accepted is a real torch.Tensor")
    if counts.dim() != 1:
        raise ValueError(f"counts have shape {tuple(counts.shape)}; accepted is (V,), one count per vocabulary entry")
    for name, value in (("alpha", alpha), ("eps", eps)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; accepted are finite numbers >= 0")
    frequencies = counts.double()
    accepted = (frequencies >= 0) & frequencies.isfinite()
    if not accepted.all():
        position = int((~accepted).nonzero()[0])
        raise ValueError(f"counts[{position}] is {counts[position].item()}; accepted are finite counts >= 0")
    weights = (1.0 / (frequencies + eps) ** alpha).to(torch.float32)
    if not weights.isfinite().all():
        position = int((~weights.isfinite()).nonzero()[0])
        raise ValueError(
            f"the weight of entry {position} (count {counts[position].item()}, eps {eps}, alpha {alpha}) is not finite "
            "in float32; accepted are an eps and alpha that keep it finite, such as eps=1"
        )
    return weights
