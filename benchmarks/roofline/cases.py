"""Which calls the roofline looks at: shapes, dtypes, options and layouts as users have them.

A case names a call, not kernels: which kernels that call launches, in which variant, is the package's answer.
"""

import functools
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.inputs import VOCABULARIES
from pdl_kernels.kernels import launch, shard_launch
from pdl_kernels.kernels.planner import TWO_PASSES, plan_loss
from pdl_kernels.ops.rows import empty_gradient
from pdl_kernels.options import SCALARS, LossInputs, LossOptions, Shard, ShardLayout

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = ("bfloat16", "float16", "float32")
MANY_ROWS = 4096
FEW_ROWS = 16  # rows are sliced
LOSS, GRADIENT, BOTH, SCALE = "loss", "gradient", "loss + gradient", "scale"

OPTIONS = {
    "plain": LossOptions(),
    "smoothing": LossOptions(label_smoothing=0.1),
    "z_loss": LossOptions(z_loss=1e-4),
    "softcap": LossOptions(softcap=30.0),
    "scale": LossOptions(logit_scale=0.5),
    "stats": LossOptions(return_stats=True),
    "sum": LossOptions(reduction="sum"),
    "none": LossOptions(reduction="none"),
    "everything": LossOptions(
        label_smoothing=0.1, z_loss=1e-4, softcap=30.0, logit_scale=0.5, return_stats=True, reduction="token_mean"
    ),
}


class CompiledCall(NamedTuple):
    call: str  # BOTH, LOSS, GRADIENT (for another upstream gradient than the expected one) or SCALE (of it, in place)
    target: str
    dtype: str = "bfloat16"
    vocab_size: int = 128256
    rows: int = MANY_ROWS
    options: str = "plain"
    weights: bool = True
    token_weights: bool = False
    normalizer: bool = False  # a tensor
    expected_upstream: bool = False  # a tensor
    targets: str = "int64"
    row_stride: int | None = None  # where it is not the vocabulary's size
    column_stride: int = 1
    offset: int = 0  # elements from an aligned address to the first logit
    forced: str = ""  # of planner.KERNELS, where another would be launched
    clusters: bool | None = True  # as PDL_KERNELS_CLUSTERS would say it; None: the planner's own choice
    shards: int = 0  # ranks that have as many columns each; 0: the logits are not split

    @property
    def layout(self) -> str:
        """What is unusual about the call, for people."""
        unusual = {
            "no weights": not self.weights,
            "token weights": self.token_weights,
            "normalizer": self.normalizer,
            "expected upstream": self.expected_upstream,
            f"{self.targets} targets": self.targets != "int64",
            "padded rows": self.row_stride is not None and self.column_stride == 1,
            "column stride": self.column_stride != 1,
            "offset": self.offset > 0,
            self.forced: bool(self.forced),
            "no clusters asked for": not self.clusters,
            f"one of {self.shards} shards": self.shards > 0,
        }
        return ", ".join(name for name, present in unusual.items() if present)


def compile_call(case: CompiledCall) -> None:
    """Make the call on tensors without memory; within `compile.compiled_launches`."""
    logits, options = _logits(case), OPTIONS[case.options]
    inputs = LossInputs(
        logits,
        _empty(case.rows, dtype=getattr(torch, case.targets)),
        _empty(case.vocab_size) if case.weights else None,
        _empty(case.rows) if case.token_weights else None,
        _empty() if case.normalizer else None,
        _empty() if case.expected_upstream else 1.0,
    )
    if case.shards:
        shard = Shard(case.vocab_size, case.shards * case.vocab_size, _empty(case.rows) if case.weights else None)
        inputs = inputs._replace(shard=shard)
    row_state, scalars = _empty(2, case.rows), _empty(len(SCALARS))
    per_row = options.reduction == "none"
    upstream = _empty(case.rows) if per_row else _empty()
    with (
        launch.planned_by(functools.partial(plan_loss, only=case.forced or None)),
        mock.patch.object(launch, "clusters_wanted", return_value=case.clusters),
    ):
        if case.call == SCALE:
            launch.scale(logits, scalars, upstream)
        elif case.call == GRADIENT:
            gradient = empty_gradient(logits)
            again = not per_row and not case.shards  # of shards the gradient is formed once
            launch.backward(inputs, options, row_state, scalars, upstream, gradient, unless_expected=again)
        elif case.shards:
            _compile_shard(inputs, options, case.shards)
        else:
            launch.forward(inputs, options, empty_gradient(logits) if case.call == BOTH else None)


