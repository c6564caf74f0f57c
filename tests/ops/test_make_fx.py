"""make_fx, functionalize and aot_function: graphs that compute what the call does."""

import pytest
import torch
from helpers.tracing import (
    QUIET,
    Case,
    N,
    V,
    all_losses,
    assert_close,
    both_losses,
    differentiate,
    every_case_with,
    few_cases,
    forward_of,
    make_inputs,
    operators_in,
    step_of,
)
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = QUIET


@every_case_with("symbolic", "real", "fake")
def test_make_fx_of_forward_and_backward(case, kind):
    graph = make_fx(step_of(case), tracing_mode=kind)(*make_inputs())
    other = make_inputs(N + 4 if kind == "symbolic" else N, seed=1)
    assert_close(graph(*other), step_of(case)(*other))
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"], "nothing of the traced call is kept"
    assert len(operators_in(graph)) == (0 if case.loss == "torch" else 2)


@few_cases
def test_make_fx_of_sequences_in_bfloat16(case):
    graph = make_fx(step_of(case), tracing_mode="symbolic")(*make_inputs(2, 5, dtype=torch.bfloat16))
    other = make_inputs(2, 7, dtype=torch.bfloat16, seed=1)
    assert_close(graph(*other), step_of(case)(*other), 2e-2)


@every_case_with("", "pre_dispatch")
def test_a_graph_traced_without_grad_can_be_differentiated(case, kind):
    graph = make_fx(forward_of(case), pre_dispatch=kind == "pre_dispatch")(*make_inputs(grad=False))
    other = make_inputs(seed=1)
    assert_close(differentiate(case, graph(*other), other), step_of(case)(*other))
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_of_functionalize(loss, reduction, mode):
    case = Case(loss, {"reduction": reduction})
    graph = make_fx(torch.func.functionalize(forward_of(case)), tracing_mode=mode)(*make_inputs(grad=False))
    other = make_inputs(seed=1)
    assert_close(differentiate(case, graph(*other), other), step_of(case)(*other))


@all_losses
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_functionalize_alone(loss, grad):
    case, inputs = Case(loss), make_inputs(grad=grad)
    outputs = torch.func.functionalize(forward_of(case))(*inputs)
    if grad:
        assert_close(differentiate(case, outputs, inputs), step_of(case)(*inputs))
    else:
        torch.testing.assert_close(outputs, forward_of(case)(*inputs))


@both_losses
def test_the_other_transforms_are_refused_around_functionalize(loss):
    inputs = make_inputs(grad=False)
    function = torch.func.grad(lambda hidden: torch.func.functionalize(forward_of(Case(loss)))(hidden, *inputs[1:])[0])
    with pytest.raises(RuntimeError, match="does not support functorch transforms"):
        function(inputs.hidden)


@few_cases
def test_aot_function(case):
    from torch._functorch.aot_autograd import aot_function

    compiled = aot_function(forward_of(case), lambda graph, _: graph)
    for seed in (0, 1):
        inputs = make_inputs(seed=seed)
        assert_close(differentiate(case, compiled(*inputs), inputs), step_of(case)(*inputs))


@both_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_make_fx_of_the_triton_backend(loss, reduction, device):
    case = Case(loss, {"reduction": reduction, "backend": "triton"})
    graph = make_fx(step_of(case))(*make_inputs(4, device=device))
    other = make_inputs(4, seed=1, device=device)
    assert_close(graph(*other), step_of(Case(loss, {"reduction": reduction, "backend": "eager"}))(*other))


@all_losses
@pytest.mark.cpu_only(reason="a GPU row with such a target is nan instead")
def test_a_graph_reports_a_target_out_of_range(loss):
    graph = make_fx(forward_of(Case(loss)))(*make_inputs())
    inputs = make_inputs()
    inputs.targets[4] = V
    with pytest.raises(
        IndexError, match=f"Target {V} is out of bounds" if loss == "torch" else rf"targets\[4\] is {V}"
    ):
        graph(*inputs)
