"""Every kernel, with every option alone and all together, in every layout: few and small calls, against float64.

These are the calls that `make test-compiled` makes of compiled kernels, executed on a CPU by ttsem, which finds what
the interpreter cannot: accesses out of bounds, races between programs, reads of memory that nothing was written to.
Memory ends where the tensors end, and what is ignored holds nan.
"""

from typing import Any, NamedTuple

import pytest
import torch
from helpers import check_against_reference, make_logits, make_targets, make_weights, run_reference
from helpers.linear import check_linear, make_problem

from pdl_kernels import pdl_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("on_the_device")

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
TOKEN_WEIGHTS = torch.tensor([0.5, 1.0, -2.0, 0.0, 1.0])
EVERYTHING = {
    "label_smoothing": 0.1,
    "z_loss": 1e-2,
    "softcap": 8.0,
    "logit_scale": 0.5,
    "return_stats": True,
    "token_weights": TOKEN_WEIGHTS,
}


class Case(NamedTuple):
    """One call: loss, gradient, and a second backward."""

    dtype: torch.dtype = BFLOAT16
    vocab_size: int = 300
    layout: str = "rows"
    kernel: dict[str, Any] = {"name": "two passes"}  # noqa: RUF012  (never changed)
    options: dict[str, Any] = {}  # noqa: RUF012
    weights: str | None = "power_law"
    targets: torch.dtype = torch.int64
    upstream: float = 1.0
    expected: float = 1.0
    inplace: bool = False
    rows: int = 5

    def __str__(self):
        parts = [
            self.kernel["name"], str(self.dtype).removeprefix("torch."), str(self.vocab_size), self.layout,
            *self.options,
        ]  # fmt: skip
        parts += ["in place"] if self.inplace else []
        parts += [f"upstream {self.upstream} of {self.expected}"] if self.upstream != 1 else []
        return " ".join(parts)


TWICE, SLICED = {"name": "two passes"}, {"name": "slices"}
HELD, HELD_BY_EIGHT = {"name": "single pass"}, {"name": "single pass", "warps": 8}
LAYOUTS = ("rows", "padded", "offset", "columns", "sequences")
ALONE: tuple[dict[str, Any], ...] = (
    {"reduction": "sum"},
    {"reduction": "token_mean"},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 8.0},
    {"logit_scale": 0.5},
    {"return_stats": True},
    {"token_weights": TOKEN_WEIGHTS},
    {"normalizer": 3.0},
    {"normalizer": torch.tensor(3.0)},
)
HOLDABLE = ({"return_stats": True, "z_loss": 1e-2}, {"reduction": "sum"}, {"token_weights": TOKEN_WEIGHTS})

