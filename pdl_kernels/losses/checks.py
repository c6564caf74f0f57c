"""Checks of what a user passes. Every error names the argument, what came, and what is accepted."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pdl_kernels.backends import BACKENDS
from pdl_kernels.options import REDUCTIONS, LossOptions

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.int32, torch.int64)
FLOAT32 = torch.finfo(torch.float32)
TORCH_NAMES = {"weight": "weights", "target": "targets", "input": "logits"}


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_names(function: str, unexpected: dict[str, Any]) -> None:
    for name in unexpected:
        hint = f"; torch's {name}= is called {TORCH_NAMES[name]}= here" if name in TORCH_NAMES else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def _check_real(name: str, value: object, accepted: str) -> None:
    if type(value) is float:  # the ordinary case; asking the abstract class takes longer than all other checks
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is {accepted}")


def check_options(
    *,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    return_stats: bool,
    backend: str,
) -> LossOptions:
    """The checked options; ValueError or TypeError otherwise."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index is a {type(ignore_index).__name__}; accepted is an integer")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index is {ignore_index}; accepted are integers of 64 bits, signed")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; accepted are {', '.join(map(repr, REDUCTIONS))}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; accepted are {', '.join(map(repr, BACKENDS))}")
    _check_real("label_smoothing", label_smoothing, "a number from 0 to 1")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; accepted are numbers from 0 to 1")
    _check_real("z_loss", z_loss, "a finite number >= 0")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}; accepted are finite numbers >= 0")
    if softcap is not None:
        _check_real("softcap", softcap, "a finite number > 0, or None")
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap is {softcap}; accepted are finite numbers > 0, or None for no cap")
    _check_real("logit_scale", logit_scale, "a finite number > 0")
    if not 0 < logit_scale < math.inf:
        raise ValueError(f"logit_scale is {logit_scale}; accepted are finite numbers > 0")
    return LossOptions(
        ignore_index,
        reduction,
        float(label_smoothing),
        float(z_loss),
        None if softcap is None else float(softcap),
        float(logit_scale),
        bool(return_stats),
    )


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is a torch.Tensor")


def check_tensors(logits: Tensor, targets: Tensor, weights: Tensor | None, token_weights: Tensor | None) -> None:
    """Shapes, dtypes and devices; ValueError, TypeError or NotImplementedError."""
    _check_tensor("logits", logits)
    _check_tensor("targets", targets)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits are {logits.dtype}; accepted are {_names(LOGITS_DTYPES)}")
    if type(logits) is not Tensor and hasattr(logits, "device_mesh"):
        raise TypeError(
            "logits are a DTensor; accepted is a plain tensor: .full_tensor(), or .to_local() if the vocabulary is "
            "not sharded"
        )
    shape = logits.shape
    if not shape or shape[-1] == 0:
        raise ValueError(f"logits have shape {tuple(shape)}; accepted is (..., V) with V >= 1 classes")
    check_target_dtype(targets)
    if targets.shape != shape[:-1]:
        hint = ""
        if logits.dim() > 2 and targets.shape == logits.shape[:1] + logits.shape[2:]:
            hint = "; the class dimension is the last one here, where torch.nn.functional.cross_entropy has it second"
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and logits {tuple(logits.shape)}; accepted are targets of "
            f"shape {tuple(logits.shape[:-1])}{hint}"
        )
    check_factors(targets, weights, token_weights, "logits", logits, logits.shape[-1])


def check_target_dtype(targets: Tensor) -> None:
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets are {targets.dtype}; accepted are {_names(TARGET_DTYPES)} class indices")


def check_factors(
    targets: Tensor, weights: Tensor | None, token_weights: Tensor | None, name: str, owner: Tensor, vocab_size: int
) -> None:
    """What weighs the targets, against the tensor called `name` that decides the device."""
    _check_same_device("targets", targets, name, owner)
    if weights is not None:
        check_weight_table(weights)
        _check_same_device("weights", weights, name, owner)
        if weights.shape != (vocab_size,):
            raise ValueError(
                f"weights have shape {tuple(weights.shape)}; accepted is ({vocab_size},), one per column of the "
                "logits: the model's output layer may be longer than the tokenizer"
            )
    if token_weights is not None:
        _check_factor("token_weights", token_weights)
        _check_same_device("token_weights", token_weights, name, owner)
        if token_weights.shape != targets.shape:
            raise ValueError(
                f"token_weights have shape {tuple(token_weights.shape)}; accepted is {tuple(targets.shape)}, the shape "
                "of targets"
            )


