"""Makes calls of `doctor --check` through the ordinary launch path, on tensors with memory, and prints how many kernels
had to be compiled: those that benchmarks.compile_ahead had not put into Triton's cache. Launches go nowhere.

    TRITON_INTERPRET=0 TRITON_CACHE_DIR=... PYTHONPATH=. \\
        python tests/helpers/launch_from_cache.py VOCABULARY DTYPE [CASES]
"""

import sys
import warnings

import torch
from triton import knobs
from triton.runtime.driver import driver

from benchmarks import compile_ahead
from benchmarks.roofline.compile import public_calls_take_any_tensor
from benchmarks.roofline.hardware import HARDWARE
from benchmarks.stubbed_device import StubbedDriver
from pdl_kernels.doctor import correctness
from pdl_kernels.doctor.cases import RECIPES, cases_for
from pdl_kernels.kernels import launch


def main() -> None:
    vocab_size, dtype = int(sys.argv[1]), sys.argv[2]
    most = int(sys.argv[3]) if len(sys.argv) > 3 else None
    warnings.filterwarnings("ignore")
    driver.set_active(StubbedDriver(HARDWARE[compile_ahead.TARGET].target))
    launch.device_of = lambda device: compile_ahead.DEVICE
    found = {True: 0, False: 0}

    def count(**what) -> None:
        found[what["cache_hit"]] += 1

    knobs.compilation.listener = count
    cases = [case for case in cases_for(compile_ahead.DEVICE.multiprocessors, [vocab_size]) if case.dtype == dtype]
    for case in cases[:most]:
        recipe = RECIPES[case.recipe]
        problem = correctness.make_problem(case, torch.device("cpu"))
        call = correctness.make_call(problem, recipe, correctness.make_upstream(problem, recipe), "triton")
        with public_calls_take_any_tensor(), correctness.reading_twice(recipe.read_twice):
            call()
            call()
    print(found[True], found[False])


if __name__ == "__main__":
    main()