CASES = [
    # every dtype in every kernel, aligned and not
    *(Case(dtype, size, kernel=TWICE) for dtype in (FLOAT32, BFLOAT16, FLOAT16) for size in (304, 301)),
    *(Case(dtype, size, kernel=HELD) for dtype in (FLOAT32, BFLOAT16, FLOAT16) for size in (1104, 1103)),
    *(Case(dtype, 1103, kernel=SLICED, rows=2) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    Case(BFLOAT16, 2051, kernel=HELD_BY_EIGHT),
    Case(FLOAT32, 2051, kernel=HELD_BY_EIGHT),
    # every layout
    *(Case(layout=layout, vocab_size=301, kernel=TWICE) for layout in LAYOUTS[1:]),
    *(Case(layout=layout, vocab_size=1101, kernel=SLICED, rows=2) for layout in LAYOUTS[1:4]),
    *(Case(layout=layout, vocab_size=1101, kernel=HELD) for layout in ("padded", "sequences")),
    # every option alone, and all together
    *(Case(options=options) for options in ALONE),
    *(Case(options=options, kernel=SLICED, vocab_size=1103, rows=5) for options in ALONE[3:7]),
    *(Case(options=options, kernel=HELD, vocab_size=1103) for options in HOLDABLE),
    *(Case(dtype, options=EVERYTHING, weights="random") for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
    Case(options=EVERYTHING, layout="columns"),
    Case(options={**EVERYTHING, "label_smoothing": 0.0}, kernel=SLICED, vocab_size=1103),
    # weights and targets
    Case(weights=None),
    Case(weights="random", targets=torch.int32),
    Case(kernel=HELD, vocab_size=1103, weights="random", targets=torch.int32),
    Case(kernel=SLICED, vocab_size=1103, weights="random", targets=torch.int32),
    # in place, and upstream gradients that were expected or not
    *(
        Case(dtype, size, kernel=kernel, inplace=inplace, upstream=0.25, expected=expected)
        for dtype, size, kernel in ((BFLOAT16, 301, TWICE), (FLOAT32, 1103, HELD), (FLOAT16, 1103, SLICED))
        for inplace in (False, True)
        for expected in (1.0, 0.25)
    ),
    Case(kernel=HELD, vocab_size=1103, inplace=True),
    Case(kernel=SLICED, vocab_size=1103, inplace=True, options={"softcap": 8.0, "z_loss": 1e-2}),
    Case(inplace=True, options=EVERYTHING),
]


def laid_out(logits, layout):
    """(N, V) or (2, N / 2, V) of the same numbers, which end where their memory ends."""
    rows, V = logits.shape
    if layout == "rows":
        return logits
    if layout == "padded":  # rows start on 16 bytes
        memory = logits.new_full((rows * 1112 - 1112 + V,), torch.nan)
        return memory.as_strided((rows, V), (1112, 1)).copy_(logits)
    if layout == "offset":  # and so do not all vectors
        return logits.new_empty(logits.numel() + 1)[1:].view(rows, V).copy_(logits)
    if layout == "columns":
        return logits.new_empty(V, rows).t().copy_(logits)
    pairs = logits.new_empty(rows, 2, V)  # "sequences": the last token of each is left out, as by logits[:, :-1]
    pairs[:, 0] = logits
    return pairs[:, :-1]


def on(device, options):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call(case, force_kernel):
    force_kernel(**case.kernel)
    here = torch.get_default_device()
    logits = make_logits(case.rows, case.vocab_size, dtype=case.dtype, device=here)
    targets = make_targets(case.rows, V=case.vocab_size, dtype=case.targets, device=here, ignored=(1,))
    options = on(here, case.options)
    unread = targets == -100
    if "token_weights" in options:
        unread |= options["token_weights"] == 0
    given = logits.masked_fill(unread[:, None], torch.nan)
    weights = make_weights(case.weights, case.vocab_size, device=here)
    logits, given = laid_out(logits, case.layout), laid_out(given, case.layout)
    if case.layout == "sequences":
        targets = targets[:, None]
    check_against_reference(
        "triton", logits, targets, weights, given=given, upstream=case.upstream, expected_upstream=case.expected,
        inplace=case.inplace, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kernel", [TWICE, SLICED], ids=lambda kernel: kernel["name"])
@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "label_smoothing": 0.1}], ids=["plain", "everything"])
def test_per_row_upstream_gradients(kernel, options, force_kernel):
    """reduction="none": backward reads the logits anew, with an upstream gradient for each row, strided here."""
    force_kernel(**kernel)
    here = torch.get_default_device()
    logits = make_logits(5, 1103, dtype=BFLOAT16, device=here)
    targets = make_targets(5, V=1103, device=here, ignored=(1,))
    upstream = torch.linspace(-1, 2, 10, device=here)[::2]
    options = on(here, options)
    weights = make_weights("random", 1103, device=here)
    check_against_reference("triton", logits, targets, weights, upstream=upstream, reduction="none", **options)


@pytest.mark.parametrize("kernel", [TWICE, HELD, SLICED], ids=lambda kernel: kernel["name"])
@pytest.mark.parametrize("wrong", [1103, -1, 2**31 - 1])
def test_targets_that_are_no_class_reach_no_memory(kernel, wrong, force_kernel, monkeypatch):
    """On a GPU such a row is nan; the others are as they were. Where targets are looked at before, nothing runs."""
    from pdl_kernels.ops import cross_entropy as operation

    monkeypatch.setattr(operation, "check_targets", lambda *_: None)
    force_kernel(**kernel)
    here = torch.get_default_device()
    logits = make_logits(3, 1103, dtype=BFLOAT16, device=here)
    targets = make_targets(3, V=1103, device=here)
    weights = make_weights("random", 1103, device=here) + 0.1
    expected = run_reference(logits, targets, weights, reduction="sum").gradient
    targets[1] = wrong
    leaf = logits.clone().requires_grad_()
    pdl_cross_entropy(leaf, targets, weights, reduction="sum", backend="triton").backward()
    assert leaf.grad[1].isnan().all()
    for row in (0, 2):
        torch.testing.assert_close(leaf.grad[row].cpu().double(), expected[row], rtol=2e-2, atol=1e-6)
    loss = pdl_cross_entropy(logits, targets, weights, reduction="none", return_stats=True, backend="triton")[0]
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 8.0, "return_stats": True}], ids=str)
def test_the_linear_loss(dtype, options):
    here = torch.get_default_device()
    problem = make_problem(5, V=301, dtype=dtype, device=here, ignored=(1,))
    check_linear("triton", problem, make_weights("random", 301, device=here), chunk_size=3, upstream=0.5, **options)


def test_forward_alone(force_kernel):
    here = torch.get_default_device()
    for kernel, options in ((TWICE, {}), (SLICED, {}), (TWICE, EVERYTHING), (SLICED, {"softcap": 5.0})):
        force_kernel(**kernel)
        logits = make_logits(5, 1103, dtype=BFLOAT16, device=here)
        targets = make_targets(5, V=1103, device=here, ignored=(1,))
        options = on(here, options)
        got = pdl_cross_entropy(logits, targets, backend="triton", **options)
        loss = got[0] if isinstance(got, tuple) else got
        options = {name: v for name, v in options.items() if name != "return_stats"}
        expected = run_reference(logits, targets, **options).loss
        torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-6, atol=0)