def check_weight_table(weights: Tensor) -> None:
    """TypeError, ValueError or NotImplementedError for what cannot be a table of weights, whatever the logits."""
    _check_factor("weights", weights)
    if weights.dim() != 1:
        raise ValueError(f"weights have shape {tuple(weights.shape)}; accepted is (V,), one per vocabulary entry")


def _check_factor(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} are {value.dtype}; accepted are floating dtypes")
    if value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} require grad; accepted are tensors that do not: pass {name}.detach()")


def _check_same_device(name: str, value: Tensor, owner_name: str, owner: Tensor) -> None:
    if value.device != owner.device:
        raise ValueError(
            f"{name} are on {value.device} and {owner_name} on {owner.device}; accepted is the device of {owner_name}"
        )


def check_normalizer(
    normalizer: float | Tensor | None, reduction: str, device: torch.device, *, traced: bool = False
) -> Tensor | float | None:
    """As a number, or as a 0-d tensor on `device`, without waiting for a device."""
    if normalizer is None:
        return None
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; accepted is reduction='mean' alone")
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("normalizer requires grad; accepted is one that does not: detach it")
        _check_scalar("normalizer", normalizer)
        return moved(normalizer, device) if traced else _scalar_on(device, normalizer)
    _check_real("normalizer", normalizer, "a finite number >= 0 or a 0-d tensor")
    if not 0 <= normalizer < math.inf:
        raise ValueError(f"normalizer is {normalizer}; accepted are finite numbers >= 0")
    return normalizer if traced else float(normalizer)  # an integer that is compiled may be a symbol


def check_expected_upstream(value: float | Tensor, device: torch.device, *, traced: bool = False) -> Tensor | float:
    """The expected upstream gradient as a number, or as a 0-d tensor on `device`, without waiting for a device.

    If `traced`, 1: operators form the gradient in backward, whatever was expected.
    """
    if isinstance(value, Tensor):
        _check_scalar("expected_upstream", value)
        return 1.0 if traced else _scalar_on(device, value)
    _check_real("expected_upstream", value, "a finite number other than 0 or a 0-d tensor")
    if not FLOAT32.smallest_normal <= abs(value) <= FLOAT32.max:  # kernels divide by it
        raise ValueError(
            f"expected_upstream is {value}; accepted are finite numbers other than 0, in float32's range: the number "
            "that the loss is multiplied by before backward"
        )
    return 1.0 if traced else float(value)


def _check_scalar(name: str, value: Tensor) -> None:
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted is a number or a 0-d tensor")
    if value.is_complex():
        raise TypeError(f"{name} is {value.dtype}; accepted are real dtypes")


def _scalar_on(device: torch.device, value: Tensor) -> Tensor | float:
    return float(value) if value.device.type == "cpu" and device.type != "cpu" else moved(value, device)


def moved(value: Tensor, device: torch.device) -> Tensor:
    """Detached and on `device`, which is not touched if the value is there: that of a fake tensor need not exist."""
    value = value.detach()
    return value if value.device == device else value.to(device)


def check_inplace(logits: Tensor) -> None:
    """ValueError where the gradient must not overwrite the logits."""
    if logits.is_leaf:
        raise ValueError("inplace=True with logits that are a leaf requiring grad; accepted are results of operations")
    base = logits._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True with logits that are a view of a leaf requiring grad; accepted are results of operations"
        )
    reach = 0  # elements between the first and the last one of the dimensions seen so far
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"inplace=True with logits whose elements overlap in memory (shape {tuple(logits.shape)}, strides "
                f"{logits.stride()}); accepted are tensors whose elements have memory of their own"
            )
        reach += max(size - 1, 0) * stride
