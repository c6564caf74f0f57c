"""nn.Module faces of the functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pdl_kernels.losses import checks, linear_checks
from pdl_kernels.losses.functional import pdl_cross_entropy
from pdl_kernels.losses.linear import pdl_linear_cross_entropy
from pdl_kernels.options import LossStats


class _WeightedLoss(nn.Module):
    """A loss that owns its weights."""

    weights: Tensor | None
    options: dict[str, Any]

    def __init__(self, weights: Tensor | None, normalizer: float | Tensor | None, options: dict[str, Any]) -> None:
        super().__init__()
        checks.check_normalizer(normalizer, options["reduction"], _home(normalizer))
        checks.check_expected_upstream(options["expected_upstream"], _home(options["expected_upstream"]))
        if weights is not None:
            checks.check_weight_table(weights)
            weights = weights.detach().to(torch.float32, copy=True)
        self.register_buffer("weights", weights, persistent=False)
        self.normalizer = normalizer
        self.options = options

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


def _home(value: Any) -> torch.device:
    """Where a check leaves it as it is."""
    return value.device if isinstance(value, Tensor) else torch.device("cpu")


class PDLCrossEntropyLoss(_WeightedLoss):
    """`pdl_cross_entropy` as a module that owns its weights.

    Args:
        weights: (V,) floating, one weight per vocabulary entry, or None for 1. Kept as a float32 buffer that follows
            `.to(device)`, stays float32 under `.half()`, `.bfloat16()` and `.to(dtype)`, and stays out of checkpoints.
        ignore_index, reduction, normalizer, label_smoothing, z_loss, softcap, logit_scale, expected_upstream, inplace,
            return_stats, backend: the options of `pdl_cross_entropy`, checked here.

    `forward(logits, targets, token_weights=None, normalizer=None, expected_upstream=None)` takes (..., V) logits and
    (...) targets and returns what `pdl_cross_entropy` returns. `normalizer` and `expected_upstream` may be given here
    or per call; the call wins.

    >>> criterion = PDLCrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction="token_mean")
    >>> round(criterion(torch.tensor([[2.0, 0.0]]), torch.tensor([1])).item(), 4)
    6.3808
    """

    def __init__(
        self,
        weights: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        expected_upstream: float | Tensor = 1.0,
        inplace: bool = False,
        return_stats: bool = False,
        backend: str = "auto",
        **unexpected: Any,
    ) -> None:
        checks.check_names("PDLCrossEntropyLoss", unexpected)
        loss_options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "return_stats": return_stats,
            "backend": backend,
        }
        checks.check_options(**loss_options)  # type: ignore[arg-type]
        super().__init__(
            weights, normalizer, {**loss_options, "expected_upstream": expected_upstream, "inplace": inplace}
        )

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
            return_stats, chunk_size, accumulate_dtype, compact, row_sampling, backend: the options of
            `pdl_linear_cross_entropy`, checked here.

    `forward(hidden, lm_head_weight, targets, bias=None, token_weights=None, normalizer=None, expected_upstream=None,
    seed=None)` takes (..., H) hidden states, the (V, H) weight and (...) targets and returns what
    `pdl_linear_cross_entropy` returns.

    >>> criterion = PDLLinearCrossEntropyLoss(torch.tensor([1.0, 3.0]), reduction="token_mean")
    >>> head = torch.nn.Linear(4, 2)
    >>> criterion(torch.zeros(3, 4), head.weight, torch.tensor([1, 1, 1])).shape
    torch.Size([])
    """

    def __init__(
        self,
        weights: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        expected_upstream: float | Tensor = 1.0,
        return_stats: bool = False,
        chunk_size: int | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        compact: bool | None = None,
        row_sampling: float = 0.0,
        backend: str = "auto",
        **unexpected: Any,
    ) -> None:
        checks.check_names("PDLLinearCrossEntropyLoss", unexpected)
        loss_options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss": z_loss,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "return_stats": return_stats,
            "backend": backend,
        }
        linear_options = {
            "chunk_size": chunk_size,
            "accumulate_dtype": accumulate_dtype,
            "compact": compact,
            "row_sampling": row_sampling,
        }
        checked = checks.check_options(**loss_options)  # type: ignore[arg-type]
        linear_checks.check_linear_options(**linear_options, options=checked)
        super().__init__(
            weights, normalizer, {**loss_options, "expected_upstream": expected_upstream, **linear_options}
        )

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
