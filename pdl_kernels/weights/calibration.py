"""The bias that undoes, at inference, what the weights did to a model."""

import torch
from torch import Tensor

from pdl_kernels.weights.checks import check_entries, check_table


def calibration_bias(table: Tensor) -> Tensor:
    """-log w(t), to add to the logits of a model that was trained with the weights w.

    The minimiser of PDL is q(y|x) proportional to p(y|x) w(y), so log q - log w is log p up to a constant. With the
    bias, the model predicts natural text again.

    Args:
        table: (V,) weights > 0.

    Returns:
        (V,) float32 on the table's device.

    Raises:
        ValueError: a weight of 0. Training never taught such a token, so no bias can bring it back.

    >>> calibration_bias(torch.tensor([1.0, 0.5])).tolist()  # doctest: +ELLIPSIS
    [-0.0, 0.693...]

    Source: logit adjustment, Menon et al., Long-tail learning via logit adjustment, ICLR 2021, arXiv 2007.07314.
    """
    check_table(table)
    check_entries("table", table, table > 0, "weights > 0, whose effect can be undone")
    return -torch.log(table.detach().double()).float()
