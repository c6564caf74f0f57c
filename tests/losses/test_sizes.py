"""Sizes: one program takes a row, or several share one; no rows at all, and one row without dimensions."""

import pytest
import torch
from helpers import (
    check_against_reference,
    make_logits,
    make_targets,
    make_weights,
    run,
)

from pdl_kernels import pdl_cross_entropy

V = 37


SIZES = [
    # rows, V, dtype, weights, options
    (3, 1, torch.float32, "random", {}),
    (5, 2, torch.float16, None, {"label_smoothing": 0.1}),
    (33, 2, torch.float32, "random", {"reduction": "none"}),
    (18, 127, torch.bfloat16, "random", {"return_stats": True}),
    (17, 1000, torch.float32, "power_law", {}),
    (3, 1000, torch.float32, "random", {"z_loss": 0.1, "softcap": 5.0, "logit_scale": 1.3, "upstream": 3.0}),
    (2, 1000, torch.float16, "random", {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 5.0, "upstream": 3.0}),
    (3, 1003, torch.float16, "random", {"reduction": "none", "upstream": torch.tensor([1.0, -2.0, 4.0])}),
    (2, 32000, torch.bfloat16, "power_law", {"return_stats": True}),
    (3, 50257, torch.float16, "random", {"upstream": 1024.0}),
    (2, 50257, torch.float32, None, {"z_loss": 1e-3, "return_stats": True}),
    (2, 131077, torch.float32, "random", {}),
    (1, 131077, torch.bfloat16, None, {}),
]


@pytest.mark.lesson("chunking changes the result")
@pytest.mark.parametrize(
    ("rows", "V", "dtype", "weights", "options"), SIZES, ids=[f"{r}x{v}-{d}" for r, v, d, _, _ in SIZES]
)
def test_sizes(backend, rows, V, dtype, weights, options, device, request):
    # Forced into one block of 4 warps, which the planner never does with rows as long as this.
    longest_held = 31 * 4 * 32 * (16 // dtype.itemsize)
    if device.type == "cuda" and "on chip" in request.node.callspec.params["backend"] and longest_held < V:
        pytest.skip("so many unrolled chunks of a row compile for minutes; doctor --check has rows in clusters")
    logits = make_logits(rows, V, dtype=dtype, device=device)
    targets = make_targets(rows, V=V, device=device, ignored=(1,) if rows > 2 else ())
    targets[0], targets[-1] = V - 1, 0  # the row's ends
    check_against_reference(backend, logits, targets, make_weights(weights, V, device), **options)


@pytest.mark.cpu_only(reason="the sizes are chosen for the interpreter's stand-in of a device")
def test_the_sizes_exercise_whole_rows_and_split_ones():
    """Of several tiles each; after another tuning of the launches other sizes may be needed."""
    launch = pytest.importorskip("pdl_kernels.kernels.launch")
    slices = {
        launch.plan_rows(rows, V, dtype.itemsize, launch.INTERPRETER_MULTIPROCESSORS, two_passes=True).slices
        for rows, V, dtype, _, options in SIZES
        if V >= 1000 and "label_smoothing" not in options
    }
    assert 1 in slices
    assert max(slices) > 3


@pytest.mark.lesson("chunking changes the result")
@pytest.mark.lesson("losses of a split batch differ from the whole")
def test_a_row_does_not_depend_on_how_many_rows_there_are(backend, device):
    """Other rows, other launches: one row alone may be split over programs, among many it is not."""
    V = 1300
    logits, targets = make_logits(17, V, device=device), make_targets(17, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    together = run(backend, logits, targets, weights, reduction="none")
    for rows in (slice(0, 1), slice(3, 6)):
        alone = run(backend, logits[rows], targets[rows], weights, reduction="none")
        torch.testing.assert_close(alone.loss, together.loss[rows], rtol=3e-6, atol=1e-6)
        torch.testing.assert_close(alone.gradient, together.gradient[rows], rtol=3e-6, atol=1e-7)


@pytest.mark.lesson("chunking changes the result")
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "softcap": 5.0, "upstream": 3.0}], ids=["plain", "all"]
)
@pytest.mark.parametrize("layout", ["one block", "transposed", "scattered rows"])
def test_more_logits_than_the_eager_backend_takes_at_once(options, layout, device):
    V = 9000
    logits = make_logits(2, 150, V, device=device)
    if layout == "transposed":
        logits = logits.transpose(0, 1)
    targets = make_targets(*logits.shape[:-1], V=V, device=device, ignored=range(0, 300, 3) if "scat" in layout else ())
    check_against_reference("eager", logits, targets, make_weights("random", V, device), return_stats=True, **options)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_rows(backend, reduction, shape, device):
    logits = make_logits(*shape, V, device=device).requires_grad_()
    targets = torch.zeros(shape, dtype=torch.int64, device=device)
    loss, stats = pdl_cross_entropy(logits, targets, reduction=reduction, backend=backend, return_stats=True)
    assert loss.shape == (shape if reduction == "none" else ())
    assert loss.sum().item() == 0
    assert [stats.nll.item(), stats.accuracy.item(), stats.weight_sum.item(), stats.token_count.item()] == [0, 0, 0, 0]
    (3 * loss.sum()).backward()
    assert logits.grad.shape == (*shape, V)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_token_without_dimensions(backend, reduction, device):
    logits = make_logits(2 * V, device=device)[::2]
    assert logits.shape == (V,)
    target = torch.tensor(4, device=device)
    token_weights = torch.tensor(-2.0, device=device)
    got = check_against_reference(backend, logits, target, token_weights=token_weights, reduction=reduction)
    assert got.loss.shape == ()
