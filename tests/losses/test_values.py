"""Loss, gradient and statistics of both backends against the float64 reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EXP2_ERROR,
    INTERPRETED,
    ONE_ROUNDING,
    assert_rows_rounded_once,
    assert_stats,
    assert_within_torch,
    check_against_reference,
    confident_logits,
    make_logits,
    make_targets,
    make_weights,
    row_factors,
    run,
    run_reference,
    run_torch,
    skip_where_fma_rounds_twice,
)

from pdl_kernels import pdl_cross_entropy, power_law_weights
from reference.pdl import power_law_weights as reference_power_law_weights
from reference.pdl import reference_cross_entropy

INF = torch.inf
LOWEST = torch.finfo(torch.float32).min
HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*HALF_AND_SINGLE, torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The yardstick itself


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_reference_is_torchs_cross_entropy(reduction, label_smoothing):
    logits = make_logits(7, 19).double().requires_grad_()
    targets = make_targets(7, V=19, ignored=(2,))
    weights = make_weights("random", 19).double()
    ours, _ = reference_cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=label_smoothing)
    torchs = F.cross_entropy(logits, targets, weights, reduction=reduction, label_smoothing=label_smoothing)
    torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)
    upstream = torch.rand_like(ours)
    for_ours = torch.autograd.grad(ours, logits, upstream)[0]
    torch.testing.assert_close(for_ours, torch.autograd.grad(torchs, logits, upstream)[0], rtol=1e-12, atol=1e-13)


def test_power_law_weights_are_the_formula():
    counts = torch.tensor([0, 1, 7, 10**6, 3 * 10**9])
    for alpha, eps in ((1.0, 1e-7), (0.4, 1.0), (0.0, 1.0)):
        expected = reference_power_law_weights(counts, alpha, eps)
        weights = power_law_weights(counts, alpha=alpha, eps=eps)
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), expected, rtol=1e-7, atol=0)
    assert power_law_weights(counts)[0].item() == pytest.approx(1e7)  # the paper's defaults


# ---------------------------------------------------------------------------------------------------------------------
# Every option

ROWS, V = 5, 37

# name: (weights, token weights, options). Rows 1 and 3 are ignored where "ignored" says so.
OPTION_CASES = {
    "plain mean": (None, None, {}),
    "plain sum": (None, None, {"reduction": "sum"}),
    "plain none": (None, None, {"reduction": "none", "upstream": "rows"}),
    "weighted mean": ("random", None, {"return_stats": True}),
    "weighted token_mean": ("random", None, {"reduction": "token_mean"}),
    "power law mean": ("power_law", None, {"upstream": 3.0}),
    "power law none": ("power_law", None, {"reduction": "none", "upstream": "small rows"}),
    "power law normalizer": ("power_law", None, {"normalizer": 3e7}),
    "signed token weights": ("random", "signed", {"return_stats": True}),
    "signed token weights token_mean": (None, "signed", {"reduction": "token_mean", "return_stats": True}),
    "signed token weights none": ("random", "signed", {"reduction": "none", "upstream": "rows"}),
    "normalizer": ("random", "signed", {"normalizer": 12.5, "upstream": 0.25}),
    "smoothing": (None, None, {"label_smoothing": 0.1}),
    "smoothing weighted": ("random", None, {"label_smoothing": 0.1, "upstream": 3.0}),
    "smoothing everything": ("random", "signed", {"label_smoothing": 1.0, "return_stats": True}),
    "smoothing none": ("random", "signed", {"label_smoothing": 0.1, "reduction": "none", "upstream": "rows"}),
    "z_loss": ("random", "signed", {"z_loss": 1e-2, "return_stats": True}),
    "z_loss sum": (None, None, {"z_loss": 1e-2, "reduction": "sum", "upstream": 0.5}),
    "z_loss none": ("random", "signed", {"z_loss": 1e-2, "reduction": "none", "upstream": "rows"}),
    "z_loss token_mean": ("random", "signed", {"z_loss": 1e-1, "reduction": "token_mean"}),
    "z_loss normalizer": ("random", "signed", {"z_loss": 1e-1, "normalizer": 7}),
    "softcap": ("random", None, {"softcap": 5.0, "return_stats": True}),
    "scale": ("random", None, {"logit_scale": 0.35}),
    "softcap and scale": (None, "signed", {"softcap": 3.0, "logit_scale": 2.0, "reduction": "sum"}),
    "all of them": (
        "random",
        "signed",
        {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 1.5, "return_stats": True},
    ),
    "all of them none": (
        "random",
        "signed",
        {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 0.5, "reduction": "none"},
    ),
}


def _option_params():
    for position, name in enumerate(OPTION_CASES):
        for dtype in ALL_DTYPES:
            yield pytest.param("eager", dtype, name, id=f"eager-{dtype}-{name}")
        # The interpreter is slow: one dtype a case, in turn, and all three where the arithmetic is richest.
        dtypes = HALF_AND_SINGLE if name in ("weighted mean", "all of them") else [HALF_AND_SINGLE[position % 3]]
        for dtype in dtypes:
            yield pytest.param("triton", dtype, name, id=f"triton-{dtype}-{name}")


def signed_token_weights(*shape, device="cpu"):
    """Signed, over two orders of magnitude, with an exact zero in the first place."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(*shape, generator=generator) * torch.logspace(-1, 1, math.prod(shape)).reshape(shape)
    u.view(-1)[0] = 0
    return u.to(device)


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize(("backend", "dtype", "name"), list(_option_params()), indirect=["backend"])
def test_options(backend, dtype, name, device):
    weights, token_weights, options = OPTION_CASES[name]
    options = dict(options)
    if options.get("upstream") == "rows":
        options["upstream"] = torch.tensor([0.0, -1.5, 3.0, 0.25, 1.0])
    elif options.get("upstream") == "small rows":  # power-law weights fit no fp16 gradient otherwise
        options["upstream"] = torch.tensor([1e-3, 2e-3, -1e-3, 3e-3, 1e-3])
    weights = make_weights(weights, V, device)
    if options.get("upstream") is not None and weights is not None and dtype == torch.float16:
        weights = weights.clamp(max=1e6)
    if token_weights == "signed":
        options["token_weights"] = signed_token_weights(ROWS, device=device)
    logits = make_logits(ROWS, V, dtype=dtype, device=device)
    targets = make_targets(ROWS, V=V, device=device, ignored=(3,))
    check_against_reference(backend, logits, targets, weights, **options)


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_and_token_weights_of_any_floating_dtype(backend, weights_dtype, device):
    logits, targets = make_logits(4, V, device=device), make_targets(4, V=V, device=device)
    weights = (make_weights("random", V, device) * 100).to(weights_dtype)
    token_weights = signed_token_weights(4, device=device).to(weights_dtype)
    check_against_reference(backend, logits, targets, weights, token_weights=token_weights)


