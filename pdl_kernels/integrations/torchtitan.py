"""torchtitan: the loss of its Trainer on logits, on chunks of logits, and without logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import spmd_types as spmd
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import spmd_mesh_size

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.versions import warn_if_untested


class PDLCrossEntropyLoss(BaseLoss):
    """PDL on logits, for `Trainer.Config.loss`, alone or as the `loss_fn` of torchtitan's `ChunkedLossWrapper`.

        L = sum_i w(y_i) u_i ce_i / n

    n is `global_valid_tokens`, which the Trainer counts over all micro-batches and processes of a step; it sums
    gradients over both, so the gradient does not depend on how a step is cut. Without n, as validation calls it, L is
    the sum. Where gradients are off it is plain cross entropy: validation losses compare with those of other runs.

    `compile_config` is taken and not used: the loss is one operator, in which torch.compile finds nothing to fuse. It
    may be part of what is compiled as a whole, without breaking the graph.

    Raises:
        ValueError, TypeError, FileNotFoundError: when it is built, options and files that are not accepted; at the
            first call, a table of another length than the logits' width, and logits whose vocabulary is sharded over
            processes, as tensor parallelism makes them.

    Example, in a function of a `config_registry`::

        config = llama3_debugmodel()
        config.loss = PDLCrossEntropyLoss.Config(weights="weights.safetensors")  # a file of `pdl-kernels weights`
        config.loss = ChunkedLossWrapper.Config(loss_fn=config.loss)  # or so: some tokens' logits at a time

    Source: Power-Law Decay Loss for Large Language Model Finetuning, arXiv 2505.16900.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        weights: str = ""
        """File of `pdl-kernels weights` or `save_weights`, one weight per logit; empty: plain cross entropy"""

        label_smoothing: float = 0.0
        """As in torch, from 0 to 1; its term uses the weight of every class"""

        z_loss: float = 0.0
        """Adds z_loss * lse**2 for each token"""

        softcap: float | None = None
        """Replaces logits z by softcap * tanh(z / softcap), for models that do not do so themselves"""

        logit_scale: float = 1.0
        """Multiplies the logits, before the softcap"""

        weighted_evaluation: bool = False
        """Whether validation uses the weights, smoothing and z-loss, too"""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.loss = _training_loss(config, linear=False)

    def __call__(
        self,
        pred: Tensor,  # (B, L, V)
        labels: Tensor,  # (B, L), shifted already
        global_valid_tokens: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,  # (B, L); torchtitan's Trainer gives none
        **unused: Any,  # positions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, 0-d, and no metrics."""
        _refuse_sharded("pred", pred)
        count = _count(global_valid_tokens)
        return _partial_sum(lambda: self.loss.of_logits(pred, labels, token_weights, count)), {}


class PDLLinearCrossEntropyLoss(ChunkedLossWrapper):
    """PDL without logits, for `Trainer.Config.loss`, in the place of `ChunkedLossWrapper`.

    Formula, denominator, validation and errors are those of `PDLCrossEntropyLoss`. The Trainer has the model return
    hidden states, and hands over the output layer. This loss is a part of the graph as any other: it may be multiplied
    or added to, where `ChunkedLossWrapper` runs the output layer's backward during forward and takes an upstream
    gradient of 1 for granted. The sequence length need not be divisible by anything.

    Raises:
        TypeError: an output layer that does more than a product, such as one with a softcap, LoRA or float8.

    Example, in a function of a `config_registry`::

        config = llama3_debugmodel()
        config.loss = PDLLinearCrossEntropyLoss.Config(weights="weights.safetensors")
    """

    @dataclass(kw_only=True, slots=True)
    class Config(PDLCrossEntropyLoss.Config):
        chunk_size: int | None = None
        """Tokens whose logits exist at a time; None chooses"""

    lm_head: nn.Linear | None

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.loss = _training_loss(config, linear=True)
        self.lm_head = None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Called by the Trainer, before training."""
        if not isinstance(lm_head, nn.Linear) or type(lm_head).forward is not nn.Linear.forward:
            raise TypeError(
                f"the output layer is a {type(lm_head).__name__}, which does more than a product; accepted is a "
                "Linear: use ChunkedLossWrapper.Config(loss_fn=PDLCrossEntropyLoss.Config(...)) for this model"
            )
        self.lm_head = lm_head

    def __call__(
        self,
        pred: Tensor,  # (B, L, H), hidden states
        labels: Tensor,  # (B, L), shifted already
        global_valid_tokens: Tensor | None = None,
        *,
        token_weights: Tensor | None = None,  # (B, L)
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, 0-d, and no metrics."""
        lm_head = self.lm_head
        if lm_head is None:
            raise RuntimeError("the output layer is not known: call set_lm_head first, as torchtitan's Trainer does")
        # FSDP shards the output layer with the norm before it, whose hooks gather and reduce for both.
        if isinstance(lm_head, FSDPModule):
            lm_head.unshard()
        _refuse_sharded("pred", pred)
        _refuse_sharded("the output layer's weight", lm_head.weight)
        inputs = pred, lm_head.weight, labels, token_weights, _count(global_valid_tokens)
        loss = _partial_sum(lambda: self.loss.of_hidden(*inputs, bias=lm_head.bias))
        if isinstance(lm_head, FSDPModule) and not loss.requires_grad:  # no backward follows, which would do it
            lm_head.reshard()
        return loss, {}


def _training_loss(config: PDLCrossEntropyLoss.Config, *, linear: bool) -> TrainingLoss:
    warn_if_untested("torchtitan")
    options = {field.name: getattr(config, field.name) for field in fields(config) if field.name != "weights"}
    # Gradients are summed over processes, not averaged: the Trainer calls loss.backward() on every one.
    return TrainingLoss(config.weights or None, linear=linear, expected_upstream=1.0, **options)


def _count(global_valid_tokens: Tensor | None) -> Tensor | float:
    """What the sum is divided by."""
    return 1.0 if global_valid_tokens is None else global_valid_tokens


def _partial_sum(loss: Callable[[], Tensor]) -> Tensor:
    """The loss; `debug.spmd_typechecking` is told that it is to be summed over data and context parallelism."""
    checking = spmd.is_type_checking()
    with spmd.no_typecheck():
        value = loss()
        if checking:
            spmd.assert_type(value, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
    return value


def _refuse_sharded(name: str, value: Tensor) -> None:
    """Vocabulary-parallel logits are DTensors or, under the backend "spmd_types", plain tensors of fewer columns."""
    processes = spmd_mesh_size("tp")
    if processes == 1 and not isinstance(value, DTensor):
        return
    what = f"a DTensor {value.placements}" if isinstance(value, DTensor) else f"one of {processes} shards"
    raise TypeError(
        f"{name} is {what}: tensor parallelism shards the vocabulary over processes (loss parallel), which PDL does "
        "not support; accepted are plain tensors, with parallelism.tensor_parallel_degree=1 and "
        'parallelism.spmd_backend="spmd_types" or "partial_dtensor"'
    )
