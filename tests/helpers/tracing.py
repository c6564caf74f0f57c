"""Calls of both losses, and of torch's, that take the same tensors: for fake, meta and traced ones.

The yardstick `torch` runs in the same tests as the losses: what torch itself does not support is not asked of them.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pdl_kernels import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss, pdl_cross_entropy, pdl_linear_cross_entropy

N, V, H = 9, 11, 4
NUMBER = "the 0-d tensor among the inputs"
OPTIONAL = ("bias", "weights", "token_weights")
OURS = ("logits", "linear")
QUIET = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # it names every check of a shape
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning"),
]


class Case(NamedTuple):
    loss: str  # "torch", "logits" or "linear"
    options: dict[str, Any] = {}  # noqa: RUF012
    given: tuple[str, ...] = OPTIONAL


class Inputs(NamedTuple):
    hidden: torch.Tensor  # (..., H)
    lm_head_weight: torch.Tensor  # (V, H)
    bias: torch.Tensor  # (V,)
    targets: torch.Tensor  # (...)
    weights: torch.Tensor  # (V,)
    token_weights: torch.Tensor  # (...)
    number: torch.Tensor  # ()


def make_inputs(*shape, dtype=torch.float32, device="cpu", seed=0, grad=True):
    """One row is ignored, and one has a token weight of 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (N,)
    targets = torch.randint(V, shape, generator=generator)
    token_weights = torch.rand(shape, generator=generator) + 0.1
    targets.view(-1)[1], token_weights.view(-1)[2] = -100, 0
    inputs = Inputs(
        torch.randn(*shape, H, generator=generator).to(dtype),
        torch.randn(V, H, generator=generator).to(dtype),
        torch.randn(V, generator=generator).to(dtype),
        targets,
        torch.rand(V, generator=generator) + 0.1,
        token_weights,
        torch.rand((), generator=generator) + 3,
    )
    inputs = Inputs(*(tensor.to(device) for tensor in inputs))
    return Inputs(*(tensor.requires_grad_(grad) for tensor in inputs[:3]), *inputs[3:])


def forward_of(case):
    def forward(*tensors):
        hidden, lm_head_weight, bias, targets, weights, token_weights, number = tensors
        bias, weights, token_weights = (
            tensor if name in case.given else None
            for name, tensor in zip(OPTIONAL, (bias, weights, token_weights), strict=True)
        )
        options = {name: number if value is NUMBER else value for name, value in case.options.items()}
        if case.loss == "linear":
            found = pdl_linear_cross_entropy(
                hidden, lm_head_weight, targets, weights, bias=bias, token_weights=token_weights, **options
            )
        else:
            logits = F.linear(hidden, lm_head_weight, bias)
            if case.loss == "logits":
                found = pdl_cross_entropy(logits, targets, weights, token_weights=token_weights, **options)
            else:
                weights = None if weights is None else weights.to(logits.dtype)
                found = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), weights, **options)
        loss, stats = found if isinstance(found, tuple) else (found, ())
        return (loss, *stats)

    return forward


def differentiate(case, outputs, tensors):
    """Outputs and gradients, for an upstream gradient that is nothing special."""
    loss = outputs[0]
    factor = tensors[3].reshape(loss.shape) % 3 + 1.5 if loss.dim() else 1.5
    differentiated = tensors[:3] if "bias" in case.given else tensors[:2]
    return (loss.detach(), *outputs[1:], *torch.autograd.grad((loss * factor).sum(), differentiated))


def step_of(case):
    forward = forward_of(case)
    return lambda *tensors: differentiate(case, forward(*tensors), tensors)


def assert_close(got, expected, tolerance=1e-5):
    """The numbers; and that there are some."""
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance / 10)
    assert all(value.isfinite().all() for value in got)
    assert all(gradient.abs().max() > 0 for gradient in got[-2:])


def assert_alike(got, expected, device):
    """Everything but the numbers."""
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())
        assert ours.device.type == device


