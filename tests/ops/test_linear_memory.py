"""What the fused linear loss multiplies and allocates: nothing for frozen tensors, never the logits of all tokens."""

import itertools

import pytest
import torch
from helpers.linear import (
    PARAMETERS,
    H,
    LiveMemory,
    Products,
    V,
    leaves,
    make_problem,
    run_linear,
    run_linear_reference,
)
from helpers.traffic_counters import Allocations

from pdl_kernels import pdl_linear_cross_entropy
from pdl_kernels.ops import chunks

COMBINATIONS = list(itertools.product([True, False], repeat=3))


def named(needs):
    return " ".join(name for name, needed in zip(PARAMETERS, needs, strict=True) if needed) or "nothing"


@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("needs", COMBINATIONS, ids=named)
def test_frozen_tensors_cost_no_product(needs, reduction, compact, device):
    """Every combination: the gradients that are asked for, None for the others, and no more products."""
    problem = make_problem(9, device=device)
    expected = run_linear_reference(problem, reduction=reduction).gradients
    tensors = leaves(problem, needs)
    with Products() as done:
        hidden, weight, bias = tensors
        loss = pdl_linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, chunk_size=4, reduction=reduction, compact=compact,
            backend="eager",
        )  # fmt: skip
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.sum().backward()
    for name, tensor, needed in zip(PARAMETERS, tensors, needs, strict=True):
        assert (tensor.grad is not None) == needed, name
        if needed:
            torch.testing.assert_close(tensor.grad.cpu().double(), expected[name], rtol=1e-5, atol=1e-6)
    assert done.logit_rows == (18 if reduction == "none" and any(needs) else 9)
    assert done.hidden_rows == (9 if needs[0] else 0)
    assert done.weight_rows == (9 if needs[1] else 0)


@pytest.mark.parametrize("needs", COMBINATIONS, ids=named)
def test_frozen_combinations_on_both_backends(needs, backend, device):
    problem = make_problem(3, device=device)
    everything = run_linear(backend, problem, chunk_size=2)
    some = run_linear(backend, problem, chunk_size=2, needs=needs)
    assert torch.equal(some.loss, everything.loss)
    assert list(some.gradients) == [name for name, needed in zip(PARAMETERS, needs, strict=True) if needed]
    for name, gradient in some.gradients.items():
        torch.testing.assert_close(gradient, everything.gradients[name], rtol=1e-6, atol=1e-7)


TOKENS, WIDE_H, WIDE_V, CHUNK = 1024, 16, 3000, 64


def wide_problem(tokens=TOKENS, dtype=torch.float32, device="cpu", ignored=0):
    return make_problem(tokens, H=WIDE_H, V=WIDE_V, dtype=dtype, device=device, ignored=range(ignored))


@pytest.mark.lesson("memory of the size of the logits")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", ["plain", "everything"])
def test_no_logits_of_all_tokens(dtype, reduction, options, device):
    """The largest buffer is one chunk in float32, which the eager backend computes in, or the weight's gradient."""
    everything = {
        "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "logit_scale": 0.5, "return_stats": True,
    }  # fmt: skip
    problem = wide_problem(dtype=dtype, device=device, ignored=100)
    with Allocations() as allocations:
        run_linear(
            "eager", problem, reduction=reduction, chunk_size=CHUNK, **(everything if options == "everything" else {})
        )
    bound = max(CHUNK * WIDE_V, WIDE_V * WIDE_H, TOKENS * WIDE_H) * 4  # bytes
    largest = max(tensor.untyped_storage().nbytes() for tensor in allocations.made)
    assert CHUNK * WIDE_V * dtype.itemsize <= largest <= bound
    assert TOKENS * WIDE_V * dtype.itemsize > 4 * bound, "the case itself tells nothing"


