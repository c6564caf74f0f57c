"""Every option of the losses, declared once; and the tensors that travel between layers.

An option's name, type, default, range and one line of help stand in `LossOptions`, `LinearOptions` or `CallOptions`.
Checks, error messages, operators, modules and the table in docs/loss.md follow from there. What users read and
editors show, the signatures and `LossKeywords`, says it again, and a test compares the two.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, TypedDict, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "token_mean", "sum", "none")
BACKENDS = ("auto", "triton", "eager")
ACCUMULATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FLOAT32 = torch.finfo(torch.float32)
# Integers may be symbols, so that another value needs no compilation.
SCHEMA_TYPES = {int: "SymInt", float: "float", str: "str", bool: "bool", torch.dtype: "ScalarType"}


class Option(NamedTuple):
    """What is declared of an option beside its name, type and default."""

    help: str  # one line
    accepted: str = ""  # ends every error message about it; empty: any object, whose truth counts
    low: float = -math.inf
    high: float = math.inf
    low_is_accepted: bool = True
    high_is_accepted: bool = False
    measure: Callable[[Any], Any] | None = None  # what of the value lies between low and high; None: the value itself
    choices: tuple[Any, ...] | None = None  # instead of a range


class Declared(NamedTuple):
    """One option with everything that is declared of it."""

    name: str
    kind: type  # float takes integers too
    default: Any
    optional: bool  # None is accepted
    takes_tensor: bool  # a 0-d tensor is accepted
    option: Option

    @property
    def schema(self) -> str:
        """As an argument of an operator that torch knows."""
        return f"{SCHEMA_TYPES[self.kind]}{'?' if self.optional else ''} {self.name}"


def declared_by(options: type) -> tuple[Declared, ...]:
    """The options that this named tuple declares, in its order."""
    found = []
    for name, hint in get_type_hints(options, include_extras=True).items():
        annotation, option = get_args(hint)
        kinds = get_args(annotation) if get_origin(annotation) else (annotation,)
        kind = next(kind for kind in kinds if kind not in (Tensor, type(None)))
        default = options._field_defaults[name]  # type: ignore[attr-defined]
        found.append(Declared(name, kind, default, type(None) in kinds, Tensor in kinds, option))
    return tuple(found)


class LossOptions(NamedTuple):
    """The options that change the numbers of both losses."""

    ignore_index: Annotated[
        int,
        Option(
            "targets of this value contribute exactly 0, and their logits are not read",
            "an integer of 64 bits",
            low=-(2**63),
            high=2**63,
        ),
    ] = -100
    reduction: Annotated[
        str,
        Option(
            "what the sum is divided by: see below",
            "'mean', 'token_mean', 'sum' or 'none'",
            choices=REDUCTIONS,
        ),
    ] = "mean"
    label_smoothing: Annotated[
        float,
        Option(
            "torch's; its term uses the weight of every class",
            "a number from 0 to 1",
            low=0,
            high=1,
            high_is_accepted=True,
        ),
    ] = 0.0
    z_loss: Annotated[
        float,
        Option("adds `z_loss * lse**2` for each token, whatever the class weights", "a finite number >= 0", low=0),
    ] = 0.0
    softcap: Annotated[
        float | None,
        Option(
            "`softcap * tanh(z / softcap)`, after `logit_scale`",
            "a finite number > 0, or None for no cap",
            low=0,
            low_is_accepted=False,
        ),
    ] = None
    logit_scale: Annotated[
        float, Option("multiplies the logits, in float32", "a finite number > 0", low=0, low_is_accepted=False)
    ] = 1.0
    return_stats: Annotated[bool, Option("also return `LossStats`: what to log beside a weighted loss")] = False


class LinearOptions(NamedTuple):
    """What `pdl_linear_cross_entropy` takes beyond `LossOptions`."""

    chunk_size: Annotated[
        int | None,
        Option("tokens whose logits exist at a time; `None` chooses", "an integer >= 1 (tokens), or None", low=1),
    ] = None
    accumulate_dtype: Annotated[
        torch.dtype,
        Option(
            "dtype in which gradients are summed and wait for backward",
            f"one of {', '.join(map(str, ACCUMULATE_DTYPES))}",
            choices=ACCUMULATE_DTYPES,
        ),
    ] = torch.float32
    compact: Annotated[
        bool | None,
        Option(
            "leave tokens that contribute nothing out of the products; `None`: except while a CUDA graph is captured",
            "True, False or None",
            choices=(True, False),
        ),
    ] = None
    row_sampling: Annotated[
        float,
        Option(
            "leave light tokens out of the backward products at random, without bias: see below",
            "a number >= 0 and < 1",
            low=0,
            high=1,
        ),
    ] = 0.0
    sequence_parallel: Annotated[
        bool,
        Option("`hidden` holds this rank's even share of dimension 0, and `targets` all of it; only with `group`"),
    ] = False


class CallOptions(NamedTuple):
    """What a call is given beside what changes its numbers. `inplace` exists for the loss on logits alone."""

    normalizer: Annotated[
        float | Tensor | None,
        Option(
            'the one denominator of everything; only with `reduction="mean"`',
            "a finite number >= 0 or a 0-d tensor",
            low=0,
        ),
    ] = None
    expected_upstream: Annotated[
        float | Tensor,
        Option(
            "what the loss will be multiplied by before its backward",
            "a finite number other than 0, in float32's range, or a 0-d tensor",
            low=FLOAT32.smallest_normal,  # kernels divide by it
            high=FLOAT32.max,
            high_is_accepted=True,
            measure=abs,
        ),
    ] = 1.0
    inplace: Annotated[bool, Option("the gradient may overwrite the logits")] = False
    backend: Annotated[
        str,
        Option(
            'which implementation runs; `"auto"` is Triton on CUDA and ROCm tensors, eager elsewhere and for float64',
            "'auto', 'triton' or 'eager'",
            choices=BACKENDS,
        ),
    ] = "auto"
    group: Annotated[
        ProcessGroup | None,
        Option(
            "the ranks over which the vocabulary is split: see [distributed.md](distributed.md)",
            "a ProcessGroup that this process belongs to, or None; of a DeviceMesh: mesh.get_group()",
        ),
    ] = None


DECLARED: dict[type, tuple[Declared, ...]] = {
    options: declared_by(options) for options in (LossOptions, LinearOptions, CallOptions)
}


class LossKeywords(TypedDict, total=False):
    """The keywords that both losses and both modules take, for type checkers and editors."""

    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float
    expected_upstream: float | Tensor
    backend: str
    group: ProcessGroup | None


class CrossEntropyKeywords(LossKeywords, total=False):
    """Those of the loss on logits."""

    inplace: bool


class LinearKeywords(LossKeywords, total=False):
    """Those of the loss fused with the output projection."""

    chunk_size: int | None
    accumulate_dtype: torch.dtype
    compact: bool | None
    row_sampling: float
    sequence_parallel: bool


class LossStats(NamedTuple):
    """What to log beside a weighted loss: detached 0-d tensors on the logits' device.

    Attributes:
        nll: unweighted mean negative log-likelihood over counted tokens, in nats (exp of it is the perplexity);
            float32, float64 for float64 logits; 0 when nothing is counted.
        accuracy: fraction of counted tokens whose target reaches the row's maximum, ties included; 0 when nothing is
            counted.
        weight_sum: sum of w(y_i) |u_i| over counted tokens.
        token_count: number of counted tokens, int64.
    """

    nll: Tensor
    accuracy: Tensor
    weight_sum: Tensor
    token_count: Tensor


class Shard(NamedTuple):
    """Which columns of a vocabulary that is split over ranks the logits hold."""

    first: int  # column of the whole that is the logits' first
    vocab_size: int  # columns of the whole
    # Targets are columns of the whole, and the table of weights holds those of the logits' columns alone. So what it
    # says of a target, which may lie elsewhere, comes apart from it.
    row_weights: Tensor | None = None  # (N,) w(y_i); None: all 1, or not known yet


class LossInputs(NamedTuple):
    """The tensors of one call: as users give them, and as both backends take them, with N = rows_outer * rows_inner."""

    logits: Tensor  # (..., V); for backends (rows_outer, rows_inner, V); any strides
    targets: Tensor  # (...); for backends (N,)
    weights: Tensor | None  # (V,)
    token_weights: Tensor | None  # (...); for backends (N,)
    normalizer: Tensor | float | None = None  # 0-d; for backends on the logits' device
    expected_upstream: Tensor | float = 1.0  # 0-d; for backends on the logits' device
    shard: Shard | None = None  # None: the logits hold every column
    row_groups: tuple[str, ...] = ()  # names of groups whose ranks have other tokens of the same call

    @property
    def vocab_size(self) -> int:
        """Columns of the whole vocabulary, which targets are numbers of."""
        return self.logits.shape[-1] if self.shard is None else self.shard.vocab_size

    def take(self, rows: "slice | Tensor", logits: Tensor) -> "LossInputs":
        """These rows of what backends take, with their logits."""
        u, shard = self.token_weights, self.shard
        if shard is not None and shard.row_weights is not None:
            shard = shard._replace(row_weights=shard.row_weights[rows])
        return self._replace(
            logits=logits, targets=self.targets[rows], token_weights=None if u is None else u[rows], shard=shard
        )


class RowOutputs(NamedTuple):
    """What a backend finds for each row, before anything is summed."""

    loss: Tensor  # (N,)
    state: Tensor  # (2, N): see LossOutputs.row_state
    stats: Tensor | None  # (2, N): cross entropy of counted rows; 1 where the target reaches the row's maximum


class LossOutputs(NamedTuple):
    """What a backend's forward returns; everything but `loss` serves backward and the statistics."""

    loss: Tensor  # () or (N,) for "none"
    row_state: Tensor  # (2, N): maximum of the raw logits; sum of exp(z - z of that maximum)
    scalars: Tensor  # (7,): see SCALARS
    token_count: Tensor | None  # (), int64; the Triton backend counts only for statistics