# ---------------------------------------------------------------------------------------------------------------------
# Targets, ignore_index, normalizer


def test_int32_targets(backend, device):
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, dtype=torch.int32, ignored=(1,))
    check_against_reference(backend, logits, targets, make_weights("random", V, device), return_stats=True)


@pytest.mark.lesson("misaligned targets")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_targets_weights_and_token_weights_that_are_slices(backend, dtype, device):
    batch, length = 2, 3
    labels = make_targets(batch, length + 1, V=V, dtype=dtype, device=device, ignored=(5,))
    token_weights = signed_token_weights(batch, length + 1, device=device)
    weights = make_weights("random", 2 * V, device)[1::2]
    logits = make_logits(batch, length, V, device=device)
    targets = labels[:, 1:]
    assert not targets.is_contiguous()
    check_against_reference(backend, logits, targets, weights, token_weights=token_weights[:, :-1])
    flat = labels.view(-1)[1:4]  # contiguous, but not on 16 bytes
    assert flat.data_ptr() % 16 != 0
    check_against_reference(backend, logits[0], flat, weights, token_weights=token_weights.view(-1)[1:4])


@pytest.mark.lesson("gather at ignore_index")
@pytest.mark.parametrize("ignore_index", [-100, 5, -1, 10**6, -(2**40)])
def test_ignore_index(backend, ignore_index, device):
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, ignored=(0, 2), ignore_index=ignore_index)
    targets[1] = 5 if ignore_index != 5 else 6
    got = check_against_reference(
        backend, logits, targets, make_weights("random", V, device) + 0.5, ignore_index=ignore_index, return_stats=True
    )
    assert got.stats.token_count.item() == 2
    assert got.gradient[[0, 2]].count_nonzero() == 0


@pytest.mark.parametrize("ignore_index", [2**32, 2**32 + 5, -(2**32) + 5])
def test_ignore_index_beyond_int32_ignores_no_int32_target(backend, ignore_index, device):
    """Reduced to 32 bits these would be 0 and 5."""
    logits = make_logits(3, V, device=device)
    targets = torch.tensor([0, 5, 7], dtype=torch.int32, device=device)
    got = check_against_reference(backend, logits, targets, ignore_index=ignore_index, return_stats=True)
    assert got.stats.token_count.item() == 3


