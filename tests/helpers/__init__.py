"""Inputs, the two yardsticks (float64 and torch's own composition) and the error criterion."""

import math
import os
import shutil
from importlib import metadata
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pdl_kernels import LossStats, backends, pdl_cross_entropy
from reference.pdl import ReferenceStats, reference_cross_entropy

HALF = (torch.float16, torch.bfloat16)
INTERPRETED = not torch.cuda.is_available()
needs_compiler = pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler"
)

# A confident row's loss is log(1 + tiny): the roundings of that float32 sum are all that is left of it, in torch as
# here, and chance decides whose are smaller. Sums over threads round a few times near 1.
ONE_ROUNDING = 2.0**-24
SUM_ROUNDINGS = 6
# exp2 of 0 or nearly: exact in the interpreter; a GPU's ex2.approx is off by up to 2**-22.5 (PTX ISA).
EXP2_ERROR = 0.0 if INTERPRETED else 2.0**-22.5


class Result(NamedTuple):
    loss: Tensor  # () or (...)
    gradient: Tensor  # (..., V)
    stats: LossStats | ReferenceStats | None


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


def make_logits(*shape, dtype=torch.float32, device="cpu", spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(*shape, generator=generator)).to(dtype).to(device)


def make_targets(*shape, V, dtype=torch.int64, device="cpu", seed=0, ignored=(), ignore_index=-100):
    """Targets in [0, V); those at the flat positions `ignored` are `ignore_index`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    targets = torch.randint(V, shape, generator=generator)
    for position in ignored:
        targets.view(-1)[position] = ignore_index
    return targets.to(dtype).to(device)


def make_weights(kind, V, device="cpu", seed=0):
    """None, "random" (0 to 2, exact zeros included), or "power_law" (1e-7 to 1e7, shuffled)."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(2000 + seed)
    if kind == "random":
        weights = 2 * torch.rand(V, generator=generator)
        weights[torch.randperm(V, generator=generator)[: V // 8]] = 0
    elif kind == "power_law":
        weights = torch.logspace(-7, 7, V)[torch.randperm(V, generator=generator)]
    else:
        raise ValueError(kind)
    return weights.to(device)


def signed_token_weights(*shape, device="cpu"):
    """Signed, over two orders of magnitude, with an exact zero in the first place."""
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(*shape, generator=generator) * torch.logspace(-1, 1, math.prod(shape)).reshape(shape)
    u.view(-1)[0] = 0
    return u.to(device)


def confident_logits(rows, V, p, targets, dtype=torch.float32, seed=0):
    """Logits whose target has about probability `p`; the rest is spread unevenly."""
    logits = make_logits(rows, V, spread=1.0, seed=seed).double()
    y = targets.cpu().long()[:, None]
    others = logits.scatter(1, y, -torch.inf).logsumexp(-1, keepdim=True)
    logits = logits.scatter(1, y, others + torch.logit(torch.tensor(p, dtype=torch.float64)))
    return logits.to(dtype).to(targets.device)


# ---------------------------------------------------------------------------------------------------------------------
# The package, the reference, and torch


OURS = ("return_stats", "inplace", "expected_upstream")  # options that the yardsticks do not know


class _MadeByAModel(torch.autograd.Function):
    """A copy with the same strides, which may be overwritten."""

    @staticmethod
    def forward(ctx, leaf):
        made = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return made.copy_(leaf)

    @staticmethod
    def backward(ctx, upstream):
        return upstream


def run(backend, logits, targets, weights=None, *, upstream=1.0, **options) -> Result:
    """Loss and gradient of the package for `upstream`; the logits' strides are kept."""
    x = logits.detach().requires_grad_()
    given = _MadeByAModel.apply(x) if options.get("inplace") else x
    out = pdl_cross_entropy(given, targets, weights, backend=backend, **options)
    loss, stats = out if options.get("return_stats") else (out, None)
    (gradient,) = torch.autograd.grad(loss, x, _like(upstream, loss))
    return Result(loss.detach(), gradient, stats)


def run_reference(logits, targets, weights=None, *, upstream=1.0, **options) -> Result:
    options = {name: _cpu(value) for name, value in options.items() if name not in OURS}
    x = logits.detach().cpu().double().requires_grad_()
    loss, stats = reference_cross_entropy(x, targets.cpu().long(), _cpu(weights), **options)
    (gradient,) = torch.autograd.grad(loss, x, _like(upstream, loss))
    return Result(loss.detach(), gradient, stats)


def run_torch(logits, targets, weights=None, *, upstream=1.0, dtype=None, **options) -> Result:
    """torch's composition of the same loss; `dtype` is that of the arithmetic, the logits' own by default."""
    x = logits.detach().clone().requires_grad_()
    loss = compose(x if dtype is None else x.to(dtype), targets, weights, **options)
    (gradient,) = torch.autograd.grad(loss, x, _like(upstream, loss))
    return Result(loss.detach(), gradient, None)


def compose(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: Any = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
) -> Tensor:
    """What a torch user writes: F.cross_entropy, and the missing options around it, in the logits' dtype."""
    V = logits.shape[-1]
    z, y = logits.reshape(-1, V), targets.reshape(-1).long()
    w = None if weights is None else weights.to(z.dtype)
    if logit_scale != 1:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    plain = token_weights is None and z_loss == 0 and normalizer is None
    if plain and reduction in ("mean", "sum"):
        return F.cross_entropy(
            z, y, weight=w, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    counted = y != ignore_index
    u = torch.ones_like(y, dtype=torch.float32) if token_weights is None else token_weights.reshape(-1).float()
    counted = counted & (u != 0)
    u = torch.where(counted, u, 0.0)
    w_y = torch.ones_like(u) if weights is None else weights.float()[torch.where(counted, y, 0)]
    rows = F.cross_entropy(
        z, y, weight=w, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    ) * u.to(z.dtype)
    z_rows = z_loss * u.abs().to(z.dtype) * z.logsumexp(-1) ** 2 if z_loss > 0 else torch.zeros_like(rows)
    if reduction == "none":
        return (rows + z_rows).reshape(targets.shape)
    D, D_z = {
        "mean": ((w_y * u.abs()).sum(), u.abs().sum()),
        "token_mean": (counted.sum().float(), u.abs().sum()),
        "sum": (1.0, 1.0),
    }[reduction]
    if normalizer is not None:
        D = D_z = float(normalizer)
    return rows.sum() / D + z_rows.sum() / D_z


def _cpu(value):
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _like(upstream, loss):
    """`upstream`, a number or a tensor, as a gradient of `loss`."""
    if isinstance(upstream, Tensor):
        return upstream.to(loss.dtype).to(loss.device)
    # float16 holds no number from 65520 on, and on a GPU full_like says so instead of giving inf.
    return torch.full_like(loss, upstream, dtype=torch.float64).to(loss.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Watching


class Watching(TorchDispatchMode):
    """A mode that sees what eager mode does. A call under any other mode is one operator, for tracing."""

    def __enter__(self):
        self.patch = mock.patch.object(backends, "is_traced", return_value=False)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)


# ---------------------------------------------------------------------------------------------------------------------
# Programs


def inherited(**more):
    """The environment without what this run of pytest has set in it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own.pop("TRITON_INTERPRET", None)
    return {**own, **more}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def assert_error(error, call, *words):
    """`call` raises exactly this kind of error, and its message has all the words."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert raised.type is error, f"{raised.type.__name__}: {message}"
    for word in words:
        assert str(word) in message, f"{word!r} is missing in: {message}"


# ---------------------------------------------------------------------------------------------------------------------
# The error criterion


def skip_where_fma_rounds_twice(backend):
    """For numbers that hang on one rounding: Triton before 3.9 multiplies, rounds and adds in its interpreter."""
    if backend == "triton" and INTERPRETED:
        version = metadata.version("triton")
        if tuple(map(int, version.split(".")[:2])) < (3, 9):
            pytest.skip(f"Triton {version}'s interpreter rounds tl.fma twice, where compiled code rounds once")


def stored_rounding(backend, dtype):
    """Largest relative error of storing one float32 number as `dtype`."""
    if dtype == torch.bfloat16 and backend == "triton" and INTERPRETED:
        return 2.0**-7  # the interpreter truncates
    return torch.finfo(dtype).eps / 2


def smallest_step(dtype):
    """Distance between neighbouring numbers around 0."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def assert_within_torch(got, expected, torchs, what, floor=0.0):
    """Section 5 of the contract: in both norms no worse than torch, plus 1e-6 relative to the reference.

    `floor` is absolute, a number or one per row. Where torch itself is nan, for 0 * inf, the relative part must do.
    """
    got, expected, torchs = (t.detach().cpu().double().reshape(-1) for t in (got, expected, torchs))
    assert got.shape == expected.shape
    for order in (torch.inf, 2):
        error = torch.linalg.vector_norm(got - expected, order)
        torchs_error = torch.linalg.vector_norm(torchs - expected, order)
        absolute = torch.linalg.vector_norm(torch.as_tensor(floor, dtype=torch.float64), order)
        allowed = torchs_error.nan_to_num() + 1e-6 * torch.linalg.vector_norm(expected, order) + absolute
        # nan fails a comparison, so that `assert not error > allowed` would pass it.
        assert error <= allowed, f"{what}: error {error:.3e} in the {order}-norm, allowed {allowed:.3e}"


def row_factors(
    targets,
    weights=None,
    *,
    upstream=1.0,
    token_weights=None,
    ignore_index=-100,
    reduction="mean",
    normalizer=None,
    logit_scale=1.0,
    **_,
):
    """|r_i| / D * |upstream| of every row in float64, (N,): what one rounding of p_y, which is near 1, amounts to."""
    y = targets.cpu().long().reshape(-1)
    u = torch.ones(y.numel(), dtype=torch.float64)
    if token_weights is not None:
        u = token_weights.cpu().double().reshape(-1)
    counted = (y != ignore_index) & (u != 0)
    w = torch.ones_like(u) if weights is None else weights.cpu().double()[torch.where(counted, y, 0)]
    r = torch.where(counted, w * u, 0).abs()
    if normalizer is not None:
        r = r / float(normalizer)
    elif reduction in ("mean", "token_mean"):
        D = r.sum() if reduction == "mean" else counted.sum()
        r = r / D if D > 0 else r
    return r * torch.as_tensor(upstream, dtype=torch.float64).abs().cpu().reshape(-1) * logit_scale


def assert_rows_rounded_once(got, expected, float32s, factors, backend, what):
    """Row by row and element by element: float32 arithmetic, then one rounding to the stored dtype.

    Sharper than the norms: rows of small weight are held to their own scale, and half dtypes to one rounding.
    """
    V = expected.shape[-1]
    rounding, step = stored_rounding(backend, got.dtype), smallest_step(got.dtype)
    got, expected, float32s = (t.detach().cpu().double().reshape(-1, V) for t in (got, expected, float32s))
    assert got.shape == expected.shape
    row_scale = expected.abs().amax(-1, keepdim=True)
    torchs_error = (float32s - expected).abs().amax(-1, keepdim=True).nan_to_num()
    allowed = (
        rounding * expected.abs()
        + step
        + torchs_error
        + 2e-6 * row_scale
        + SUM_ROUNDINGS * ONE_ROUNDING * factors[:, None]
    )
    excess = ((got - expected).abs() - allowed).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    assert excess.max() <= 0, (
        f"{what}: element {divmod(worst, V)} is {got.view(-1)[worst]:.9e}, expected {expected.view(-1)[worst]:.9e}, "
        f"allowed difference {allowed.view(-1)[worst]:.2e}"
    )


def assert_stats(stats, expected, tolerance=2e-6):
    for name in ("nll", "accuracy", "weight_sum", "token_count"):
        got, want = getattr(stats, name), getattr(expected, name).double()
        assert got.dim() == 0
        assert not got.requires_grad
        assert (got.cpu().double() - want).abs() <= tolerance * want.abs(), f"{name} is {got.item()}, expected {want}"


def check_against_reference(
    backend, logits, targets, weights=None, *, upstream=1.0, confident=False, given=None, **options
) -> Result:
    """Run the package, hold loss, gradient and statistics against float64 by the criterion; return what it gave.

    Args:
        confident: the rows' probabilities of their targets are near 1, see ONE_ROUNDING.
        given: the logits that the package gets instead, with other numbers in rows that must not be read.
    """
    got = run(backend, logits if given is None else given, targets, weights, upstream=upstream, **options)
    options = {name: value for name, value in options.items() if name not in OURS}
    expected = run_reference(logits, targets, weights, upstream=upstream, **options)
    loss_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert got.loss.dtype == loss_dtype
    assert got.gradient.dtype == logits.dtype
    assert got.loss.shape == expected.loss.shape
    assert got.gradient.shape == logits.shape
    assert expected.gradient.abs().max() < torch.finfo(logits.dtype).max, "the case itself overflows"

    if logits.dtype == torch.float64:
        torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(got.gradient.cpu(), expected.gradient, rtol=1e-11, atol=1e-13)
    else:
        factors = row_factors(targets, weights, upstream=upstream, **options)
        # The composition in float32 is the sharper yardstick where the logits are half: its loss is float32 as ours.
        float32s = run_torch(logits.float(), targets, weights, upstream=upstream, **options)
        floor = 2 * ONE_ROUNDING * factors if confident else torch.zeros(1)
        assert_within_torch(got.loss, expected.loss, float32s.loss, "loss", floor.sum())
        assert_rows_rounded_once(got.gradient, expected.gradient, float32s.gradient, factors, backend, "gradient")
        interpreted_bf16 = INTERPRETED and backend == "triton" and logits.dtype == torch.bfloat16
        if not interpreted_bf16:
            same_dtype = run_torch(logits, targets, weights, upstream=upstream, **options)
            if same_dtype.gradient.isfinite().all():  # fp16 cannot hold every weight
                assert_within_torch(got.gradient, expected.gradient, same_dtype.gradient, "gradient", floor)
    if got.stats is not None:
        assert_stats(got.stats, expected.stats)
    return got
