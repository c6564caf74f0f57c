"""What the Triton backend keeps of a call for others that are alike: it must be right for every call that finds it."""

import functools
import gc
import weakref

import pytest
import torch

from pdl_kernels import pdl_cross_entropy

pytest.importorskip("triton", reason="Triton is not installed")
from pdl_kernels.kernels import launch, planner
from pdl_kernels.options import LossOptions

pytestmark = pytest.mark.usefixtures("on_the_device")
DEVICE = planner.Device(132, 32, True, (9, 0), 50 * 2**20)


@pytest.fixture(autouse=True)
def _no_plans(monkeypatch):
    monkeypatch.setattr(launch, "_plans", {})


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


# ---------------------------------------------------------------------------------------------------------------------
# The key


def logits_of(rows=8, vocab_size=4096, dtype=torch.bfloat16, row_stride=None, column_stride=1, offset=0):
    """(1, rows, V) without memory."""
    row_stride = vocab_size * column_stride if row_stride is None else row_stride
    storage = torch.empty(offset + rows * row_stride * column_stride, dtype=dtype, device="meta")
    return storage.as_strided((1, rows, vocab_size), (0, row_stride, column_stride), offset)


def key(plan=None, logits=None, options=None, gradient="as the logits"):
    logits = logits_of() if logits is None else logits
    gradient = logits if isinstance(gradient, str) else gradient
    return launch.plan_key(plan or launch._plan_loss, logits, options or LossOptions(), gradient)


CHANGES = {
    "rows": {"logits": logits_of(rows=9)},
    "vocabulary": {"logits": logits_of(vocab_size=4104)},
    "dtype": {"logits": logits_of(dtype=torch.float16)},
    "width": {"logits": logits_of(dtype=torch.float32)},
    "row stride": {"logits": logits_of(row_stride=4104)},
    "column stride": {"logits": logits_of(row_stride=1, column_stride=8)},
    "offset": {"logits": logits_of(offset=1)},
    "no gradient": {"gradient": None},
    "stride of the gradient": {"gradient": logits_of(row_stride=4104)},
    "offset of the gradient": {"gradient": logits_of(offset=1)},
    "another purpose": {"plan": launch._plan_gradient},
    **{
        name: {"options": LossOptions()._replace(**{name: value})}
        for name, value in {
            "ignore_index": 3,
            "reduction": "sum",
            "label_smoothing": 0.1,
            "z_loss": 0.1,
            "softcap": 5.0,
            "logit_scale": 0.5,
            "return_stats": True,
        }.items()
    },
}


@pytest.fixture
def described(monkeypatch):
    monkeypatch.setattr(launch, "device_of", lambda device: DEVICE)


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("change", CHANGES)
def test_each_part_of_the_key_is_told_apart(change):
    assert key() == key()
    assert key(**CHANGES[change]) != key()


@pytest.mark.usefixtures("described")
def test_the_device_the_planner_and_the_setting_of_clusters_are_told_apart(monkeypatch):
    before = key()
    with launch.planned_by(functools.partial(planner.plan_loss, only=planner.TWO_PASSES)):
        assert key() != before
    assert key() == before
    for value in ("0", "1"):
        monkeypatch.setenv("PDL_KERNELS_CLUSTERS", value)
        assert key() != before
    monkeypatch.delenv("PDL_KERNELS_CLUSTERS")
    assert key() == before
    monkeypatch.setattr(launch, "device_of", lambda device: DEVICE._replace(capability=(10, 0)))
    assert key() != before


@pytest.mark.usefixtures("described")
@pytest.mark.parametrize("change", CHANGES)
def test_equal_keys_have_equal_plans(change):
    """Nothing that plans depend on is missing: with the key of another call, another plan is found."""

    def plans(plan=None, logits=None, options=None, gradient="as the logits"):
        logits = logits_of() if logits is None else logits
        gradient = logits if isinstance(gradient, str) else gradient
        plan = plan or launch._plan_loss
        arguments = plan, logits, options or LossOptions(), gradient
        return launch._kept(*arguments), plan(*arguments[1:])

    plans()
    kept, fresh = plans(**CHANGES[change])
    assert kept == fresh


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def test_a_second_call_plans_nothing(monkeypatch):
    logits, targets, weights = make()
    assert_right(logits, targets, weights, upstream=3.0)
    assert len(launch._plans) == 2  # of loss and gradient in forward, and of the gradient in backward

    def refuse(*_, **__):
        raise AssertionError("planned again")

    monkeypatch.setattr(launch, "make_plan", refuse)
    assert_right(*make(), upstream=-0.5)


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
        {"expected_upstream": 0.5},
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
    assert_right(logits, targets.int(), None)
    assert_right(logits, targets, weights.double())
    for weight_offset in range(4):
        table = torch.rand(60)[weight_offset : weight_offset + 48]
        assert_right(logits, targets, table, upstream=2.0)


def test_no_tensor_is_kept():
    logits, targets, weights = make()
    references = [weakref.ref(tensor) for tensor in (logits, targets, weights)]
    loss, gradient = run(logits, targets, weights, upstream=2.0)
    references += [weakref.ref(tensor) for tensor in (loss, gradient)]
    del logits, targets, weights, loss, gradient
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_the_number_of_kept_plans_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "MAX_PLANS", 3)
    for rows in range(1, 9):
        assert_right(*make(rows))
        assert len(launch._plans) <= 3


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