def _compile_shard(inputs: LossInputs, options: LossOptions, shards: int) -> None:
    """What a rank launches in forward."""
    layout = ShardLayout.of(smoothing=options.label_smoothing > 0, row_weights=False)
    found = _empty(layout.numbers, len(inputs.targets))
    shard_launch.shard_rows(inputs, options, layout, found)
    scalars, token_count = launch.denominators(inputs, options)
    totals = _empty(shards) if layout.smoothing else None
    rows = shard_launch.merge_shards(inputs, options, scalars, layout, _empty(shards, *found.shape), totals)
    launch.reduce_rows(rows, options, scalars, token_count)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(case: CompiledCall) -> Tensor:
    """(1, rows, V)"""
    row_stride = case.vocab_size if case.row_stride is None else case.row_stride
    span = case.offset + (case.rows - 1) * row_stride + (case.vocab_size - 1) * case.column_stride + 1
    storage = _empty(span, dtype=getattr(torch, case.dtype))
    return storage.as_strided((1, case.rows, case.vocab_size), (0, row_stride, case.column_stride), case.offset)


def quick_cases() -> list[CompiledCall]:
    """Every kernel on every target, and every branch of the variant at least once."""
    found = []
    for target in TARGETS:
        found += [CompiledCall(BOTH, target, dtype) for dtype in DTYPES]
        found += [CompiledCall(call, target, options="everything") for call in (BOTH, GRADIENT)]
        found += [CompiledCall(call, target) for call in (LOSS, GRADIENT, SCALE)]
        found += [CompiledCall(BOTH, target, rows=FEW_ROWS)]
    # Where a row is held on chip these would not be seen: older Triton versions launch them.
    twice = CompiledCall(BOTH, "sm_90", forced=TWO_PASSES)
    found += [twice, twice._replace(target="sm_100")]
    found += [twice._replace(options=name) for name in OPTIONS if name not in ("plain", "everything", "none")]
    found += [CompiledCall(GRADIENT, "sm_90", options="none"), CompiledCall(LOSS, "sm_90", options="smoothing")]
    changes = (
        {"weights": False},
        {"token_weights": True, "normalizer": True, "expected_upstream": True},
        {"targets": "int32"},
        {"vocab_size": 50257, "row_stride": 50264},
        {"vocab_size": 50257, "row_stride": 1, "column_stride": MANY_ROWS},
        {"offset": 1},
        {"vocab_size": 50257, "row_stride": 100000},  # the gradient is contiguous, unlike the logits
        *({"vocab_size": size} for size in (1000, 32000, 50257, 262144)),
    )
    found += [twice._replace(**change) for change in changes]
    held = twice._replace(forced="")
    found += [held._replace(vocab_size=size) for size in (1000, 32000, 50257, 151936, 262144)]
    found += [held._replace(options="z_loss"), held._replace(options="stats"), held._replace(targets="int32")]
    found += [held._replace(dtype="float32", vocab_size=size) for size in (50257, 262144)]
    found += [held._replace(vocab_size=50257, row_stride=50264), held._replace(target="sm_100", vocab_size=50257)]
    for dtype in ("float16", "float32"):
        found += [CompiledCall(call, "sm_90", dtype) for call in (LOSS, GRADIENT)]
        found.append(twice._replace(dtype=dtype, vocab_size=50257))
    found += [CompiledCall(call, "sm_90", vocab_size=50257) for call in (LOSS, GRADIENT)]
    found.append(CompiledCall(LOSS, "sm_90", vocab_size=50257, rows=FEW_ROWS))
    found.append(CompiledCall(BOTH, "sm_100", vocab_size=50257, options="stats"))  # the closest to a spill
    for target in TARGETS:
        found += [CompiledCall(call, target, vocab_size=16032, shards=8) for call in (LOSS, GRADIENT)]
    shard = CompiledCall(LOSS, "sm_90", vocab_size=16032, shards=8)
    found += [shard._replace(call=call, options="everything", rows=FEW_ROWS) for call in (LOSS, GRADIENT)]
    found += [shard._replace(call=call, dtype="float32", weights=False, vocab_size=6283) for call in (LOSS, GRADIENT)]
    alone = CompiledCall(BOTH, "sm_100", vocab_size=32000, clusters=None)  # held by one block
    return [*found, alone, alone._replace(options="z_loss"), alone._replace(dtype="float32")]


def full_cases() -> list[CompiledCall]:
    """The quick cases, then every vocabulary with every dtype, and every option where rows are aligned and not."""
    found = quick_cases()
    for target in TARGETS:
        for dtype, size in product(DTYPES, VOCABULARIES):
            found += [CompiledCall(call, target, dtype, size) for call in (BOTH, LOSS, GRADIENT, SCALE)]
            found.append(CompiledCall(BOTH, target, dtype, size, FEW_ROWS))
            found.append(CompiledCall(BOTH, target, dtype, size, forced=TWO_PASSES))
        for options, size in product(OPTIONS, (50257, 128256)):
            calls = (BOTH, LOSS, GRADIENT) if options != "none" else (LOSS, GRADIENT)
            found += [CompiledCall(call, target, vocab_size=size, options=options) for call in calls]
    return list(dict.fromkeys(found))