@pytest.mark.lesson("normalizer counted in a half dtype")
@pytest.mark.parametrize(
    "normalizer",
    [
        3,
        0.5,
        torch.tensor(4.0),
        torch.tensor(4099, dtype=torch.int64),  # no half dtype holds 4099
        torch.tensor(3, dtype=torch.int32),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor(2.5, dtype=torch.float16),
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.tensor(7, dtype=torch.uint8),
        torch.tensor(True),
    ],
    ids=lambda value: str(value) if not isinstance(value, torch.Tensor) else str(value.dtype),
)
def test_normalizer_kinds(backend, normalizer, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    weights = make_weights("random", V, device)
    as_number = float(normalizer)
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    got = run(backend, logits, targets, weights, normalizer=normalizer, z_loss=0.01)
    expected = run_reference(logits, targets, weights, normalizer=as_number, z_loss=0.01)
    torchs = run_torch(logits, targets, weights, normalizer=as_number, z_loss=0.01)
    assert_within_torch(got.loss, expected.loss, torchs.loss, "loss")
    assert_within_torch(got.gradient, expected.gradient, torchs.gradient, "gradient")


def test_normalizer_tensor_on_the_cpu_serves_logits_anywhere(backend, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    loss = run(backend, logits, targets, normalizer=torch.tensor(8.0)).loss
    expected = run_reference(logits, targets, normalizer=8.0).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0, dtype=torch.int64)])
def test_normalizer_zero_gives_zero(backend, zero, z_loss, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    normalizer = zero.to(device) if isinstance(zero, torch.Tensor) else zero
    got = run(backend, logits, targets, normalizer=normalizer, z_loss=z_loss, upstream=2.0)
    assert got.loss.item() == 0
    assert got.gradient.count_nonzero() == 0


@pytest.mark.parametrize(("value", "name"), [(-2.0, "negative"), (INF, "inf"), (torch.nan, "nan")])
def test_normalizer_tensor_that_is_no_denominator_propagates(backend, value, name, device):
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, normalizer=torch.tensor(value, device=device))
    summed = run_reference(logits, targets, reduction="sum")
    if name == "nan":
        assert got.loss.isnan()
        assert got.gradient[[0, 2]].isnan().all()  # the ignored row has a test of its own
    else:
        assert got.loss.item() == pytest.approx(summed.loss.item() / value, rel=1e-6)
        torch.testing.assert_close(got.gradient.cpu().double(), summed.gradient / value, rtol=1e-5, atol=1e-7)


@pytest.mark.lesson("0 * -inf")
def test_an_ignored_row_stays_zero_under_a_nan_normalizer(backend, device):
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, normalizer=torch.tensor(torch.nan, device=device))
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_row_stays_zero_under_an_infinite_upstream_gradient(backend, reduction, device):
    """A loss scale that overflowed."""
    logits = make_logits(3, V, device=device)
    targets = make_targets(3, V=V, device=device, ignored=(1,))
    got = run(backend, logits, targets, reduction=reduction, upstream=INF)
    assert not got.gradient[[0, 2]].isfinite().any()
    assert got.gradient[1].count_nonzero() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sizes, so that one program takes a row or several share one

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


# ---------------------------------------------------------------------------------------------------------------------
# Strides


def _strided(name, dtype, device):
    """Logits of the layout `name`; a float32 row of 37 and a float16 row of 45 columns start where they like."""
    width = 37 if dtype == torch.float32 else 45

    def logits(*shape):
        return make_logits(*shape, dtype=dtype, device=device)

    layouts = {
        "rows of a wider matrix": lambda: logits(4, width + 8)[:, :width],
        "inner columns of a wider matrix": lambda: logits(4, width + 9)[:, 3 : width + 3],
        "every second row": lambda: logits(8, width)[::2],
        "without the last position": lambda: logits(2, 3, width)[:, :-1],
        "transposed (S, B, V)": lambda: logits(3, 2, width).transpose(0, 1),
        "four dimensions that do not merge": lambda: logits(3, 2, 2, width).permute(1, 2, 0, 3)[:, :, :2],
        "four dimensions that merge": lambda: logits(2, 1, 2, width),
        "column-major": lambda: logits(width, 4).t(),
        "every second column": lambda: logits(4, 2 * width)[:, ::2],
        "every second column, aligned rows": lambda: logits(3, 64)[:, ::2],
        "one row expanded": lambda: logits(1, width).expand(4, width),
        "batch expanded": lambda: logits(1, 2, width).expand(2, 2, width),
        "base off 16 bytes": lambda: logits(4 * width + 1)[1:].view(4, width),
        "base off 16 bytes, aligned rows": lambda: logits(3 * 64 + 1)[1:].view(3, 64),
        "one column expanded": lambda: logits(4, 1).expand(4, width),
        "one column of a matrix": lambda: logits(4, 5)[:, 2:3],
    }
    return layouts[name]()


