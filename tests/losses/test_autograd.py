"""What the loss promises as a citizen of autograd, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from helpers import Watching, make_logits, make_targets, make_weights, run, run_reference
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.eager import cross_entropy as eager

N, V = 3, 37
DOUBLE = "differentiated twice|second derivative"
# Torch compares where the kept and the recomputed tensors are.
RECOMPUTED = pytest.mark.needs_driver(reason="a tensor that a matrix product keeps is on a CPU, as it really is")


@pytest.fixture
def problem(device):
    """(logits, targets, weights) and the gradient of the mean for an upstream gradient of 1."""
    logits = make_logits(N, V, device=device)
    targets = make_targets(N, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    gradient = run_reference(logits, targets, weights).gradient.to(device=device, dtype=torch.float32)
    return logits, targets, weights, gradient


def assert_gradient(got, expected):
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=1e-5, atol=1e-7)


def producer(logits):
    """(leaf, non-leaf with the same values): what a model's output is to its parameters."""
    leaf = logits.clone().requires_grad_()
    return leaf, leaf * 1


# ---------------------------------------------------------------------------------------------------------------------
# One backward and many


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_leaf_through_a_view_with_many_upstream_gradients(backend, reduction, problem):
    """.grad may share the storage of the first gradient; no later backward may touch that."""
    logits, targets, weights, _ = problem
    expected = run_reference(logits, targets, weights, reduction=reduction).gradient.float().to(logits.device)
    leaf = logits.clone().view(-1).requires_grad_()
    loss = pdl_cross_entropy(leaf.view(N, V), targets, weights, reduction=reduction, backend=backend)
    seen = []
    for upstream in (1.0, 3.0, 0.0, 0.5, 1.0):
        leaf.grad = None
        loss.backward(torch.full_like(loss, upstream), retain_graph=True)
        assert_gradient(leaf.grad.view(N, V), upstream * expected)
        seen.append((leaf.grad, leaf.grad.clone()))
    for kept, copied in seen:  # none of them changed after it was handed over
        assert torch.equal(kept, copied)


def test_the_first_upstream_gradient_is_not_one(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    for upstream in (3.0, 1.0, 0.0, 1.0):
        leaf.grad = None
        loss.backward(torch.tensor(upstream, device=leaf.device), retain_graph=True)
        assert_gradient(leaf.grad, upstream * expected)


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_autograd_grad_twice(backend, problem, upstream):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = upstream * pdl_cross_entropy(leaf, targets, weights, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf)
    assert_gradient(first, upstream * expected)
    assert_gradient(second, upstream * expected)
    assert first.data_ptr() != second.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)


