"""The kernels over a vocabulary that is split over ranks, all ranks in one process: few and small calls, in float64.

`make test-compiled` executes them as compiled. With processes, and with everything else that can be asked of them, the
losses are tested in tests/distributed.
"""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import make_logits, make_targets, make_weights, run_reference
from helpers.shards import run_shards

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("on_the_device")

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FLOAT32: 2e-6, BFLOAT16: 2.0**-7, FLOAT16: 2.0**-10}  # of a stored gradient; the interpreter truncates
TOKEN_WEIGHTS = torch.tensor([0.5, 1.0, -2.0, 0.0, 1.0])
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 8.0, "logit_scale": 0.5, "return_stats": True}
ENDS = (1, 1, 131, 300)  # a rank with one column, one with none, two whose columns start anywhere


class Case(NamedTuple):
    dtype: torch.dtype = BFLOAT16
    ends: tuple[int, ...] = ENDS  # of each rank's columns
    options: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    kernel: str = "two passes"
    weights: str | None = "power_law"
    token_weights: bool = False
    targets: torch.dtype = torch.int64
    inplace: bool = False
    contiguous: bool = True
    upstream: float = 0.25

    def __str__(self):
        given = zip(self._fields, self, self._field_defaults.values(), strict=True)
        return " ".join(f"{name} {value}" for name, value, default in given if value != default) or "plain"


CASES = [
    Case(),
    *(Case(dtype, (304, 608)) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    *(Case(dtype) for dtype in (FLOAT32, FLOAT16)),
    *(Case(options={name: value}) for name, value in EVERYTHING.items()),
    *(Case(options={"reduction": reduction}) for reduction in ("sum", "token_mean")),
    *(Case(dtype, options=EVERYTHING, weights="random", token_weights=True) for dtype in (FLOAT32, BFLOAT16)),
    *(Case(dtype, (1103, 2206), kernel="slices") for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    Case(ends=(1103, 1104, 2206), kernel="slices", options=EVERYTHING | {"label_smoothing": 0.0}),
    Case(weights=None, options={"label_smoothing": 0.1}),
    Case(weights="random", targets=torch.int32),
    Case(inplace=True),
    Case(FLOAT32, (1103, 2206), kernel="slices", inplace=True),
    Case(inplace=True, options=EVERYTHING),
    Case(contiguous=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ranks_have_the_numbers_of_the_whole(case, force_kernel):
    force_kernel(case.kernel)
    here = torch.get_default_device()
    V, rows = case.ends[-1], len(TOKEN_WEIGHTS)
    logits = make_logits(rows, V, dtype=case.dtype, device=here)
    targets = make_targets(rows, V=V, dtype=case.targets, device=here, ignored=(1,))
    targets[2], targets[4] = case.ends[0] - 1, case.ends[-2]  # at the borders
    weights = make_weights(case.weights, V, device=here)
    u = TOKEN_WEIGHTS.to(here) if case.token_weights else None
    given = logits.clone()
    given[1] = torch.nan  # ignored
    starts = [0, *case.ends[:-1]]
    parts = [given[:, begin:end] for begin, end in zip(starts, case.ends, strict=True)]
    if case.contiguous:
        parts = [part.clone() for part in parts]
    found = run_shards(
        "triton", parts, targets, weights, case.ends, upstream=case.upstream, token_weights=u, inplace=case.inplace,
        **case.options,
    )  # fmt: skip
    expected = run_reference(
        logits, targets, weights, upstream=case.upstream, **case.options, **({} if u is None else {"token_weights": u})
    )
    check(found, expected, starts, case)


def check(found, expected, starts, case):
    largest = expected.gradient.abs().max()
    for one, begin, end in zip(found, starts, case.ends, strict=True):
        torch.testing.assert_close(one.loss.double().cpu(), expected.loss, rtol=2e-6, atol=1e-6)
        off = (one.gradient.double().cpu() - expected.gradient[:, begin:end]).abs()
        bound = ROUNDING[case.dtype] * expected.gradient[:, begin:end].abs() + 1e-6 * largest
        assert (off <= bound).all(), f"columns {begin} to {end}: {off.max():.1e}"
        assert (one.gradient[1] == 0).all(), "of an ignored row"
        if one.stats is not None:
            for mine, theirs in zip(one.stats, expected.stats, strict=True):
                torch.testing.assert_close(mine.double().cpu(), theirs.double(), rtol=2e-6, atol=0)
        assert torch.equal(one.loss, found[0].loss), "every rank has the same bits"


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_upstream_gradients_of_rows(options):
    here = torch.get_default_device()
    logits = make_logits(5, 300, dtype=FLOAT32, device=here)
    targets = make_targets(5, V=300, device=here, ignored=(1,))
    weights = make_weights("random", 300, device=here)
    upstream = torch.linspace(-1, 2, 10, device=here)[::2]
    options = options | {"reduction": "none"}
    found = run_shards("triton", logits, targets, weights, ENDS, upstream=upstream, **options)
    expected = run_reference(logits, targets, weights, upstream=upstream, **options)
    check(found, expected, [0, *ENDS[:-1]], Case(FLOAT32))


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_a_rank_of_padding(softcap):
    """A rank's columns may all be -inf, or hold the lowest finite value, whatever the other ranks have."""
    here = torch.get_default_device()
    logits = make_logits(5, 300, dtype=FLOAT32, device=here)
    logits[:, 131:] = -torch.inf
    logits[0, :131] = torch.finfo(FLOAT32).min
    targets = make_targets(5, V=131, device=here, ignored=(1,))
    weights = make_weights("random", 300, device=here)
    found = run_shards("triton", logits, targets, weights, ENDS, softcap=softcap)
    expected = run_reference(logits, targets, weights, softcap=softcap)
    check(found, expected, [0, *ENDS[:-1]], Case(FLOAT32))
    if softcap is None:
        assert (found[-1].gradient == 0).all()


def test_a_large_common_offset():
    here = torch.get_default_device()
    logits = make_logits(5, 300, dtype=FLOAT32, device=here) + 1e4
    targets = make_targets(5, V=300, device=here, ignored=(1,))
    found = run_shards("triton", logits, targets, None, ENDS)
    check(found, run_reference(logits, targets), [0, *ENDS[:-1]], Case(FLOAT32))


def test_targets_that_are_no_class_reach_no_memory(monkeypatch):
    """On a GPU such a row is nan on every rank; the others are as they were."""
    import helpers.shards

    monkeypatch.setattr(helpers.shards, "check_targets", lambda *_: None)
    here = torch.get_default_device()
    logits = make_logits(5, 300, dtype=FLOAT32, device=here)
    targets = make_targets(5, V=300, device=here)
    weights = make_weights("random", 300, device=here)
    expected = run_shards("triton", logits, targets, weights, ENDS, reduction="none")
    for wrong in (300, -1, 2**31 - 1):
        changed = targets.clone()
        changed[3] = wrong
        found = run_shards("triton", logits, changed, weights, ENDS, reduction="none")
        for one, before in zip(found, expected, strict=True):
            assert one.loss[3].isnan()
            assert one.gradient[3].isnan().all()
            rest = [0, 1, 2, 4]
            assert torch.equal(one.loss[rest], before.loss[rest])
            assert torch.equal(one.gradient[rest], before.gradient[rest])