class ShardLayout(NamedTuple):
    """Where the numbers stand that ranks exchange of every row: rows of an (F, N) tensor."""

    row_max: int = 0  # maximum of the raw logits in the rank's columns, at least the lowest finite value
    row_sum: int = 1  # sum of exp(z - z of that maximum) over them
    target_logit: int = 2  # x_y; 0 where another rank has the column
    smoothing: int | None = None  # sum_j w_j (z of that maximum - z_j)
    row_weights: int | None = None  # w(y_i); 0 where another rank has the column

    @classmethod
    def of(cls, *, smoothing: bool, row_weights: bool) -> "ShardLayout":
        """Smoothing needs one more number, and so do weights of which every rank has its own columns' alone."""
        return cls(smoothing=3 if smoothing else None, row_weights=(3 + smoothing) if row_weights else None)

    @property
    def numbers(self) -> int:
        """F"""
        return sum(place is not None for place in self)


class LinearInputs(NamedTuple):
    """The tensors of one call of the loss fused with the output projection. The parameters come first."""

    hidden: Tensor  # (..., H)
    lm_head_weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (...)
    weights: Tensor | None  # (V,)
    token_weights: Tensor | None  # (...)
    seed: Any  # a number or a 0-d tensor, for row sampling; None: torch draws it
    normalizer: Tensor | float | None = None  # 0-d
    expected_upstream: Tensor | float = 1.0  # 0-d

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the loss is differentiable in."""
        return self.hidden, self.lm_head_weight, self.bias


class LinearOutputs(NamedTuple):
    """What it returns; everything but `loss` serves backward and the statistics."""

    loss: Tensor  # () or (...) for "none"
    row_state: Tensor  # (2, N) for "none", (2, 0) otherwise: see LossOutputs
    scalars: Tensor  # (7,): see SCALARS
    token_count: Tensor  # (), int64


# Indices into LossOutputs.scalars. A denominator of 0 has the inverse 0: its term is 0.
SCALARS = (
    "inverse_denominator",
    "inverse_z_denominator",
    "weight_total",
    "nll",
    "accuracy",
    "weight_sum",
    "expected_upstream",  # the upstream gradient that forward forms the gradient for, neither 0, infinite nor nan
)
INVERSE_DENOMINATOR, INVERSE_Z_DENOMINATOR, WEIGHT_TOTAL, NLL, ACCURACY, WEIGHT_SUM, EXPECTED_UPSTREAM = range(7)
