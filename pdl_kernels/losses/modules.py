"""The losses as torch.nn modules."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from pdl_kernels.losses import checks
from pdl_kernels.losses.functional import pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.options import (
    CallOptions,
    CrossEntropyKeywords,
    LinearKeywords,
    LinearOptions,
    LossOptions,
    LossStats,
)

PER_CALL = ("token_weights", "bias", "seed")  # given to `forward` alone


Initialise = TypeVar("Initialise", bound=Callable[..., None])


def _with_options_of(function: Callable[..., Any]) -> Callable[[Initialise], Initialise]:
    """Give an `__init__` the options of `function`: its signature, its defaults, and a TypeError for other names."""
    weights, *rest = (
        parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name == "weights" or (parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in PER_CALL)
    )
    defaults = {parameter.name: parameter.default for parameter in rest}

    def decorate(initialise: Initialise) -> Initialise:
        @functools.wraps(initialise)
        def __init__(self: Any, weights: Tensor | None = None, **options: Any) -> None:  # noqa: N807
            checks.check_names(type(self).__name__, {name: None for name in options if name not in defaults})
            initialise(self, weights, **defaults | options)

        self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        __init__.__signature__ = inspect.Signature([self_parameter, weights, *rest])  # type: ignore[attr-defined]
        return cast(Initialise, __init__)

    return decorate


def _check(kind: type, options: dict[str, Any]) -> Any:
    """The options of this kind among all of them, checked."""
    return checks.check_options(kind(**{name: options[name] for name in kind._fields if name in options}))  # type: ignore[attr-defined]


class _WeightedLoss(nn.Module):
    """A loss that owns its weights."""

    weights: Tensor | None
    options: dict[str, Any]

    def __init__(self, weights: Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        _check(LossOptions, options)
        _check(CallOptions, options)
        self.normalizer = options.pop("normalizer")
        checks.check_normalizer(self.normalizer, options["reduction"])
        if weights is not None:
            checks.check_weight_table(weights)
            weights = weights.detach().to(torch.float32, copy=True)
        self.register_buffer("weights", weights, persistent=False)
        shown = (*LossOptions._fields, "backend", "expected_upstream", "inplace", *LinearOptions._fields, "group")
        self.options = {name: options[name] for name in shown if name in options}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_WeightedLoss":
        before = self.weights
        super()._apply(fn, recurse)
        # nn.Module casts floating buffers with the rest; rounded weights would be other weights.
        if before is not None and self.weights is not None and self.weights.dtype != torch.float32:
            self.weights = before.to(self.weights.device)
        return self

    def _options_of_call(
        self, normalizer: float | Tensor | None, expected_upstream: float | Tensor | None
    ) -> dict[str, Any]:
        """All options, these two as they were given here if a call does not give them."""
        options = {"normalizer": self.normalizer, **self.options}
        if normalizer is not None:
            options["normalizer"] = normalizer
        if expected_upstream is not None:
            options["expected_upstream"] = expected_upstream
        return options

    def extra_repr(self) -> str:
        size = "None" if self.weights is None else f"({self.weights.shape[0]},)"
        return ", ".join([f"weights={size}", *(f"{name}={value!r}" for name, value in self.options.items())])


class PDLCrossEntropyLoss(_WeightedLoss):
    """`pdl_cross_entropy` as a module that owns its weights.

    Args:
        weights: (V,) floating, one weight per vocabulary entry, or None for 1. Kept as a float32 buffer that follows
            `.to(device)`, stays float32 under `.half()`, `.bfloat16()` and `.to(dtype)`, and stays out of checkpoints.
        ignore_index, reduction, normalizer, label_smoothing, z_loss, softcap, logit_scale, expected_upstream, inplace,
            return_stats, backend, group: the options of `pdl_cross_entropy`, checked here.

    `forward(logits, targets, token_weights=None, normalizer=None, expected_upstream=None)` takes (..., V) logits and
    (...) targets and returns what `pdl_cross_entropy` returns. `normalizer` and `expected_upstream` may be given here
    or per call; the call wins.

    >>> criterion = PDLCrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction="token_mean")
    >>> round(criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([1])).item(), 4)
    6.3808
    """

    @_with_options_of(pdl_cross_entropy)
    def __init__(
        self, weights: Tensor | None = None, *, return_stats: bool = False, **options: Unpack[CrossEntropyKeywords]
    ) -> None:
        super().__init__(weights, {"return_stats": return_stats, **options})

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        token_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        expected_upstream: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        options = self._options_of_call(normalizer, expected_upstream)
        return pdl_cross_entropy(logits, targets, self.weights, token_weights=token_weights, **options)


class PDLLinearCrossEntropyLoss(_WeightedLoss):
    """`pdl_linear_cross_entropy` as a module that owns its weights, not the output projection.

    Args:
        weights: as in `PDLCrossEntropyLoss`.
        ignore_index, reduction, normalizer, label_smoothing, z_loss, softcap, logit_scale, expected_upstream,
            return_stats, chunk_size, accumulate_dtype, compact, row_sampling, sequence_parallel, backend, group: the
            options of `pdl_linear_cross_entropy`, checked here.

    `forward(hidden, lm_head_weight, targets, bias=None, token_weights=None, normalizer=None, expected_upstream=None,
    seed=None)` takes (..., H) hidden states, the (V, H) weight and (...) targets and returns what
    `pdl_linear_cross_entropy` returns.

    >>> criterion = PDLLinearCrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction="token_mean")
    >>> head = torch.nn.Linear(4, 2)
    >>> criterion(torch.zeros(3, 4), head.weight, torch.tensor([1, 1, 1])).shape
    torch.Size([])
    """

    @_with_options_of(pdl_linear_cross_entropy)
    def __init__(
        self, weights: Tensor | None = None, *, return_stats: bool = False, **options: Unpack[LinearKeywords]
    ) -> None:
        given = {"return_stats": return_stats, **options}
        checks.check_row_sampling(_check(LinearOptions, given), _check(LossOptions, given))
        super().__init__(weights, given)

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        token_weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        expected_upstream: float | Tensor | None = None,
        seed: int | float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, LossStats]:
        options = self._options_of_call(normalizer, expected_upstream)
        return pdl_linear_cross_entropy(
            hidden, lm_head_weight, targets, self.weights, bias=bias, token_weights=token_weights, seed=seed, **options
        )
