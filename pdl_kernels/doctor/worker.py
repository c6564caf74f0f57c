"""A process of `pdl-kernels doctor --check`. If a case crashes it, the check goes on with another process.

    python -m pdl_kernels.doctor.worker

It reads one order from standard input, as JSON, and writes its answers to standard output, one JSON object a line:

    {"device": "cuda:0", "backend": "triton", "cases": [[recipe, rows, vocab_size, dtype], ...]}    are they right?
    {"device": "cuda:0", "backend": "triton", "shapes": [[vocab_size, dtype], ...]}                 how fast are they?
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from typing import Any

import torch

from pdl_kernels.doctor.cases import Case
from pdl_kernels.doctor.correctness import check_case
from pdl_kernels.doctor.speed import measure_copy, speeds
from pdl_kernels.errors import first_line


def main() -> None:
    # Only answers may reach standard output, so whatever else is printed there goes to standard error.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=results)

    order = json.load(sys.stdin)
    device = torch.device(order["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "shapes" in order:
        tell(begin="copy")
        tell(end="copy", copy=measure_copy(device))
        for number, shape in enumerate(order["shapes"]):
            tell(begin=number)
            for record in speeds(device, order["backend"], [tuple(shape)]):
                tell(end=number, record=record)
        return
    for number, fields in enumerate(order["cases"]):
        tell(begin=number)
        found, fatal = examine(Case(*fields), device, order["backend"])
        tell(end=number, record=found)
        if fatal:
            return


def examine(case: Case, device: torch.device, backend: str) -> tuple[dict[str, Any], bool]:
    """The verdict on a case, and whether its error has left the device unusable for this process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = check_case(case, device, backend)
            fatal = False
        except Exception as error:  # whatever a kernel, a compiler or a driver raises is a finding
            traceback.print_exc()
            found = {"status": "failed", "problem": f"{type(error).__name__}: {first_line(error)}"[:500]}
            fatal = is_fatal(error)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
    messages = {
        str(warning.message)
        for warning in caught
        if "pdl_kernels" in warning.filename or "Triton" in str(warning.message)
    }
    return {**found, "warnings": sorted(messages)}, fatal


def is_fatal(error: Exception) -> bool:
    """Whether the process can launch nothing more: the driver reports such an error again for every later call."""
    return any(said in str(error) for said in ("CUDA error", "HIP error", "Triton Error [CUDA]", "Triton Error [HIP]"))


if __name__ == "__main__":
    main()
