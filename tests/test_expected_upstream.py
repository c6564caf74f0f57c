"""Forward forms the gradient for the upstream gradient that the last backward met: right whatever that was."""

import math
import threading

import pytest
import torch

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.ops import cross_entropy as operation

ROWS, V = 3, 300
EXPECTED = [0.25, -3.0, 2.0**24]
UNUSABLE = [0.0, math.inf, math.nan, 2.0**25]
FLOAT32 = {"rtol": 4e-6, "atol": 0}  # a row that is held, and one that is read again


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    set_last("eager", 1.0)
    set_last("triton", 1.0)


def set_last(backend, value):
    """As if a backward had met this upstream gradient."""
    if backend == "eager":
        operation._remember(value)
        return
    from pdl_kernels.ops.repeated_calls import remembered_upstream

    remembered_upstream(device()).fill_(value)


def last(backend):
    if backend == "eager":
        return operation._last_upstream
    from pdl_kernels.ops.repeated_calls import remembered_upstream

    return remembered_upstream(device()).item()


def device():
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def remembers(backend):
    return backend == "triton" or device().type == "cpu"  # elsewhere the eager backend would have to wait


def make(dtype):
    generator = torch.Generator().manual_seed(3)
    logits = (3 * torch.randn(ROWS, V, generator=generator)).to(dtype)
    targets = torch.randint(V, (ROWS,), generator=generator)
    targets[1] = -100
    weights = torch.rand(V, generator=generator) + 0.1
    return logits.to(device()).requires_grad_(), targets.to(device()), weights.to(device())


def formed_in_forward(loss):
    """What forward left for backward."""
    return loss.grad_fn.gradient


def gradient(loss, logits, upstream, **options):
    return torch.autograd.grad(loss, logits, torch.tensor(upstream, device=loss.device), **options)[0]


@pytest.mark.parametrize("options", [{}, {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expected", EXPECTED + UNUSABLE)
def test_the_gradient_does_not_depend_on_what_was_expected(backend, expected, dtype, options):
    """16-bit logits give the same bits; in float32 the kernels that hold a row round once more."""
    logits, targets, weights = make(dtype)
    found = {}
    for last_upstream in (1.0, expected):
        for upstream in (0.5, expected):
            set_last(backend, last_upstream)
            loss = pdl_cross_entropy(logits, targets, weights, backend=backend, **options)
            found[last_upstream, upstream] = gradient(loss, logits, upstream)
            if remembers(backend):
                assert last(backend) == pytest.approx(upstream, nan_ok=True)
    for upstream in (0.5, expected):
        tolerance = FLOAT32 if dtype == torch.float32 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found[expected, upstream], found[1.0, upstream], **tolerance, equal_nan=True)


@pytest.mark.parametrize("expected", EXPECTED)
def test_what_was_expected_is_formed_in_forward(backend, expected):
    if not remembers(backend):
        pytest.skip("the eager backend expects 1 on a GPU")
    logits, targets, weights = make(torch.float32)
    set_last(backend, expected)
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend)
    formed = formed_in_forward(loss).clone()
    handed_over = gradient(loss, logits, expected)
    assert torch.equal(formed, handed_over)
    set_last(backend, 1.0)
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend)
    torch.testing.assert_close(gradient(loss, logits, expected), handed_over, **FLOAT32)


@pytest.mark.parametrize("unusable", UNUSABLE)
def test_one_is_expected_after_an_unusable_upstream_gradient(backend, unusable):
    logits, targets, weights = make(torch.float32)
    set_last(backend, 1.0)
    expected = formed_in_forward(pdl_cross_entropy(logits, targets, weights, backend=backend)).clone()
    set_last(backend, unusable)
    loss = pdl_cross_entropy(logits, targets, weights, backend=backend)
    assert torch.equal(formed_in_forward(loss), expected)
    zero = gradient(loss, logits, 0.0)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_alternating_losses(backend):
    logits, targets, weights = make(torch.float32)
    first = pdl_cross_entropy(logits, targets, weights, backend=backend)
    exact = gradient(first, logits, 1.0)
    for upstream in (0.5, 64.0, 0.5):
        one = pdl_cross_entropy(logits, targets, weights, backend=backend)
        two = pdl_cross_entropy(logits, targets, weights, backend=backend)
        torch.testing.assert_close(gradient(one, logits, upstream), exact * upstream)
        torch.testing.assert_close(gradient(two, logits, -upstream), exact * -upstream)


def test_a_second_backward_and_one_of_an_older_loss(backend):
    logits, targets, weights = make(torch.float32)
    set_last(backend, 0.25)
    older = pdl_cross_entropy(logits, targets, weights, backend=backend)
    newer = pdl_cross_entropy(logits, targets, weights, backend=backend)
    for upstream in (8.0, 0.25, 1.0):
        got = gradient(newer, logits, upstream, retain_graph=True)
        torch.testing.assert_close(got, gradient(newer, logits, 1.0, retain_graph=True) * upstream)
    torch.testing.assert_close(gradient(older, logits, 3.0), gradient(newer, logits, 3.0))


@pytest.mark.parametrize("upstream", [0.25, 1.0, 5.0])
def test_logits_that_changed_after_forward(backend, upstream):
    """Nothing is left to form the gradient from: it is multiplied by what separates the two."""
    logits, targets, weights = make(torch.float32)
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    set_last(backend, 0.25)
    copy = logits.detach().clone().requires_grad_()
    loss = pdl_cross_entropy(copy, targets, weights, backend=backend)
    with torch.no_grad():
        copy.zero_()
    torch.testing.assert_close(gradient(loss, copy, upstream), exact * upstream)


@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_in_place_one_is_expected(backend, upstream):
    logits, targets, weights = make(torch.float32)
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend=backend), logits, 1.0)
    set_last(backend, 0.25)
    product = logits.detach().clone().requires_grad_() * 1
    loss = pdl_cross_entropy(product, targets, weights, backend=backend, inplace=True)
    torch.testing.assert_close(gradient(loss, product, upstream), exact * upstream)


def test_threads_with_different_upstream_gradients():
    """Of the eager backend, which keeps a number of the process: a thread may meet another's."""
    logits, targets, weights = (tensor.cpu() for tensor in make(torch.float32))
    logits = logits.detach().requires_grad_()
    exact = gradient(pdl_cross_entropy(logits, targets, weights, backend="eager"), logits, 1.0)
    wrong = []

    def work(upstream):
        leaf = logits.detach().clone().requires_grad_()
        for _ in range(20):
            got = gradient(pdl_cross_entropy(leaf, targets, weights, backend="eager"), leaf, upstream)
            if not torch.allclose(got, exact * upstream, **FLOAT32):
                wrong.append(upstream)

    threads = [threading.Thread(target=work, args=(upstream,)) for upstream in (0.5, 3.0, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
