"""torch.compile: whole graphs, static and dynamic shapes, the same numbers; and the operators behind it."""

import pytest
import torch
import torch._dynamo
from helpers import needs_compiler

from pdl_kernels import PDLCrossEntropyLoss, pdl_cross_entropy

V = 50
pytestmark = pytest.mark.usefixtures("_fresh_compiler")
TRACED = pytest.mark.needs_driver(reason="torch's tracing asks a driver for the current stream")


def inputs(rows, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 16, generator=generator).to(device)
    targets = torch.randint(0, V, (rows,), generator=generator).to(device)
    targets[rows // 2] = -100
    return hidden, targets


def model(device):
    generator = torch.Generator().manual_seed(7)
    head = torch.randn(V, 16, generator=generator).to(device).requires_grad_()
    weights = (torch.rand(V, generator=generator) + 0.1).to(device)
    return head, weights


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {
        "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.5, "reduction": "token_mean",
    },
    "normalizer": {"normalizer": 7},
    "inplace": {"inplace": True},
}  # fmt: skip


@needs_compiler
@TRACED
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_equals_eager(name, dynamic, backend, device):
    head, weights = model(device)

    def step(hidden, targets):
        logits = hidden @ head.t()
        loss, stats = pdl_cross_entropy(logits, targets, weights, backend=backend, return_stats=True, **OPTIONS[name])
        return loss * 1.5, stats

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    for rows in (4, 6) if dynamic else (4,):
        hidden, targets = inputs(rows, device)
        results = []
        for function in (step, compiled):
            loss, stats = function(hidden, targets)
            upstream = torch.linspace(0.0, 2.0, loss.numel(), device=device).view(loss.shape)
            (gradient,) = torch.autograd.grad(loss, head, upstream if loss.dim() else None)
            results.append((loss.detach(), gradient, *stats))
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)
        assert results[0][1].abs().max() > 0


@needs_compiler
@TRACED
def test_one_graph_for_many_numbers_of_rows(backend, device):
    head, weights = model(device)

    def step(hidden, targets):
        return pdl_cross_entropy(hidden @ head.t(), targets, weights, backend=backend)

    compiled = torch.compile(step, fullgraph=True)
    for rows in range(3, 9):
        loss = compiled(*inputs(rows, device))
        torch.testing.assert_close(loss, step(*inputs(rows, device)), rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "static once, then dynamic"


@needs_compiler
@TRACED
@pytest.mark.parametrize("shape", ["shifted", "transposed"])
def test_compiled_logits_that_are_not_contiguous(shape, backend, device):
    head, weights = model(device)
    hidden = torch.randn(2, 5, 16, device=device)
    targets = torch.arange(10, device=device).view(2, 5)

    def step(hidden):
        logits = hidden @ head.t()
        if shape == "shifted":
            return pdl_cross_entropy(logits[:, :-1], targets[:, 1:], weights, backend=backend)
        return pdl_cross_entropy(logits.transpose(0, 1), targets.t(), weights, backend=backend)

    (expected,) = torch.autograd.grad(step(hidden), head)
    (gradient,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), head)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@needs_compiler
@TRACED
def test_compiled_module_and_leaf(device):
    _, weights = model(device)
    criterion = PDLCrossEntropyLoss(weights, label_smoothing=0.1)
    logits = torch.randn(5, V, device=device, requires_grad=True)
    targets = torch.arange(5, device=device)
    compiled = torch.compile(criterion, fullgraph=True)
    (expected,) = torch.autograd.grad(criterion(logits, targets), logits)
    (gradient,) = torch.autograd.grad(compiled(logits, targets), logits)
    torch.testing.assert_close(gradient, expected)


@needs_compiler
@pytest.mark.cpu_only(reason="a GPU row with such a target is nan instead")
def test_compiled_reports_a_target_out_of_range():
    compiled = torch.compile(lambda x, y: pdl_cross_entropy(x, y), fullgraph=True)
    with pytest.raises(IndexError, match=r"targets\[1\] is 99"):
        compiled(torch.randn(3, V), torch.tensor([0, 99, 1]))


def operator_arguments(device, **changes):
    head, weights = model(device)
    hidden, targets = inputs(5, device)
    arguments = {
        "logits": (hidden @ head.t()).detach().requires_grad_(),
        "targets": targets,
        "weights": weights,
        "token_weights": None,
        "normalizer": None,
        "ignore_index": -100,
        "reduction": "mean",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": None,
        "logit_scale": 1.0,
        "return_stats": False,
        "backend": "eager",
        "row_groups": "",
    }
    return tuple({**arguments, **changes}.values())


@TRACED
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "none", "return_stats": True},
        {"label_smoothing": 0.1, "softcap": 30.0, "weights": None},
        {"normalizer": torch.tensor(3.0)},
    ],
)
def test_operators_pass_opcheck(changes, device, backend):
    if "normalizer" in changes:
        changes = {"normalizer": changes["normalizer"].to(device)}
    operator = torch.ops.pdl_kernels.cross_entropy.default
    results = torch.library.opcheck(operator, operator_arguments(device, backend=backend, **changes))
    assert set(results.values()) == {"SUCCESS"}


@TRACED
def test_backward_operator_passes_opcheck(device, backend):
    arguments = operator_arguments(device, backend=backend)
    logits, targets, weights, token_weights, _, *settings, _ = arguments
    _, row_state, scalars, _ = torch.ops.pdl_kernels.cross_entropy(*arguments)
    upstream = torch.tensor(2.0, device=device)
    results = torch.library.opcheck(
        torch.ops.pdl_kernels.cross_entropy_backward.default,
        (upstream, logits.detach(), targets, weights, token_weights, row_state, scalars, *settings),
    )
    assert set(results.values()) == {"SUCCESS"}


def test_operators_refuse_a_second_derivative(device):
    logits = operator_arguments(device)[0]
    loss = torch.ops.pdl_kernels.cross_entropy(*operator_arguments(device, logits=logits))[0]
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), logits)


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum", "none"])
@pytest.mark.parametrize("return_stats", [False, True])
def test_operators_leave_no_output_uninitialised(reduction, return_stats, device, backend):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with nan and the largest integers
    try:
        arguments = operator_arguments(device, backend=backend, reduction=reduction, return_stats=return_stats)
        outputs = torch.ops.pdl_kernels.cross_entropy(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for output in outputs:
        assert output.isfinite().all()
    assert outputs[3] <= 5
