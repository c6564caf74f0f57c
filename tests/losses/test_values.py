"""Loss, gradient and statistics of every option, on both backends, against the float64 reference."""

import pytest
import torch
from helpers import (
    check_against_reference,
    make_logits,
    make_targets,
    make_weights,
    signed_token_weights,
)

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*HALF_AND_SINGLE, torch.float64)
ROWS, V = 5, 37


# name: (weights, token weights, options). Rows 1 and 3 are ignored where "ignored" says so.
OPTION_CASES = {
    "plain mean": (None, None, {}),
    "plain sum": (None, None, {"reduction": "sum"}),
    "plain none": (None, None, {"reduction": "none", "upstream": "rows"}),
    "weighted mean": ("random", None, {"return_stats": True}),
    "weighted token_mean": ("random", None, {"reduction": "token_mean"}),
    "power law mean": ("power_law", None, {"upstream": 3.0}),
    "power law none": ("power_law", None, {"reduction": "none", "upstream": "small rows"}),
    "power law normalizer": ("power_law", None, {"normalizer": 3e7}),
    "signed token weights": ("random", "signed", {"return_stats": True}),
    "signed token weights token_mean": (None, "signed", {"reduction": "token_mean", "return_stats": True}),
    "signed token weights none": ("random", "signed", {"reduction": "none", "upstream": "rows"}),
    "normalizer": ("random", "signed", {"normalizer": 12.5, "upstream": 0.25}),
    "smoothing": (None, None, {"label_smoothing": 0.1}),
    "smoothing weighted": ("random", None, {"label_smoothing": 0.1, "upstream": 3.0}),
    "smoothing everything": ("random", "signed", {"label_smoothing": 1.0, "return_stats": True}),
    "smoothing none": ("random", "signed", {"label_smoothing": 0.1, "reduction": "none", "upstream": "rows"}),
    "z_loss": ("random", "signed", {"z_loss": 1e-2, "return_stats": True}),
    "z_loss sum": (None, None, {"z_loss": 1e-2, "reduction": "sum", "upstream": 0.5}),
    "z_loss none": ("random", "signed", {"z_loss": 1e-2, "reduction": "none", "upstream": "rows"}),
    "z_loss token_mean": ("random", "signed", {"z_loss": 1e-1, "reduction": "token_mean"}),
    "z_loss normalizer": ("random", "signed", {"z_loss": 1e-1, "normalizer": 7}),
    "softcap": ("random", None, {"softcap": 5.0, "return_stats": True}),
    "scale": ("random", None, {"logit_scale": 0.35}),
    "softcap and scale": (None, "signed", {"softcap": 3.0, "logit_scale": 2.0, "reduction": "sum"}),
    "all of them": (
        "random",
        "signed",
        {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 1.5, "return_stats": True},
    ),
    "all of them none": (
        "random",
        "signed",
        {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 4.0, "logit_scale": 0.5, "reduction": "none"},
    ),
}


def _option_params():
    for position, name in enumerate(OPTION_CASES):
        for dtype in ALL_DTYPES:
            yield pytest.param("eager", dtype, name, id=f"eager-{dtype}-{name}")
        # The interpreter is slow: one dtype a case, in turn, and all three where the arithmetic is richest.
        dtypes = HALF_AND_SINGLE if name in ("weighted mean", "all of them") else [HALF_AND_SINGLE[position % 3]]
        for dtype in dtypes:
            yield pytest.param("triton", dtype, name, id=f"triton-{dtype}-{name}")


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize(("backend", "dtype", "name"), list(_option_params()), indirect=["backend"])
def test_options(backend, dtype, name, device):
    weights, token_weights, options = OPTION_CASES[name]
    options = dict(options)
    if options.get("upstream") == "rows":
        options["upstream"] = torch.tensor([0.0, -1.5, 3.0, 0.25, 1.0])
    elif options.get("upstream") == "small rows":  # power-law weights fit no fp16 gradient otherwise
        options["upstream"] = torch.tensor([1e-3, 2e-3, -1e-3, 3e-3, 1e-3])
    weights = make_weights(weights, V, device)
    if options.get("upstream") is not None and weights is not None and dtype == torch.float16:
        weights = weights.clamp(max=1e6)
    if token_weights == "signed":
        options["token_weights"] = signed_token_weights(ROWS, device=device)
    logits = make_logits(ROWS, V, dtype=dtype, device=device)
    targets = make_targets(ROWS, V=V, device=device, ignored=(3,))
    check_against_reference(backend, logits, targets, weights, **options)


@pytest.mark.lesson("weights over fourteen orders of magnitude")
@pytest.mark.parametrize("weights_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_and_token_weights_of_any_floating_dtype(backend, weights_dtype, device):
    logits, targets = make_logits(4, V, device=device), make_targets(4, V=V, device=device)
    weights = (make_weights("random", V, device) * 100).to(weights_dtype)
    token_weights = signed_token_weights(4, device=device).to(weights_dtype)
    check_against_reference(backend, logits, targets, weights, token_weights=token_weights)
