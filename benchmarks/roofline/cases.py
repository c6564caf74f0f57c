"""Which calls the roofline looks at: shapes, dtypes, options and layouts as users have them.

A case names a call, not kernels: which kernels that call launches, in which variant, is the package's answer.
"""

import functools
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pdl_kernels.kernels import launch
from pdl_kernels.kernels.planner import TWO_PASSES, plan_loss
from pdl_kernels.ops.cross_entropy import empty_gradient
from pdl_kernels.options import SCALARS, LossInputs, LossOptions

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
DTYPES = ("bfloat16", "float16", "float32")
MANY_ROWS = 4096
FEW_ROWS = 16  # rows are sliced

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


class Case(NamedTuple):
    call: str  # "loss + gradient", "loss", "gradient" (for another upstream gradient), "scale"
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

    @property
    def layout(self) -> str:
        """What is unusual about the call, for people."""
        parts = [
            "" if self.weights else "no weights",
            "token weights" if self.token_weights else "",
            "normalizer" if self.normalizer else "",
            "expected upstream" if self.expected_upstream else "",
            "" if self.targets == "int64" else f"{self.targets} targets",
            "" if self.row_stride is None or self.column_stride != 1 else "padded rows",
            "" if self.column_stride == 1 else "column stride",
            "offset" if self.offset else "",
            self.forced,
            "" if self.clusters else "no clusters asked for",
        ]
        return ", ".join(filter(None, parts))


def run_case(case: Case) -> None:
    """Make the call on tensors without memory."""
    with (
        launch.planned_by(functools.partial(plan_loss, only=case.forced or None)),
        mock.patch.object(launch, "clusters_wanted", return_value=case.clusters),
    ):
        _run_case(case)


def _run_case(case: Case) -> None:
    logits = _logits(case)
    rows, options = case.rows, OPTIONS[case.options]
    inputs = LossInputs(
        logits,
        _empty(rows, getattr(torch, case.targets)),
        _empty(case.vocab_size) if case.weights else None,
        _empty(rows) if case.token_weights else None,
        _empty() if case.normalizer else None,
        _empty() if case.expected_upstream else 1.0,
    )
    if case.call == "loss":
        launch.forward(inputs, options, None)
    elif case.call == "loss + gradient":
        launch.forward(inputs, options, empty_gradient(logits))
    elif case.call == "gradient":
        per_row = options.reduction == "none"
        upstream = _empty(rows) if per_row else _empty()
        launch.backward(
            inputs, options, _empty(2, rows), _empty(len(SCALARS)), upstream, empty_gradient(logits),
            unless_expected=not per_row,
        )  # fmt: skip
    elif case.call == "scale":
        launch.scale(logits, _empty(len(SCALARS)), _empty())
    else:
        raise ValueError(f"unknown call {case.call!r}")


def _empty(*arguments: int | torch.dtype) -> Tensor:
    shape = [size for size in arguments if isinstance(size, int)]
    dtype = next((dtype for dtype in arguments if isinstance(dtype, torch.dtype)), torch.float32)
    return torch.empty(shape, dtype=dtype, device="meta")


def _logits(case: Case) -> Tensor:
    """(1, rows, V)"""
    row_stride = case.vocab_size if case.row_stride is None else case.row_stride
    span = case.offset + (case.rows - 1) * row_stride + (case.vocab_size - 1) * case.column_stride + 1
    storage = _empty(span, getattr(torch, case.dtype))
    return storage.as_strided((1, case.rows, case.vocab_size), (0, row_stride, case.column_stride), case.offset)


def quick_cases() -> list[Case]:
    """Every kernel on every target, and every branch of the variant at least once."""
    found = []
    for target in TARGETS:
        found += [Case("loss + gradient", target, dtype) for dtype in DTYPES]
        found += [Case(call, target, options="everything") for call in ("loss + gradient", "gradient")]
        found += [Case("loss", target), Case("gradient", target), Case("scale", target)]
        found += [Case("loss + gradient", target, rows=FEW_ROWS)]
    # Where a row is held on chip these would not be seen: older Triton versions launch them.
    plain = Case("loss + gradient", "sm_90", forced=TWO_PASSES)
    found += [plain, plain._replace(target="sm_100")]
    found += [plain._replace(options=name) for name in OPTIONS if name not in ("plain", "everything", "none")]
    found += [Case("gradient", "sm_90", options="none"), Case("loss", "sm_90", options="smoothing")]
    found += [
        plain._replace(weights=False),
        plain._replace(token_weights=True, normalizer=True, expected_upstream=True),
        plain._replace(targets="int32"),
        plain._replace(vocab_size=50257, row_stride=50264),
        plain._replace(vocab_size=50257, row_stride=1, column_stride=MANY_ROWS),
        plain._replace(offset=1),
        plain._replace(vocab_size=50257, row_stride=100000),  # the gradient is contiguous, unlike the logits
        plain._replace(vocab_size=1000),
    ]
    found += [plain._replace(vocab_size=size) for size in (32000, 50257, 262144)]
    held = plain._replace(forced="")
    found += [held._replace(vocab_size=size) for size in (1000, 32000, 50257, 151936, 262144)]
    found += [held._replace(options="z_loss"), held._replace(options="stats"), held._replace(targets="int32")]
    found += [held._replace(dtype="float32", vocab_size=size) for size in (50257, 262144)]
    found += [held._replace(vocab_size=50257, row_stride=50264), held._replace(target="sm_100", vocab_size=50257)]
    for dtype in ("float16", "float32"):
        found += [Case(call, "sm_90", dtype) for call in ("loss", "gradient")]
        found.append(plain._replace(dtype=dtype, vocab_size=50257))
    found += [Case(call, "sm_90", vocab_size=50257) for call in ("loss", "gradient")]
    found.append(Case("loss", "sm_90", vocab_size=50257, rows=FEW_ROWS))
    found.append(Case("loss + gradient", "sm_100", vocab_size=50257, options="stats"))  # the closest to a spill
    alone = Case("loss + gradient", "sm_100", vocab_size=32000, clusters=None)  # held by one block
    found += [alone, alone._replace(options="z_loss"), alone._replace(dtype="float32")]
    return found


def full_cases() -> list[Case]:
    """The quick cases, then every vocabulary with every dtype, and every option where rows are aligned and not."""
    found = quick_cases()
    for target in TARGETS:
        for dtype in DTYPES:
            for size in VOCABULARIES:
                found += [Case(call, target, dtype, size) for call in ("loss + gradient", "loss", "gradient", "scale")]
                found.append(Case("loss + gradient", target, dtype, size, FEW_ROWS))
                found.append(Case("loss + gradient", target, dtype, size, forced=TWO_PASSES))
        for options in OPTIONS:
            for size in (50257, 128256):
                calls = ("loss + gradient", "loss", "gradient") if options != "none" else ("loss", "gradient")
                found += [Case(call, target, vocab_size=size, options=options) for call in calls]
    return list(dict.fromkeys(found))
