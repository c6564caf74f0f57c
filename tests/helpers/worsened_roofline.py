"""Runs the roofline on a kernel that was made worse on purpose.

A program of its own, because kernels that were imported under TRITON_INTERPRET=1 cannot be compiled:

    TRITON_INTERPRET=0 python tests/helpers/worsened_roofline.py WORSENING [ARGUMENTS OF THE ROOFLINE]
"""

import re
import sys
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


if __name__ == "__main__":
    {f.__name__: f for f in (more_instructions, narrow_accesses, spills, another_disassembler, unknown_walks)}[
        sys.argv[1]
    ]()
    sys.exit(roofline.main(sys.argv[2:]))