STRIDES = [
    ("rows of a wider matrix", torch.float16, {}),
    ("inner columns of a wider matrix", torch.float32, {"return_stats": True}),
    ("every second row", torch.float32, {}),
    ("without the last position", torch.bfloat16, {"upstream": 3.0}),
    ("transposed (S, B, V)", torch.float32, {"upstream": 3.0}),
    ("four dimensions that do not merge", torch.float16, {"reduction": "none", "upstream": "rows"}),
    ("four dimensions that merge", torch.float16, {}),
    ("column-major", torch.float32, {"label_smoothing": 0.1, "upstream": 3.0}),
    ("every second column", torch.float16, {"softcap": 4.0}),
    ("every second column, aligned rows", torch.float32, {"z_loss": 0.1}),
    ("one row expanded", torch.float32, {"upstream": 3.0}),
    ("batch expanded", torch.float16, {}),
    ("base off 16 bytes", torch.bfloat16, {}),
    ("base off 16 bytes, aligned rows", torch.float16, {"upstream": 3.0}),
    ("one column expanded", torch.float32, {}),
    ("one column of a matrix", torch.float32, {"reduction": "sum"}),
]


@pytest.mark.lesson("transposed logits")
@pytest.mark.parametrize(("name", "dtype", "options"), STRIDES, ids=[name for name, _, _ in STRIDES])
def test_strides(backend, name, dtype, options, device):
    logits = _strided(name, dtype, device)
    V = logits.shape[-1]
    targets = make_targets(*logits.shape[:-1], V=V, device=device)
    options = dict(options)
    if options.get("upstream") == "rows":
        options["upstream"] = torch.linspace(-1, 2, targets.numel()).reshape(targets.shape)
    before = logits.clone()
    check_against_reference(backend, logits, targets, make_weights("random", V, device) + 0.1, **options)
    assert torch.equal(logits, before)


def test_strides_with_few_long_rows(backend, device):
    """Rows split over programs, none of them on 16 bytes, in a batch that does not merge."""
    logits = make_logits(2, 3, 1201, dtype=torch.float16, device=device)[:, :-1]
    targets = make_targets(2, 2, V=1201, device=device)
    targets[0, 0], targets[1, 1] = 1200, 0
    check_against_reference(backend, logits, targets, upstream=3.0)
    columns = make_logits(1003, 2, device=device).t()
    check_against_reference(backend, columns, targets[0].clamp(max=1002), reduction="sum", upstream=-1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Rows on the edge


@pytest.mark.lesson("leading block of -inf")
@pytest.mark.parametrize("V", [37, 1100])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1, "return_stats": True}], ids=["plain", "z_loss"])
def test_blocks_of_minus_inf(backend, V, options, device):
    logits = make_logits(4, V, device=device)
    logits[0, : V - 5] = -INF  # a leading block
    logits[1, 3:] = -INF  # a padded vocabulary
    logits[2, ::2] = -INF
    logits[3, :-1] = -INF  # one class is left, and it is the target: loss 0
    targets = torch.tensor([V - 2, 1, 7, V - 1], device=device)
    got = check_against_reference(backend, logits, targets, make_weights("random", V, device) + 0.1, **options)
    assert got.gradient[0, : V - 5].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
def test_smoothing_over_minus_inf_columns_of_weight_zero(backend, device):
    """A padded vocabulary whose missing classes have weight 0 can be smoothed; with weight 1 it is infinite."""
    logits = make_logits(3, V, device=device)
    logits[:, -6:] = -INF
    targets = make_targets(3, V=V - 6, device=device)
    weights = torch.ones(V, device=device)
    weights[-6:] = 0
    got = check_against_reference(backend, logits, targets, weights, label_smoothing=0.1)
    assert got.loss.isfinite()
    infinite = run(backend, logits, targets, None, label_smoothing=0.1)
    assert infinite.loss.item() == INF
    assert not infinite.gradient.isnan().any()


