"""The kernels behind the loss: which one is made to run, which were launched, and which should have been.

This is the only file of the doctor that knows about `pdl_kernels.kernels`, which cannot be imported without Triton.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pdl_kernels.doctor.cases import DTYPES, Case

HELD_ROW_KERNEL = "single_pass_rows_kernel"  # holds a row on chip, where the planner chooses it
OF_SEVERAL_RANKS = {"merge_shards_kernel"}  # a check is one process: tests/kernels/test_shard_kernels.py runs them


@contextmanager
def reading_twice(wanted: bool) -> Iterator[None]:
    """Within, the kernel that reads rows twice forms loss and gradient, whatever the planner would choose."""
    if not wanted:
        yield
        return
    from pdl_kernels.kernels import launch, planner

    with launch.planned_by(functools.partial(planner.plan_loss, only=planner.TWO_PASSES)):
        yield


@contextmanager
def heard_launches(names: list[str]) -> Iterator[None]:
    """Within, the name of every compiled kernel that Triton launches is appended to `names`."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def hear(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hear)
    try:
        yield
    finally:
        knobs.runtime.launch_enter_hook.remove(hear)


def kernels_to_see(device: torch.device, cases: Sequence[Case]) -> set[str]:
    """The kernels that these cases should launch: all that one process can, HELD_ROW_KERNEL only if it is planned."""
    from pdl_kernels import kernels
    from pdl_kernels.kernels import launch, planner

    modules = [
        importlib.import_module(found.name) for found in pkgutil.iter_modules(kernels.__path__, "pdl_kernels.kernels.")
    ]
    names = {name for module in modules for name in vars(module) if name.endswith("_kernel")} - OF_SEVERAL_RANKS
    described = launch.device_of(device)
    for case in cases:
        itemsize = DTYPES[case.dtype].itemsize
        best, *_ = planner.plan_loss(
            case.rows, case.vocab_size, itemsize, described, launch.TRITON_VERSION,
            head=case.vocab_size * itemsize % planner.VECTOR_BYTES != 0, clusters=launch.clusters_wanted(),
        )  # fmt: skip
        if best.kernel == planner.SINGLE_PASS:
            return names
    return names - {HELD_ROW_KERNEL}
