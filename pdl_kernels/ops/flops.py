"""Floating point operations of the fused loss, as torch.utils.flop_counter.FlopCounterMode counts those of F.linear.

It counts matrix products alone, two operations for each multiplication and addition, and every token, whether it
contributes or not.
"""

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def _forward_flops(hidden: Any, lm_head_weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    _, _, _, _, to_hidden, to_weight, _ = out_shape
    return _products(hidden, lm_head_weight, 1 + (len(to_hidden) == 2) + (len(to_weight) == 2))


def _backward_flops(
    upstream: Any,
    to_hidden: Any,
    to_weight: Any,
    to_bias: Any,
    row_state: Any,
    scalars: Any,
    hidden: Any,
    lm_head_weight: Any,
    *_: Any,
    out_shape: Any,
    **__: Any,
) -> int:
    found, waiting = map(math.prod, out_shape), map(math.prod, (to_hidden, to_weight, to_bias))
    if all(size in (0, waits) for size, waits in zip(found, waiting, strict=True)):
        return 0  # forward has formed them
    first, second, _bias = out_shape
    return _products(hidden, lm_head_weight, 1 + (math.prod(first) > 0) + (math.prod(second) > 0))


def _products(hidden: Any, lm_head_weight: Any, number: int) -> int:
    return 2 * number * math.prod(hidden[:-1]) * math.prod(lm_head_weight)


def share_formulas() -> None:
    """Register the formulas where the counter is imported; importing it for that would import Triton."""
    counting = sys.modules.get("torch.utils.flop_counter")
    if counting is None:
        return
    formulas = {
        torch.ops.pdl_kernels.linear_cross_entropy: _forward_flops,
        torch.ops.pdl_kernels.linear_cross_entropy_backward: _backward_flops,
    }
    for operator, formula in formulas.items():
        if operator not in counting.flop_registry:
            counting.register_flop_formula(operator)(formula)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, counting.FlopCounterMode):  # has copied what was registered when it was made
            for operator in formulas:
                counter.flop_registry.setdefault(operator, counting.flop_registry[operator])