@pytest.mark.lesson("running maximum that starts at 0")
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_full_of_the_lowest_finite_value(backend, dtype, device):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("float64 is the eager backend's")
    V = 1030
    logits = torch.full((2, V), torch.finfo(dtype).min, dtype=dtype, device=device)
    logits[1] = -INF
    logits[1, 5] = torch.finfo(dtype).min  # all the probability on one column
    got = run(backend, logits, torch.tensor([3, 5], device=device), reduction="none")
    assert got.loss[0].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.loss[1].item() == 0
    expected = torch.full((V,), 1 / V, dtype=torch.float64)
    expected[3] -= 1
    torch.testing.assert_close(got.gradient[0].cpu().double(), expected, rtol=2**-7, atol=1e-7)
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("running maximum that starts at 0")
def test_rows_far_below_zero(backend, device):
    skip_where_fma_rounds_twice(backend)
    logits = make_logits(2, V, device=device) - 1e6
    check_against_reference(backend, logits, make_targets(2, V=V, device=device))


@pytest.mark.lesson("masks of -1e9 and -1e30")
@pytest.mark.parametrize("V", [37, 1030])
@pytest.mark.parametrize("fill", [-1e4, -1e6, -1e9, -1e10, -1e30, -2e38, LOWEST])
def test_columns_masked_with_large_finite_values(backend, V, fill, device):
    """What frameworks fill a padded vocabulary with. A lane or a slice may see nothing else."""
    logits = make_logits(2, V, dtype=torch.bfloat16 if fill == -1e9 else torch.float32, device=device)
    logits[0, : V - 5] = fill
    logits[1, 5:] = fill
    got = check_against_reference(backend, logits, torch.tensor([V - 2, 3], device=device), upstream=3.0)
    assert got.gradient[0, : V - 5].count_nonzero() == 0


@pytest.mark.parametrize("common", [1e5, -1e7, 1e9, 1e10, -1e20, 1e30, 2e38])
def test_rows_of_large_magnitude(backend, common, device):
    """All probability on the maximum and its ties, whatever the magnitude."""
    logits = torch.full((2, V), common, device=device)
    logits[0, 5:] = -abs(common)
    logits[1, 7] = 0.9 * common
    targets = torch.tensor([2, 2], device=device)
    ties = [5 if common > 0 else V, V - 1 if common > 0 else 1]
    got = run(backend, logits, targets, reduction="none")
    expected = run_reference(logits, targets, reduction="none")
    if common > 0:
        assert got.loss.tolist() == pytest.approx([math.log(n) for n in ties], rel=1e-6)
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.gradient.cpu().double(), expected.gradient, rtol=1e-5, atol=1e-6)


