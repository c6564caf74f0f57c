"""Inputs, yardsticks and recorders for the loss fused with the output projection."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from helpers import INTERPRETED, assert_stats, assert_within_torch, compose, make_targets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pdl_kernels import LossStats, pdl_linear_cross_entropy
from reference.pdl import ReferenceStats, reference_cross_entropy

PARAMETERS = ("hidden", "lm_head_weight", "bias")


class Problem(NamedTuple):
    hidden: Tensor  # (..., H)
    lm_head_weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)

    @property
    def parameters(self):
        return [t for t in self[:3] if t is not None]


class LinearResult(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]  # by name; only of what was asked for
    stats: LossStats | ReferenceStats | None = None


def make_problem(
    *shape, H=8, V=37, dtype=torch.float32, device="cpu", bias=True, seed=0, ignored=(), ignore_index=-100
) -> Problem:
    """Logits of a spread of about 3."""
    generator = torch.Generator().manual_seed(3000 + seed)
    hidden = torch.randn(*shape, H, generator=generator)
    lm_head_weight = torch.randn(V, H, generator=generator) * (3 / H**0.5)
    offsets = torch.randn(V, generator=generator)
    return Problem(
        hidden.to(dtype).to(device),
        lm_head_weight.to(dtype).to(device),
        offsets.to(dtype).to(device) if bias else None,
        make_targets(*shape, V=V, device=device, seed=seed, ignored=ignored, ignore_index=ignore_index),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The package, the reference, and torch


def run_linear(backend, problem, weights=None, *, upstream=1.0, needs=(True, True, True), **options) -> LinearResult:
    """Loss and gradients of the package; the tensors' strides are kept."""
    tensors = _leaves(problem, needs)
    hidden, lm_head_weight, bias = tensors
    out = pdl_linear_cross_entropy(
        hidden, lm_head_weight, problem.targets, weights, bias=bias, backend=backend, **options
    )
    loss, stats = out if options.get("return_stats") else (out, None)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream), stats)


def run_reference(problem, weights=None, *, upstream=1.0, **options) -> LinearResult:
    """Float64 on the CPU, from the same rounded inputs."""
    ours = ("return_stats", "chunk_size", "accumulate_dtype", "compact", "row_sampling", "seed")
    options = {name: _cpu(value) for name, value in options.items() if name not in ours}
    tensors = [None if t is None else t.detach().cpu().double().requires_grad_() for t in problem[:3]]
    logits = F.linear(*tensors)
    loss, stats = reference_cross_entropy(logits, problem.targets.cpu().long(), _cpu(weights), **options)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream), stats)


def run_torch(problem, weights=None, *, upstream=1.0, autocast=None, **options) -> LinearResult:
    """F.linear and F.cross_entropy in the dtype of the problem, or as `autocast` has them."""
    ours = ("return_stats", "chunk_size", "accumulate_dtype", "compact", "row_sampling", "seed")
    options = {name: value for name, value in options.items() if name not in ours}
    tensors = _leaves(problem, (True, True, True))
    with torch.autocast(problem.hidden.device.type, dtype=autocast, enabled=autocast is not None):
        loss = compose(F.linear(*tensors), problem.targets, weights, **options)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream))


def _leaves(problem, needs):
    return [None if t is None else t.detach().requires_grad_(need) for t, need in zip(problem[:3], needs, strict=True)]


def _gradients(loss, tensors, upstream):
    named = {n: t for n, t in zip(PARAMETERS, tensors, strict=True) if t is not None and t.requires_grad}
    if not named:
        return {}
    given = upstream if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
    found = torch.autograd.grad(loss, list(named.values()), given.to(loss.dtype).to(loss.device).view(loss.shape))
    return dict(zip(named, found, strict=True))


def _cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------------------------------------
# The error criterion


def truncates(backend, dtype):
    """The interpreter stores bfloat16 by cutting digits off, twice the error of rounding, and biased."""
    return INTERPRETED and backend == "triton" and dtype == torch.bfloat16


def assert_no_worse(got, expected, torchs, backend, dtype):
    """Loss and gradients, each in both norms, against float64: at most torch's error plus 1e-6."""
    if dtype == torch.float64:
        torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-12, atol=1e-13)
        for name, gradient in got.gradients.items():
            torch.testing.assert_close(gradient.cpu(), expected.gradients[name], rtol=1e-10, atol=1e-12)
        return
    assert_within_torch(got.loss, expected.loss, torchs.loss, "loss")
    for name, gradient in got.gradients.items():
        want = expected.gradients[name]
        assert gradient.isfinite().all(), name
        floor = 2.0**-7 * want.abs().max().item() if truncates(backend, dtype) else 0.0
        assert_within_torch(gradient, want, torchs.gradients[name], f"gradient of {name}", floor)


def check_linear(backend, problem, weights=None, *, upstream=1.0, **options) -> LinearResult:
    """Run the package, hold everything against float64 by the criterion, return what it gave."""
    dtype = problem.hidden.dtype
    got = run_linear(backend, problem, weights, upstream=upstream, **options)
    expected = run_reference(problem, weights, upstream=upstream, **options)
    torchs = run_torch(problem, weights, upstream=upstream, **options)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.loss.shape == expected.loss.shape
    for name, gradient in got.gradients.items():
        assert gradient.dtype == dtype
        assert gradient.shape == getattr(problem, name).shape
    assert_no_worse(got, expected, torchs, backend, dtype)
    if got.stats is not None:
        # Half logits are rounded before the maximum is sought, and nll is a mean of rounded rows.
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 3e-6)
        assert_stats(got.stats, expected.stats, tolerance)
    return got


def assert_same(got, expected, rtol=1e-5, atol=1e-6):
    """Two results of the package that may differ by rounding only."""
    torch.testing.assert_close(got.loss, expected.loss, rtol=rtol, atol=atol)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(
            gradient, expected.gradients[name], rtol=rtol, atol=atol, msg=lambda m, n=name: n + m
        )


def assert_equal(got, expected):
    """Bit for bit."""
    assert torch.equal(got.loss, expected.loss)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# What runs underneath


class Recorder(TorchDispatchMode):
    """Shapes and bytes of every new storage, and the operands of every matrix product."""

    def __init__(self, *known):
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in known if t is not None}
        self.allocations = []  # (shape, bytes of the storage)
        self.products = []  # (m, k, n)
        self._alive = []  # keeps addresses from being reused, which would hide an allocation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.products.append((left.shape[0], left.shape[1], right.shape[1]))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.storages:
                self.storages.add(tensor.untyped_storage().data_ptr())
                self.allocations.append((tuple(tensor.shape), tensor.untyped_storage().nbytes()))
                self._alive.append(tensor)
        return out

    def count(self, *shape):
        return sum(found == shape for found, _ in self.allocations)

    @property
    def largest(self):
        return max((size for _, size in self.allocations), default=0)

    def forward_rows(self, H, V):
        """Rows of hidden states that were multiplied by the (V, H) weight."""
        return sum(m for m, k, n in self.products if (k, n) == (H, V))

    def weight_rows(self, H, V):
        """Rows whose products went into the gradient of the weight."""
        return sum(k for m, k, n in self.products if (m, n) == (V, H))

    def hidden_rows(self, H, V):
        """Rows for which a gradient of the hidden state was formed."""
        return sum(m for m, k, n in self.products if (k, n) == (V, H))