def test_gradients_accumulate_over_backwards(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        assert_gradient(leaf.grad, times * expected)


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("change", ["clip", "zero"])
def test_grad_changed_in_place_between_two_backwards(backend, problem, change):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    loss.backward(retain_graph=True)
    if change == "clip":
        norm = torch.nn.utils.clip_grad_norm_([leaf], 1e-3)
        left = expected * (1e-3 / norm)
    else:
        leaf.grad.zero_()
        left = torch.zeros_like(expected)
    loss.backward()
    assert_gradient(leaf.grad, left + expected)
    assert torch.equal(leaf, logits)  # the logits are not what was changed


def test_hooks_see_and_replace_the_gradient(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    seen = []
    hidden.register_hook(lambda gradient: seen.append(gradient.clone()))
    hidden.register_hook(lambda gradient: gradient.mul_(2))  # in place, which autograd does not forbid
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    loss.backward(retain_graph=True)
    assert_gradient(seen[0], expected)
    assert_gradient(leaf.grad, 2 * expected)
    loss.backward()
    assert_gradient(seen[1], expected)
    assert_gradient(leaf.grad, 4 * expected)


@pytest.mark.lesson("gradient written over shared logits")
def test_two_losses_on_one_tensor(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    ours = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    again = pdl_cross_entropy(hidden, targets, reduction="sum", backend=backend)
    torchs = hidden.square().sum()
    (ours + 2 * again + 3 * torchs).backward()
    summed = run_reference(logits, targets, reduction="sum").gradient.float().to(logits.device)
    assert_gradient(leaf.grad, expected + 2 * summed + 6 * logits)


@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_gradients_of_the_statistics_do_not_exist(backend, problem, inplace):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss, stats = pdl_cross_entropy(hidden, targets, weights, return_stats=True, inplace=inplace, backend=backend)
    assert all(not value.requires_grad and value.dim() == 0 for value in stats)
    assert all(value.device == logits.device for value in stats)
    loss.backward()
    assert_gradient(leaf.grad, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Upstream gradients per row


class _Upstream(torch.autograd.Function):
    """The identity, whose backward sends exactly the tensor it was given."""

    @staticmethod
    def forward(ctx, loss, upstream):
        ctx.upstream = upstream
        return loss.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.upstream, None


@pytest.mark.lesson("rows scaled by the first upstream gradient")
@pytest.mark.lesson("upstream gradient with stride 0")
@pytest.mark.parametrize(
    "kind", ["zero first", "stride 0", "strided", "offset", "reversed by index", "half", "transposed"]
)
def test_upstream_per_row(backend, kind, device):
    logits = make_logits(2, 2, V, device=device)
    targets = make_targets(2, 2, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    upstream = {
        "zero first": torch.tensor([[0.0, 2.0], [-1.0, 0.5]], device=device),
        "stride 0": torch.tensor(1.5, device=device).expand(2, 2),
        "strided": torch.arange(8.0, device=device)[::2].view(2, 2),
        "offset": torch.arange(10.0, device=device)[3:7].view(2, 2),
        "reversed by index": torch.arange(4.0, device=device).flip(0).view(2, 2),
        "half": torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device).expand(2, 2),
        "transposed": torch.arange(4.0, device=device).view(2, 2).t(),
    }[kind]
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, reduction="none", backend=backend)
    assert loss.shape == (2, 2)
    _Upstream.apply(loss, upstream).sum().backward()
    expected = run_reference(logits, targets, weights, reduction="none", upstream=upstream.cpu())
    assert_gradient(leaf.grad, expected.gradient.to(device))


@pytest.mark.lesson("upstream gradient with stride 0")
@pytest.mark.lesson("rows scaled by the first upstream gradient")
@pytest.mark.parametrize("consumer", ["sum", "first rows", "every second", "masked", "weighted"])
def test_reductions_a_user_writes(backend, consumer, device):
    logits, targets = make_logits(4, V, device=device), make_targets(4, V=V, device=device)

    def reduce(loss):
        return {
            "sum": lambda: loss.sum(),
            "first rows": lambda: loss[:2].mean(),
            "every second": lambda: loss[1::2].sum(),
            "masked": lambda: loss[torch.tensor([False, True, True, False], device=device)].mean(),
            "weighted": lambda: (loss * torch.tensor([0.0, 1.0, -2.0, 0.5], device=device)).sum(),
        }[consumer]()

    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    reduce(pdl_cross_entropy(leaf, targets, reduction="none", backend=backend)).backward()
    reduce(F.cross_entropy(other, targets, reduction="none")).backward()
    assert other.grad.abs().max() > 0.01
    assert_gradient(leaf.grad, other.grad)


# ---------------------------------------------------------------------------------------------------------------------
# The logits


@pytest.mark.lesson("gradient written over shared logits")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_are_untouched(backend, problem, reduction):
    logits, targets, weights, _ = problem
    _, hidden = producer(logits)
    version = hidden._version
    loss = pdl_cross_entropy(hidden, targets, weights, reduction=reduction, backend=backend)
    (3 * loss.sum()).backward()
    assert torch.equal(hidden, logits)
    assert hidden._version == version


@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
def test_logits_may_change_after_the_loss(backend, problem, upstream):
    """The first backward has its gradient already; the second needs the logits, and must say that they are gone."""
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    hidden.detach().mul_(-2)
    loss.backward(torch.tensor(upstream, device=logits.device), retain_graph=True)
    assert_gradient(leaf.grad, upstream * expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_may_change_after_the_loss(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    table = weights.clone()
    loss = pdl_cross_entropy(leaf, targets, table, backend=backend)
    table.fill_(torch.nan)
    (3 * loss).backward()
    assert_gradient(leaf.grad, 3 * expected)


def test_normalizer_may_change_after_the_loss(backend, problem):
    """An accumulation loop that reuses one tensor for its denominators."""
    logits, targets, _, _ = problem
    leaf = logits.clone().requires_grad_()
    normalizer = torch.tensor(4.0, device=logits.device)
    loss = pdl_cross_entropy(leaf, targets, normalizer=normalizer, backend=backend)
    normalizer.fill_(1000)
    (3 * loss).backward(retain_graph=True)
    expected = run_reference(logits, targets, normalizer=4.0, upstream=3.0).gradient.to(logits.device)
    assert_gradient(leaf.grad, expected)
    leaf.grad = None
    (3 * loss).backward()
    assert_gradient(leaf.grad, expected)


def test_saved_tensors_hooks_may_move_the_logits(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.cpu().numpy().copy(), lambda a: torch.from_numpy(a)):
        loss = pdl_cross_entropy(leaf, targets.cpu(), weights, backend=backend) if leaf.is_cpu else None
    if loss is None:
        pytest.skip("the hooks bring the tensors back to the CPU")
    for upstream in (3.0, 1.0):
        (gradient,) = torch.autograd.grad(upstream * loss, leaf, retain_graph=True)
        assert_gradient(gradient, upstream * expected)


# ---------------------------------------------------------------------------------------------------------------------
# inplace=True


@pytest.mark.parametrize("upstream", [1.0, 3.0, 0.0])
@pytest.mark.parametrize("layout", ["contiguous", "without the last position", "transposed"])
def test_inplace_gradient(backend, upstream, layout, device):
    if layout == "contiguous":
        logits = make_logits(N, V, device=device)
    elif layout == "without the last position":
        logits = make_logits(2, 3, V, device=device)[:, :-1]
    else:
        logits = make_logits(2, 2, V, device=device).transpose(0, 1)
    targets = make_targets(*logits.shape[:-1], V=V, device=device, ignored=(1,))
    leaf = torch.empty_strided(logits.shape, logits.stride(), device=device).copy_(logits).requires_grad_()
    hidden = leaf * 1
    version = hidden._version
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    assert hidden._version > version
    assert not torch.equal(hidden, logits)  # the gradient has moved in
    expected = run_reference(logits, targets, upstream=upstream)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    loss.backward(torch.tensor(upstream, device=device))
    assert_gradient(leaf.grad, expected.gradient.to(device))
    assert leaf.grad[targets == -100].count_nonzero() == 0


def test_inplace_gradient_of_few_long_rows(backend, device):
    """Rows may be split over programs; the one that overwrites the target's column must not mislead the others."""
    long = 1100
    logits = make_logits(2, long, dtype=torch.float16, device=device)
    targets = torch.tensor([0, long - 1], device=device)
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, inplace=True, softcap=8.0, z_loss=0.01, backend=backend)
    (3 * loss).backward()
    expected = run_reference(logits, targets, softcap=8.0, z_loss=0.01, upstream=3.0)
    torch.testing.assert_close(leaf.grad.double(), expected.gradient.to(device), rtol=2**-9, atol=2**-20)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_inplace_and_out_of_place_agree_bitwise(backend, problem, smoothing):
    logits, targets, weights, _ = problem
    gradients = []
    for inplace in (False, True):
        leaf, hidden = producer(logits)
        loss = pdl_cross_entropy(
            hidden, targets, weights, label_smoothing=smoothing, inplace=inplace, return_stats=True, backend=backend
        )[0]
        loss.backward()
        gradients.append((loss.detach(), leaf.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.lesson("gradient written over shared logits")
@pytest.mark.parametrize("who", ["consumer", "producer"])
def test_inplace_is_seen_by_whoever_saved_the_logits(backend, problem, who):
    logits, targets, _, _ = problem
    leaf = logits.clone().requires_grad_()
    hidden = leaf.exp() if who == "producer" else leaf * 1  # exp saves its result, and the result is the logits
    other = hidden.square().sum() if who == "consumer" else 0.0  # square saves its input
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@pytest.mark.lesson("gradient written over shared logits")
def test_a_second_inplace_loss_is_an_error_in_the_backward_of_the_first(backend, problem):
    logits, targets, _, _ = problem
    _, hidden = producer(logits)
    first = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    second = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_an_inplace_loss_after_another_loss(backend, problem):
    """The first loss, out of place, has its gradient already; its second backward must raise."""
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    first = pdl_cross_entropy(hidden, targets, weights, backend=backend)
    second = pdl_cross_entropy(hidden, targets, reduction="sum", inplace=True, backend=backend)
    summed = run_reference(logits, targets, reduction="sum").gradient.float().to(logits.device)
    (first + second).backward(retain_graph=True)
    assert_gradient(leaf.grad, expected + summed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.lesson("second backward scales again")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_second_backward_in_place_raises(backend, problem, upstream):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    loss = upstream * pdl_cross_entropy(hidden, targets, weights, inplace=True, backend=backend)
    loss.backward(retain_graph=True)
    assert_gradient(leaf.grad, upstream * expected)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    assert_gradient(leaf.grad, upstream * expected)


def test_inplace_logits_changed_before_backward(backend, problem):
    """The gradient lives in the logits; who writes over them must hear of it."""
    logits, targets, _, _ = problem
    _, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, inplace=True, backend=backend)
    hidden.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "kind", ["leaf", "view of a leaf", "slice of a leaf", "expanded", "overlapping windows", "detached leaf"]
)
def test_inplace_refusals(backend, kind, device):
    leaf = make_logits(4, V, device=device).requires_grad_()
    logits = {
        "leaf": lambda: leaf,
        "view of a leaf": lambda: leaf.view(2, 2, V),
        "slice of a leaf": lambda: leaf[1:],
        "expanded": lambda: (leaf[:1] * 1).expand(4, V),
        "overlapping windows": lambda: (leaf * 1).view(-1).unfold(0, V, 3),
        "detached leaf": lambda: leaf.detach().requires_grad_(),
    }[kind]()
    before = leaf.detach().clone()
    targets = make_targets(*logits.shape[:-1], V=V, device=device)
    with pytest.raises(ValueError, match="inplace=True"):
        pdl_cross_entropy(logits, targets, inplace=True, backend=backend)
    assert torch.equal(leaf, before)
    assert pdl_cross_entropy(logits, targets, backend=backend).isfinite()


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "no requires_grad", "no_grad leaf"])
def test_inplace_touches_nothing_where_no_gradient_is_needed(backend, problem, how):
    logits, targets, weights, _ = problem
    expected = run_reference(logits, targets, weights).loss.item()
    mine = logits.clone()
    if how == "no requires_grad":
        loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    elif how == "inference_mode":
        with torch.inference_mode():
            mine = mine * 1
            loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    else:
        mine.requires_grad_()
        mine = mine if how == "no_grad leaf" else mine * 1
        with torch.no_grad():
            loss = pdl_cross_entropy(mine, targets, weights, inplace=True, backend=backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert not loss.requires_grad
    assert torch.equal(mine, logits)
    assert how == "inference_mode" or mine._version == 0


def test_inplace_with_reduction_none(backend, problem):
    """Documented to be without effect: right, and as often as one likes."""
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, reduction="none", inplace=True, backend=backend)
    upstream = torch.tensor([0.0, 1.0, -2.0])
    loss.backward(upstream.to(loss.device))
    expected = run_reference(logits, targets, weights, reduction="none", upstream=upstream).gradient
    assert_gradient(leaf.grad, expected.to(logits.device))


def test_inplace_through_a_model(backend, device):
    """A head, its output cut by one position, and an optimiser step: parameters get torch's gradients."""
    torch.manual_seed(1)
    head = torch.nn.Linear(8, V).to(device)
    hidden = torch.randn(2, 3, 8, device=device)
    labels = make_targets(2, 3, V=V, device=device)
    loss = pdl_cross_entropy(head(hidden)[:, :-1], labels[:, 1:], inplace=True, backend=backend)
    got = torch.autograd.grad(loss, list(head.parameters()))
    torchs = F.cross_entropy(head(hidden)[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    for ours, expected in zip(got, torch.autograd.grad(torchs, list(head.parameters())), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("inplace", [False, True])
def test_double_backward_raises(backend, problem, reduction, inplace):
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    loss = pdl_cross_entropy(hidden, targets, weights, reduction=reduction, inplace=inplace, backend=backend)
    # An upstream gradient that nobody expected: in place, the logits are written to once more.
    (gradient,) = torch.autograd.grad(3 * loss.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE):
        gradient.square().sum().backward()


def test_create_graph_alone_is_harmless(backend, problem):
    logits, targets, weights, expected = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    (gradient,) = torch.autograd.grad(3 * loss, leaf, create_graph=True)
    assert_gradient(gradient, 3 * expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "jacrev", "vjp", "is_grads_batched"])
def test_functorch_transforms_raise(backend, problem, transform):
    logits, targets, weights, _ = problem

    def loss(x):
        return pdl_cross_entropy(x, targets, weights, backend=backend)

    def call():
        if transform == "grad":
            torch.func.grad(loss)(logits)
        elif transform == "vmap":
            torch.func.vmap(loss)(logits.expand(2, N, V))
        elif transform == "jvp":
            torch.func.jvp(loss, (logits,), (torch.ones_like(logits),))
        elif transform == "jacrev":
            torch.func.jacrev(loss)(logits)
        elif transform == "vjp":
            torch.func.vjp(loss, logits)
        else:
            leaf = logits.clone().requires_grad_()
            upstream = torch.ones(2, device=logits.device)
            torch.autograd.grad(loss(leaf), leaf, upstream, is_grads_batched=True)

    with pytest.raises(RuntimeError, match=r"pdl_cross_entropy does not support|functorch"):
        call()


def test_forward_mode_raises_or_is_right(backend, problem):
    """Not named by the contract; what must not happen is a tangent that is wrong in silence."""
    logits, targets, weights, expected = problem
    tangent = torch.randn_like(logits)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        try:
            loss = pdl_cross_entropy(dual, targets, weights, backend=backend)
        except (RuntimeError, NotImplementedError):
            return
        got = torch.autograd.forward_ad.unpack_dual(loss).tangent
        assert got is not None, "the tangent was dropped"
        assert got.item() == pytest.approx((tangent * expected).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["weights", "token_weights", "normalizer"])
def test_only_the_logits_are_differentiable(backend, problem, name):
    logits, targets, _, _ = problem
    shape = {"weights": (V,), "token_weights": (N,), "normalizer": ()}[name]
    value = torch.ones(shape, device=logits.device, requires_grad=True)
    leaf = logits.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=name):
        pdl_cross_entropy(leaf, targets, **{name: value}, backend=backend)
    assert pdl_cross_entropy(leaf, targets, **{name: value.detach()}, backend=backend).requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class _Allocations(Watching):
    """Sizes in bytes of every new storage that an operator returns."""

    def __init__(self, known):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in known}
        self.sizes = []
        self.alive = []  # keeps addresses from being reused, which would hide an allocation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                self.storages.add(tensor.untyped_storage().data_ptr())
                self.sizes.append(tensor.untyped_storage().nbytes())
                self.alive.append(tensor)
        return out


# Large enough that the eager backend works piecewise on a CPU: 16 MB of logits.
ROWS_LARGE, V_LARGE = 1024, 4096


@pytest.fixture
def _small_pieces(monkeypatch):
    """On every device, so that the same logits are large."""
    monkeypatch.setattr(eager, "DEVICE_PIECE_BYTES", eager.CPU_PIECE_BYTES)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.lesson("gradients computed under no_grad")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_nothing_large_is_allocated_without_a_gradient(reduction, how, device):
    logits = torch.randn(ROWS_LARGE, V_LARGE, device=device)
    targets = make_targets(ROWS_LARGE, V=V_LARGE, device=device)
    if how == "no_grad":
        logits.requires_grad_()
    options = {"reduction": reduction, "return_stats": True, "label_smoothing": 0.1, "softcap": 5.0, "logit_scale": 2.0}
    with torch.set_grad_enabled(how == "frozen"), _Allocations([logits, targets]) as allocations:
        pdl_cross_entropy(logits, targets, backend="eager", **options)
    assert allocations.sizes
    size = logits.untyped_storage().nbytes()  # a name of its own: pytest would print the storage, element by element
    assert max(allocations.sizes) < size / 2


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.lesson("memory of the size of the logits")
@pytest.mark.parametrize(("inplace", "buffers"), [(False, 1), (True, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_large_buffer_with_a_gradient_and_none_in_place(inplace, buffers, dtype, device):
    leaf = torch.randn(ROWS_LARGE, V_LARGE, device=device, dtype=dtype).requires_grad_()
    hidden = leaf * 1
    targets = make_targets(ROWS_LARGE, V=V_LARGE, device=device)
    with _Allocations([leaf, hidden, targets]) as allocations:
        loss = pdl_cross_entropy(hidden, targets, inplace=inplace, backend="eager")
        (gradient,) = torch.autograd.grad(loss, hidden)
    large = [size for size in allocations.sizes if size > hidden.untyped_storage().nbytes() / 2]
    assert len(large) == buffers
    assert gradient.abs().max() > 0
    if inplace:
        assert gradient.data_ptr() == hidden.data_ptr()


@pytest.mark.usefixtures("_small_pieces")
def test_no_large_buffer_for_another_upstream_gradient(device):
    """The first backward forms it again where it is."""
    leaf = torch.randn(ROWS_LARGE, V_LARGE, device=device).requires_grad_()
    targets = make_targets(ROWS_LARGE, V=V_LARGE, device=device)
    loss = pdl_cross_entropy(leaf, targets, backend="eager")
    upstream = torch.tensor(3.0, device=device)
    with _Allocations([leaf, targets]) as allocations:
        torch.autograd.grad(loss, leaf, upstream)
    large = [size for size in allocations.sizes if size > leaf.untyped_storage().nbytes() / 2]
    assert len(large) <= 1  # the gradient itself may be seen here for the first time


@pytest.mark.lesson("memory of the size of the logits")
def test_the_gradient_is_released_with_grad(backend, problem):
    """After backward the operation holds no buffer that .grad does not own."""
    logits, targets, weights, _ = problem
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = gradient.clone()
    gradient.fill_(torch.nan)
    (again,) = torch.autograd.grad(loss, leaf)
    assert_gradient(again, kept)


# ---------------------------------------------------------------------------------------------------------------------
# Autocast, checkpointing, gradcheck, determinism


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}], ids=["plain", "all"])
def test_autocast_leaves_the_numbers_alone(backend, problem, dtype, options):
    logits, targets, weights, _ = problem
    plain = run(backend, logits, targets, weights, upstream=3.0, **options)
    with torch.autocast(logits.device.type, dtype=dtype):
        cast = run(backend, logits, targets, weights, upstream=3.0, **options)
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast.gradient, plain.gradient)


@pytest.mark.parametrize("use_reentrant", [True, pytest.param(False, marks=RECOMPUTED)])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_activation_checkpointing(backend, use_reentrant, inplace, upstream, device):
    torch.manual_seed(2)
    weight = torch.randn(V, 8, device=device).requires_grad_()
    hidden = torch.randn(N, 8, device=device).requires_grad_()
    targets = make_targets(N, V=V, device=device)

    def head_and_loss(hidden):
        return pdl_cross_entropy(hidden @ weight.t(), targets, inplace=inplace, backend=backend)

    loss = checkpoint(head_and_loss, hidden, use_reentrant=use_reentrant)
    (upstream * loss).backward()
    got = hidden.grad, weight.grad
    torchs = upstream * F.cross_entropy(hidden @ weight.t(), targets)
    for ours, expected in zip(got, torch.autograd.grad(torchs, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"reduction": "token_mean", "label_smoothing": 0.2},
        {"normalizer": 3.0, "z_loss": 0.1},
        {"reduction": "sum", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1},
        {"reduction": "none", "softcap": 3.0, "logit_scale": 0.7, "z_loss": 0.1, "label_smoothing": 0.1},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("token_weights", [False, True])
def test_gradcheck(options, token_weights, device):
    logits = make_logits(3, 7, device=device, spread=1.0).double().requires_grad_()
    targets = make_targets(3, V=7, device=device, ignored=(1,))
    weights = make_weights("random", 7, device).double() + 0.1
    u = torch.tensor([-1.5, 1.0, 0.5], device=device) if token_weights else None

    def loss(x):
        return pdl_cross_entropy(x, targets, weights, token_weights=u, backend="eager", **options)

    assert torch.autograd.gradcheck(loss, (logits,), check_undefined_grad=False)


def test_inplace_gradcheck_by_differences(backend, problem):
    """In place, with the loss's own finite differences as the yardstick."""
    logits, targets, weights, _ = problem
    leaf, hidden = producer(logits)
    pdl_cross_entropy(hidden, targets, weights, softcap=4.0, inplace=True, backend=backend).backward()
    direction = torch.randn(N, V, generator=torch.Generator().manual_seed(5)).to(logits.device)
    ahead, behind = (
        run_reference(logits.double() + step * direction, targets, weights, softcap=4.0).loss for step in (1e-5, -1e-5)
    )
    slope = ((ahead - behind) / 2e-5).item()
    assert (leaf.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(("rows", "V"), [(4, 37), (2, 1100)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bitwise_deterministic(backend, rows, V, reduction, device):
    logits, targets = make_logits(rows, V, device=device), make_targets(rows, V=V, device=device)
    weights = make_weights("random", V, device) + 0.1
    options = {"z_loss": 0.1, "return_stats": True, "upstream": 3.0, "reduction": reduction}
    first = run(backend, logits, targets, weights, **options)
    again = run(backend, logits.clone(), targets.clone(), weights, **options)
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.gradient, again.gradient)
    assert all(torch.equal(a, b) for a, b in zip(first.stats, again.stats, strict=True))


def test_threads_do_not_change_the_result(device):
    logits, targets = make_logits(64, 500, device=device), make_targets(64, V=500, device=device)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run("eager", logits, targets, upstream=3.0))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0].loss, results[1].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0].gradient, results[1].gradient, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Only a GPU can show these


@pytest.mark.gpu
@pytest.mark.lesson("synchronisation on the hot path")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("inplace", [False, True])
def test_no_synchronisation(upstream, inplace, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    upstream = torch.tensor(upstream, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = pdl_cross_entropy(
            hidden, targets, weights, token_weights=torch.ones(N, device="cuda"), return_stats=True, inplace=inplace
        )
        loss.backward(upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_gradient(leaf.grad, upstream * expected)


@pytest.mark.gpu
@pytest.mark.lesson("synchronisation on the hot path")
@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_cuda_graph(problem, upstream):
    """Replays see other targets, weights and normalizers, and other upstream gradients met in between."""
    logits, targets, weights, _ = problem
    leaf = logits.clone().requires_grad_()
    normalizer = torch.tensor(7.0, device="cuda")

    def step():
        loss = pdl_cross_entropy(leaf, targets, weights, normalizer=normalizer)
        return torch.autograd.grad(upstream * loss, leaf)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient = step()
    for replay in range(3):
        targets.copy_(targets.roll(replay))
        weights.copy_(weights.roll(replay))
        normalizer.fill_(7.0 + replay)
        exact = run_reference(logits, targets, weights, normalizer=normalizer).gradient
        gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_gradient(gradient, upstream * exact.to(gradient.device))


@pytest.mark.gpu
@pytest.mark.lesson("32-bit offsets")
def test_more_than_2_to_the_31_logits():
    rows, V = 2**15 + 8, 2**16
    if torch.cuda.mem_get_info()[0] < 3 * rows * V * 2:
        pytest.skip("needs 13 GB of GPU memory")
    logits = torch.zeros(rows, V, dtype=torch.bfloat16, device="cuda")
    logits[-1, 7] = 5.0
    targets = torch.full((rows,), 7, device="cuda")
    targets[:-2] = -100
    leaf = logits.requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, reduction="none", backend="triton")
    expected = run_reference(logits[-2:].detach().clone(), targets[-2:], reduction="none")
    torch.testing.assert_close(loss[-2:].detach().cpu().double(), expected.loss, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    torch.testing.assert_close(gradient[-2:].cpu().double(), expected.gradient, rtol=2**-7, atol=1e-7)
    assert gradient[0].count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.lesson("launch on the current device")
def test_the_tensors_device_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    device = torch.device("cuda", 1)
    logits, targets = make_logits(N, V, device=device), make_targets(N, V=V, device=device)
    with torch.cuda.device(0):
        got = run("triton", logits, targets)
    assert got.loss.device == device
    assert_gradient(got.gradient, run_reference(logits, targets).gradient.to(device))


# ---------------------------------------------------------------------------------------------------------------------
# What a user may change between the loss and its backward


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"inplace": True}], ids=["mean", "none", "inplace"])
def test_changing_a_statistic_changes_no_gradient(backend, problem, options):
    logits, targets, weights, _ = problem
    gradients = []
    for change in (False, True):
        leaf, hidden = producer(logits)
        loss, stats = pdl_cross_entropy(hidden, targets, weights, backend=backend, return_stats=True, **options)
        if change:
            for value in stats:
                value.mul_(0)
        loss.sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_inplace_lets_the_targets_change_before_backward(backend, problem):
    logits, targets, weights, expected = problem
    leaf, hidden = producer(logits)
    targets = targets.clone()
    loss = pdl_cross_entropy(hidden, targets, weights, backend=backend, inplace=True)
    targets.zero_()
    loss.backward()
    assert_gradient(leaf.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_denominator_of_zero_survives_an_infinite_upstream_gradient(backend, device, reduction):
    leaf = torch.randn(3, 7, device=device, requires_grad=True)
    targets = torch.tensor([0, 1, 2], device=device)
    options = {"normalizer": 0.0} if reduction == "mean" else {"token_weights": torch.zeros(3, device=device)}
    loss = pdl_cross_entropy(leaf, targets, backend=backend, reduction=reduction, z_loss=0.1, **options)
    loss.backward(torch.full_like(loss, float("inf")))
    assert leaf.grad.count_nonzero() == 0
