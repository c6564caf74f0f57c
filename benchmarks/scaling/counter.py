"""Counts what a process hands to torch.distributed, and how often it passes over large tensors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.scaling.hardware import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER

# What a rank hands over: the name of the parameter. Those that are missing here are counted as kinds of their own, by
# their first tensor, so that nothing is sent unseen.
COUNTED = {
    "all_gather_single": (ALL_GATHER, "input_tensor"),
    "all_gather_into_tensor": (ALL_GATHER, "input_tensor"),
    "all_gather": (ALL_GATHER, "tensor"),
    "all_reduce": (ALL_REDUCE, "tensor"),
    "reduce_scatter_single": (REDUCE_SCATTER, "input"),
    "reduce_scatter_tensor": (REDUCE_SCATTER, "input"),
}
OTHERS = ("all_to_all", "all_to_all_single", "broadcast", "gather", "reduce", "reduce_scatter", "scatter", "send")


class Sent(NamedTuple):
    """One call of this rank."""

    kind: str
    payload: int  # bytes


class Collectives:
    """Watches torch.distributed from its creation on: made before whoever keeps its functions under other names."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self.inside = False
        for name in (*COUNTED, *OTHERS):
            function = getattr(dist, name, None)
            if function is not None:
                watched = self._watched(name, function)
                setattr(dist, name, watched)
                setattr(distributed_c10d, name, watched)

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind, parameter = COUNTED.get(name, (name, None))
        names = function.__wrapped__.__code__.co_varnames if hasattr(function, "__wrapped__") else ()

        @functools.wraps(function)
        def watched(*arguments: Any, **keywords: Any) -> Any:
            if self.inside:  # one public function that calls another
                return function(*arguments, **keywords)
            given = {**dict(zip(names, arguments, strict=False)), **keywords}
            tensors = [leaf for leaf in tree_leaves(given.get(parameter, arguments)) if isinstance(leaf, Tensor)]
            self.sent.append(Sent(kind, tensors[0].nbytes if tensors else 0))
            self.inside = True
            try:
                return function(*arguments, **keywords)
            finally:
                self.inside = False

        return watched

    def taken(self) -> list[Sent]:
        """What was sent since the last time."""
        sent, self.sent = self.sent, []
        return sent


class Passes(TorchDispatchMode):
    """Bytes that torch's operations read and write of tensors with at least so many elements, and what is all-reduced.

    Operations that make a view or touch a few elements are passed over. Of a DTensor its local part is looked at.
    """

    FEW = ("gather", "index", "index_put_", "scatter", "_unsafe_index_put")

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.moved = 0
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        outputs = function(*arguments, **(keywords or {}))
        name = function._schema.name.split("::")[1]
        if function.namespace == "_c10d_functional" and name == "all_reduce":
            self.sent.append(Sent(ALL_REDUCE, arguments[0].nbytes))
        if name in self.FEW or name.startswith(("empty", "new_empty")) or _is_view(function, arguments, outputs):
            return outputs
        read = [] if name.startswith(("zeros", "ones", "full", "new_zeros")) else tree_leaves((arguments, keywords))
        for leaf in (*read, *tree_leaves(outputs)):
            large = isinstance(leaf, Tensor) and leaf.numel() >= self.elements
            if large and not isinstance(leaf, FakeTensor):  # DTensor asks those without memory for shapes
                self.moved += leaf.nbytes
        return outputs


def _is_view(function: Any, arguments: Any, outputs: Any) -> bool:
    """Whether an operation that may return a view of its first argument did."""
    alias = function._schema.returns[0].alias_info if function._schema.returns else None
    if alias is None or alias.is_write or not isinstance(outputs, Tensor):
        return alias is not None and not alias.is_write
    return outputs.untyped_storage()._cdata == arguments[0].untyped_storage()._cdata
