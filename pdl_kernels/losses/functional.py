"""The functions a user calls: check, choose a backend, compute."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pdl_kernels.losses import checks
from pdl_kernels.ops import cross_entropy as operation
from pdl_kernels.ops import tracing
from pdl_kernels.options import ACCURACY, NLL, WEIGHT_SUM, LossInputs, LossStats


@overload
def pdl_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None = ..., *, return_stats: Literal[False] = ..., **options: Any
) -> Tensor: ...


@overload
def pdl_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None = ..., *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, LossStats]: ...


@overload
def pdl_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor | None = ..., *, return_stats: bool, **options: Any
) -> Tensor | tuple[Tensor, LossStats]: ...


def pdl_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    expected_upstream: float | Tensor = 1.0,
    inplace: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
    **unexpected: Any,
) -> Tensor | tuple[Tensor, LossStats]:
    r"""Cross entropy in which every token counts by a weight of its class: Power-Law Decay Loss.

    With z the logits after `logit_scale` and `softcap`, y the targets, w the weights, u the token weights, s the label
    smoothing, and *counted* the tokens with y != ignore_index and u != 0::

        ce_i = lse(z_i) - z_i[y_i]
        n_i  = u_i ((1 - s) w[y_i] ce_i + s / V * sum_j w_j (lse(z_i) - z_ij))
        L    = sum_i n_i / D + z_loss * sum_i |u_i| lse(z_i)**2 / D_z          over counted tokens

    ============  =================================  ==================
    reduction     D                                  D_z
    ============  =================================  ==================
    "mean"        sum_i w[y_i] |u_i|                 sum_i |u_i|
    "token_mean"  number of counted tokens           sum_i |u_i|
    "sum"         1                                  1
    "none"        1, and one loss per token          1
    ============  =================================  ==================

    `normalizer` replaces both denominators. A denominator of 0 makes its term 0.

    Args:
        logits: (..., V) float16, bfloat16 or float32, any strides; float64 too, on the eager backend. The class
            dimension is the last one (torch has it second).
        targets: (...) int32 or int64 class indices.
        weights: (V,) floating, one weight per vocabulary entry, as `power_law_weights` makes them; None means 1. They
            enter in float32 whatever the logits' dtype.
        token_weights: (...) floating, any sign: sample weights, advantages, masks.
        ignore_index: targets of this value contribute exactly 0, as do tokens with a token weight of 0; their logits
            are not read and may hold nan.
        reduction: "mean" is torch's weighted mean. It is not invariant to gradient accumulation or data parallelism;
            for that, pass a shared `normalizer`.
        normalizer: a number >= 0 or a 0-d tensor, the one denominator of everything; only with "mean". Negative or
            non-finite values in a tensor propagate.
        label_smoothing: torch's: the smoothing term uses every class's weight, the denominator only w[y_i]. One
            never-seen class of weight 1e7 therefore owns that term; cap the table before smoothing.
        z_loss: adds z_loss |u_i| lse_i**2, whatever the weights.
        softcap: softcap * tanh(z / softcap), applied after `logit_scale`.
        logit_scale: multiplies the logits, in float32; products beyond the finite range are clamped to it.
        expected_upstream: a finite number other than 0, or a 0-d tensor on any device, which is not waited for: what
            the loss will be multiplied by before its backward, as by a loss scale or one over the accumulation steps.
            Forward forms the gradient for it. Where the upstream gradient turns out to be another, backward forms it
            again from the logits: never a wrong number. Where a tensor holds 0, inf or nan, 1 is expected. Without
            effect with reduction="none" and where tensors are traced.
        inplace: the gradient may overwrite the logits. Whoever reads them afterwards reads the gradient; a second
            backward raises; an upstream gradient other than the expected one rounds it a second time, so that float16
            loses small gradients. Refused for leaves that require grad, their views, and overlapping elements. Without
            effect where no gradient is needed, with reduction="none", and where tensors are traced.
        return_stats: also return `LossStats`: unweighted NLL, accuracy, sum of weights, token count.
        backend: "auto" (Triton for CUDA and ROCm tensors, eager elsewhere and for float64), "triton" or "eager".

    Returns:
        The loss, float32 (float64 for float64 logits): 0-d, or (...) for "none". With `return_stats`, (loss, stats).

    Unlike torch, nothing to average (no counted token, all weights 0) gives a loss of 0 that is still attached to the
    graph, and gradients of 0, not nan.

    Raises:
        ValueError: shapes, sizes, devices or options.
        TypeError: dtypes and types.
        IndexError: a target that is neither a class nor `ignore_index`, on CPU. On a GPU it makes the row's loss and
            gradient nan without waiting for the device; PDL_KERNELS_VALIDATE=1 raises there too.
        NotImplementedError: `weights`, `token_weights` or `normalizer` require grad.
        RuntimeError: the backend cannot run; a second derivative; a functorch transform.

    Cost, in bytes per logit of b bytes: forward reads b; with a gradient it reads b once or twice, the second time
    meant to hit the second-level cache, and writes b. Kept for backward: the gradient and the logits, and 8 bytes a
    token. Backward is free for the expected upstream gradient; another one costs one more read and write, as does any
    on the eager backend off the CPU, where comparing the two would wait for the device.

    Traced tensors (torch.compile, torch.export, FakeTensorMode, make_fx, torch.jit.trace, FlopCounterMode, meta
    tensors) meet two operators, "pdl_kernels::cross_entropy" and its backward, which mutate nothing.

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> loss = pdl_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    >>> round(loss.item(), 4)
    0.5516

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """
    checks.check_names("pdl_cross_entropy", unexpected)
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
    checks.check_tensors(logits, targets, weights, token_weights)
    traced = tracing.is_traced(logits, targets, weights, token_weights)
    denominator = checks.check_normalizer(normalizer, reduction, logits.device, traced=traced)
    expected = checks.check_expected_upstream(expected_upstream, logits.device, traced=traced)
    if not torch.compiler.is_compiling():
        tracing.refuse_transforms("pdl_cross_entropy", logits)
    if inplace and not traced and logits.requires_grad and torch.is_grad_enabled():
        checks.check_inplace(logits)
    inputs = LossInputs(logits, targets, weights, token_weights, denominator, expected)
    loss, scalars, token_count = operation.cross_entropy(inputs, options, backend, inplace=inplace, traced=traced)
    if not return_stats:
        return loss
    assert scalars is not None
    assert token_count is not None
    return loss, stats_of(scalars, token_count)


def stats_of(scalars: Tensor, token_count: Tensor) -> LossStats:
    scalars = scalars.detach().clone()  # backward reads the others: changing a statistic must not reach them
    # Indexing would ask for the device of a fake tensor, which need not exist.
    nll, accuracy, weight_sum = (scalars.select(0, number) for number in (NLL, ACCURACY, WEIGHT_SUM))
    return LossStats(nll, accuracy, weight_sum, token_count.detach())