TORCH = {"plain": {}, "none": {"reduction": "none"}, "smoothing": {"label_smoothing": 0.1, "reduction": "sum"}}
BOTH = {
    "plain": {},
    "none": {"reduction": "none"},
    "token_mean": {"reduction": "token_mean"},
    "sum, statistics": {"reduction": "sum", "return_stats": True},
    "none, statistics": {"reduction": "none", "return_stats": True},
    "normalizer": {"normalizer": 7},
    "normalizer, tensor": {"normalizer": NUMBER},
    "expected upstream": {"expected_upstream": 0.25},
    "expected upstream, tensor": {"expected_upstream": NUMBER},
    "everything": {
        "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.5, "return_stats": True,
    },
}  # fmt: skip
LOGITS = {"inplace": {"inplace": True}}
LINEAR = {
    "chunks": {"chunk_size": 2, "compact": False},
    "narrow sums": {"accumulate_dtype": torch.bfloat16},
    "row sampling": {"row_sampling": 0.5, "seed": 3},
    "row sampling, none": {"row_sampling": 0.5, "seed": 3.0, "reduction": "none"},
    "row sampling, tensor": {"row_sampling": 0.5, "seed": NUMBER},
}
CASES = {
    f"{loss}: {name}": Case(loss, options)
    for loss, all_options in (("torch", TORCH), ("logits", BOTH | LOGITS), ("linear", BOTH | LINEAR))
    for name, options in all_options.items()
} | {f"{loss}: nothing optional": Case(loss, {}, ()) for loss in ("torch", *OURS)}
FEW = [name for name in CASES if name.endswith((": plain", ": none", ": nothing optional", "normalizer"))]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


def every_case_with(first, *others, torch_too=True):
    """Every case with the first kind, a few with the other ones, torch's own among them or not."""
    few = [name for name in FEW if torch_too or not name.startswith("torch")]
    pairs = [(name, first) for name in CASES] + [(name, kind) for kind in others for name in few]
    return pytest.mark.parametrize(("case", "kind"), [pytest.param(CASES[n], k, id=f"{n}, {k}") for n, k in pairs])


both_losses = pytest.mark.parametrize("loss", OURS)
all_losses = pytest.mark.parametrize("loss", ["torch", *OURS])


def fake_copies(inputs, device, grad=True):
    """Called inside a FakeTensorMode."""
    copies = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in inputs]
    return Inputs(*(t.requires_grad_(grad) for t in copies[:3]), *copies[3:])


class Model(nn.Module):
    """An output projection and a loss that is a module."""

    def __init__(self, loss, *, seed=None, **options):
        super().__init__()
        self.body = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V)
        weights = torch.linspace(0.1, 2, V)
        self.criterion = {
            "torch": lambda: nn.CrossEntropyLoss(weights, **options),
            "logits": lambda: PDLCrossEntropyLoss(weights, **options),
            "linear": lambda: PDLLinearCrossEntropyLoss(weights, **options),
        }[loss]()
        self.loss = loss
        self.seed = seed

    def forward(self, hidden, targets):
        hidden = self.body(hidden)
        if self.loss == "linear":
            return self.criterion(hidden, self.lm_head.weight, targets, self.lm_head.bias, seed=self.seed)
        logits = self.lm_head(hidden)
        if self.loss == "torch":
            logits, targets = logits.flatten(0, -2), targets.flatten()
        return self.criterion(logits, targets)


def trained(model, hidden, targets):
    """The loss, and the gradients of all parameters."""
    loss = model(hidden, targets)
    upstream = torch.arange(1.0, 1 + loss.numel(), device=loss.device).view(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)


def operators_in(graph):
    return [str(node.target) for node in graph.graph.nodes if "pdl_kernels" in str(node.target)]


def counted(function, inputs):
    """What `function` returns, and the operations that it counts."""
    with FlopCounterMode(display=False) as counter:
        found = function(*inputs)
    return found, counter.get_total_flops()


class Record(TorchDispatchMode):
    """The operators that pass, and what they return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        self.seen.append((str(function), outputs))
        return outputs

    @property
    def ours(self):
        return [tree_leaves(outputs) for name, outputs in self.seen if "pdl_kernels" in name]
