"""What the loss allocates: one buffer of the size of the logits, none in place, and none without a gradient."""

import pytest
import torch
from helpers import Watching, make_targets
from helpers.autograd import assert_gradient
from torch.utils._pytree import tree_leaves

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.eager import pieces


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
    monkeypatch.setattr(pieces, "DEVICE_PIECE_BYTES", pieces.CPU_PIECE_BYTES)


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
