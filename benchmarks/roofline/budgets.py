"""What fails a run: spills, narrow accesses of aligned rows, and walks that cost more than their budget.

To raise a budget, change the number and say in `reason` what it buys and how that was seen. "It grew" is no reason.
"""

from typing import Any, NamedTuple

TOLERANCE = 0.10
TARGET, DTYPE = "sm_90", "bfloat16"  # for which there are budgets
MAX_CLUSTER_FENCES = 2  # one exchange


class Budget(NamedTuple):
    instructions: float  # per element, in the walk's loop, with every option off
    reason: str


BUDGETS = {
    "forward only": Budget(
        5.7, "unpacking, maximum, multiply-add, exponential and sum are 5; the rest is a tile's loop and rescaling"
    ),
    "first of two": Budget(5.7, "as forward only"),
    "gradient": Budget(5.5, "unpacking, multiply-add, exponential, scale and half a packing are 4.5; then the loop"),
    "single pass": Budget(14.0, "10.2 a column and some 460 a thread, which at 128 columns a thread are 13.9"),
}


def problems(variant: dict[str, Any]) -> list[str]:
    """What is wrong with a variant, as measure.measured returns it."""
    found = []
    if variant["spills"]:
        found.append(f"spills: {variant['spills']}")
    if variant["cluster_fences"] > MAX_CLUSTER_FENCES:
        found.append(f"{variant['cluster_fences']} cluster fences, {MAX_CLUSTER_FENCES} allowed")
    for walk in variant["walks"]:
        where = f"walk {walk['role']!r}"
        if variant["aligned"] and walk["narrow"]:
            written = "" if walk["store_bytes"] is None else f" and written {walk['store_bytes']}"
            found.append(f"{where}: aligned rows are read {walk['load_bytes']}{written} bytes at a time, not 16")
        budget = BUDGETS.get(walk["role"]) if variant["budgeted"] else None
        if budget is not None and walk["instructions_per_element"] > (most := budget.instructions * (1 + TOLERANCE)):
            found.append(
                f"{where}: {walk['instructions_per_element']:.2f} instructions per element, {most:.2f} allowed "
                f"(budget {budget.instructions} + {TOLERANCE:.0%})"
            )
    return found
