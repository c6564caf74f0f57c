"""Logits of every layout: slices, transposes, expanded rows, and rows that do not start on 16 bytes."""

import pytest
import torch
from helpers import (
    check_against_reference,
    make_logits,
    make_targets,
    make_weights,
)


def _strided(name, dtype, device):
    """Logits of the layout `name`; a float32 row of 37 and a float16 row of 45 columns start where they like."""
    width = 37 if dtype == torch.float32 else 45

    def logits(*shape):
        return make_logits(*shape, dtype=dtype, device=device)

    layouts = {
        "rows of a wider matrix": lambda: logits(4, width + 8)[:, :width],
        "inner columns of a wider matrix": lambda: logits(4, width + 9)[:, 3 : width + 3],
        "every second row": lambda: logits(8, width)[::2],
        "without the last position": lambda: logits(2, 3, width)[:, :-1],
        "transposed (S, B, V)": lambda: logits(3, 2, width).transpose(0, 1),
        "four dimensions that do not merge": lambda: logits(3, 2, 2, width).permute(1, 2, 0, 3)[:, :, :2],
        "four dimensions that merge": lambda: logits(2, 1, 2, width),
        "column-major": lambda: logits(width, 4).t(),
        "every second column": lambda: logits(4, 2 * width)[:, ::2],
        "every second column, aligned rows": lambda: logits(3, 64)[:, ::2],
        "one row expanded": lambda: logits(1, width).expand(4, width),
        "batch expanded": lambda: logits(1, 2, width).expand(2, 2, width),
        "base off 16 bytes": lambda: logits(4 * width + 1)[1:].view(4, width),
        "base off 16 bytes, aligned rows": lambda: logits(3 * 64 + 1)[1:].view(3, 64),
        "one column expanded": lambda: logits(4, 1).expand(4, width),
        "one column of a matrix": lambda: logits(4, 5)[:, 2:3],
    }
    return layouts[name]()


STRIDES = [
    ("rows of a wider matrix", torch.float16, {}),
    ("inner columns of a wider matrix", torch.float32, {"return_stats": True}),
    ("every second row", torch.float32, {}),
    ("without the last position", torch.bfloat16, {"upstream": 3.0}),
    ("transposed (S, B, V)", torch.float32, {"upstream": 3.0}),
    ("four dimensions that do not merge", torch.float16, {"reduction": "none", "upstream": "rows"}),
    ("four dimensions that merge", torch.float16, {}),
    ("column-major", torch.float32, {"label_smoothing": 0.1, "upstream": 3.0}),
    ("every second column", torch.float16, {"softcap": 4.0}),
    ("every second column, aligned rows", torch.float32, {"z_loss": 0.1}),
    ("one row expanded", torch.float32, {"upstream": 3.0}),
    ("batch expanded", torch.float16, {}),
    ("base off 16 bytes", torch.bfloat16, {}),
    ("base off 16 bytes, aligned rows", torch.float16, {"upstream": 3.0}),
    ("one column expanded", torch.float32, {}),
    ("one column of a matrix", torch.float32, {"reduction": "sum"}),
]


@pytest.mark.lesson("transposed logits")
@pytest.mark.parametrize(("name", "dtype", "options"), STRIDES, ids=[name for name, _, _ in STRIDES])
def test_strides(backend, name, dtype, options, device):
    logits = _strided(name, dtype, device)
    V = logits.shape[-1]
    targets = make_targets(*logits.shape[:-1], V=V, device=device)
    options = dict(options)
    if options.get("upstream") == "rows":
        options["upstream"] = torch.linspace(-1, 2, targets.numel()).reshape(targets.shape)
    before = logits.clone()
    check_against_reference(backend, logits, targets, make_weights("random", V, device) + 0.1, **options)
    assert torch.equal(logits, before)


def test_strides_with_few_long_rows(backend, device):
    """Rows split over programs, none of them on 16 bytes, in a batch that does not merge."""
    logits = make_logits(2, 3, 1201, dtype=torch.float16, device=device)[:, :-1]
    targets = make_targets(2, 2, V=1201, device=device)
    targets[0, 0], targets[1, 1] = 1200, 0
    check_against_reference(backend, logits, targets, upstream=3.0)
    columns = make_logits(1003, 2, device=device).t()
    check_against_reference(backend, columns, targets[0].clamp(max=1002), reduction="sum", upstream=-1.0)
