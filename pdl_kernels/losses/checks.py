"""Every check of what a user passes. Errors name the argument, what came, and what is accepted."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pdl_kernels.backends import autocast_dtype
from pdl_kernels.options import (
    DECLARED,
    Declared,
    LinearInputs,
    LinearOptions,
    LossInputs,
    LossOptions,
)

LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TARGET_DTYPES = (torch.int32, torch.int64)
TORCH_NAMES = {"weight": "weights", "target": "targets", "input": "logits"}
KINDS = {
    int: int,
    float: Real,
    bool: bool,
}  # classes that are accepted where an option declares a type

Options = TypeVar("Options", bound=tuple[Any, ...])  # LossOptions, LinearOptions or CallOptions


def check_names(function: str, unexpected: dict[str, Any]) -> None:
    """TypeError for keywords that the function does not have."""
    for name in unexpected:
        hint = f"; torch's {name}= is called {TORCH_NAMES[name]}= here" if name in TORCH_NAMES else ""
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Options


def check_options(options: Options) -> Options:
    """The options, each in its declared type and range; TypeError or ValueError otherwise."""
    checked: list[Any] = []
    for declared, value in zip(DECLARED[type(options)], options, strict=True):
        if type(value) is type(declared.default) and value == declared.default:  # most are
            checked.append(value)
            continue
        option = declared.option
        given = not (value is None and declared.optional)
        if given and type(value) is not declared.kind:
            value = _of_kind(declared, value)
        if option.choices is not None:
            accepted = not given or value in option.choices
        elif not given or declared.name == "group" or isinstance(value, (bool, Tensor)):
            accepted = True
        else:
            measured = value if option.measure is None else option.measure(value)
            accepted = (
                option.low < measured < option.high
                or (option.low_is_accepted and measured == option.low)
                or (option.high_is_accepted and measured == option.high)
            )
        if not accepted:
            error = TypeError if declared.kind is torch.dtype else ValueError
            raise error(f"{declared.name} is {value!r}; accepted is {option.accepted}")
        if given and declared.kind is float and type(value) is not float and not declared.takes_tensor:
            value = float(value)
        checked.append(value)
    return type(options)(*checked)


def _of_kind(declared: Declared, value: Any) -> Any:
    """A value of another type than the declared one, where it may stand for it; TypeError otherwise."""
    if not declared.option.accepted:
        return bool(value)
    if declared.name == "group":
        if not isinstance(value, ProcessGroup):
            if value == dist.GroupMember.NON_GROUP_MEMBER:  # from torch.distributed.new_group
                raise ValueError("group does not hold this process; accepted are groups that do")
            raise TypeError(f"group is a {type(value).__name__}; accepted is {declared.option.accepted}")
        return value
    if declared.kind in (str, torch.dtype):
        return value  # any other value is none of the choices
    if declared.takes_tensor and isinstance(value, Tensor):
        _check_scalar(declared.name, value)
    elif isinstance(value, bool) or not isinstance(value, KINDS[declared.kind]):
        raise TypeError(f"{declared.name} is a {type(value).__name__}; accepted is {declared.option.accepted}")
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return float(value)  # numpy's scalars would be compared in their own dtype, which rounds the bounds
    return value


def _check_scalar(name: str, value: Tensor) -> None:
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted is a number or a 0-d tensor")
    if value.is_complex():
        raise TypeError(f"{name} is {value.dtype}; accepted are real dtypes")


def check_sharded_linear(linear: LinearOptions, group: ProcessGroup | None, seed: Any) -> None:
    """ValueError for what ranks would do each in its own way, and for what takes ranks."""
    if group is None:
        if linear.sequence_parallel:
            raise ValueError(
                "sequence_parallel is given with group=None; accepted is the group that hidden is split over"
            )
        return
    check_group(group)
    if linear.row_sampling > 0 and seed is None:
        raise ValueError(
            "row_sampling with a group and seed=None; accepted is a seed that is the same on every rank, such as the "
            "step's number: the ranks have to leave out the same tokens"
        )


def check_normalizer(normalizer: Tensor | float | None, reduction: str) -> None:
    """Combinations and tensors that are refused."""
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer is given with reduction={reduction!r}; accepted is reduction='mean' alone")
    if isinstance(normalizer, Tensor) and normalizer.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("normalizer requires grad; accepted is one that does not: detach it")


def check_group(group: ProcessGroup) -> None:
    """ValueError for a group that this process does not belong to."""
    if not torch.compiler.is_compiling() and dist.get_rank(group) < 0:
        raise ValueError(f"group does not hold this process, rank {dist.get_rank()}; accepted are groups that do")


def check_row_sampling(linear: LinearOptions, options: LossOptions) -> None:
    """Options that row_sampling refuses."""
    if linear.row_sampling > 0 and options.z_loss > 0:
        raise ValueError(
            f"row_sampling is {linear.row_sampling} with z_loss {options.z_loss}; accepted is one of them: a row's "
            "z-loss does not shrink with its weight"
        )
    if linear.row_sampling > 0 and linear.compact is False:
        raise ValueError("row_sampling needs to know how many rows it keeps; accepted are compact=None and True")


def check_seed(seed: Any) -> None:
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.is_complex():
            raise ValueError(f"seed has shape {tuple(seed.shape)}, {seed.dtype}; accepted is a number or a 0-d tensor")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, Real) or not math.isfinite(seed)):
        raise ValueError(f"seed is {seed!r}; accepted is a finite number or a 0-d tensor")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; accepted is a torch.Tensor")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; accepted is a plain one: {name}.values() of a jagged one, or padded"
        )


def is_dtensor(value: Any) -> bool:
    """Whether it is a torch.distributed.tensor.DTensor, without importing that."""
    return type(value) is not Tensor and hasattr(value, "device_mesh")


def check_inputs(inputs: LossInputs, *, sharded: bool = False) -> None:
    """Shapes, dtypes and devices; ValueError, TypeError or NotImplementedError.

    Args:
        sharded: the logits hold some columns of the vocabulary, maybe none. Whether the weights are as long as the
            vocabulary is then for the ranks to find out together.
    """
    logits, targets, weights, token_weights, *_ = inputs
    check_tensor("logits", logits)
    check_tensor("targets", targets)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"logits are {logits.dtype}; accepted are {_names(LOGITS_DTYPES)}")
    for name, value in (("targets", targets), ("weights", weights), ("token_weights", token_weights)):
        if is_dtensor(value):
            raise TypeError(f"{name} are a DTensor and logits are not; accepted is a plain tensor: {name}.to_local()")
    shape = logits.shape
    if not shape or (shape[-1] == 0 and not sharded):
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
    check_factors(targets, weights, token_weights, "logits", logits, None if sharded else logits.shape[-1])


def check_target_dtype(targets: Tensor) -> None:
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets are {targets.dtype}; accepted are {_names(TARGET_DTYPES)} class indices")


def check_factors(
    targets: Tensor,
    weights: Tensor | None,
    token_weights: Tensor | None,
    name: str,
    owner: Tensor,
    vocab_size: int | None,  # None: not known
) -> None:
    """What weighs the targets, against the tensor called `name` that decides the device."""
    _check_same_device("targets", targets, name, owner)
    if weights is not None:
        check_weight_table(weights)
        _check_same_device("weights", weights, name, owner)
        if vocab_size is not None and weights.shape != (vocab_size,):
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
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} are {value.dtype}; accepted are floating dtypes")
    if value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} require grad; accepted are tensors that do not: pass {name}.detach()")


def _check_same_device(name: str, value: Tensor, owner_name: str, owner: Tensor) -> None:
    if value.device != owner.device:
        raise ValueError(
            f"{name} are on {value.device} and {owner_name} on {owner.device}; accepted is the device of {owner_name}"
        )


def check_linear_inputs(
    inputs: LinearInputs, group: ProcessGroup | None = None, *, sequence_parallel: bool = False
) -> None:
    """Shapes, dtypes and devices; ValueError, TypeError or NotImplementedError.

    Args:
        group: over which the rows of the weight are split, or None.
        sequence_parallel: the hidden states are split over it, too.
    """
    sharded = group is not None
    hidden, lm_head_weight, bias, targets, weights, token_weights, *_ = inputs
    _check_parameter("lm_head_weight", lm_head_weight, may_be_empty=sharded)
    check_tensor("hidden", hidden)
    check_tensor("targets", targets)
    if hasattr(hidden, "device_mesh"):
        raise TypeError("hidden is a DTensor; accepted is a plain tensor: .to_local() or .full_tensor()")
    autocast = autocast_dtype(hidden.device) is not None
    for name, value in (("hidden", hidden), ("lm_head_weight", lm_head_weight)):
        if value.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name} is {value.dtype}; accepted are {_names(LOGITS_DTYPES)}")
    if lm_head_weight.dim() != 2 or (lm_head_weight.shape[0] == 0 and not sharded):
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
        _check_parameter("bias", bias, may_be_empty=sharded)
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
    check_target_dtype(targets)
    expected = tuple(hidden.shape[:-1])
    if sequence_parallel:
        if not expected:
            raise ValueError("hidden has shape (H,) with sequence_parallel; accepted is (S / ranks, ..., H)")
        assert group is not None
        expected = (expected[0] * group.size(), *expected[1:])
    if targets.shape != expected:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and hidden {tuple(hidden.shape)}; accepted are targets of "
            f"shape {expected}" + (", those of all ranks" if sequence_parallel else "")
        )
    check_factors(targets, weights, token_weights, "hidden", hidden, None if sharded else vocab_size)


def _check_parameter(name: str, value: Any, *, may_be_empty: bool = False) -> None:
    if isinstance(value, torch.nn.Module):
        wrapped = hasattr(value, "base_layer") or any("lora" in part for part, _ in value.named_modules())
        hint = (
            "it is wrapped by an adapter, whose share a plain weight would leave out: merge the adapter, or leave the "
            "output layer out of its target modules and use pdl_cross_entropy on its logits"
            if wrapped
            else f"pass its tensor, module.{'bias' if name == 'bias' else 'weight'}"
        )
        raise TypeError(f"{name} is a {type(value).__name__} module; accepted is a torch.Tensor: {hint}")
    check_tensor(name, value)
    if hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor; accepted is a plain tensor: under FSDP call the loss inside the forward of the "
            f"module that holds it, under tensor parallelism pass {name}.to_local() and group=mesh.get_group(); "
            "full_tensor() alone would leave its gradient unsummed (docs/distributed.md)"
        )
    if value.numel() == 0 and not may_be_empty:
        raise ValueError(
            f"{name} has no elements (shape {tuple(value.shape)}), as ZeRO stage 3 and FSDP leave a sharded parameter; "
            "gather it first, for example inside deepspeed.zero.GatheredParameters, or call the loss from the model's "
            "forward"
        )
