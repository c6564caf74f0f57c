"""What each scheme moves, sends and keeps on one rank, in formulas.

N tokens; V columns in equal parts over R ranks, of b = 2 bytes (bfloat16); n = N ceil(V / R) local logits; hidden size
H. Passes over the local logits are counted, and what is exchanged of every token, written once and read once where it
is gathered; per-token numbers that stay on a rank (targets, losses) are not. A matrix product costs the longer of its
arithmetic and its memory traffic.

The passes of others were counted from their code, November 2026: Liger-Kernel 0.8.5 (its vocab_parallel_cross_entropy
and the fallback of its fused_linear_scaled_cross_entropy for tensor parallelism), Megatron-LM at 0cb4a9c8
(fusions/fused_cross_entropy.py, each compiled part taken as one pass) and 00611e6e (tensor_parallel/cross_entropy.py),
torch 2.13 (distributed/tensor/parallel/loss.py, whose count `--check-with-gloo` confirms). Without class weights, which
of them torch's alone takes.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.scaling.hardware import (
    ALL_GATHER,
    ALL_REDUCE,
    REDUCE_SCATTER,
    Collective,
    Device,
    Fabric,
    collective_seconds,
    sent_bytes,
)
from pdl_kernels.ops.chunks import plan_chunk

FLOAT32, ROW_STATE = 4, 8  # bytes: of a number that is exchanged, of what a token keeps from forward to backward
NUMBERS = 3  # F, of each token: row maximum, row sum, target logit
AGREEMENT = 3  # numbers of a call by which ranks notice that they split the vocabulary differently
LIGER_CHUNK = 512  # tokens


class Case(NamedTuple):
    tokens: int  # N
    vocab_size: int  # V
    ranks: int  # R
    hidden_size: int = 4096  # H
    itemsize: int = 2  # b

    @property
    def columns(self) -> int:
        """Of each rank; the last may have less."""
        return -(-self.vocab_size // self.ranks)

    @property
    def local_logits(self) -> int:
        return self.tokens * self.columns


class Cost(NamedTuple):
    """Of one forward + backward on one rank.

    Attributes:
        moved: bytes of HBM that passes over logits and exchanged numbers read and write.
        collectives: what is sent.
        memory: peak bytes beyond the inputs of the loss and the memory of a library's own buffers.
        flops: of matrix products.
        products_moved: bytes of HBM that the products read and write.
    """

    moved: int
    collectives: tuple[Collective, ...]
    memory: int
    flops: int = 0
    products_moved: int = 0

    @property
    def calls(self) -> int:
        return sum(collective.count for collective in self.collectives)

    @property
    def all_moved(self) -> int:
        return self.moved + self.products_moved

    def sent(self, ranks: int) -> float:
        """Bytes."""
        return sum(sent_bytes(collective, ranks) for collective in self.collectives)


def seconds(cost: Cost, ranks: int, device: Device, fabric: Fabric) -> float:
    products = max(cost.flops / device.product_rate, cost.products_moved / device.memory_rate)
    return products + cost.moved / device.memory_rate + exposed_seconds(cost, ranks, device, fabric)


def exposed_seconds(cost: Cost, ranks: int, device: Device, fabric: Fabric) -> float:
    """Of collectives, less what products hide."""
    total = 0.0
    for collective in cost.collectives:
        alone = collective_seconds(collective._replace(count=1), ranks, device, fabric)
        total += collective.count * max(alone - collective.behind / device.product_rate, 0.0)
    return total


def _collectives(case: Case, *collectives: Collective) -> tuple[Collective, ...]:
    """None at all where a rank is alone."""
    return collectives if case.ranks > 1 else ()


# ---------------------------------------------------------------------------------------------------------------------
# The loss on logits


def exchanged_bytes(tokens: int, *, label_smoothing: bool = False, sharded_weights: bool = False) -> int:
    """What a rank hands to the all-gather: F numbers of each token and a few of the call, in float32."""
    numbers = NUMBERS + label_smoothing + sharded_weights
    return FLOAT32 * (numbers * tokens + AGREEMENT + label_smoothing)


def ours(case: Case, *, inplace: bool = False, **features: bool) -> Cost:
    """Forward reads, backward reads and writes; one all-gather between them.

    The exchanged numbers are written, sent from there, received from every rank and read to be merged.
    """
    mine = exchanged_bytes(case.tokens, **features)
    sent_from = mine if case.ranks > 1 else 0
    gradient = 0 if inplace else case.itemsize * case.local_logits
    return Cost(
        3 * case.itemsize * case.local_logits + 2 * (case.ranks * mine + sent_from),
        _collectives(case, Collective(ALL_GATHER, mine)),
        gradient + case.ranks * mine + sent_from + ROW_STATE * case.tokens,
    )


def ours_in_place(case: Case) -> Cost:
    return ours(case, inplace=True)


def ours_with_reductions(case: Case) -> Cost:
    """What `ours` would be with a maximum over the ranks and then one sum of the other numbers. It does not exist.

    The numbers are written, the sums scaled to the common maximum between the reductions, and all of them read.
    """
    maximum = FLOAT32 * case.tokens
    sums = exchanged_bytes(case.tokens) - maximum
    gradient = case.itemsize * case.local_logits
    return Cost(
        3 * gradient + 4 * (maximum + sums),
        _collectives(case, Collective(ALL_REDUCE, maximum), Collective(ALL_REDUCE, sums)),
        gradient + maximum + sums + ROW_STATE * case.tokens,
    )


def gathered_logits(case: Case) -> Cost:
    """All logits on every rank, and this package's loss on them in place.

    Assumed: the parts arrive one after another and are copied into rows; the whole row's gradient is written, of which
    the rank's own part is copied.
    """
    local = case.itemsize * case.local_logits
    if case.ranks == 1:
        return Cost(2 * local, (), 0)
    whole = local * case.ranks
    moved = local + whole + 2 * whole + 2 * whole + 2 * local  # send, receive, copy, loss and gradient, slice
    return Cost(moved, (Collective(ALL_GATHER, local),), 2 * whole + local)


def _several_passes(narrow: int, wide: int, peak_narrow: int, peak_wide: int, *reduced: int) -> Callable[[Case], Cost]:
    """A scheme that passes over the local logits several times and reduces numbers of each token over the ranks.

    Args:
        narrow, wide: how often a logit is read or written in its own dtype, and in float32.
        peak_narrow, peak_wide: how many copies of the logits exist at most, beyond the logits.
        reduced: bytes of each token, for each all-reduce.
    """

    def scheme(case: Case) -> Cost:
        b, n = case.itemsize, case.local_logits
        reductions = [Collective(ALL_REDUCE, bytes_of_a_token * case.tokens) for bytes_of_a_token in reduced]
        return Cost(
            (narrow * b + wide * FLOAT32) * n,
            _collectives(case, *reductions),
            (peak_narrow * b + peak_wide * FLOAT32) * n,
        )

    return scheme


# 22 bytes of a bfloat16 logit: a maximum; exponentials kept in float32; the gradient over them, and rounded.
liger = _several_passes(3, 4, 1, 1, FLOAT32, FLOAT32, FLOAT32)
megatron_fused = _several_passes(2, 9, 1, 1, FLOAT32, 2 * FLOAT32)  # 40 bytes
megatron = _several_passes(2, 12, 1, 1, FLOAT32, FLOAT32, FLOAT32)  # 52 bytes
loss_parallel = _several_passes(10, 10, 1, 3, FLOAT32, FLOAT32, 2)  # 60 bytes; the target's logit stays bfloat16

OURS = "pdl_cross_entropy"
REDUCTIONS = "the same with two all-reduces (not built)"
ON_LOGITS: dict[str, Callable[[Case], Cost]] = {
    OURS: ours,
    f"{OURS}, in place": ours_in_place,
    REDUCTIONS: ours_with_reductions,
    "gathered logits": gathered_logits,
    "Liger-Kernel": liger,
    "Megatron-LM, fused": megatron_fused,
    "Megatron-LM": megatron,
    "torch loss_parallel": loss_parallel,
}


# ---------------------------------------------------------------------------------------------------------------------
# With the output projection


def _products(case: Case, chunks: int, numbers: int = 3, accumulated: int = FLOAT32) -> tuple[int, int]:
    """(operations, bytes moved) of `numbers` products: logits (twice where they are made again), two gradients.

    Every product of a chunk reads the weight or adds to its gradient; `accumulated` bytes for each of its elements.
    """
    hidden = case.tokens * case.hidden_size
    weight = case.columns * case.hidden_size
    logits = case.itemsize * case.local_logits
    forward = (numbers - 2) * (case.itemsize * (hidden + chunks * weight) + logits)
    of_hidden = logits + case.itemsize * chunks * weight + accumulated * hidden
    of_weight = logits + case.itemsize * hidden + (2 * chunks - 1) * accumulated * weight
    return numbers * 2 * case.local_logits * case.hidden_size, forward + of_hidden + of_weight


def chunk_lengths(case: Case, chunk_size: int | None = None) -> list[int]:
    """Tokens of each chunk of `pdl_linear_cross_entropy`."""
    step = chunk_size or plan_chunk(case.tokens, case.hidden_size, case.columns, case.itemsize)
    return [min(step, case.tokens - start) for start in range(0, case.tokens, step)]


def ours_linear(
    case: Case,
    *,
    sequence_parallel: bool = False,
    label_smoothing: bool = False,
    sharded_weights: bool = False,
    chunk_size: int | None = None,
    accumulated: int = FLOAT32,
) -> Cost:
    """`pdl_linear_cross_entropy`: chunk by chunk, gradients added up in numbers of `accumulated` bytes.

    First, ranks tell each other how they split the vocabulary, and the weights of all targets where each has a part of
    the table. A chunk's all-gather runs behind the next chunk's first product. The hidden gradient is summed over the
    ranks as it was added up; under sequence parallelism hidden states are gathered before, and each rank gets a part of
    the sum.
    """
    chunks = chunk_lengths(case, chunk_size)
    flops, moved = _products(case, len(chunks), accumulated=accumulated)
    hidden, weight = case.tokens * case.hidden_size, case.columns * case.hidden_size
    several = case.ranks > 1
    parts = [exchanged_bytes(length, label_smoothing=label_smoothing) for length in chunks]
    passing = 2 * (case.ranks + several) * sum(parts)
    rounding = 0 if accumulated == case.itemsize else (accumulated + case.itemsize) * (hidden + weight)

    collectives = [Collective(ALL_GATHER, FLOAT32 * AGREEMENT)]
    if sharded_weights:
        collectives.append(Collective(ALL_REDUCE, FLOAT32 * (case.tokens + 1)))
    if sequence_parallel:
        collectives.append(Collective(ALL_GATHER, case.itemsize * hidden // case.ranks))
    for part, following in zip(parts, [*chunks[1:], 0], strict=True):
        collectives.append(Collective(ALL_GATHER, part, behind=2 * following * case.columns * case.hidden_size))
    collectives.append(Collective(REDUCE_SCATTER if sequence_parallel else ALL_REDUCE, accumulated * hidden))

    alive = min(len(chunks), 2) * (chunks[0] * case.itemsize * case.columns + (case.ranks + several) * parts[0])
    whole_hidden = case.itemsize * hidden if sequence_parallel and several else 0
    return Cost(
        3 * case.itemsize * case.local_logits + passing + rounding,
        _collectives(case, *collectives),
        alive + accumulated * (hidden + weight) + ROW_STATE * case.tokens + whole_hidden,
        flops,
        moved,
    )


def ours_linear_sequence_parallel(case: Case) -> Cost:
    return ours_linear(case, sequence_parallel=True)


def ours_linear_in_bfloat16(case: Case) -> Cost:
    return ours_linear(case, accumulated=2)


def then(on_logits: Callable[[Case], Cost]) -> Callable[[Case], Cost]:
    """The whole local logits, a scheme on them, and the hidden gradient summed over the ranks in its own dtype."""

    def scheme(case: Case) -> Cost:
        loss = on_logits(case)
        flops, moved = _products(case, 1, accumulated=case.itemsize)
        hidden, weight = case.tokens * case.hidden_size, case.columns * case.hidden_size
        gradient = Collective(ALL_REDUCE, case.itemsize * hidden)
        return Cost(
            loss.moved,
            (*loss.collectives, *_collectives(case, gradient)),
            case.itemsize * (case.local_logits + hidden + weight) + loss.memory,
            flops,
            moved,
        )

    return scheme


def liger_linear(case: Case) -> Cost:
    """The fallback in torch of its fused loss for tensor parallelism: 512 tokens at a time, logits made again in
    backward. Where its compiled part is installed, another code runs, of which this says nothing."""
    chunks = -(-case.tokens // LIGER_CHUNK)
    flops, moved = _products(case, chunks, numbers=4, accumulated=case.itemsize)
    length = min(LIGER_CHUNK, case.tokens)
    hidden, weight = case.tokens * case.hidden_size, case.columns * case.hidden_size
    return Cost(
        (3 * case.itemsize + 21 * FLOAT32) * case.local_logits,
        _collectives(
            case,
            Collective(ALL_REDUCE, FLOAT32 * length, count=chunks),
            Collective(ALL_REDUCE, 2 * FLOAT32 * length, count=chunks),
            Collective(ALL_REDUCE, case.itemsize * hidden),
        ),
        length * case.columns * (case.itemsize + 4 * FLOAT32) + case.itemsize * (hidden + 2 * weight),
        flops,
        moved,
    )


OURS_LINEAR = "pdl_linear_cross_entropy"
WITH_PROJECTION: dict[str, Callable[[Case], Cost]] = {
    OURS_LINEAR: ours_linear,
    "the same, sequence parallel": ours_linear_sequence_parallel,
    "the same, accumulate_dtype=torch.bfloat16": ours_linear_in_bfloat16,
    "projection, then pdl_cross_entropy in place": then(ours_in_place),
    "projection, then gathered logits": then(gathered_logits),
    "projection, then Liger-Kernel": then(liger),
    "Liger-Kernel, fused, in torch": liger_linear,
    "projection, then Megatron-LM, fused": then(megatron_fused),
    "projection, then torch loss_parallel": then(loss_parallel),
}
