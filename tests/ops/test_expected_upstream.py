"""The upstream gradient that the caller expects: forward forms the gradient for it, backward for another one."""

import math

import pytest
import torch
from helpers import INTERPRETED, run_reference

from pdl_kernels import (
    PDLCrossEntropyLoss,
    PDLLinearCrossEntropyLoss,
    pdl_cross_entropy,
    pdl_linear_cross_entropy,
)

ROWS, V = 3, 300
EXPECTED = [1.0, 0.25, -3.0, 2.0**16]
UNUSABLE = [0.0, math.inf, math.nan]
NOT_DIVISORS = [*UNUSABLE, 1e-40]  # the last, in float32, overflows what is divided by it
FLOAT32 = {"rtol": 4e-6, "atol": 0}  # a row that is held, and one that is read again
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("on_the_device")


def make(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(ROWS, V, generator=generator, device="cpu")).to(dtype)
    targets = torch.randint(V, (ROWS,), generator=generator, device="cpu")
    targets[1] = -100
    weights = torch.rand(V, generator=generator, device="cpu") + 0.1
    here = torch.get_default_device()
    return logits.to(here).requires_grad_(), targets.to(here), weights.to(here)


def gradient(loss, logits, upstream, **options):
    return torch.autograd.grad(loss, logits, torch.tensor(upstream), **options)[0]


def formed_in_forward(loss):
    """What forward left for backward."""
    return loss.grad_fn.gradient


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expected", EXPECTED)
def test_the_gradient_is_right_whatever_was_expected(backend, expected, dtype, options):
    """16-bit logits give the same bits; in float32 the kernels that hold a row round once more."""
    logits, targets, weights = make(dtype)
    tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 0, "atol": 0}
    plain = pdl_cross_entropy(logits, targets, weights, backend=backend, **options)
    for upstream in {1.0, 0.25, expected}:
        if dtype == torch.float16 and abs(upstream) > 100:
            continue  # float16 cannot hold these gradients
        loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=expected, **options)
        assert torch.equal(loss, plain)
        got = gradient(loss, logits, upstream)
        torch.testing.assert_close(got, gradient(plain, logits, upstream, retain_graph=True), **tolerance)
        exact = run_reference(logits, targets, weights, upstream=upstream, **options).gradient
        rounding = 2.0**-7 if INTERPRETED and dtype == torch.bfloat16 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.cpu().double(), exact, rtol=rounding + 2e-6, atol=1e-6 * abs(upstream))


@pytest.mark.parametrize("expected", EXPECTED)
def test_what_was_expected_is_formed_in_forward_and_handed_over(backend, expected):
    logits, targets, weights = make()
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=expected)
    formed = formed_in_forward(loss)
    before = formed.clone()
    handed_over = gradient(loss, logits, expected)
    assert handed_over.untyped_storage().data_ptr() == formed.untyped_storage().data_ptr()
    assert torch.equal(handed_over, before)


@pytest.mark.parametrize("expected", EXPECTED)
def test_one_rounding_in_place(backend, expected):
    """The gradient for the expected upstream gradient is the one that is formed out of place, bit for bit."""
    logits, targets, weights = make(torch.bfloat16)
    out_of_place = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=expected)
    product = logits.detach().requires_grad_() * 1
    loss = pdl_cross_entropy(product, targets, weights, backend=backend, expected_upstream=expected, inplace=True)
    got = gradient(loss, product, expected)
    assert got.data_ptr() == product.data_ptr()
    assert torch.equal(got, gradient(out_of_place, logits, expected))


@pytest.mark.parametrize("upstream", [1.0, 0.25, -7.0, 0.0])
def test_in_place_another_one_multiplies(backend, upstream):
    logits, targets, weights = make()
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    product = logits.detach().requires_grad_() * 1
    loss = pdl_cross_entropy(product, targets, weights, backend=backend, expected_upstream=0.25, inplace=True)
    torch.testing.assert_close(gradient(loss, product, upstream), exact * upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64], ids=str)
def test_a_tensor_of_any_dtype(backend, dtype):
    logits, targets, weights = make()
    expected = torch.tensor(4, dtype=dtype)
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=expected)
    number = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=4)
    assert torch.equal(formed_in_forward(loss), formed_in_forward(number))


