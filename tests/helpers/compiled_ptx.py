"""Compiles kernels as the package would launch them, and says what a verifier of PTX needs to know of the launches.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled. Reads a JSON list
of `ptx_races.Call` and writes one of `ptx_races.Kernel`:

    echo '[["single_pass_rows_kernel", 4096, 2]]' | TRITON_INTERPRET=0 python tests/helpers/compiled_ptx.py
"""

import contextlib
import functools
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.roofline.compile import Launch, compiled_launches
from helpers.ptx_races import Call, Kernel
from pdl_kernels.kernels import launch, planner
from pdl_kernels.ops.rows import empty_gradient
from pdl_kernels.options import SCALARS, LossInputs, LossOptions

BITS = {"i32": 32, "i64": 64}


def compiled(call: Call) -> Kernel:
    logits = torch.empty(1, call.rows, call.vocab_size, dtype=getattr(torch, call.dtype), device="meta")
    inputs = LossInputs(logits, logits.new_empty(call.rows, dtype=torch.int64), None, None)
    plan_loss = functools.partial(planner.plan_loss, **_shape(call))
    with (
        edited(call),
        launch.planned_by(plan_loss),
        compiled_launches(call.architecture, lambda name: name == call.kernel) as launches,
    ):
        if call.kernel == "scale_rows_kernel":
            launch.scale(logits, torch.empty(len(SCALARS), device="meta"), torch.empty((), device="meta"))
        else:
            launch.forward(inputs, LossOptions(), empty_gradient(logits))
    assert len(launches) == 1, f"{call.kernel} was launched {len(launches)} times"
    return described(call, launches[0])


def _shape(call: Call) -> dict[str, Any]:
    """What the planner is told to choose."""
    if call.blocks:
        return {"only": planner.SINGLE_PASS, "ctas": call.blocks}
    return {"only": planner.TWO_PASSES} if call.kernel == "loss_rows_kernel" else {}


@contextlib.contextmanager
def edited(call: Call) -> Iterator[None]:
    """Within, the kernel is launched from a copy of its source with passages replaced, each of which occurs once."""
    if not call.edits:
        yield
        return
    modules = (launch, launch.kernels, launch.reductions)
    owner = next(module for module in modules if hasattr(module, call.kernel))
    source = Path(sys.modules[getattr(owner, call.kernel).fn.__module__].__file__).read_text()
    for passage, instead in call.edits:
        assert source.count(passage) == 1, f"{source.count(passage)} times in {call.kernel}'s module:\n{passage}"
        source = source.replace(passage, instead)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "edited_kernels.py")
        path.write_text(source)
        specification = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        with mock.patch.object(owner, call.kernel, getattr(module, call.kernel)):
            yield


def described(call: Call, found: Launch) -> Kernel:
    metadata, ptx = found.compiled.metadata, found.compiled.asm["ptx"]
    shape = {
        "grid_dim": [call.rows * metadata.num_ctas, found.programs // call.rows, 1],
        "block_dim": [metadata.num_warps * 32, 1, 1],
        "cluster_dim": [metadata.num_ctas, 1, 1],
        "dynamic_shared_bytes": metadata.shared,
    }
    return Kernel(found.kernel, ptx, shape, list(_arguments(found, ptx)))


def _arguments(found: Launch, ptx: str) -> Iterator[dict[str, Any]]:
    """The values of all parameters of the PTX that are no tensors."""
    names = [(name, kind) for name, kind in found.compiled.src.signature.items() if kind != "constexpr"]
    parameters = re.findall(rf"\.param .*\b({found.kernel}_param_\d+)", ptx)
    for parameter, (name, kind) in zip(parameters, names, strict=False):
        value = found.arguments[name]
        if kind in BITS:
            yield {"parameter": parameter, "type": f"u{BITS[kind]}", "value": value % 2 ** BITS[kind]}
        elif kind == "fp32":
            yield {"parameter": parameter, "type": "f32", "value": value}
        else:
            assert kind.startswith("*"), f"{name} has the type {kind}"
    # Triton adds pointers to working memory, for which these kernels have no use.
    for parameter in parameters[len(names) :]:
        yield {"parameter": parameter, "type": "pointer", "value": None}


if __name__ == "__main__":
    print(json.dumps([compiled(Call(*fields)) for fields in json.load(sys.stdin)]))
