"""A vocabulary split over ranks against the whole of it: one call of a loss on every rank, and all that must hold."""

from typing import NamedTuple

import torch
from torch import Tensor

from helpers import (
    OURS,
    assert_rows_rounded_once,
    assert_stats,
    assert_within_torch,
    row_factors,
    run,
    run_reference,
    run_torch,
)
from helpers.linear import OURS as OURS_LINEAR
from helpers.linear import LinearResult, Problem, assert_no_worse, run_linear, run_linear_reference, run_linear_torch

SPLITS = {  # columns of each rank, 17 in all: alike, one column, none in each place, all in each place
    2: [(8, 9), (16, 1), (1, 16), (17, 0), (0, 17)],
    3: [(6, 6, 5), (8, 1, 8), (0, 9, 8), (9, 0, 8), (9, 8, 0), (0, 17, 0)],
    4: [(5, 5, 5, 2), (4, 0, 0, 13), (1, 9, 1, 6)],
}
UNEVEN = {2: (11, 6), 3: (7, 1, 9), 4: (3, 8, 0, 6)}
V = 17


def columns(split, rank):
    """The rank's columns of the whole."""
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def border_targets(split):
    """The first and the last column of each rank that has some, and one in the middle of the widest; the fourth of
    them is ignored."""
    first = [sum(split[:rank]) for rank in range(len(split))]
    found = [column for begin, size in zip(first, split, strict=True) if size for column in (begin, begin + size - 1)]
    widest = max(range(len(split)), key=split.__getitem__)
    found.append(first[widest] + split[widest] // 2)
    found.insert(3, -100)
    return torch.tensor(found)


def own(weights, split, rank):
    """The rank's own part of a table; None stays None."""
    return None if weights is None else weights[columns(split, rank)].clone()


def assert_same_bits(one, other, what):
    """Two results; nan is equal to itself."""
    for number, (a, b) in enumerate(zip(_tensors(one), _tensors(other), strict=True)):
        assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), (
            f"{what}: tensor {number} is {a} and {b}"
        )


def _tensors(value):
    if isinstance(value, Tensor):
        return [value.detach().reshape(-1)]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


# ---------------------------------------------------------------------------------------------------------------------
# The loss on logits


class Got(NamedTuple):
    loss: Tensor  # () or (...)
    gradient: Tensor  # (..., V) of all ranks, side by side
    stats: tuple | None


def run_split(
    ranks, logits, targets, weights=None, *, split=None, own_weights=False, group=None, backend="eager", **options
):
    """The loss and the gradient of all columns; each rank gives its own. Checks what must hold without a reference:
    equal bits on all ranks and from run to run, dtypes, shapes."""
    split = split or UNEVEN[ranks.size]
    mine = columns(split, ranks.rank)
    group = group or ranks.group()
    table = own(weights, split, ranks.rank) if own_weights else weights
    given = logits[..., mine].clone()
    before = given.clone()
    ranks.calls += 1
    runs = 2 if ranks.calls == 1 else 1  # once a case is enough for bits to differ
    results = [run(backend, given, targets, table, group=group, **options) for _ in range(runs)]
    everyones = ranks.everyones([(r.loss, r.gradient, None if r.stats is None else tuple(r.stats)) for r in results])

    assert_same_bits(given, before, "the logits after the loss")
    assert_same_bits(results[0], results[-1], "two runs")
    for rank, found in enumerate(everyones):
        for number, (loss, gradient, stats) in enumerate(found):
            what = f"run {number} on rank {rank} and here"
            assert_same_bits((loss, stats), (results[0].loss, results[0].stats), what)
            assert gradient.shape == (*logits.shape[:-1], split[rank]), f"gradient of rank {rank}: {gradient.shape}"
    loss, _, stats = everyones[ranks.rank][0]
    gradient = torch.cat([found[0][1] for found in everyones], -1)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == logits.dtype
    return Got(loss, gradient, results[0].stats)


def check_split(
    ranks, logits, targets, weights=None, *, upstream=1.0, confident=False, given=None, backend="eager", **settings
) -> Got:
    """`run_split`, and loss, gradient and statistics against the float64 reference of the whole, by the contract.

    Args:
        confident: the rows' probabilities of their targets are near 1.
        given: the logits that the package gets instead, with other numbers in rows that must not be read.
    """
    options = {name: value for name, value in settings.items() if name not in ("split", "own_weights", "group", *OURS)}
    got = run_split(
        ranks, logits if given is None else given, targets, weights, upstream=upstream, backend=backend, **settings
    )
    expected = run_reference(logits, targets, weights, upstream=upstream, **options)
    assert got.loss.shape == expected.loss.shape
    if logits.dtype == torch.float64:
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got.gradient, expected.gradient, rtol=1e-11, atol=1e-13)
    else:
        factors = row_factors(targets, weights, upstream=upstream, **options)
        float32s = run_torch(logits.float(), targets, weights, upstream=upstream, **options)
        floor = 2 * 2.0**-24 * factors if confident else torch.zeros(1)
        assert_within_torch(got.loss, expected.loss, float32s.loss, "loss", floor.sum())
        assert_rows_rounded_once(got.gradient, expected.gradient, float32s.gradient, factors, backend, "gradient")
        if not (backend == "triton" and logits.dtype == torch.bfloat16):  # the interpreter truncates
            same_dtype = run_torch(logits, targets, weights, upstream=upstream, **options)
            if same_dtype.gradient.isfinite().all():
                assert_within_torch(got.gradient, expected.gradient, same_dtype.gradient, "gradient", floor)
    if got.stats is not None:
        assert_stats(got.stats, expected.stats)
    return got


