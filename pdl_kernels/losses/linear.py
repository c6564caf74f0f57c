"""The loss fused with the output projection, for large vocabularies: the function a user calls."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pdl_kernels.losses import checks, linear_checks
from pdl_kernels.losses.functional import stats_of
from pdl_kernels.ops import linear_cross_entropy as operation
from pdl_kernels.ops import tracing
from pdl_kernels.options import LinearInputs, LossStats


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[False] = ...,
    **options: Any,
) -> Tensor: ...


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: Literal[True],
    **options: Any,
) -> tuple[Tensor, LossStats]: ...


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    return_stats: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, LossStats]: ...


def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    expected_upstream: float | Tensor = 1.0,
    return_stats: bool = False,
    chunk_size: int | None = None,
    accumulate_dtype: torch.dtype = torch.float32,
    compact: bool | None = None,
    row_sampling: float = 0.0,
    seed: int | float | Tensor | None = None,
    backend: str = "auto",
    **unexpected: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""`pdl_cross_entropy(hidden @ lm_head_weight.T + bias, ...)` without the logits of all tokens ever existing.

    Args:
        hidden: (..., H) float16, bfloat16 or float32, float64 on the eager backend; any strides.
        lm_head_weight: (V, H), of the dtype of `hidden`. Under autocast both may be wider: the products run in the
            autocast dtype, as those of torch.nn.Linear do, and the gradients keep the precision of the sums.
        targets: (...) int32 or int64 class indices.
        weights, token_weights, ignore_index, reduction, normalizer, label_smoothing, z_loss, softcap, logit_scale,
            return_stats, backend: see `pdl_cross_entropy`.
        expected_upstream: see `pdl_cross_entropy`. Another upstream gradient multiplies the waiting gradients.
        bias: (V,), of the same dtype.
        chunk_size: tokens whose logits exist at a time. None chooses from the shape alone: chunks of at most 64 MiB or
            a quarter of the weight's float32 gradient, whichever is more, and at least 128 tokens. Results depend on it
            by rounding only.
        accumulate_dtype: in which the gradients of `lm_head_weight`, `bias` and `hidden` are summed and wait for
            backward. With the dtype of the products (say, bfloat16) they take half the memory of float32, each chunk
            rounds once more, and so does an upstream gradient other than the expected one.
        compact: leave tokens that contribute nothing (ignored, token weight 0, or class weight 0 without smoothing,
            z_loss and statistics) out of the products, which reads two numbers back from the device, at once. None does
            so except during CUDA graph capture; False never does.
        row_sampling: t in [0, 1): the lightest tokens, which together hold the share t of the sum of row factors
            |u_i| ((1 - s) w[y_i] + s / V sum_j w_j), enter the backward products only with a probability proportional
            to their factor, scaled up accordingly: the expected gradient is exact, loss and statistics count every
            token. 0 is off. Refused with z_loss.
        seed: for row_sampling, a number or a 0-d tensor; the same seed keeps the same rows. Give the step's number;
            without one, torch's generator draws it.

    Returns:
        The loss, float32 (float64 for float64): 0-d, or (...) for "none". With `return_stats`, (loss, stats).

    Raises:
        As `pdl_cross_entropy`; TypeError also for DTensors, modules and mixed dtypes, ValueError for parameters that
        ZeRO or FSDP has sharded away.

    Cost: three products of N x V x H (one without gradients), and reading and writing each logit about twice. Kept
    until backward: the gradients, in `accumulate_dtype`. On top of them, one chunk of logits, and a copy of the
    contributing rows of `hidden` where some do not contribute. "none" makes the logits a second time in backward.

    >>> hidden = torch.tensor([[2.0], [0.0]], requires_grad=True)
    >>> lm_head_weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    >>> loss = pdl_linear_cross_entropy(hidden, lm_head_weight, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    >>> round(loss.item(), 4)
    0.5516

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    checks.check_names("pdl_linear_cross_entropy", unexpected)
    options = checks.check_options(
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        return_stats=return_stats,
        backend=backend,
    )
    linear = linear_checks.check_linear_options(
        chunk_size=chunk_size,
        accumulate_dtype=accumulate_dtype,
        compact=compact,
        row_sampling=row_sampling,
        options=options,
    )
    linear_checks.check_linear_tensors(hidden, lm_head_weight, targets, bias, weights, token_weights)
    traced = tracing.is_traced(hidden, lm_head_weight, bias, targets, weights, token_weights)
    denominator = checks.check_normalizer(normalizer, reduction, hidden.device, traced=traced)
    expected = checks.check_expected_upstream(expected_upstream, hidden.device, traced=traced)
    seed_tensor = linear_checks.check_seed(seed, linear.row_sampling, hidden)
    if not torch.compiler.is_compiling():
        tracing.refuse_transforms("pdl_linear_cross_entropy", hidden)
        tracing.refuse_transforms("pdl_linear_cross_entropy", lm_head_weight)
    inputs = LinearInputs(hidden, lm_head_weight, bias, targets, weights, token_weights, seed_tensor)
    outputs = operation.linear_cross_entropy(inputs, denominator, expected, options, linear, backend, traced=traced)
    return (outputs.loss, stats_of(outputs.scalars, outputs.token_count)) if return_stats else outputs.loss
