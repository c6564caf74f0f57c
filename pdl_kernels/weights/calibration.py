"""Undoing at inference what the weights did to the model."""

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_table


def calibration_bias(table: Tensor) -> Tensor:
    """-log w(t), to add to the logits of a model that was trained with the weights w.

    The minimiser of PDL is q(y|x) proportional to p(y|x) w(y), so log q - log w is log p up to a constant: with the
    bias the model predicts natural text again.

    Args:
        table: (V,) weights > 0.

    Returns:
        (V,) float32 on the table's device.

    Raises:
        ValueError: a weight of 0: such a token was never taught, and nothing brings it back.

    >>> calibration_bias(torch.tensor([1.0, 0.5])).tolist()  # doctest: +ELLIPSIS
    [-0.0, 0.693...]

    Source: logit adjustment, Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv 2007.07314.
    """
    check_table(table)
    if (table == 0).any():
        position = int((table == 0).nonzero()[0])
        raise ValueError(f"table[{position}] is 0; accepted are weights > 0, whose effect can be undone")
    return -torch.log(table.detach().double()).float()
