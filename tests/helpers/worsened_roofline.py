"""Runs the roofline on kernels that were made worse on purpose.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled. Each worsening
gets a copy of this process, since Triton compiles a kernel that it knows only once; what it prints goes to
FOLDER/WORSENING, and the last line of that is the exit status.

    TRITON_INTERPRET=0 python tests/helpers/worsened_roofline.py FOLDER [ARGUMENTS OF THE ROOFLINE]
"""

import os
import re
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton
import triton.language as tl

from benchmarks.roofline import __main__ as roofline
from benchmarks.roofline import machine, walks
from pdl_kernels.kernels import launch
from pdl_kernels.kernels import row_kernels as cross_entropy
from pdl_kernels.kernels import row_math as rows


@triton.jit
def slow_transformed(x, logit_scale, softcap, VARIANT: tl.constexpr):
    return rows_tanh(x) * 3.0


@triton.jit
def unaligned_interior_pointer(base, offset, head, ALIGNED: tl.constexpr, VARIANT: tl.constexpr):
    return base + offset + head


rows_tanh = rows.tanh


def more_instructions():
    rows.transformed = slow_transformed


def narrow_accesses():
    cross_entropy.interior_pointer = unaligned_interior_pointer


def spills():
    options = launch.row_compile_options
    launch.row_compile_options = lambda *plan, **softcap: {**options(*plan, **softcap), "maxnreg": 24}


def another_disassembler():
    machine.SASS_LINE = re.compile("never")


def unknown_walks():
    del walks.KERNEL_WALKS["slice_rows_kernel"]


def run_worsened(worsen, path, arguments):
    """In a copy of this process."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    with open(path, "w") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        try:
            worsen()
            status = roofline.main(arguments)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            status = "an exception"
        print(status, flush=True)
    os._exit(0)


if __name__ == "__main__":
    folder, *arguments = sys.argv[1:]
    for worsening in (more_instructions, narrow_accesses, spills, another_disassembler, unknown_walks):
        run_worsened(worsening, Path(folder, worsening.__name__), arguments)
