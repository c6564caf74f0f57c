# mypy: ignore-errors
"""Numbers that device functions read by name."""

import triton.language as tl

from pdl_kernels import options


class Constant(tl.constexpr):
    """A `tl.constexpr` that Triton compares fast.

    At each launch Triton compares every global of a kernel with what it was when the kernel was compiled. For plain
    ones that took 0.6 to 0.8 us each on a CPU, 26 times in a forward and backward.
    """

    def __ne__(self, other):
        return self.value != getattr(other, "value", other)


LOG2E = Constant(1.4426950408889634)
LN2 = Constant(0.6931471805599453)
LARGEST = Constant(3.4028234663852886e38)  # the largest finite float32
MINUS_INFINITY_PAIR = Constant(0xFF80FF80 - 2**32)  # two bfloat16 in one int32
MINUS_INFINITY_HALVES = Constant(0xFC00FC00 - 2**32)  # two float16 in one int32
WARP_SIZE = Constant(32)  # NVIDIA's; the planner chooses the single-pass kernel nowhere else

# Where LossOutputs.scalars holds what.
INVERSE_DENOMINATOR = Constant(options.INVERSE_DENOMINATOR)
INVERSE_Z_DENOMINATOR = Constant(options.INVERSE_Z_DENOMINATOR)
WEIGHT_TOTAL = Constant(options.WEIGHT_TOTAL)
NLL = Constant(options.NLL)
ACCURACY = Constant(options.ACCURACY)
WEIGHT_SUM = Constant(options.WEIGHT_SUM)
EXPECTED_UPSTREAM = Constant(options.EXPECTED_UPSTREAM)
