"""The functions a user calls: check, then one operation."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import Unpack, overload

from pdl_kernels.distributed.collectives import name_of
from pdl_kernels.losses import checks
from pdl_kernels.ops import cross_entropy, linear_cross_entropy, sharded_cross_entropy
from pdl_kernels.options import (
    ACCURACY,
    NLL,
    WEIGHT_SUM,
    CallOptions,
    CrossEntropyKeywords,
    LinearInputs,
    LinearKeywords,
    LinearOptions,
    LinearOutputs,
    LossInputs,
    LossOptions,
    LossOutputs,
    LossStats,
)


@overload
def pdl_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    token_weights: Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[CrossEntropyKeywords],
) -> Tensor: ...


@overload
def pdl_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    token_weights: Tensor | None = ...,
    return_stats: Literal[True],
    **options: Unpack[CrossEntropyKeywords],
) -> tuple[Tensor, LossStats]: ...


@overload
def pdl_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    token_weights: Tensor | None = ...,
    return_stats: bool,
    **options: Unpack[CrossEntropyKeywords],
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
    group: ProcessGroup | None = None,
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
        group: the ranks of torch.distributed over which the class dimension is split, as tensor parallelism splits the
            output layer: each holds some neighbouring columns of the logits, in the order of the ranks, maybe none, and
            gets the loss of the whole and its own columns' gradient. `inplace` writes in backward then, also with
            "none"; `expected_upstream` has no effect. `targets` number the columns of the whole and are,
            with all other arguments, the same on every rank; `weights` hold all columns on every rank, or on every rank
            its own. Forward sends 12 bytes a token to every rank (16 with label smoothing, 4 more for the weights where
            each rank has its own), backward sends nothing.

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
        LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    )
    call = checks.check_options(CallOptions(normalizer, expected_upstream, inplace, backend, group))
    checks.check_normalizer(call.normalizer, options.reduction)
    inputs = LossInputs(logits, targets, weights, token_weights, call.normalizer, call.expected_upstream)
    outputs: LossOutputs
    if checks.is_dtensor(logits):
        from pdl_kernels.losses import dtensors

        outputs = dtensors.dtensor_cross_entropy(inputs, options, call)
    elif group is not None:
        checks.check_group(group)
        checks.check_inputs(inputs, sharded=True)
        outputs = sharded_cross_entropy.sharded_cross_entropy(
            inputs, options, call.backend, group, None, inplace=call.inplace
        )
    else:
        checks.check_inputs(inputs)
        outputs = cross_entropy.cross_entropy(inputs, options, call.backend, inplace=call.inplace)
    return (outputs.loss, stats_of(outputs)) if options.return_stats else outputs.loss


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    seed: int | float | Tensor | None = ...,
    return_stats: Literal[False] = ...,
    **options: Unpack[LinearKeywords],
) -> Tensor: ...


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    seed: int | float | Tensor | None = ...,
    return_stats: Literal[True],
    **options: Unpack[LinearKeywords],
) -> tuple[Tensor, LossStats]: ...


@overload
def pdl_linear_cross_entropy(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    weights: Tensor | None = ...,
    *,
    bias: Tensor | None = ...,
    token_weights: Tensor | None = ...,
    seed: int | float | Tensor | None = ...,
    return_stats: bool,
    **options: Unpack[LinearKeywords],
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
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
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
        group: the ranks over which the rows of `lm_head_weight`, and of `bias`, are split: see `pdl_cross_entropy`.
            `hidden` is the same on all ranks, and so is its gradient, which is summed over them.
        sequence_parallel: with a `group`, `hidden` (S / ranks, ..., H) holds this rank's share of dimension 0 and is
            gathered, its gradient comes back by a reduce-scatter, and `targets` (S, ...) hold all of it.
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
        LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap, logit_scale, return_stats)
    )
    linear = checks.check_options(LinearOptions(chunk_size, accumulate_dtype, compact, row_sampling, sequence_parallel))
    call = checks.check_options(CallOptions(normalizer, expected_upstream, backend=backend, group=group))
    checks.check_normalizer(call.normalizer, options.reduction)
    checks.check_row_sampling(linear, options)
    checks.check_seed(seed)
    numbers = seed, call.normalizer, call.expected_upstream
    inputs = LinearInputs(hidden, lm_head_weight, bias, targets, weights, token_weights, *numbers)
    checks.check_sharded_linear(linear, call.group, seed)
    checks.check_linear_inputs(inputs, group, sequence_parallel=linear.sequence_parallel)
    name = None if group is None else name_of(group)
    outputs = linear_cross_entropy.linear_cross_entropy(inputs, options, linear, call.backend, name)
    return (outputs.loss, stats_of(outputs)) if options.return_stats else outputs.loss


def stats_of(outputs: LossOutputs | LinearOutputs) -> LossStats:
    assert outputs.token_count is not None
    scalars = outputs.scalars.detach().clone()  # backward reads the others: changing a statistic must not reach them
    # Indexing would ask for the device of a fake tensor, which need not exist.
    nll, accuracy, weight_sum = (scalars.select(0, number) for number in (NLL, ACCURACY, WEIGHT_SUM))
    return LossStats(nll, accuracy, weight_sum, outputs.token_count.detach())
