"""Counts what an operation really allocates, loads and stores, on a CPU and in Triton's interpreter."""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers import Watching


class Span(NamedTuple):
    """Addresses of a tensor's storage."""

    begin: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Span":
        storage = tensor.untyped_storage()
        return cls(storage.data_ptr(), storage.data_ptr() + storage.nbytes())


class Allocations(Watching):
    """Records every new storage, and how many elements of watched tensors torch's own operations read and write.

    An element is read by an operation that takes it as an argument and does not merely make a view of it, and written
    by one that returns it changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []  # kept alive, so that no address is used twice
        self.read: dict[int, int] = {}  # elements, by the address of the storage
        self.written: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        outputs = function(*arguments, **keywords)
        taken = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        given = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
        addresses = {_address(tensor) for tensor in taken}
        for tensor in given:
            if _address(tensor) not in addresses and tensor.untyped_storage().nbytes() > 0:
                self.made.append(tensor.detach())
        if not _makes_views(function) and not _touches_few(function):
            self._count(function, arguments, keywords)
        return outputs

    def _count(self, function, arguments, keywords) -> None:
        schema = function._schema.arguments
        named = list(zip(schema, arguments, strict=False))
        named += [(argument, keywords[argument.name]) for argument in schema if argument.name in keywords]
        overwrites_all = function in (torch.ops.aten.copy_.default, torch.ops.aten.zero_.default)
        for argument, value in named:
            for tensor in (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)):
                written = argument.alias_info is not None and argument.alias_info.is_write
                only_written = written and (argument.is_out or overwrites_all)
                if written:
                    _add(self.written, tensor)
                if not only_written:
                    _add(self.read, tensor)

    def large(self, elements: int) -> list[Tensor]:
        """What was allocated with at least so many elements."""
        return [tensor for tensor in self.made if tensor.untyped_storage().nbytes() // tensor.itemsize >= elements]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _add(counts: dict[int, int], tensor: Tensor) -> None:
    counts[_address(tensor)] = counts.get(_address(tensor), 0) + tensor.numel()


def _makes_views(function) -> bool:
    infos = [result.alias_info for result in function._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _touches_few(function) -> bool:
    """Operations that take a large tensor and look at a few of its elements."""
    return function.overloadpacket in (
        torch.ops.aten.gather,
        torch.ops.aten.scatter_,
        torch.ops.aten.index_put_,
        torch.ops.aten.index_put,
    )


class KernelAccesses:
    """Bytes that interpreted kernels load from and store to, within the spans that are asked about."""

    def __init__(self) -> None:
        self.loads: list[tuple[object, int]] = []  # (addresses of active lanes, bytes per element)
        self.stores: list[tuple[object, int]] = []

    @staticmethod
    def within(accesses, span: Span) -> int:
        return sum(
            int(((addresses >= span.begin) & (addresses < span.end)).sum()) * size for addresses, size in accesses
        )

    @staticmethod
    def total(accesses) -> int:
        return sum(addresses.size * size for addresses, size in accesses)


@contextmanager
def kernel_accesses(monkeypatch):
    """Every load and store of the interpreter, while the context lasts."""
    from triton.runtime.interpreter import interpreter_builder

    accesses = KernelAccesses()
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def record(into, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        into.append((pointers.data[mask.data], size))

    def counting_load(pointers, mask, *rest):
        record(accesses.loads, pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers, value, mask, *rest):
        record(accesses.stores, pointers, mask)
        return store(pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", counting_load)
        patch.setattr(interpreter_builder, "create_masked_store", counting_store)
        yield accesses
