"""What both losses say of gradients: second derivatives raise, and arguments that are not differentiable get none."""

from typing import Any

import torch
from torch import Tensor


class RefuseDoubleBackward(torch.autograd.Function):
    """The identity on a gradient. Its own backward raises."""

    @staticmethod
    def forward(ctx: Any, operation: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        """`sources` are what the gradient depends on, so that differentiating in them comes through here."""
        ctx.operation = operation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx.operation)


def refuse(operation: str) -> None:
    raise RuntimeError(
        f"{operation} cannot be differentiated twice: its gradients are formed by kernels that autograd does not see; "
        "for second derivatives use torch.nn.functional.cross_entropy, after torch.nn.functional.linear if need be"
    )


def no_gradients(ctx: Any, *, after: int) -> tuple[None, ...]:
    """For the arguments of a function after the first ones, which alone are differentiable."""
    return (None,) * (len(ctx.needs_input_grad) - after)
