"""Checks of what a user passes to the loss fused with the output projection."""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.losses import checks
from pdl_kernels.ops.tracing import autocast_dtype
from pdl_kernels.options import LinearOptions, LossOptions

ACCUMULATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_linear_options(
    *,
    chunk_size: Any,
    accumulate_dtype: Any,
    compact: Any,
    row_sampling: Any,
    options: LossOptions,
) -> LinearOptions:
    """The checked options; ValueError or TypeError otherwise."""
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size is a {type(chunk_size).__name__}; accepted is an integer >= 1, or None")
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; accepted is an integer >= 1 (tokens), or None")
    if accumulate_dtype not in ACCUMULATE_DTYPES:
        accepted = ", ".join(str(dtype) for dtype in ACCUMULATE_DTYPES)
        raise TypeError(f"accumulate_dtype is {accumulate_dtype!r}; accepted are {accepted}")
    if compact is not None and not isinstance(compact, bool):
        raise TypeError(f"compact is a {type(compact).__name__}; accepted are True, False and None")
    if isinstance(row_sampling, bool) or not isinstance(row_sampling, (int, float)):
        raise TypeError(f"row_sampling is a {type(row_sampling).__name__}; accepted is a number >= 0 and < 1")
    if not 0 <= row_sampling < 1:
        raise ValueError(f"row_sampling is {row_sampling}; accepted are numbers >= 0 and < 1")
    if row_sampling > 0 and options.z_loss > 0:
        raise ValueError(
            f"row_sampling is {row_sampling} with z_loss {options.z_loss}; accepted is one of them: a row's z-loss "
            "does not shrink with its weight"
        )
    if row_sampling > 0 and compact is False:
        raise ValueError("row_sampling needs to know how many rows it keeps; accepted are compact=None and True")
    return LinearOptions(chunk_size, accumulate_dtype, compact, float(row_sampling))


def check_linear_tensors(
    hidden: Any,
    lm_head_weight: Any,
    targets: Any,
    bias: Any,
    weights: Any,
    token_weights: Any,
) -> None:
    """Shapes, dtypes and devices; ValueError, TypeError or NotImplementedError."""
    _check_parameter("lm_head_weight", lm_head_weight)
    for name, value in (("hidden", hidden), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; accepted is a torch.Tensor")
    if hasattr(hidden, "device_mesh"):
        raise TypeError("hidden is a DTensor; accepted is a plain tensor: .to_local() or .full_tensor()")
    autocast = autocast_dtype(hidden.device) is not None
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in checks.LOGITS_DTYPES)
    for name, value in (("hidden", hidden), ("lm_head_weight", lm_head_weight)):
        if value.dtype not in checks.LOGITS_DTYPES:
            raise TypeError(f"{name} is {value.dtype}; accepted are {accepted}")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[0] == 0:
        raise ValueError(f"lm_head_weight has shape {tuple(lm_head_weight.shape)}; accepted is (V, H) with V >= 1")
    vocab_size, hidden_size = lm_head_weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != hidden_size:
        shapes = f"hidden has shape {tuple(hidden.shape)} and lm_head_weight {tuple(lm_head_weight.shape)}"
        if hidden.dim() > 0 and hidden.shape[-1] == vocab_size:
            raise ValueError(
                f"{shapes}, which is transposed; accepted is lm_head_weight of shape (V, H), as torch.nn.Linear has "
                f"it, here (V, {vocab_size}): pass lm_head_weight.T"
            )
        raise ValueError(f"{shapes}; accepted is hidden of shape (..., {hidden_size})")
    parameters = [("lm_head_weight", lm_head_weight)]
    if bias is not None:
        _check_parameter("bias", bias)
        if bias.shape != (vocab_size,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted is ({vocab_size},), one per class")
        parameters.append(("bias", bias))
    for name, value in parameters:
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} and hidden on {hidden.device}; accepted is one device")
        if value.dtype != hidden.dtype and (not autocast or torch.float64 in (value.dtype, hidden.dtype)):
            raise TypeError(
                f"{name} is {value.dtype} and hidden {hidden.dtype}; accepted is one dtype for all, or autocast"
            )
    checks.check_target_dtype(targets)
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and hidden {tuple(hidden.shape)}; accepted are targets of "
            f"shape {tuple(hidden.shape[:-1])}"
        )
    checks.check_factors(targets, weights, token_weights, "hidden", hidden, vocab_size)


def _check_parameter(name: str, value: Any) -> None:
    if isinstance(value, torch.nn.Module):
        wrapped = hasattr(value, "base_layer") or any("lora" in part for part, _ in value.named_modules())
        hint = (
            "it is wrapped by an adapter, whose share a plain weight would leave out: merge the adapter, or leave the "
            "output layer out of its target modules and use pdl_cross_entropy on its logits"
            if wrapped
            else f"pass its tensor, module.{'bias' if name == 'bias' else 'weight'}"
        )
        raise TypeError(f"{name} is a {type(value).__name__} module; accepted is a torch.Tensor: {hint}")
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is a torch.Tensor")
    if hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor; accepted is a plain tensor: gather it with .full_tensor(), which autograd follows, "
            "or keep the output layer out of tensor and fully sharded parallelism"
        )
    if value.numel() == 0:
        raise ValueError(
            f"{name} has no elements (shape {tuple(value.shape)}), as ZeRO stage 3 and FSDP leave a sharded parameter; "
            "gather it first, for example inside deepspeed.zero.GatheredParameters, or call the loss from the model's "
            "forward"
        )


def check_seed(seed: Any, row_sampling: float, hidden: Tensor) -> Tensor | None:
    """The seed as a 0-d tensor like `hidden`; None where no row is sampled. Without one, torch's generator draws it."""
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.is_complex():
            raise ValueError(f"seed has shape {tuple(seed.shape)}, {seed.dtype}; accepted is a number or a 0-d tensor")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, Real) or not math.isfinite(seed)):
        raise ValueError(f"seed is {seed!r}; accepted is a finite number or a 0-d tensor")
    if row_sampling == 0:
        return None
    # Made from `hidden`, so that it is fake where hidden is, outside of the fake tensors' mode too.
    if seed is None:
        return torch.randint_like(hidden.new_empty((), dtype=torch.int64), 2**31)
    if isinstance(seed, Tensor):
        return checks.moved(seed, hidden.device)
    return hidden.new_full((), seed, dtype=torch.float64)
