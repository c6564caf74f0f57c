"""FlopCounterMode counts the products of both losses as it counts torch's."""

import subprocess
import sys

import pytest
import torch
from helpers import inherited
from helpers.tracing import (
    QUIET,
    Case,
    H,
    N,
    V,
    assert_close,
    both_losses,
    counted,
    fake_copies,
    few_cases,
    forward_of,
    make_inputs,
    step_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

pytestmark = QUIET


@few_cases
def test_flop_counter_changes_no_number(case):
    inputs = make_inputs()
    assert_close(counted(step_of(case), inputs)[0], step_of(case)(*inputs))


@both_losses
@pytest.mark.parametrize("shape", [(N,), (2, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True), (False, False)], ids=["all", "hidden", "weight", "nothing"]
)
def test_products_are_counted_as_torchs(loss, shape, reduction, needs):
    inputs = make_inputs(*shape, grad=False)
    for tensor, need in zip(inputs[:2], needs, strict=True):
        tensor.requires_grad_(need)

    def run(loss):
        def function(*tensors):
            (found,) = forward_of(Case(loss, {"reduction": reduction}))(*tensors)
            if any(needs):
                found.sum().backward()

        return counted(function, inputs)[1]

    one = 2 * inputs.targets.numel() * V * H  # multiplications and additions of one product
    assert run("torch") == (1 + sum(needs)) * one
    again = one if loss == "linear" and reduction == "none" and any(needs) else 0  # backward makes the logits again
    assert run(loss) == run("torch") + again


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_when_the_linear_loss_counts_its_products(reduction):
    inputs = make_inputs()
    one = 2 * N * V * H
    with FlopCounterMode(display=False) as counter:
        (loss,) = forward_of(Case("linear", {"reduction": reduction}))(*inputs)
        assert counter.get_total_flops() == (one if reduction == "none" else 3 * one)
        loss.sum().backward()
    operator = torch.ops.pdl_kernels.linear_cross_entropy
    counts = counter.get_flop_counts()["Global"]
    assert counts[operator] + counts[torch.ops.pdl_kernels.linear_cross_entropy_backward] == counter.get_total_flops()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_was_traced_without_grad_counts_what_it_computes(reduction):
    case = Case("linear", {"reduction": reduction})
    graph = make_fx(forward_of(case))(*make_inputs(grad=False))
    inputs = make_inputs(seed=1)
    _, operations = counted(lambda *t: graph(*t)[0].sum().backward(), inputs)
    assert operations == 4 * 2 * N * V * H


@both_losses
def test_fake_tensors_in_a_flop_counter_and_the_reverse(loss):
    inputs = make_inputs()
    expected = counted(step_of(Case("torch")), inputs)[1]
    with FakeTensorMode():
        fakes = fake_copies(inputs, "cpu")
        assert counted(step_of(Case(loss)), fakes)[1] == expected
    with FlopCounterMode(display=False) as counter, FakeTensorMode():
        step_of(Case(loss))(*fake_copies(inputs, "cpu"))
    assert counter.get_total_flops() == expected
    assert counted(step_of(Case(loss)), make_inputs(device="meta"))[1] == expected


def test_in_a_fresh_process():
    """The operators are there once the package is imported, Triton is not, and the first count is right."""
    program = f"""
import sys, torch, pdl_kernels
torch.ops.pdl_kernels.cross_entropy_backward, torch.ops.pdl_kernels.linear_cross_entropy_backward
assert "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
counter = FlopCounterMode(display=False)
hidden, head = torch.randn({N}, {H}), torch.randn({V}, {H})
with counter:
    pdl_kernels.pdl_linear_cross_entropy(hidden, head, torch.zeros({N}, dtype=torch.int64))
assert counter.get_total_flops() == {2 * N * V * H}, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, env=inherited())