def test_rows_over_the_whole_range_of_float32(backend, device):
    logits = torch.zeros(3, V, device=device)
    logits[0, 4], logits[0, 5] = 3e38, -3e38
    logits[1, :] = -3e38
    logits[1, 6] = 3e38
    logits[2, :] = 3e38
    targets = torch.tensor([4, 6, 0], device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss[:2].tolist() == [0, 0]
    assert got.loss[2].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.gradient.isfinite().all()
    assert got.gradient[:2].count_nonzero() == 0
    torch.testing.assert_close(got.gradient[2, 1:], torch.full_like(got.gradient[2, 1:], 1 / V))
    # 3e38 below the maximum is a loss that float32 still holds, and the target's gradient is -1.
    got = run(backend, torch.where(logits[:1] > 0, 0.0, logits[:1]), torch.tensor([5], device=device))
    assert got.loss.item() == pytest.approx(3e38, rel=1e-6)
    assert got.gradient[0, 5].item() == -1


@pytest.mark.parametrize("logit_scale", [1e30, 3e38])
def test_scaled_logits_that_overflow_are_clamped(backend, logit_scale, device):
    logits = torch.zeros(3, V, device=device)
    logits[0, :2] = torch.tensor([1e20, 2e20])  # both beyond float32: equal once clamped
    logits[1, :] = -1e20
    logits[2, 3] = 1e20
    targets = torch.tensor([0, 5, 3], device=device)
    got = run(backend, logits, targets, logit_scale=logit_scale, reduction="none")
    for loss, expected in zip(got.loss.tolist(), (math.log(2), math.log(V), 0.0), strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
    assert not got.gradient.isnan().any()
    capped = run(backend, logits, targets, logit_scale=logit_scale, softcap=2.0, reduction="none")
    expected = run_reference(logits, targets, logit_scale=logit_scale, softcap=2.0, reduction="none")
    torch.testing.assert_close(capped.loss.cpu().double(), expected.loss, rtol=1e-6, atol=0)
    assert capped.gradient[0, :2].count_nonzero() == 0  # flat where capped
    assert capped.gradient[1].count_nonzero() == 0


def test_minus_inf_stays_minus_inf_under_a_scale(backend, device):
    logits = make_logits(2, V, device=device)
    logits[:, 10:] = -INF
    check_against_reference(backend, logits, torch.tensor([3, 0], device=device), logit_scale=0.5)
    got = run(backend, logits, torch.tensor([3, 0], device=device), logit_scale=1e30)
    assert got.gradient[:, 10:].count_nonzero() == 0


@pytest.mark.lesson("0 * -inf")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_target_on_minus_inf(backend, dtype, device):
    logits = make_logits(3, V, dtype=dtype, device=device)
    logits[:, 4] = -INF
    targets = torch.tensor([4, 4, 6], device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss[:2].tolist() == [INF, INF]
    assert got.loss[2].isfinite()
    expected = torch.softmax(logits.cpu().double(), -1)
    expected[range(3), targets.cpu()] -= 1
    torch.testing.assert_close(got.gradient.cpu().double(), expected, rtol=2**-7, atol=2**-14)
    assert run(backend, logits, targets).loss.item() == INF
    # A row factor of 0, by token weight, by upstream gradient, or by class weight: exactly 0, not 0 * inf.
    token_weights = torch.tensor([0.0, 0.0, 1.0], device=device)
    assert run(backend, logits, targets, token_weights=token_weights).loss.isfinite()
    weights = torch.ones(V, device=device)
    weights[4] = 0
    got = run(backend, logits, targets, weights, reduction="none")
    assert got.loss[:2].tolist() == [0, 0]
    assert got.gradient[:2].count_nonzero() == 0
    got = run(backend, logits, targets, reduction="none", upstream=torch.tensor([0.0, 1.0, 1.0]))
    assert got.gradient[0].count_nonzero() == 0
    assert got.gradient.isfinite().all()


def test_target_on_minus_inf_with_weight_zero_under_z_loss(backend, device):
    """The row is read for the z-loss, and its cross entropy of +inf must still not appear."""
    logits = make_logits(2, V, device=device)
    logits[0, 4] = -INF
    weights = torch.ones(V, device=device)
    weights[4] = 0
    targets = torch.tensor([4, 6], device=device)
    check_against_reference(backend, logits, targets, weights, z_loss=0.1, upstream=3.0)


def test_row_wholly_minus_inf_is_nan(backend, device):
    logits = make_logits(3, V, device=device)
    logits[1] = -INF
    targets = make_targets(3, V=V, device=device)
    got = run(backend, logits, targets, reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert got.gradient[1].isnan().all()
    assert got.gradient[[0, 2]].isfinite().all()
    assert run(backend, logits, targets).loss.isnan()


@pytest.mark.lesson("padding turned into -softcap")
@pytest.mark.parametrize("V", [37, 1030])
def test_softcap_with_minus_inf(backend, V, device):
    """A user's -inf becomes -softcap, as torch's composition does, while padding lanes get no probability."""
    logits = make_logits(3, V, device=device)
    logits[0, 5:20] = -INF
    logits[1, :] = -INF
    logits[2, 4] = -INF
    targets = torch.tensor([0, 3, 4], device=device)
    got = check_against_reference(backend, logits, targets, softcap=3.0, logit_scale=1.5)
    rows = run(backend, logits, targets, softcap=3.0, reduction="none")
    assert rows.loss[1].item() == pytest.approx(math.log(V), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0  # flat where capped


@pytest.mark.parametrize("softcap", [1e-3, 30.0, 1e4])
def test_softcaps_small_and_large(backend, softcap, device):
    logits = make_logits(3, V, device=device, spread=10.0)
    check_against_reference(backend, logits, make_targets(3, V=V, device=device), softcap=softcap)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that do not count


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize(("V", "bad"), [(37, torch.nan), (37, INF), (37, -INF), (1030, torch.nan), (1030, -INF)])
@pytest.mark.parametrize(
    "options",
    [{}, {"return_stats": True}, {"reduction": "none"}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0}],
    ids=["mean", "stats", "none", "everything"],
)
def test_ignored_rows_and_rows_of_token_weight_zero_are_not_read(backend, bad, V, options, device):
    logits = make_logits(4, V, device=device)
    logits[0] = logits[2] = bad
    targets = make_targets(4, V=V, device=device, ignored=(0,))
    token_weights = torch.tensor([1.0, 2.0, 0.0, 3.0], device=device)
    got = run(backend, logits, targets, token_weights=token_weights, upstream=3.0, **options)
    expected = run_reference(logits, targets, token_weights=token_weights, upstream=3.0, **options)
    torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(got.gradient.cpu().double(), expected.gradient, rtol=1e-5, atol=1e-6)
    assert got.gradient[[0, 2]].tolist() == torch.zeros(2, V).tolist()
    if got.stats is not None:
        assert_stats(got.stats, expected.stats)


@pytest.mark.lesson("ignored rows are read")
@pytest.mark.parametrize("bad", [torch.nan, INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_whose_class_weighs_nothing_are_not_read(backend, bad, reduction, device):
    logits = make_logits(3, V, device=device)
    logits[1] = bad
    weights = torch.ones(V, device=device)
    weights[9] = 0
    targets = torch.tensor([2, 9, 4], device=device)
    got = run(backend, logits, targets, weights, reduction=reduction, upstream=0.5)
    assert got.loss.isfinite().all()
    assert got.gradient[1].tolist() == [0] * V
    assert got.gradient[[0, 2]].isfinite().all()


def test_statistics_leave_the_gradient_of_weightless_rows_alone(backend, device):
    """With statistics such a row is read, for its NLL; its gradient is still exactly 0."""
    logits = make_logits(3, V, device=device)
    logits[1, 5] = INF
    weights = torch.ones(V, device=device)
    weights[9] = 0
    got = run(backend, logits, torch.tensor([2, 9, 4], device=device), weights, return_stats=True)
    assert got.loss.isfinite()
    assert got.gradient[1].count_nonzero() == 0
    assert not got.gradient.isnan().any()
    assert got.stats.token_count.item() == 3


@pytest.mark.lesson("0 * -inf")
def test_token_weights_and_class_weights_of_uncounted_rows_may_be_anything(backend, device):
    """An ignored token's weight is not used, be it nan, nor is the weight of a class that is nobody's target."""
    logits = make_logits(3, V, device=device)
    targets = torch.tensor([4, -100, 6], device=device)
    token_weights = torch.tensor([1.0, torch.nan, 2.0], device=device)
    expected = run_reference(logits[[0, 2]], targets[[0, 2]], token_weights=token_weights[[0, 2]])
    got = run(backend, logits, targets, token_weights=token_weights)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0
    weights = torch.ones(V, device=device)
    weights[0] = INF
    expected = run_reference(logits[[0, 2]], targets[[0, 2]])
    got = run(backend, logits, targets, weights)
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert got.gradient[1].count_nonzero() == 0


@pytest.mark.lesson("all tokens ignored")
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("why", ["ignored", "token weights", "class weights"])
def test_nothing_to_average(backend, reduction, why, device):
    logits = make_logits(3, V, device=device, dtype=torch.float16)
    logits[1] = torch.nan
    hidden = logits.clone().requires_grad_()
    targets = make_targets(3, V=V, device=device, ignored=(0, 1, 2) if why == "ignored" else ())
    token_weights = torch.zeros(3, device=device) if why == "token weights" else None
    weights = torch.zeros(V, device=device) if why == "class weights" else torch.ones(V, device=device)
    loss = pdl_cross_entropy(
        hidden * 1, targets, weights, token_weights=token_weights, reduction=reduction, backend=backend
    )
    assert loss.requires_grad  # attached: every rank of a distributed job takes part in backward
    assert loss.count_nonzero() == 0
    loss.sum().backward()
    assert hidden.grad.tolist() == torch.zeros(3, V).tolist()


def test_all_class_weights_zero_leaves_the_z_loss(backend, device):
    logits, targets = make_logits(3, V, device=device), make_targets(3, V=V, device=device)
    got = check_against_reference(backend, logits, targets, torch.zeros(V, device=device), z_loss=0.5)
    assert got.loss.item() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_accuracy_counts_ties(backend, device):
    logits = torch.zeros(4, V, dtype=torch.bfloat16, device=device)
    logits[0, [3, 8]] = 2.0  # the target ties
    logits[1, 8] = 2.0  # the target loses
    logits[2, 9] = 2.0  # the target wins
    targets = torch.tensor([3, 3, 9, -100], device=device)
    stats = run(backend, logits, targets, return_stats=True).stats
    assert stats.accuracy.item() == pytest.approx(2 / 3, rel=1e-6)
    assert stats.token_count.item() == 3
    assert stats.token_count.dtype == torch.int64


def test_statistics_are_unweighted_and_alone_possible(backend, device):
    """nll is what plain cross entropy would be, whatever the weights; asking changes neither loss nor gradient."""
    logits = make_logits(4, V, device=device)
    targets = make_targets(4, V=V, device=device, ignored=(1,))
    weights = make_weights("power_law", V, device)
    got = run(backend, logits, targets, weights, return_stats=True)
    assert got.stats.nll.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)
    without = run(backend, logits, targets, weights)
    torch.testing.assert_close(got.loss, without.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.gradient, without.gradient, rtol=1e-6, atol=0)
    with torch.no_grad():
        _, stats = pdl_cross_entropy(logits, targets, weights, return_stats=True, backend=backend, reduction="none")
    assert_stats(stats, run_reference(logits, targets, weights).stats)


# ---------------------------------------------------------------------------------------------------------------------
# The error criterion where it is hard


@pytest.mark.lesson("target column rounded before p - 1")
@pytest.mark.parametrize("p", [0.99, 0.999, 0.99999])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_confident_predictions(backend, p, dtype, device):
    """p_y - 1 loses every digit that p_y was rounded to."""
    if dtype == torch.float32:
        skip_where_fma_rounds_twice(backend)
    rows = 64 if backend == "eager" else 12
    targets = make_targets(rows, V=V, device=device)
    logits = confident_logits(rows, V, p, targets, dtype)
    weights = make_weights("random", V, device) + 0.1
    check_against_reference(backend, logits, targets, weights, confident=True)


@pytest.mark.lesson("lse - z_y cancels")
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_common_offset(backend, offset, device):
    skip_where_fma_rounds_twice(backend)
    rows = 6
    targets = make_targets(rows, V=V, device=device)
    logits = make_logits(rows, V, device=device) + offset
    check_against_reference(backend, logits, targets, return_stats=True)
    # Confident rows show it best: here lse - z_y would be wrong by a hundred times the loss.
    logits = confident_logits(rows, V, 0.99999, targets) + offset
    got = run(backend, logits, targets, reduction="none")
    expected = run_reference(logits, targets, reduction="none")
    torchs = run_torch(logits, targets, reduction="none")
    floor = ONE_ROUNDING + 2 * EXP2_ERROR  # of the largest term, and of what takes the offset's rounding back
    assert_within_torch(got.loss, expected.loss, torchs.loss, "loss", torch.full((rows,), floor))


@pytest.mark.lesson("two roundings of the gradient")
@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.25, 65536.0])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_upstream_gradients(backend, upstream, dtype, device):
    logits = make_logits(3, V, dtype=dtype, device=device)
    targets = make_targets(3, V=V, device=device)
    check_against_reference(backend, logits, targets, normalizer=4.0, upstream=upstream)


@pytest.mark.lesson("two roundings of the gradient")
def test_loss_scaling_saves_small_fp16_gradients(backend, device):
    """Gradients below fp16's range for an upstream gradient of 1 must be there for one of 65536."""
    logits = make_logits(3, V, dtype=torch.float16, device=device)
    targets = make_targets(3, V=V, device=device)
    assert run(backend, logits, targets, normalizer=1e8).gradient.count_nonzero() == 0
    scaled = check_against_reference(backend, logits, targets, normalizer=1e8, upstream=65536.0)
    assert scaled.gradient.count_nonzero() > 3 * V // 2


@pytest.mark.lesson("losses kept in a half dtype")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sum_of_many_rows_is_float32(backend, dtype, device):
    """In fp16 the sum of 600 rows overflows or sticks; V=2 keeps the interpreter quick."""
    rows = 3000 if backend == "eager" or not INTERPRETED else 60
    logits = make_logits(rows, 2, dtype=dtype, device=device, spread=8.0)
    targets = make_targets(rows, V=2, device=device)
    got = run(backend, logits, targets, reduction="sum", token_weights=torch.full((rows,), 100.0, device=device))
    expected = run_reference(logits, targets, reduction="sum", token_weights=torch.full((rows,), 100.0))
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)
    assert got.loss.dtype == torch.float32


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_weights_from_1e_7_to_1e7_in_one_batch(backend, dtype, device):
    """Each row is held to its own scale: a light row must be right beside one that weighs 1e14 times as much."""
    V = 29
    weights = torch.logspace(-7, 7, V, device=device)
    targets = torch.tensor([0, 7, 14, 21, 28], device=device)
    logits = make_logits(5, V, dtype=dtype, device=device)
    got = check_against_reference(backend, logits, targets, weights, reduction="mean")
    ordinary = run_reference(logits, targets, reduction="mean").gradient[4]
    torch.testing.assert_close(  # the heaviest row owns the mean
        got.gradient[4].cpu().double(), 5 * ordinary, rtol=2**-6, atol=1e-3
    )
    if dtype != torch.float16:
        expected = run_reference(logits, targets, weights, reduction="none")
        float32s = run_torch(logits.float(), targets, weights, reduction="none")
        got = run(backend, logits, targets, weights, reduction="none")
        torch.testing.assert_close(got.loss.cpu().double(), expected.loss, rtol=2e-6, atol=0)
        factors = row_factors(targets, weights, reduction="none")
        assert_rows_rounded_once(got.gradient, expected.gradient, float32s.gradient, factors, backend, "gradient")
