"""Ahead-of-time compilation of the package's kernels for a named GPU, without a GPU, and what the machine code does."""

import os
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\*")
LAUNCH_INTEGERS = ("rows", "rows_inner", "V", "ignore_index", "slice_columns", "slice_tiles", "slices")


class Machine(NamedTuple):
    """What the assembler made of one kernel."""

    registers: int
    spills: int  # loads and stores of local memory, or the bytes of scratch on AMD
    shared_bytes: int
    opcodes: Counter[str]
    instructions: list[tuple[int, str]]  # address, text; NVIDIA alone
    assembly: str


def compile_kernel(kernel: Any, target: str, arguments: dict[str, Any], **options: Any) -> Any:
    """Compile `kernel` as its launcher would.

    Args:
        arguments: for every argument its Triton type ("*bf16", "i32", "fp32"), or ("constexpr", value); a pointer type
            with a trailing "!" starts on 16 bytes, an integer type with one is divisible by 16.
    """
    names = list(kernel.arg_names)
    missing = set(names) ^ set(arguments)
    assert not missing, f"arguments differ from the kernel's: {missing}"
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(names):
        kind = arguments[name]
        if isinstance(kind, tuple):
            signature[name] = "constexpr"
            constants[name] = kind[1]
        else:
            signature[name] = kind.rstrip("!")
            if kind.endswith("!"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def machine_code(compiled: Any) -> Machine:
    if "cubin" in compiled.asm:
        return _nvidia(compiled)
    text = compiled.asm["amdgcn"]
    scratch = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
    opcodes = Counter(line.split()[0] for line in text.splitlines() if re.match(r"^\s+[a-z]+_[a-z0-9_]+\s", line))
    return Machine(registers, scratch, compiled.metadata.shared, opcodes, [], text)


def _nvidia(compiled: Any) -> Machine:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [
            subprocess.run([f"{TOOLS}/cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        ]
    matches = [m for m in map(INSTRUCTION.match, dump[0].splitlines()) if m]
    instructions = [(int(m[1], 16), m[2]) for m in matches]
    opcodes = Counter(opcode(text) for _, text in instructions)
    assert opcodes, "no machine code found: has the disassembler's format changed?"
    spills = sum(n for name, n in opcodes.items() if name.startswith(("LDL", "STL")))
    registers = int(re.search(r"REG:(\d+)", dump[1])[1])
    return Machine(registers, spills, compiled.metadata.shared, opcodes, instructions, dump[0])


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].rstrip(";")


def loops(machine: Machine) -> list[list[str]]:
    """The innermost loops' instructions, in program order."""
    jumps = []
    for address, text in machine.instructions:
        found = re.search(r"0x([0-9a-f]+)", text) if opcode(text).startswith("BRA") else None
        if found and int(found[1], 16) < address:
            jumps.append((int(found[1], 16), address))
    inner = [j for j in jumps if not any(o != j and o[0] >= j[0] and o[1] <= j[1] for o in jumps)]
    return [[text for address, text in machine.instructions if low <= address <= high] for low, high in sorted(inner)]


def row_arguments(
    kernel: Any,
    variant: Any,
    *,
    dtype: str = "bfloat16",
    targets: str = "*i64",
    weights: bool = True,
    token_weights: bool = False,
    gradient: bool = True,
    stats: bool | None = None,
    upstream: bool = True,
    unless_one: bool = True,
    based: bool = True,
    divisible: bool = True,
) -> dict[str, Any]:
    """The arguments of a row kernel as its launcher passes them for `variant`."""
    logits = POINTERS[dtype] + ("!" if based else "")
    none = ("constexpr", None)
    known: dict[str, Any] = {
        "logits": logits,
        "gradient": logits if gradient else none,
        "targets": targets,
        "weights": "*fp32!" if weights else none,
        "token_weights": "*fp32!" if token_weights else none,
        "scalars": "*fp32!",
        "slice_state": "*fp32!",
        "row_loss": "*fp32!",
        "row_state": "*fp32!",
        "row_stats": "*fp32!" if variant.stats else none,
        "upstream": "*fp32" if upstream else none,
        "UNLESS_ONE": ("constexpr", unless_one),
        "SLICES": ("constexpr", 16),
        "VARIANT": ("constexpr", variant),
        "stride_column": ("constexpr", 1) if variant.unit_stride else "i32",
        "gradient_stride_column": ("constexpr", 1) if variant.unit_stride else "i32",
    }
    arguments = {}
    for name in kernel.arg_names:
        if name in known:
            arguments[name] = known[name]
        elif name in LAUNCH_INTEGERS or "stride" in name:
            arguments[name] = "i32!" if name == "V" and divisible else "i32"
        else:
            arguments[name] = "fp32"
    return arguments
