"""Compiles the kernels that the launcher would launch, for every target, and prints one JSON line per case.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled:

    TRITON_INTERPRET=0 python tests/compile_kernels.py [PATTERN]
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import aot
import torch

from pdl_kernels.kernels import cross_entropy as kernels
from pdl_kernels.kernels import launch
from pdl_kernels.ops.cross_entropy import empty_gradient
from pdl_kernels.options import LossOptions

DTYPES = ("bfloat16", "float16", "float32")
WARP = {"gfx942": 64}
PLAIN = LossOptions()
EVERYTHING = LossOptions(
    label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5, return_stats=True, reduction="token_mean"
)


class Case(NamedTuple):
    kernel: str
    target: str
    dtype: str = "bfloat16"
    name: str = "plain"
    options: LossOptions = PLAIN
    vocab_size: int = 128256
    stride: int | None = None  # of a row, where it is not the vocabulary's size
    column_stride: int = 1
    gradient: bool = True
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def id(self) -> str:
        return f"{self.kernel}-{self.name}-{self.dtype}-{self.target}"


def cases() -> list[Case]:
    found = []
    for target in aot.TARGETS:
        for dtype in DTYPES:
            found.append(Case("loss_rows_kernel", target, dtype))
        found.append(Case("loss_rows_kernel", target, name="everything", options=EVERYTHING))
        found.append(Case("loss_rows_kernel", target, name="forward", gradient=False))
        found.append(Case("gradient_rows_kernel", target))
        found.append(Case("gradient_rows_kernel", target, name="everything", options=EVERYTHING))
        found.append(Case("slice_rows_kernel", target, gradient=False))
        for kernel in ("denominators_kernel", "merge_rows_kernel", "scale_rows_kernel", "reduce_rows_kernel"):
            found.append(Case(kernel, target))
    one_target = {
        "smoothing": Case("", "", options=PLAIN._replace(label_smoothing=0.1)),
        "z_loss": Case("", "", options=PLAIN._replace(z_loss=1e-4)),
        "softcap": Case("", "", options=PLAIN._replace(softcap=30.0)),
        "scale": Case("", "", options=PLAIN._replace(logit_scale=0.5)),
        "stats": Case("", "", options=PLAIN._replace(return_stats=True)),
        "sum": Case("", "", options=PLAIN._replace(reduction="sum")),
        "no_weights": Case("", "", arguments=(("weights", False),)),
        "token_weights": Case("", "", arguments=(("token_weights", True),)),
        "int32_targets": Case("", "", arguments=(("targets", "*i32"),)),
        "small_vocabulary": Case("", "", vocab_size=1000),
        "v32000": Case("", "", vocab_size=32000),
        "v262144": Case("", "", vocab_size=262144),
        "unaligned_rows": Case("", "", vocab_size=50257),
        "padded_rows": Case("", "", vocab_size=50257, stride=50264),
        "column_stride": Case("", "", vocab_size=50257, stride=1, column_stride=64),
    }
    for name, case in one_target.items():
        found.append(case._replace(kernel="loss_rows_kernel", target="sm_90", name=name))
    for dtype in ("float16", "float32"):
        found.append(Case("loss_rows_kernel", "sm_90", dtype, "forward", gradient=False))
        found.append(Case("gradient_rows_kernel", "sm_90", dtype))
        found.append(Case("loss_rows_kernel", "sm_90", dtype, "unaligned_rows", vocab_size=50257))
    found.append(Case("gradient_rows_kernel", "sm_90", name="unaligned_rows", vocab_size=50257))
    found.append(Case("slice_rows_kernel", "sm_90", name="unaligned_rows", vocab_size=50257, gradient=False))
    return found


def compile_case(case: Case) -> dict[str, Any]:
    rows, V = 4096, case.vocab_size
    stride = V if case.stride is None else case.stride
    dtype = getattr(torch, case.dtype)
    logits = torch.empty_strided((1, rows, V), (0, stride, case.column_stride), dtype=dtype, device="meta")
    gradient = empty_gradient(logits) if case.gradient else None
    plan = launch.plan_rows(
        rows, V, dtype.itemsize, 132,
        two_passes=case.gradient and case.kernel == "loss_rows_kernel",
        smoothing=case.options.label_smoothing > 0, unit_stride=launch.has_unit_stride(logits),
        warp_size=WARP.get(case.target, 32),
    )  # fmt: skip
    variant = launch.make_variant(logits, case.options, gradient, plan)
    kernel = getattr(kernels, case.kernel)
    arguments = aot.row_arguments(
        kernel, variant, dtype=case.dtype, gradient=case.gradient, divisible=V % 16 == 0, **dict(case.arguments)
    )
    compile_options = launch.row_compile_options(plan, limits_registers=case.target != "gfx942")
    if case.kernel in ("denominators_kernel", "reduce_rows_kernel"):
        compile_options = launch.REDUCE_OPTIONS
        arguments.update(
            normalizer="*fp32", token_count="*i64!", loss="*fp32!", REDUCTION=("constexpr", "mean"),
            NUMBER=("constexpr", False), SUM_WEIGHTS=("constexpr", True), STATS=("constexpr", True),
            BLOCK=("constexpr", launch.REDUCE_BLOCK), row_stats="*fp32!", token_weights="*fp32!",
        )  # fmt: skip
        arguments = {name: arguments[name] for name in kernel.arg_names}
    elif case.kernel == "merge_rows_kernel":
        compile_options = {"num_warps": 1, **launch.COMPILE_OPTIONS}
    compiled = aot.compile_kernel(kernel, case.target, arguments, **compile_options)
    machine = aot.machine_code(compiled)
    memory = {name: n for name, n in machine.opcodes.items() if name.startswith(("LDG", "STG", "global_"))}
    bulk = [
        line for line in compiled.asm["ttgir"].splitlines() if "tt.store" in line and f"x{variant.vector}x!tt" in line
    ]
    layouts = {line.rsplit("#blocked", 1)[1].split(">")[0] for line in bulk}
    # The walking loops are those that read the logits' tiles, the first of them the maximum and the sum.
    hot = [loop for loop in aot.loops(machine) if sum(".128" in text and "LDG" in text for text in loop) >= plan.unroll]
    return {
        "id": case.id,
        "case": case._replace(options=list(case.options))._asdict(),
        "warps": compile_options["num_warps"],
        "registers": machine.registers,
        "spills": machine.spills,
        "shared_bytes": machine.shared_bytes,
        "memory": memory,
        "tile_store_layouts": sorted(layouts),
        "instructions_per_element": [len(loop) / (plan.unroll * variant.vector) for loop in hot],
        "fused": "FFMA" in machine.opcodes or "v_fma_f32" in machine.opcodes or "v_fmac_f32_e32" in machine.opcodes,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    pattern = sys.argv[1] if len(sys.argv) > 1 else ""
    for case in cases():
        if pattern in case.id:
            print(json.dumps(compile_case(case)), flush=True)


if __name__ == "__main__":
    main()
