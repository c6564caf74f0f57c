"""Which shapes are measured where, and whether they fit."""

import psutil
import torch

from benchmarks.inputs import DTYPES, VOCABULARIES, Case

# (rows, hidden size, V, share of ignored rows): half and more of the tokens are prompt in instruction tuning.
LINEAR_GPU_SHAPES = ((8192, 4096, 128256, 0.0), (8192, 4096, 128256, 0.5), (8192, 4096, 32000, 0.0))
LINEAR_CPU_SHAPES = ((2048, 512, 32000, 0.0), (2048, 512, 32000, 0.5))
LINEAR_QUICK_SHAPES = {"cuda": ((4096, 2048, 128256, 0.0),), "cpu": ((256, 256, 32000, 0.0),)}
# Copies of the logits that a case may need at once: the logits, what in-place contenders overwrite, two gradients
# under check, and torch's log-probabilities, their gradient and the logits' gradient.
COPIES = 7


def default_cases(device: torch.device, dtypes: list[str], *, quick: bool) -> list[Case]:
    """What matters most comes first, so that an interrupted run has measured it."""
    if device.type == "cuda":
        shapes = {dtype: _gpu_shapes(dtype, quick) for dtype in dtypes}
    else:
        shapes = {dtype: _cpu_shapes(dtype, quick) for dtype in dtypes}
    return [Case(rows, vocab_size, dtype) for dtype in dtypes for rows, vocab_size in shapes[dtype]]


def default_linear_cases(device: torch.device, dtypes: list[str], *, quick: bool) -> list[Case]:
    kind = "cuda" if device.type == "cuda" else "cpu"
    shapes = LINEAR_GPU_SHAPES if kind == "cuda" else LINEAR_CPU_SHAPES
    if quick:
        shapes = LINEAR_QUICK_SHAPES[kind]
    # Where 16 bits are measured, float32 adds little on a GPU, and float16 is bfloat16's like.
    chosen = [dtype for dtype in dtypes if dtype != "float16" and not (kind == "cuda" and dtype == "float32")] or dtypes
    return [Case(rows, V, dtype, hidden, ignored) for dtype in chosen for rows, hidden, V, ignored in shapes]


def default_dtypes(device: torch.device, *, quick: bool) -> list[str]:
    if device.type == "cuda":
        return ["bfloat16"] if quick else list(DTYPES)
    return ["float32", "bfloat16"] if quick else ["float32", "bfloat16", "float16"]


def _gpu_shapes(dtype: str, quick: bool) -> list[tuple[int, int]]:
    if quick:
        return [(4096, 32000), (4096, 128256), (64, 128256)]
    shapes = [(8192, vocab_size) for vocab_size in VOCABULARIES]
    if dtype == "bfloat16":
        shapes += [(rows, vocab_size) for vocab_size in (128256, 32000) for rows in (1, 16, 256, 2048, 16384)]
        shapes += [(16384, 262144)]
    return shapes


# More than 32 MB even in 16 bits, where malloc's own caching ends: below, torch's buffers cost it no fresh pages.
def _cpu_shapes(dtype: str, quick: bool) -> list[tuple[int, int]]:
    if quick:
        return [(768, 32000), (192, 128256)]
    if dtype == "float16":
        return [(1024, 32000), (512, 128256)]
    shapes = [(1024, 32000), (512, 128256), (512, 50257), (256, 151936), (128, 262144)]
    return shapes + [(rows, 32000) for rows in (1, 16, 256)]


def parse_shapes(text: str) -> list[tuple[int, int, int]]:
    """ "1024x32000,2048x512x32000" as [(1024, 32000, 0), (2048, 32000, 512)], hidden last; ValueError otherwise."""
    shapes = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) not in (2, 3) or not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(
                f"shape {part.strip()!r}: accepted are ROWSxVOCABULARY, such as 1024x32000, and for the linear loss "
                "ROWSxHIDDENxVOCABULARY, such as 2048x512x32000"
            )
        rows, *hidden_sizes, vocab_size = map(int, numbers)
        if vocab_size < 2:
            raise ValueError(f"shape {part.strip()!r}: a vocabulary has at least 2 entries")
        shapes.append((rows, vocab_size, *(hidden_sizes or [0])))
    return shapes


def misfit(case: Case, device: torch.device) -> str | None:
    """Why the case cannot be measured on this machine, or None."""
    needed = COPIES * case.logits_bytes
    what = f"{COPIES} copies of the logits"
    if case.linear:  # hidden states, output layer, their gradients and the reference's in float64
        needed += (case.rows + case.vocab_size) * case.hidden_size * (2 * case.itemsize + 4 * 8)
        what += " and the gradients in float64"
    free = free_memory(device)
    if needed <= free:
        return None
    return f"it needs about {needed / 1e9:.1f} GB ({what}) and {free / 1e9:.1f} GB are free"


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
