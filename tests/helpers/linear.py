"""Inputs, yardsticks and recorders for the loss fused with the output projection."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from helpers import INTERPRETED, Watching, assert_stats, assert_within_torch, compose, make_targets, stored_rounding
from pdl_kernels import LossStats, pdl_linear_cross_entropy
from reference.pdl import ReferenceStats, reference_cross_entropy

H, V = 8, 37
PARAMETERS = ("hidden", "lm_head_weight", "bias")
OURS = (
    "return_stats",
    "chunk_size",
    "accumulate_dtype",
    "compact",
    "row_sampling",
    "seed",
)  # unknown to the yardsticks


class Problem(NamedTuple):
    hidden: Tensor  # (..., H)
    lm_head_weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)


class LinearResult(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]  # by name; only of what was asked for
    stats: LossStats | ReferenceStats | None = None


def rows_for(backend, rows=13):
    """The interpreter takes about a tenth of a second a row."""
    return 5 if backend == "triton" and INTERPRETED else rows


def make_problem(*shape, H=H, V=V, dtype=torch.float32, device="cpu", bias=True, seed=0, ignored=(), ignore_index=-100):
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


def make_token_weights(rows, device="cpu"):
    """Mostly positive, so that their sum does not cancel; row 2 is 0 and row 3 negative."""
    u = 0.5 + torch.rand(rows, generator=torch.Generator().manual_seed(11))
    u[2], u[3] = 0, -0.4
    return u.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The package, the reference, and torch


def leaves(problem, needs=(True, True, True)):
    """Hidden, weight and bias as leaves; the strides are kept."""
    return [None if t is None else t.detach().requires_grad_(need) for t, need in zip(problem[:3], needs, strict=True)]


def run_linear(backend, problem, weights=None, *, upstream=1.0, needs=(True, True, True), **options) -> LinearResult:
    """Loss and gradients of the package."""
    hidden, lm_head_weight, bias = tensors = leaves(problem, needs)
    out = pdl_linear_cross_entropy(
        hidden, lm_head_weight, problem.targets, weights, bias=bias, backend=backend, **options
    )
    loss, stats = out if options.get("return_stats") else (out, None)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream), stats)


def run_linear_reference(problem, weights=None, *, upstream=1.0, **options) -> LinearResult:
    """Float64 on the CPU, from the same rounded inputs."""
    options = {name: _cpu(value) for name, value in options.items() if name not in OURS}
    tensors = [None if t is None else t.detach().cpu().double().requires_grad_() for t in problem[:3]]
    loss, stats = reference_cross_entropy(F.linear(*tensors), problem.targets.cpu().long(), _cpu(weights), **options)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream), stats)


def run_linear_torch(problem, weights=None, *, upstream=1.0, upcast=False, **options) -> LinearResult:
    """F.linear and F.cross_entropy in the dtype of the problem; `upcast`: the logits to float32 between them."""
    options = {name: value for name, value in options.items() if name not in OURS}
    tensors = leaves(problem)
    logits = F.linear(*tensors)
    loss = compose(logits.float() if upcast else logits, problem.targets, weights, **options)
    return LinearResult(loss.detach(), _gradients(loss, tensors, upstream))


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


def assert_no_worse(got, expected, torchs, backend, dtype):
    """Loss and gradients, each in both norms, against float64: at most torch's error plus 1e-6.

    In half dtypes chance decides whose last rounding is the luckier one; each tensor is allowed one. What that leaves
    out, test_half_dtypes_on_average holds.
    """
    if dtype == torch.float64:
        torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-12, atol=1e-13)
        for name, gradient in got.gradients.items():
            torch.testing.assert_close(gradient.cpu(), expected.gradients[name], rtol=1e-10, atol=1e-12)
        return
    half = dtype != torch.float32
    for name, value in {"loss": got.loss, **got.gradients}.items():
        want = expected.loss if name == "loss" else expected.gradients[name]
        torchs_value = torchs.loss if name == "loss" else torchs.gradients[name]
        assert value.isfinite().all(), name
        # One number per element: the criterion takes their norm.
        floor = stored_rounding(backend, dtype) * want.abs() if half else torch.zeros(1)
        if half and value.dim() > 0:
            floor = torch.maximum(floor, stored_rounding(backend, dtype) * want.abs().max() / 2)
        assert_within_torch(value, want, torchs_value, name, floor.reshape(-1))


def check_linear(backend, problem, weights=None, *, upstream=1.0, **options) -> LinearResult:
    """Run the package, hold everything against float64 by the criterion, return what it gave."""
    dtype = problem.hidden.dtype
    got = run_linear(backend, problem, weights, upstream=upstream, **options)
    expected = run_linear_reference(problem, weights, upstream=upstream, **options)
    torchs = run_linear_torch(problem, weights, upstream=upstream, **options)
    if not all(t.isfinite().all() for t in (torchs.loss, *torchs.gradients.values())):
        # Half dtypes hold neither every weight nor every sum; a user's next try is to upcast.
        torchs = run_linear_torch(problem, weights, upstream=upstream, upcast=True, **options)
    assert got.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.loss.shape == expected.loss.shape
    for name, gradient in got.gradients.items():
        assert gradient.dtype == dtype
        assert gradient.shape == getattr(problem, name).shape
    assert_no_worse(got, expected, torchs, backend, dtype)
    if got.stats is not None:
        # The logits are rounded to their dtype before the maximum is sought, and nll is a mean over such rows.
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 3e-6)
        assert_stats(got.stats, expected.stats, tolerance)
    return got


def assert_same(got, expected, rtol=1e-5, atol=1e-6):
    """Two results of the package that may differ by rounding only."""
    torch.testing.assert_close(got.loss, expected.loss, rtol=rtol, atol=atol)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in got.gradients.items():
        torch.testing.assert_close(
            gradient, expected.gradients[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_equal(got, expected):
    """Bit for bit."""
    assert torch.equal(got.loss, expected.loss)
    assert got.gradients.keys() == expected.gradients.keys()
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, expected.gradients[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# What runs underneath


class Products(Watching):
    """Rows that take part in each of the three products."""

    def __init__(self, H=H, V=V):
        super().__init__()
        self.sizes = (H, V)
        self.shapes = []  # (m, k, n) of every product

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = arguments[-2:]
            self.shapes.append((*left.shape, right.shape[1]))
        return function(*arguments, **(keywords or {}))

    @property
    def logit_rows(self):
        H, V = self.sizes
        return sum(m for m, k, n in self.shapes if (k, n) == (H, V))

    @property
    def hidden_rows(self):
        H, V = self.sizes
        return sum(m for m, k, n in self.shapes if (k, n) == (V, H))

    @property
    def weight_rows(self):
        H, V = self.sizes
        return sum(k for m, k, n in self.shapes if (m, n) == (V, H))


class LiveMemory(Watching):
    """Bytes of the storages that torch's operations make, while they live; what was there before is not counted."""

    def __init__(self):
        super().__init__()
        self.live = {}  # storage's address: (weak reference, bytes)
        self.peak = 0  # bytes
        self.largest = 0  # bytes of the largest storage
        self.known = set()  # addresses of what was there before

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        for tensor in tree_leaves((arguments, keywords)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                self.known.add(tensor.untyped_storage()._cdata)
        outputs = function(*arguments, **keywords)
        self.live = {address: entry for address, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return outputs
