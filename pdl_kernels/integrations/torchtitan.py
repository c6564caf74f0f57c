"""torchtitan: the loss of its Trainer on logits, on chunks of logits, and without logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import spmd_types as spmd
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from pdl_kernels.integrations.training_loss import TrainingLoss
from pdl_kernels.integrations.versions import warn_if_untested

INSTEAD = "use ChunkedLossWrapper.Config(loss_fn=PDLCrossEntropyLoss.Config(...)) for this model"


class PDLCrossEntropyLoss(BaseLoss):
    """PDL on logits, for `Trainer.Config.loss`, alone or as the `loss_fn` of torchtitan's `ChunkedLossWrapper`.

        L = sum_i w(y_i) u_i ce_i / n

    n is `global_valid_tokens`, which the Trainer counts over all micro-batches and processes of a step; it sums
    gradients over both, so the gradient does not depend on how a step is cut. Without n, as validation calls it, L is
    the sum. Where gradients are off it is plain cross entropy: validation losses compare with those of other runs.

    `compile_config` is taken and not used: the loss is one operator, in which torch.compile finds nothing to fuse. It
    may be part of what is compiled as a whole, without breaking the graph.

    Tensor parallelism leaves each process its share of the logits' columns, and the loss takes them as they are, with
    the backends "spmd_types" and "partial_dtensor" and every option. All processes of the group read the whole file of
    weights and get the loss of the whole vocabulary. Forward sends 12 bytes a token to each of them, 16 with label
    smoothing; backward sends nothing.

    Raises:
        ValueError, TypeError, FileNotFoundError: when it is built, options and files that are not accepted; at the
            first call, a table of another length than the logits' width over all processes, and DTensors of the backend
            "full_dtensor".

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
        count = _count(global_valid_tokens)

        def of_logits() -> Tensor:
            group = _group_of_columns(pred, self.loss.table)
            return self.loss.of_logits(pred, labels, token_weights, count, group=group)

        return _partial_sum(of_logits), {}


class PDLLinearCrossEntropyLoss(ChunkedLossWrapper):
    """PDL without logits, for `Trainer.Config.loss`, in the place of `ChunkedLossWrapper`.

    Formula, denominator, validation and errors are those of `PDLCrossEntropyLoss`. The Trainer has the model return
    hidden states, and hands over the output layer. This loss is a part of the graph as any other: it may be multiplied
    or added to, where `ChunkedLossWrapper` runs the output layer's backward during forward and takes an upstream
    gradient of 1 for granted. The sequence length need not be divisible by anything.

    With tensor parallelism each process works on its rows of the output layer. Beside what `PDLCrossEntropyLoss` sends,
    the gradient of the hidden states is summed over the group.

    Raises:
        TypeError: an output layer that does more than a product, such as one with a softcap, LoRA or float8; one that
            tensor parallelism places otherwise than by its rows.

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
                f"Linear: {INSTEAD}"
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
        count = _count(global_valid_tokens)

        def of_hidden() -> Tensor:
            hidden, weight, bias, group = _shards_of(pred, lm_head)
            return self.loss.of_hidden(hidden, weight, labels, token_weights, count, bias=bias, group=group)

        loss = _partial_sum(of_hidden)
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
    """The loss, a plain tensor; `debug.spmd_typechecking` is told that it is to be summed over data and context
    parallelism, and the same on all processes of tensor parallelism."""
    checking = spmd.is_type_checking()
    with spmd.no_typecheck():
        value = loss()
        if isinstance(value, DTensor):  # of sharded logits: the whole loss, on every process
            value = value.to_local()
        if checking:
            spmd.assert_type(value, {"dp": spmd.P, "cp": spmd.P, "tp": spmd.I})
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism splits the output layer's rows, which are the columns of the logits. The backend "partial_dtensor"
# has DTensors on the mesh of tensor parallelism alone, "spmd_types" has plain tensors.


def _group_of_columns(pred: Tensor, table: Tensor | None) -> ProcessGroup | None:
    """The processes among which the columns of plain logits are split. The placements of DTensors say it themselves.

    torchtitan's decoders split them over all of tensor parallelism. Only weights can give away logits that are whole.
    """
    if isinstance(pred, DTensor):
        _refuse_other_meshes("pred", pred)
        return None
    group = _tensor_parallel_group()
    if group is not None and table is not None and pred.shape[-1] == len(table):
        raise ValueError(
            f"pred has {len(table)} columns, as many as there are weights, on each of {group.size()} processes of "
            "tensor parallelism; accepted are logits of which each process has its share of the columns, as "
            "torchtitan's decoders make them"
        )
    return group


def _shards_of(
    pred: Tensor,  # (B, L, H)
    lm_head: nn.Linear,
) -> tuple[Tensor, Tensor, Tensor | None, ProcessGroup | None]:
    """Hidden states (B, L, H), the same on all processes of tensor parallelism, and this process's rows of the output
    layer's weight and bias; and the group of these processes, None without tensor parallelism."""
    weight, bias = lm_head.weight, lm_head.bias
    if isinstance(weight, DTensor):
        _refuse_other_meshes("the output layer's weight", weight)
        mesh = weight.device_mesh
        if weight.placements != (Shard(0),) or not isinstance(pred, DTensor) or pred.device_mesh != mesh:
            placed = pred.placements if isinstance(pred, DTensor) else "a plain tensor"
            raise TypeError(
                f"the output layer's weight is a DTensor placed {weight.placements}, and pred is {placed}; accepted "
                f"are Shard(0) and hidden states on the same mesh: {INSTEAD}"
            )
        everywhere = [Replicate()]
        hidden = pred.redistribute(placements=everywhere).to_local(grad_placements=everywhere)
        return hidden, weight.to_local(), bias.to_local() if isinstance(bias, DTensor) else bias, mesh.get_group()
    if isinstance(pred, DTensor):
        raise TypeError(
            f"pred is a DTensor placed {pred.placements}, and the output layer's weight a plain tensor; accepted are "
            f"two plain tensors or two DTensors: {INSTEAD}"
        )
    group = _tensor_parallel_group()
    if group is None:
        return pred, weight, bias, None
    if len(weight) == lm_head.out_features:
        raise ValueError(
            f"the output layer's weight has all {len(weight)} rows on each of {group.size()} processes of tensor "
            "parallelism; accepted is a share of them on each, as torchtitan's decoders have it"
        )
    # The loss sums the gradient of the hidden states over the processes, and torchtitan sums what they hand back once
    # more: with this, the first one hands back the sum and the others 0.
    hidden = spmd.convert(pred, group, src=spmd.R, dst=spmd.I, expert_mode=True)
    return hidden, weight, bias, group


def _tensor_parallel_group() -> ProcessGroup | None:
    """That of the backend "spmd_types", None without tensor parallelism."""
    mesh = current_spmd_mesh()
    if mesh is None or spmd_mesh_size("tp") == 1:
        return None
    return mesh.get_group("tp")


def _refuse_other_meshes(name: str, value: DTensor) -> None:
    """The backend "full_dtensor" has data parallelism in the mesh, too, and wants another loss."""
    dimensions = value.device_mesh.mesh_dim_names
    if dimensions == ("tp",):
        return
    raise TypeError(
        f"{name} is a DTensor placed {value.placements} on a mesh of the dimensions {dimensions}, as "
        'parallelism.spmd_backend="full_dtensor" has it, which PDL does not support; accepted are '
        'spmd_backend="spmd_types" and "partial_dtensor"'
    )
