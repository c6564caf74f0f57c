"""Fake tensors: both losses answer with what the real ones would look like."""

import pytest
import torch
from helpers.tracing import (
    OURS,
    QUIET,
    Case,
    N,
    all_losses,
    assert_alike,
    both_losses,
    every_case,
    every_case_with,
    fake_copies,
    few_cases,
    forward_of,
    make_inputs,
    step_of,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

pytestmark = QUIET


@every_case
@pytest.mark.parametrize(("shape", "inside"), [((N,), True), ((2, 5), False)], ids=["inside", "outside of their mode"])
def test_fake_tensors(case, shape, inside):
    inputs = make_inputs(*shape)
    with FakeTensorMode() as mode:
        fakes = fake_copies(inputs, "cpu")
        if inside:
            got = step_of(case)(*fakes)
    if not inside:
        got = step_of(case)(*fakes)
    assert all(isinstance(t, FakeTensor) and t.fake_mode is mode for t in got)
    assert_alike(got, step_of(case)(*inputs), "cpu")


@few_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fake_tensors_of_other_dtypes(case, dtype):
    inputs = make_inputs(dtype=dtype)
    with FakeTensorMode():
        got = step_of(case)(*fake_copies(inputs, "cpu"))
    assert_alike(got, step_of(case)(*inputs), "cpu")


@every_case_with("auto", "eager", "triton", torch_too=False)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside of their mode"])
def test_fake_cuda_tensors(case, kind, inside):
    """Without a GPU torch itself cannot differentiate them."""
    on_gpu = torch.cuda.is_available()
    kind_of_run = step_of if on_gpu else forward_of
    backend = {} if case.loss == "torch" else {"backend": kind}
    run = kind_of_run(case._replace(options=case.options | backend))
    with FakeTensorMode():
        fakes = fake_copies(make_inputs(), "cuda", grad=on_gpu)
        if inside:
            got = run(*fakes)
    if not inside:
        got = run(*fakes)
    assert_alike(got, kind_of_run(case)(*make_inputs()), "cuda")


@pytest.mark.parametrize(
    "case", [*map(Case, ("torch", *OURS)), Case("linear", {"row_sampling": 0.5})], ids=[*("torch", *OURS), "sampling"]
)
def test_fake_tensors_in_a_mode_that_takes_others(case):
    inputs = make_inputs()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = fake_copies(inputs, "cpu")
        got = step_of(case)(*fakes[:4], *inputs[4:])
        all_real = step_of(case)(*inputs)
    expected = step_of(case)(*inputs)
    for found in (got, all_real):
        assert all(isinstance(t, FakeTensor) for t in found)
        assert_alike(found, expected, "cpu")


@both_losses
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_an_ordinary_expected_upstream_does_not_disturb_fake_tensors(loss, inside):
    """It has no effect where tensors are traced."""
    case = Case(loss, {"expected_upstream": torch.tensor(0.25)})
    with FakeTensorMode():
        fakes = fake_copies(make_inputs(), "cpu")
        if inside:
            got = step_of(case)(*fakes)
    if not inside:
        got = step_of(case)(*fakes)
    assert all(isinstance(t, FakeTensor) for t in got)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_row_sampling_without_a_seed(inside, device):
    forward = forward_of(Case("linear", {"row_sampling": 0.5}))
    with FakeTensorMode():
        fakes = fake_copies(make_inputs(), device, grad=False)
        if inside:
            (loss,) = forward(*fakes)
    if not inside:
        (loss,) = forward(*fakes)
    assert isinstance(loss, FakeTensor)
    assert loss.device.type == device


@all_losses
def test_fake_tensors_under_autocast(loss):
    inputs = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step_of(Case(loss))(*inputs)
        with FakeTensorMode():
            got = step_of(Case(loss))(*fake_copies(inputs, "cpu"))
    assert_alike(got, expected, "cpu")