@pytest.mark.parametrize("unusable", NOT_DIVISORS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_tensor_that_cannot_be_divided_by_counts_as_one(backend, unusable, inplace):
    """A loss scale that overflowed; what it holds is not known without waiting for the device."""
    logits, targets, weights = make()
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    for upstream in (1.0, 0.5, 0.0):
        product = logits.detach().requires_grad_() * 1
        loss = pdl_cross_entropy(
            product, targets, weights, backend=backend, expected_upstream=torch.tensor(unusable), inplace=inplace
        )
        torch.testing.assert_close(gradient(loss, product, upstream), exact * upstream)


@pytest.mark.parametrize("upstream", UNUSABLE)
def test_ignored_rows_stay_zero_under_any_upstream_gradient(backend, upstream):
    logits, targets, weights = make()
    for inplace in (False, True):
        product = logits.detach().requires_grad_() * 1
        loss = pdl_cross_entropy(product, targets, weights, backend=backend, expected_upstream=0.25, inplace=inplace)
        assert torch.equal(gradient(loss, product, upstream)[1], torch.zeros(V))


def test_in_place_with_saved_logits_of_other_strides(backend):
    """A hook on saved tensors, for offloading, may return them in memory that splits into rows by copying alone."""
    shape = (2, 3, 2)
    torch.manual_seed(2)
    logits, targets = torch.randn(*shape, 40).requires_grad_(), torch.randint(40, shape)
    exact = gradient(pdl_cross_entropy(logits, targets, backend=backend), logits, 1.0)

    def elsewhere(tensor):
        return torch.empty(3, 4, 2, 40)[:, :2].permute(2, 0, 1, 3).copy_(tensor)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), elsewhere):
        product = logits.detach().requires_grad_() * 1
        loss = pdl_cross_entropy(product, targets, backend=backend, inplace=True)
    torch.testing.assert_close(gradient(loss, product, 3.0), exact * 3)


@pytest.mark.parametrize("expected", [2.0**60, 2.0**-60])
def test_the_linear_loss_in_float16_with_an_expected_number_out_of_its_range(backend, expected):
    """The gradients of the logits are brought near 1 whatever is expected."""
    torch.manual_seed(1)
    hidden, head = torch.randn(6, 16).half().requires_grad_(), torch.randn(50, 16).half().requires_grad_()
    targets = torch.randint(50, (6,))
    options = {"backend": backend, "reduction": "sum"}
    plain = torch.autograd.grad(pdl_linear_cross_entropy(hidden, head, targets, **options), (hidden, head))
    loss = pdl_linear_cross_entropy(hidden, head, targets, expected_upstream=expected, **options)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, head)), plain, rtol=2e-3, atol=2e-3)


def test_a_second_backward(backend):
    logits, targets, weights = make()
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=0.25)
    for upstream in (8.0, 0.25, 1.0, 0.25):
        torch.testing.assert_close(gradient(loss, logits, upstream, retain_graph=True), exact * upstream)


@pytest.mark.parametrize("upstream", [0.25, 1.0, 5.0])
def test_logits_that_changed_after_forward(backend, upstream):
    """Nothing is left to form the gradient from: it is multiplied by what separates the two."""
    logits, targets, weights = make()
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    copy = logits.detach().clone().requires_grad_()
    loss = pdl_cross_entropy(copy, targets, weights, backend=backend, expected_upstream=0.25)
    with torch.no_grad():
        copy.zero_()
    torch.testing.assert_close(gradient(loss, copy, upstream), exact * upstream)


def test_per_row_upstream_gradients_are_not_affected(backend):
    logits, targets, weights = make()
    upstream = torch.tensor([0.5, 2.0, -1.0])
    losses = [
        pdl_cross_entropy(logits, targets, weights, backend=backend, reduction="none", expected_upstream=expected)
        for expected in (1.0, 8.0)
    ]
    one, other = (torch.autograd.grad(loss, logits, upstream)[0] for loss in losses)
    assert torch.equal(one, other)


@pytest.mark.parametrize("steps", [3, 7])
def test_what_a_division_of_the_loss_gives(backend, steps):
    """Gradient accumulation: `loss / steps` is met by expected_upstream=1 / steps, to the bit."""
    logits, targets, weights = make()
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=1 / steps)
    before = formed_in_forward(loss).clone()
    (got,) = torch.autograd.grad(loss / steps, logits)
    assert torch.equal(got, before)


