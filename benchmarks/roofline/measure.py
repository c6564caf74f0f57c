"""One launch as a row of the report."""

import re
from typing import Any

from benchmarks.roofline import budgets, model
from benchmarks.roofline.cases import Case
from benchmarks.roofline.compile import Launch
from benchmarks.roofline.hardware import HARDWARE
from benchmarks.roofline.machine import CLUSTER_FENCES, FENCES, accesses, count, machine_code
from benchmarks.roofline.walks import find_walks

OPTION_FIELDS = ("smoothing", "z_loss", "softcap", "scale", "stats")  # of launch.Variant


def measured(case: Case, launch: Launch) -> dict[str, Any]:
    """Everything the report says about a launch, ready for JSON.

    Raises:
        MachineCodeError: the machine code is not what it should be.
    """
    hardware = HARDWARE[case.target]
    machine = machine_code(launch.compiled)
    walks = find_walks(launch, machine.instructions)
    resident = model.resident_programs(hardware, machine, launch.warps)
    variant = launch.arguments.get("VARIANT")
    work = _work(case, launch)
    prediction = model.predict(hardware, machine, walks, work, resident) if work else None
    aligned = bool(walks) and _aligned(launch)
    plain = bool(walks) and not any(getattr(variant, field) for field in OPTION_FIELDS)
    result = {
        "kernel": launch.kernel,
        **case._asdict(),
        "layout": case.layout,
        "variant": variant._asdict() if variant is not None else None,
        "programs": launch.programs,
        "warps": launch.warps,
        "programs_per_cluster": launch.compiled.metadata.num_ctas,
        "registers": machine.registers,
        "spills": machine.spills,
        "shared_bytes": machine.shared_bytes,
        "resident_programs": resident,
        "fences": count(machine.instructions, FENCES),
        "cluster_fences": count(machine.instructions, CLUSTER_FENCES) if launch.compiled.metadata.num_ctas > 1 else 0,
        "fused_multiply_add": count(machine.instructions, ("FFMA", "v_fma", "v_fmac", "v_pk_fma")),
        "accesses": [
            {**one._asdict(), "instructions": times} for one, times in sorted(accesses(machine.instructions).items())
        ],
        "tile_store_layouts": _tile_store_layouts(launch),
        "aligned": aligned,
        "budgeted": plain and aligned and (case.target, case.dtype) == (budgets.BUDGET_TARGET, budgets.BUDGET_DTYPE),
        "walks": [{**walk._asdict(), "instructions_per_element": walk.instructions_per_element} for walk in walks],
        "model": prediction._asdict() if prediction else None,
    }
    return {**result, "problems": budgets.problems(result)}


def _aligned(launch: Launch) -> bool:
    """Whether the kernel was told that rows start on 16 bytes, or that they do after a head."""
    variant = launch.arguments["VARIANT"]
    writes = launch.kernel != "scale_rows_kernel" and launch.arguments.get("gradient") is not None
    return variant.layout != "any" and (not writes or variant.gradient_layout != "any")


def _work(case: Case, launch: Launch) -> model.Work | None:
    variant = launch.arguments.get("VARIANT")
    if variant is None:
        return None
    # A row held on chip is one tile.
    tile = case.vocab_size if variant.chunks else variant.lanes * variant.vector * variant.unroll
    slice_tiles = launch.arguments.get("slice_tiles")
    return model.Work(
        programs=launch.programs,
        threads=variant.lanes,
        elements=min(case.vocab_size, slice_tiles * tile) if slice_tiles else case.vocab_size,
        tile=tile if launch.kernel != "scale_rows_kernel" else variant.lanes * variant.vector,
        element_bytes=16 // variant.vector,
        writes=launch.arguments.get("gradient") is not None,
    )


def _tile_store_layouts(launch: Launch) -> list[str]:
    """The compiler's layouts of the stores of whole vectors; more than one would break `store_target_column`."""
    variant = launch.arguments.get("VARIANT")
    if variant is None:
        return []
    stores = [line for line in launch.compiled.asm["ttgir"].splitlines() if "tt.store" in line]
    shape = rf"{variant.lanes * variant.vector}" if variant.chunks else rf"\d+x{variant.vector}"
    tile = re.compile(rf"tensor<{shape}x!tt\.ptr<\w+>, (#\w+)>")  # of pointers, with its layout
    return sorted({match[1] for match in map(tile.search, stores) if match})
