"""One launch as a row of the report, and what is wrong with it."""

import re
from typing import Any

from benchmarks.roofline import budgets, model
from benchmarks.roofline.cases import CompiledCall
from benchmarks.roofline.compile import Launch
from benchmarks.roofline.hardware import HARDWARE
from benchmarks.roofline.machine import CLUSTER_FENCES, FENCES, accesses, count, machine_code
from benchmarks.roofline.walks import VECTOR_BYTES, find_walks

OPTION_FIELDS = ("smoothing", "z_loss", "softcap", "scale", "stats")  # of the package's Variant
FUSED_MULTIPLY_ADD = ("FFMA", "v_fma", "v_fmac", "v_pk_fma")


def measured(case: CompiledCall, launch: Launch) -> dict[str, Any]:
    """Everything the report says about a launch, ready for JSON.

    Raises:
        MachineCodeError: the machine code is not what it should be.
    """
    hardware = HARDWARE[case.target]
    machine = machine_code(launch.compiled)
    code = machine.instructions
    walks = find_walks(launch, code)
    variant = launch.arguments.get("VARIANT")
    blocks = launch.compiled.metadata.num_ctas
    resident = model.resident_programs(hardware, machine.registers, machine.shared_bytes, launch.warps)
    prediction = model.predict(hardware, machine, walks, _work(case, launch), resident) if variant is not None else None
    aligned = bool(walks) and _aligned(launch)
    plain = bool(walks) and not any(getattr(variant, field) for field in OPTION_FIELDS)
    result = {
        "kernel": launch.kernel,
        **case._asdict(),
        "layout": case.layout,
        "variant": variant._asdict() if variant is not None else None,
        "programs": launch.programs,
        "warps": launch.warps,
        "programs_per_cluster": blocks,
        "registers": machine.registers,
        "spills": machine.spills,
        "shared_bytes": machine.shared_bytes,
        "resident_programs": resident,
        "fences": count(code, FENCES),
        "cluster_fences": count(code, CLUSTER_FENCES) if blocks > 1 else 0,
        "fused_multiply_add": count(code, FUSED_MULTIPLY_ADD),
        "accesses": [{**one._asdict(), "instructions": times} for one, times in sorted(accesses(code).items())],
        "tile_store_layouts": _tile_store_layouts(launch),
        "aligned": aligned,
        "budgeted": plain and aligned and (case.target, case.dtype) == (budgets.TARGET, budgets.DTYPE),
        "walks": [{**walk._asdict(), "instructions_per_element": walk.instructions_per_element} for walk in walks],
        "model": prediction._asdict() if prediction else None,
    }
    return {**result, "problems": budgets.problems(result)}


def _aligned(launch: Launch) -> bool:
    """Whether the kernel was told that rows start on 16 bytes, or that they do after a head."""
    variant = launch.arguments["VARIANT"]
    writes = launch.kernel != "scale_rows_kernel" and launch.arguments.get("gradient") is not None
    return variant.layout != "any" and (not writes or variant.gradient_layout != "any")


def _work(case: CompiledCall, launch: Launch) -> model.Work:
    variant = launch.arguments["VARIANT"]
    vector_columns = variant.lanes * variant.vector
    # A row held on chip is one tile.
    tile = case.vocab_size if variant.chunks else vector_columns * variant.unroll
    slice_tiles = launch.arguments.get("slice_tiles")
    return model.Work(
        programs=launch.programs,
        threads=variant.lanes,
        elements=min(case.vocab_size, slice_tiles * tile) if slice_tiles else case.vocab_size,
        tile=vector_columns if launch.kernel == "scale_rows_kernel" else tile,
        element_bytes=VECTOR_BYTES // variant.vector,
        writes=launch.arguments.get("gradient") is not None,
    )


def _tile_store_layouts(launch: Launch) -> list[str]:
    """The compiler's layouts of the stores of whole vectors; more than one would break `store_target_column`."""
    variant = launch.arguments.get("VARIANT")
    if variant is None:
        return []
    shape = rf"{variant.lanes * variant.vector}" if variant.chunks else rf"\d+x{variant.vector}"
    tile = re.compile(rf"tt\.store.*?tensor<{shape}x!tt\.ptr<\w+>, (#\w+)>")  # of pointers, with its layout
    return sorted(set(tile.findall(launch.compiled.asm["ttgir"])))
