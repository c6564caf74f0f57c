"""Whether the gradient may overwrite the logits."""

from torch import Tensor


def share_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def refuse_inplace(logits: Tensor) -> None:
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
