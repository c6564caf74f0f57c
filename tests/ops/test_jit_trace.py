"""torch.jit.trace, of functions and of modules; and row sampling that draws in every run of a graph."""

import io

import torch
from helpers.tracing import (
    QUIET,
    Case,
    Model,
    all_losses,
    assert_close,
    differentiate,
    every_case_with,
    forward_of,
    make_inputs,
    step_of,
    trained,
)
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = QUIET


@every_case_with("no grad", "grad")
def test_jit_trace(case, kind):
    traced = torch.jit.trace(forward_of(case), make_inputs(grad=kind == "grad"))
    other = make_inputs(seed=1)
    assert_close(differentiate(case, traced(*other), other), step_of(case)(*other))


@all_losses
def test_jit_trace_of_a_module_saved_and_loaded(loss):
    model = Model(loss)
    hidden, _, _, targets, *_ = make_inputs(2, 5, grad=False)
    traced = torch.jit.trace(model, (hidden, targets))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    other, _, _, other_targets, *_ = make_inputs(2, 5, grad=False, seed=1)
    assert_close(trained(torch.jit.load(file), other, other_targets), trained(model, other, other_targets))


def test_row_sampling_without_a_seed_draws_in_every_run_of_a_graph():
    inputs = make_inputs(12)
    case = Case("linear", {"row_sampling": 0.7})
    graphs = [
        torch.jit.trace(forward_of(case), inputs, check_trace=False),
        make_fx(forward_of(case))(*inputs),
        make_fx(forward_of(case), tracing_mode="symbolic")(*inputs),
    ]
    for run in graphs:
        gradients = [differentiate(case, run(*inputs), inputs)[1] for _ in range(6)]
        assert any(not torch.equal(gradient, gradients[0]) for gradient in gradients)
        torch.manual_seed(5)
        first = differentiate(case, run(*inputs), inputs)[1]
        torch.manual_seed(5)
        assert torch.equal(differentiate(case, run(*inputs), inputs)[1], first), "torch's generator decides"