def everything(N, seed=0):
    """All options at once, for N rows of which one is ignored by its token weight."""
    u = torch.randn(N, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, N)
    u[N // 2] = 0
    return {
        "token_weights": u, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.7,
        "return_stats": True,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The loss fused with the output projection


def check_split_linear(
    ranks,
    problem,
    weights=None,
    *,
    split=None,
    own_weights=False,
    group=None,
    backend="eager",
    sequence_parallel=False,
    needs=(True, True, True),
    **options,
) -> LinearResult:
    """One call on every rank, each with its rows of the weight, against float64 and torch on the whole."""
    split = split or UNEVEN[ranks.size]
    mine = columns(split, ranks.rank)
    group = group or ranks.group()
    table = own(weights, split, ranks.rank) if own_weights else weights
    hidden, lm_head_weight, bias, targets = problem
    if sequence_parallel:
        hidden = hidden.chunk(ranks.size)[ranks.rank].clone()
        options["sequence_parallel"] = True
    local = Problem(hidden, lm_head_weight[mine].clone(), None if bias is None else bias[mine].clone(), targets)
    ranks.calls += 1
    runs = 2 if ranks.calls == 1 else 1
    results = [run_linear(backend, local, table, group=group, needs=needs, **options) for _ in range(runs)]
    assert_same_bits(results[0], results[-1], "two runs")
    everyones = ranks.everyones((results[0].loss, results[0].gradients, results[0].stats and tuple(results[0].stats)))
    for rank, (loss, gradients, stats) in enumerate(everyones):
        assert_same_bits((loss, stats), (results[0].loss, results[0].stats), f"rank {rank} and here")
        if "hidden" in gradients and not sequence_parallel:
            assert_same_bits(
                gradients["hidden"], results[0].gradients["hidden"], f"gradient of hidden on rank {rank}, and here"
            )
    whole = {
        name: torch.cat([gradients[name] for _, gradients, _ in everyones])
        if name != "hidden" or sequence_parallel
        else results[0].gradients[name]
        for name in results[0].gradients
    }
    got = LinearResult(results[0].loss, whole, results[0].stats)
    assert set(whole) == {
        name
        for name, needed, parameter in zip(("hidden", "lm_head_weight", "bias"), needs, problem[:3], strict=True)
        if needed and parameter is not None
    }
    for name, gradient in whole.items():
        assert gradient.dtype == problem.hidden.dtype
        assert gradient.shape == getattr(problem, name).shape, f"{name}: {gradient.shape}"
    unknown = (*OURS_LINEAR, "sequence_parallel", "expected_upstream")
    settings = {name: value for name, value in options.items() if name not in unknown}
    expected = run_linear_reference(problem, weights, **settings)
    torchs = run_linear_torch(problem, weights, **settings)
    if not all(tensor.isfinite().all() for tensor in (torchs.loss, *torchs.gradients.values())):
        torchs = run_linear_torch(problem, weights, upcast=True, **settings)
    assert_no_worse(got, expected, torchs, backend, problem.hidden.dtype)
    if got.stats is not None:
        # The logits are rounded to their dtype before the maximum is sought.
        assert_stats(
            got.stats, expected.stats, {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(problem.hidden.dtype, 3e-6)
        )
    return got


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def everyones_errors(ranks, call):
    """(type, message) of what `call` raises on each rank, (None, "") where it returns."""
    try:
        call()
        mine = (None, "")
    except Exception as error:
        mine = (type(error).__name__, str(error))
    return ranks.everyones(mine)


def assert_every_rank_raises(ranks, error, call, *words, same=True):
    """The same error on every rank, in the same words, and these among them."""
    found = everyones_errors(ranks, call)
    for rank, (kind, message) in enumerate(found):
        assert kind == error.__name__, f"rank {rank} raised {kind}: {message}"
        for word in words:
            assert str(word) in message, f"{word!r} is missing on rank {rank} in: {message}"
    assert not same or len({message for _, message in found}) == 1, f"the ranks say different things: {found}"