def test_a_gradient_scaler(backend):
    """`scaler.scale` of a one is the scale as a tensor, without waiting for the device."""
    logits, targets, weights = make(torch.float16)
    scaler = torch.amp.GradScaler(logits.device.type, init_scale=2.0**10)
    expected = scaler.scale(torch.ones(()))
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=expected)
    before = formed_in_forward(loss).clone()
    (got,) = torch.autograd.grad(scaler.scale(loss), logits)
    assert torch.equal(got, before)
    exact = run_reference(logits, targets, weights, upstream=2.0**10).gradient
    torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-3, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The modules


def test_the_module_passes_it_on(backend):
    logits, targets, weights = make()
    criterion = PDLCrossEntropyLoss(weights, backend=backend, expected_upstream=0.25)
    function = pdl_cross_entropy(logits, targets, weights, backend=backend, expected_upstream=0.25)
    assert torch.equal(formed_in_forward(criterion(logits, targets)), formed_in_forward(function))
    doubled = criterion(logits, targets, expected_upstream=torch.tensor(0.5))
    torch.testing.assert_close(formed_in_forward(doubled), 2 * formed_in_forward(function))
    assert "expected_upstream=0.25" in repr(criterion)


@pytest.mark.parametrize("make_module", [PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss])
def test_the_modules_check_it(make_module):
    with pytest.raises(ValueError, match="expected_upstream is 0"):
        make_module(expected_upstream=0)


# ---------------------------------------------------------------------------------------------------------------------
# The linear loss


@pytest.mark.parametrize("accumulate_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expected", [0.25, torch.tensor(-3.0)], ids=str)
def test_the_linear_loss(backend, expected, dtype, accumulate_dtype):
    if accumulate_dtype == torch.float16 and dtype != torch.float16:
        pytest.skip("wider than float16 whatever is asked")
    torch.manual_seed(1)
    hidden = torch.randn(3, 16).to(dtype).requires_grad_()
    head = torch.randn(50, 16).to(dtype).requires_grad_()
    targets = torch.randint(50, (3,))
    if isinstance(expected, torch.Tensor):
        expected = expected.to(hidden.device)
    options = {"backend": backend, "accumulate_dtype": accumulate_dtype, "chunk_size": 2}
    for upstream in (1.0, 0.25, -3.0):
        found = []
        for number in (1.0, expected):
            loss = pdl_linear_cross_entropy(hidden, head, targets, expected_upstream=number, **options)
            given = torch.tensor(upstream)
            found.append((loss.detach(), *torch.autograd.grad(loss, (hidden, head), given, retain_graph=True)))
            again = torch.autograd.grad(loss, (hidden, head), given)
            torch.testing.assert_close(again, found[-1][1:], rtol=0, atol=0)
        # The gradients of the logits are rounded to their dtype once either way.
        tolerance = 2.0**-6 if dtype == torch.bfloat16 else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance * abs(upstream))


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("function", [pdl_cross_entropy, pdl_linear_cross_entropy], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0, ValueError, "expected_upstream is 0; accepted is a finite number other than 0, in float32's range"),
        (math.inf, ValueError, "expected_upstream is inf"),
        (math.nan, ValueError, "expected_upstream is nan"),
        (1e-60, ValueError, "in float32's range"),
        (1e60, ValueError, "in float32's range"),
        ("1", TypeError, "expected_upstream is a str; accepted is a finite number other than 0, in float32"),
        (True, TypeError, "expected_upstream is a bool"),
        (None, TypeError, "expected_upstream is a NoneType"),
        (torch.ones(1), ValueError, r"expected_upstream has shape \(1,\)"),
        (torch.tensor(1j), TypeError, "expected_upstream is torch.complex64"),
    ],
    ids=str,
)
def test_what_is_refused(function, value, error, words):
    logits, targets, _ = make()
    arguments = (logits,) if function is pdl_cross_entropy else (logits, torch.randn(V, V))
    with pytest.raises(error, match=words):
        function(*arguments, targets, expected_upstream=value)
