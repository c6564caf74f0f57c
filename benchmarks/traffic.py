"""Bytes: what each operation has to move, and what this package's plan moves and keeps.

N rows of V columns of b bytes, C of the rows counted. Ignored rows are not read, but their gradients are written. The
second read of a row in forward is meant to hit the second-level cache (GPU) or the nearer ones (CPU), so that it costs
no memory traffic; it is counted apart. Per-row numbers (targets, losses, row state) are left out of the floor.
"""

from typing import NamedTuple

from benchmarks.inputs import Case
from benchmarks.operations import Operation
from pdl_kernels.ops.chunks import plan_chunk

# What a row costs besides its logits: its target (8) and weight (4), read for the denominators and again by the row
# kernel; its loss (4) and row state (8) written; its loss read to be summed.
ROW_BYTES_READ = 2 * (8 + 4) + 4
ROW_BYTES_WRITTEN = 4 + 8
ROW_BYTES_READ_BACKWARD = 8 + 4 + 8  # target, weight, row state
ROW_STATE_BYTES = 8


class Traffic(NamedTuple):
    """Of one operation of this package.

    Attributes:
        read: bytes read from memory.
        reread: bytes read a second time, meant to come from a cache.
        written: bytes written.
        kept: bytes alive from forward to backward besides the logits.
        buffers: allocations as large as the logits.
        logit_reads: how often each counted logit is loaded, from wherever.
        gradient_writes: how often each element of the gradient is stored.
    """

    read: int
    reread: int
    written: int
    kept: int
    buffers: int
    logit_reads: int
    gradient_writes: int

    @property
    def moved(self) -> int:
        return self.read + self.written


def floor_bytes(case: Case, operation: Operation) -> int:
    """What no version avoids: every counted logit read once, every gradient written once."""
    read = case.counted * case.vocab_size * case.itemsize
    return read + case.logits_bytes if operation.has_backward else read


def floor_flops(case: Case, operation: Operation) -> int:
    """Of a linear case: one product of the counted rows forward, two more backward."""
    products = 3 if operation.has_backward else 1
    return products * 2 * case.counted * case.hidden_size * case.vocab_size if case.linear else 0


def planned_linear_memory(case: Case, operation: Operation) -> int:
    """Peak extra bytes by the plan of `pdl_kernels.ops.chunks`, per-row numbers left out.

    A chunk of logits; where rows are ignored a copy of the others' hidden states; the gradients, which wait in float32
    and are rounded into the parameters' dtype.
    """
    chunk = plan_chunk(case.counted, case.hidden_size, case.vocab_size, case.itemsize) * case.vocab_size * case.itemsize
    packed = case.counted * case.hidden_size * case.itemsize if case.counted < case.rows else 0
    if not operation.has_backward:
        return chunk + packed
    elements = (case.counted + case.vocab_size) * case.hidden_size
    rounded = 0 if case.dtype == "float32" else case.vocab_size * case.hidden_size * case.itemsize
    return max(chunk + packed + 4 * elements, 4 * elements + rounded + case.rows * case.hidden_size * case.itemsize)


def planned_traffic(
    case: Case, operation: Operation, *, backend: str, inplace: bool, held: bool = False, expected: bool = True
) -> Traffic:
    """The plan of `pdl_kernels.ops.cross_entropy`: the gradient is formed in forward.

    Args:
        expected: for the upstream gradient of the operation. Otherwise it is formed again from the logits, or, in
            place, where they are gone, multiplied.
        held: the kernel keeps a row on chip between its sum and its gradient.
    """
    counted_bytes = case.counted * case.vocab_size * case.itemsize
    read = counted_bytes + case.rows * ROW_BYTES_READ
    written = case.rows * ROW_BYTES_WRITTEN
    # The kernels walk a row once for its sum and once for its gradient. The eager backend keeps a piece's softmax
    # instead; of float32 logits it reads the piece again for the maximum, of others it takes that from its copy.
    walks = 2 if backend == "triton" or case.dtype == "float32" else 1
    if held and operation.has_backward:
        walks = 1
    if operation.upstream is None:
        walks = 1 if backend == "triton" else walks
        return Traffic(read, (walks - 1) * counted_bytes, written, 0, 0, logit_reads=walks, gradient_writes=0)
    reread = (walks - 1) * counted_bytes
    written += case.logits_bytes
    kept = 0 if inplace else case.logits_bytes + case.rows * ROW_STATE_BYTES
    buffers = 0 if inplace else 1
    if expected:
        return Traffic(read, reread, written, kept, buffers, logit_reads=walks, gradient_writes=1)
    written += case.logits_bytes
    if inplace:
        read += case.logits_bytes  # the finished gradient, which lies where the logits were
        return Traffic(read, reread, written, kept, buffers, logit_reads=walks + 1, gradient_writes=2)
    read += counted_bytes + case.rows * ROW_BYTES_READ_BACKWARD
    return Traffic(read, reread, written, kept, buffers, logit_reads=walks + 1, gradient_writes=2)
