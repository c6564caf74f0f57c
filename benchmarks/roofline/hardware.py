"""What the data sheets say of one device per target."""

from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Hardware(NamedTuple):
    """One GPU. Rates are per multiprocessor and clock, and None where this package has no model of the architecture."""

    name: str
    target: GPUTarget
    memory_bandwidth: float  # bytes per second
    multiprocessors: int
    clock: float  # Hz, boost
    cache_bytes: int  # second level
    registers: int  # 32-bit registers of one of the four partitions of a multiprocessor
    register_unit: int  # registers are given to a thread in multiples of this
    warps: int  # resident, of one partition
    programs: int  # resident, of a multiprocessor
    shared_bytes: int  # of a multiprocessor
    shared_reserve: int  # bytes that every program takes besides its own
    issue_rate: int | None  # lanes whose instruction is issued
    special_rate: int | None  # results of the special function unit (MUFU), conversions to and from integers included


# Bandwidth, multiprocessors and second-level cache: the vendors' data sheets (A100 80GB SXM, H200 SXM, HGX B200,
# MI300X). Clock: the boost clock that their peak FP32 rate implies (19.5, 67, 75 and 163.4 TFLOP/s).
# NVIDIA registers, warps, programs, shared memory, and 16 special functions a clock: the tables of technical
# specifications and of arithmetic throughput per compute capability in the CUDA C++ Programming Guide. Four schedulers,
# each of which issues one instruction of 32 lanes a clock: the tuning guides of the architectures.
# AMD: 512 vector registers a lane, 8 waves of 64 lanes a SIMD, 64 KiB of local memory: the CDNA 3 instruction set
# reference. What it issues together is not modelled here, hence no rates.
HARDWARE = {
    "sm_80": Hardware(
        "A100", GPUTarget("cuda", 80, 32), 2.039e12, 108, 1.41e9, 40 * 2**20,
        16384, 8, 16, 32, 164 * 1024, 1024, 128, 16,
    ),
    "sm_90": Hardware(
        "H200", GPUTarget("cuda", 90, 32), 4.8e12, 132, 1.98e9, 50 * 2**20,
        16384, 8, 16, 32, 228 * 1024, 1024, 128, 16,
    ),
    "sm_100": Hardware(
        "B200", GPUTarget("cuda", 100, 32), 8.0e12, 148, 1.98e9, 126 * 2**20,
        16384, 8, 16, 32, 228 * 1024, 1024, 128, 16,
    ),
    "gfx942": Hardware(
        "MI300X", GPUTarget("hip", "gfx942", 64), 5.3e12, 304, 2.1e9, 32 * 2**20,
        512 * 64, 8, 8, 32, 64 * 1024, 0, None, None,
    ),
}  # fmt: skip