@pytest.mark.parametrize("rows", [900, 1025])
def test_the_chosen_chunk_keeps_its_bound(rows, monkeypatch, device):
    """`chunk_size=None`, with a bound that a small problem reaches."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 200 * WIDE_V * 4)
    problem = wide_problem(rows, device=device)
    with Allocations() as allocations:
        run_linear("eager", problem)
    largest = max(tensor.untyped_storage().nbytes() for tensor in allocations.made)
    assert 128 * WIDE_V * 4 <= largest <= 200 * WIDE_V * 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "upstream"), [(torch.float32, 1.0), (torch.float32, 0.3), (torch.bfloat16, 0.3)])
def test_peak_memory(dtype, upstream, reduction, device):
    """Gradients in float32, those handed over, one chunk of logits and what the eager rows need of it."""
    problem = wide_problem(dtype=dtype, device=device)
    with LiveMemory() as memory:
        run_linear("eager", problem, reduction=reduction, upstream=upstream, chunk_size=CHUNK)
    gradients = (TOKENS * WIDE_H + WIDE_V * WIDE_H + WIDE_V) * (4 if dtype == torch.float32 else 6)
    chunk = CHUNK * WIDE_V * 4
    tokens = TOKENS * 128  # losses, states, factors, masks
    assert memory.peak <= gradients + 4 * chunk + tokens
    assert memory.peak < 0.4 * TOKENS * WIDE_V * dtype.itemsize


@pytest.mark.parametrize("ignored_share", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_grows_by_rows_of_hidden_states_alone(reduction, ignored_share, device):
    """More tokens need their losses and gradients of hidden states, and, where packed, a copy of these; no logits."""
    peaks = []
    for tokens in (TOKENS, 2 * TOKENS):
        problem = wide_problem(tokens, device=device, ignored=int(ignored_share * tokens))
        with LiveMemory() as memory:
            run_linear("eager", problem, reduction=reduction, chunk_size=CHUNK)
        peaks.append(memory.peak)
    per_token = (peaks[1] - peaks[0]) / TOKENS  # bytes
    copies = 3 if ignored_share else 1  # packed hidden states, their gradients, the gradients among all tokens
    assert per_token + 1 >= WIDE_H * 4
    assert per_token <= copies * WIDE_H * 4 + 160
    assert per_token < 0.05 * WIDE_V * 4


@pytest.mark.lesson("gradients computed under no_grad")
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_a_gradient_only_a_chunk_of_logits(how, reduction, device):
    problem = wide_problem(device=device)
    hidden, weight, bias = leaves(problem, (how != "frozen",) * 3)
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[how]
    with guard(), LiveMemory() as memory, Products(WIDE_H, WIDE_V) as done:
        pdl_linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, reduction=reduction, return_stats=True, chunk_size=CHUNK,
            backend="eager",
        )  # fmt: skip
    assert done.logit_rows == TOKENS
    assert done.hidden_rows == done.weight_rows == 0
    assert memory.largest <= CHUNK * WIDE_V * 4
    assert memory.peak <= 4 * CHUNK * WIDE_V * 4


def test_the_gradients_are_released_with_backward(device):
    """What waited for backward goes with the first one, and with the graph."""
    problem = wide_problem(device=device)
    hidden, weight, _ = leaves(problem)
    with LiveMemory() as memory:
        loss = pdl_linear_cross_entropy(hidden, weight, problem.targets, chunk_size=CHUNK, backend="eager")
        loss.backward(retain_graph=True)
        hidden.grad = weight.grad = None
        torch.zeros((), device=device).add(1)  # an operation, so that the recorder looks again
        kept = sum(size for _, size in memory.live.values())
    assert kept < WIDE_V * WIDE_H * 4 / 2


@pytest.mark.parametrize(
    ("reduction", "ignored", "forward", "backward"),
    [("mean", 0, 2, 0), ("mean", 128, 1.5, 1), ("none", 0, 1, 2), ("none", 128, 1.5, 1.5)],
)
def test_hidden_states_with_gaps_are_copied_only_where_rows_are_taken(reduction, ignored, forward, backward, device):
    """`hidden[:, :-1]`: one copy, gone once its rows are packed, beside gradients; none to scale what waits.

    `forward` and `backward` count hidden states of all tokens; a quarter of one is left for all the rest.
    """
    tokens, wide_H = 256, 256
    problem = make_problem(4, tokens // 4 + 1, H=wide_H, device=device)
    targets = problem.targets[:, 1:].clone()
    targets.view(-1)[:ignored] = -100
    whole, weight, bias = leaves(problem)
    hidden = whole[:, :-1]
    with LiveMemory() as memory:
        loss = pdl_linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction=reduction, chunk_size=16, backend="eager"
        ).sum()
    unit = tokens * wide_H * 4  # bytes
    assert memory.peak <= (forward + 0.25) * unit
    with LiveMemory() as memory:
        torch.autograd.grad(loss, hidden)
    assert memory.peak <= (backward + 0.25) * unit


def test_losses_per_token_form_no_gradient_in_forward(device):
    """With "none", backward forms them: not even zeros for the weight before."""
    problem = wide_problem(64, device=device)
    hidden, weight, bias = leaves(problem)
    with Allocations() as allocations:
        loss = pdl_linear_cross_entropy(
            hidden, weight, problem.targets, bias=bias, reduction="none", chunk_size=4, backend="eager"
        )
    assert loss.requires_grad
    largest = max(tensor.untyped_storage().nbytes() for tensor in allocations.made)
    assert largest < WIDE_V * WIDE_H * 4


@pytest.mark.parametrize("accumulate_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_accumulate_dtype_decides_what_waits(accumulate_dtype, device):
    problem = wide_problem(64, dtype=torch.bfloat16, device=device)
    hidden, weight, _ = leaves(problem)
    with LiveMemory() as memory:
        loss = pdl_linear_cross_entropy(
            hidden, weight, problem.targets, chunk_size=16, accumulate_dtype=accumulate_dtype, backend="eager"
        )
        torch.zeros((), device=device).add(1)
        kept = sum(size for _, size in memory.live.values())
    assert loss.requires_grad
    waiting = (64 * WIDE_H + WIDE_V * WIDE_H) * accumulate_dtype.itemsize
    assert waiting <= kept <= waiting + 64 * 64


def test_products_run_in_the_dtype_of_the_hidden_states(device):
    """No float32 copy of hidden states or weight beside what the mixed product of a CPU takes block by block."""
    problem = make_problem(9, dtype=torch.bfloat16, device=device)
    with Products() as done:
        run_linear("eager", problem, chunk_size=4, accumulate_dtype=torch.bfloat16)
    assert done.shapes[0] == (4, H, V)
    assert done.logit_rows == done.hidden_rows == done.weight_rows == 9
