"""Reads machine code, as text, into instructions, loops and accesses to memory."""

import bisect
import os
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

import networkx  # torch depends on it
import triton

TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\*")
SASS_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
SASS_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # bytes; 4 without a suffix
AMDGCN_LINE = re.compile(r"^\s+([a-z]+\d*_[a-z0-9_]+)\b(.*)")
AMDGCN_LABEL = re.compile(r"^(\.LBB\w+):")
AMDGCN_ACCESS = re.compile(r"^(?:global|buffer|flat)_(load|store)_(\w+?)(?:_d16(?:_hi)?)?$")
AMDGCN_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
AMDGCN_WIDTHS |= {"ushort": 2, "sshort": 2, "short": 2, "ubyte": 1, "sbyte": 1, "byte": 1}

FENCES = ("MEMBAR", "CCTL", "ERRBAR", "FENCE", "UCGABAR", "buffer_wbl2", "buffer_inv")
CLUSTER_FENCES = ("MEMBAR.ALL", "MEMBAR.SC")  # of all memory: one stands at every exchange of a cluster
# What the special function unit does: exponentials, logarithms, reciprocals, conversions but for packing (F2FP).
SPECIAL = ("MUFU", "F2I", "I2F", "F2F.", "v_exp", "v_log", "v_rcp", "v_rsq", "v_sqrt")
LOCAL = ("LDL", "STL")  # memory of one thread, where spilled registers go


class MachineCodeError(Exception):
    """Machine code that does not look as expected: counts from it would mean nothing."""


class Instruction(NamedTuple):
    position: int  # an address, or a line where there are no addresses
    opcode: str
    jump: int | None = None  # the position that it may jump to
    goes_on: bool = True  # the next instruction may follow


class Access(NamedTuple):
    """One access to global memory."""

    kind: str  # "load", "store"
    bytes: int  # of a thread


class Machine(NamedTuple):
    registers: int  # of a thread
    spills: int  # loads and stores of local memory; bytes of scratch on AMD
    shared_bytes: int
    instructions: list[Instruction]


def machine_code(compiled: Any) -> Machine:
    """What the assembler made of a compiled kernel."""
    shared_bytes = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = sum(_number(rf"\.{kind}_count:\s+(\d+)", text) for kind in ("vgpr", "agpr"))
        scratch = _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return Machine(registers, scratch, shared_bytes, parse_amdgcn(text))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, resources = (
            subprocess.run([f"{TOOLS}/cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )
    instructions = parse_sass(code)
    spills = sum(instruction.opcode.startswith(LOCAL) for instruction in instructions)
    return Machine(_number(r"REG:(\d+)", resources), spills, shared_bytes, instructions)


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of cuobjdump's output, without the padding at the end."""
    found = []
    for match in filter(None, map(SASS_LINE.match, text.splitlines())):
        position = int(match[1], 16)
        instruction = SASS_PREDICATE.sub("", match[2])
        opcode = instruction.split()[0]
        jump = re.search(r"0x([0-9a-f]+)", instruction) if opcode.startswith("BRA") else None
        always = instruction == match[2] and re.match(r"(EXIT|RET\S*|BRA\S*\s+0x\w+)$", instruction)
        found.append(Instruction(position, opcode, int(jump[1], 16) if jump else None, not always))
    padding = [i for i in found if i.opcode == "NOP" or i.jump == i.position]
    return _not_empty([i for i in found if i not in padding])


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of one kernel's assembly, with lines for addresses."""
    lines = text.split(".Lfunc_end")[0].splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := AMDGCN_LABEL.match(line))}
    found = []
    for number, match in enumerate(map(AMDGCN_LINE.match, lines)):
        if match and match[1] not in ("s_nop", "s_code_end"):
            jump = labels.get(match[2].split(";")[0].strip()) if "branch" in match[1] else None
            found.append(Instruction(number, match[1], jump, match[1] not in ("s_branch", "s_endpgm")))
    return _not_empty(found)


def innermost_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the loops that contain no other, in program order.

    A loop is instructions that can all reach each other. A jump backwards alone is none: compilers put seldom taken
    code at the end and jump back from it, and start loops in their middle.
    """
    positions = [instruction.position for instruction in instructions]
    flow = networkx.DiGraph()  # of indices
    flow.add_nodes_from(range(len(instructions)))
    for number, instruction in enumerate(instructions):
        if instruction.goes_on and number + 1 < len(instructions):
            flow.add_edge(number, number + 1)
        if instruction.jump is not None and instruction.jump <= positions[-1]:
            flow.add_edge(number, bisect.bisect_left(positions, instruction.jump))  # a label is before its code
    bodies = _innermost(set(flow), flow)
    return [[instructions[number] for number in sorted(body)] for body in sorted(bodies, key=min)]


def _innermost(among: set[int], flow: networkx.DiGraph) -> list[set[int]]:
    found: list[set[int]] = []
    for body in networkx.strongly_connected_components(flow.subgraph(among)):
        first = min(body)
        if len(body) > 1 or flow.has_edge(first, first):
            # Without the instructions through which it is entered, only the loops inside it are left.
            entries = {number for number in body if any(before not in body for before in flow.predecessors(number))}
            found += _innermost(body - (entries or {first}), flow) or [body]
    return found


def access(opcode: str) -> Access | None:
    """What an instruction reads from or writes to global memory."""
    name, *suffixes = opcode.split(".")
    if name in ("LDG", "STG"):
        widths = [SASS_WIDTHS[suffix] for suffix in suffixes if suffix in SASS_WIDTHS]
        return Access("load" if name == "LDG" else "store", widths[0] if widths else 4)
    match = AMDGCN_ACCESS.match(opcode)
    if match is None:
        return None
    if match[2] not in AMDGCN_WIDTHS:
        raise MachineCodeError(f"unknown memory access {opcode}")
    return Access(match[1], AMDGCN_WIDTHS[match[2]])


def accesses(instructions: list[Instruction]) -> Counter[Access]:
    return Counter(found for instruction in instructions if (found := access(instruction.opcode)))


def count(instructions: list[Instruction], prefixes: tuple[str, ...]) -> int:
    return sum(instruction.opcode.startswith(prefixes) for instruction in instructions)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise MachineCodeError(f"nothing like {pattern!r} in the compiler's output: has its format changed?")
    return int(match[1])


def _not_empty(instructions: list[Instruction]) -> list[Instruction]:
    if not instructions:
        raise MachineCodeError("no instruction found: has the disassembler's format changed?")
    return instructions
