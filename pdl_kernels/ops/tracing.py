"""When operators take the place of eager mode, and what neither of them supports."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # make_fx(..., pre_dispatch=True) has a stack of modes of its own


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call is recorded, or its tensors hold no data, so that it must be one operator that torch knows.

    That is so under torch.compile, torch.export and torch.jit.trace, under every mode that intercepts operators
    (FakeTensorMode, make_fx, FlopCounterMode, selective checkpointing, ...), under torch.func.functionalize, on meta
    tensors, and on tensors of a class that intercepts them, such as fake tensors outside of their mode.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        or torch._C._are_functorch_transforms_active()
    ):
        return True
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_meta or (
            type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        ):
            return True
    return False


def number_as_tensor(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """What an operator takes for a number, so that another number needs no compilation; fake where `like` is."""
    if value is None or isinstance(value, Tensor):
        return value
    return like.new_full((), value, dtype=torch.float64)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device; None where it is off, and for meta tensors."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def refuse_transforms(what: str, tensor: Tensor) -> None:
    """RuntimeError under functorch transforms and forward-mode differentiation, which would miss the kernels."""
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)  # is_grads_batched=True
    if batched or _other_transforms_than_functionalize():
        raise RuntimeError(
            f"{what} does not support functorch transforms (torch.func.grad, vmap, jvp, is_grads_batched, ...); "
            "use torch.autograd.grad, or torch.nn.functional.cross_entropy inside transforms"
        )
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f"{what} does not support forward-mode differentiation; use torch.nn.functional.cross_entropy for it"
        )


def _other_transforms_than_functionalize() -> bool:
    """Functionalisation passes an operator on as it is."""
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or []
    return any(transform.key() != torch._C._functorch.TransformType.Functionalize for transform in transforms)
