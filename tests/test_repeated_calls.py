"""What the Triton backend keeps from one call for the next: it must be right for every call that finds it."""

import gc
import weakref

import pytest
import torch

from pdl_kernels import pdl_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed")
from pdl_kernels.ops import repeated_calls

pytestmark = pytest.mark.usefixtures("forgotten_calls", "on_the_device")


def run(logits, targets, weights=None, upstream=1.0, backend="triton", **options):
    """(loss, gradient) of the loss times `upstream`."""
    leaf = logits.detach().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, weights, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, upstream))
    return loss.detach(), gradient


def assert_right(logits, targets, weights=None, **options):
    got = run(logits, targets, weights, **options)
    expected = run(logits, targets, weights, backend="eager", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def make(rows=6, vocab_size=40, dtype=torch.float32):
    return torch.randn(rows, vocab_size, dtype=dtype), torch.randint(vocab_size, (rows,)), torch.rand(vocab_size) + 0.1


def test_a_second_call_works_nothing_out(monkeypatch):
    logits, targets, weights = make()
    assert_right(logits, targets, weights, upstream=3.0)
    assert len(repeated_calls._calls) == 1

    def refuse(*_, **__):
        raise AssertionError("worked out again")

    monkeypatch.setattr(repeated_calls, "_work_out", refuse)
    monkeypatch.setattr(repeated_calls.launch, "gradient_call", refuse)
    other_logits, other_targets, other_weights = make()
    assert_right(other_logits, other_targets, other_weights, upstream=-0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "token_mean"},
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"logit_scale": 0.5},
        {"ignore_index": 3},
        {"normalizer": 7.0},
        {"normalizer": torch.tensor(7.0)},
        {"token_weights": torch.arange(6.0)},
    ],
    ids=lambda options: " ".join(options),
)
def test_an_option_is_not_taken_from_another_call(options, device):
    logits, targets, weights = make()
    options = {name: value.to(device) if name == "token_weights" else value for name, value in options.items()}
    assert_right(logits, targets, weights)
    assert_right(logits, targets, weights, **options)
    assert_right(logits, targets, weights)


def test_shapes_strides_dtypes_and_offsets_are_told_apart():
    logits, targets, weights = make(8, 48)
    storage = torch.randn(8 * 48 + 64)
    for given in (
        logits,
        logits[:7],
        logits[:, :47],
        logits[::2],
        torch.randn(48, 8).T,
        storage[1 : 1 + 8 * 48].view(8, 48),
        storage[4 : 4 + 8 * 48].view(8, 48),
        storage[: 8 * 48].view(8, 48),
        torch.as_strided(storage, (8, 48), (49, 1)),
        logits.view(2, 4, 48),
        logits.view(2, 4, 48).transpose(0, 1),
        torch.randn(2, 5, 48)[:, :4],
    ):
        classes = targets.new_zeros(given.shape[:-1]).random_(given.shape[-1])
        assert_right(given, classes, weights[: given.shape[-1]], upstream=0.5)
        assert_right(given, classes.int(), None)
        assert_right(given, classes, weights[: given.shape[-1]].double())
    for weight_offset in range(4):
        table = torch.rand(60)[weight_offset : weight_offset + 48]
        assert_right(logits, targets, table, upstream=2.0)


def shifted(tensor):
    """The same numbers, starting one element off 16 bytes."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def test_what_triton_compiles_for_is_told_apart():
    """The interpreter takes any tensor; a compiled kernel fits only the dtypes and alignment that it was made for."""
    logits, targets, weights = make()
    upstream = torch.tensor(2.0)
    token_weights = torch.ones(6)

    def kept(logits=logits, targets=targets, weights=weights, token_weights=token_weights, upstream=upstream):
        leaf = logits.detach().requires_grad_()
        loss = pdl_cross_entropy(leaf, targets, weights, token_weights=token_weights, backend="triton")
        torch.autograd.grad(loss, leaf, upstream)
        return len(repeated_calls._calls), sum(len(call.backward) for call in repeated_calls._calls.values())

    seen = kept()
    for changed in (
        {"logits": shifted(logits)},
        {"logits": logits.half()},
        {"targets": shifted(targets)},
        {"targets": targets.int()},
        {"weights": shifted(weights)},
        {"weights": weights.double()},
        {"weights": None},
        {"token_weights": shifted(token_weights)},
        {"token_weights": None},
    ):
        now = kept(**changed)
        assert now == (seen[0] + 1, seen[1] + 1), changed.keys()
        assert kept(**changed) == now
        seen = now
    assert kept(upstream=torch.ones(2)[1]) == (seen[0], seen[1] + 1)


def test_no_tensor_is_kept():
    logits, targets, weights = make()
    references = [weakref.ref(tensor) for tensor in (logits, targets, weights)]
    loss, gradient = run(logits, targets, weights, upstream=2.0)
    references += [weakref.ref(tensor) for tensor in (loss, gradient)]
    del logits, targets, weights, loss, gradient
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_the_number_of_kept_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(repeated_calls, "MAX_CALLS", 3)
    for rows in range(1, 9):
        assert_right(*make(rows))
        assert len(repeated_calls._calls) <= 3


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)], ids=["rows", "sequences"])
def test_saved_tensors_come_back_with_other_strides_and_offsets(shape):
    """Hooks on saved tensors, for offloading, may return the same numbers in other memory."""
    targets, weights = torch.randint(40, shape[:-1]), torch.rand(40)

    def elsewhere(tensor):
        memory = torch.empty(2 * tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        moved = memory[1:].view(*tensor.shape, 2)[..., 0] if tensor.dim() else memory[1]
        return moved.copy_(tensor)

    logits = torch.randn(shape)
    expected = run(logits, targets, weights, upstream=3.0, backend="eager")
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), elsewhere):
            got = run(logits, targets, weights, upstream=3.0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(run(logits, targets, weights, upstream=3.0), expected, rtol=1e-5, atol=1e-6)
