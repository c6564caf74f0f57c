"""torch.compile of the fused linear loss: one operator in one graph, the same numbers; and the operators behind it."""

import pytest
import torch
import torch._dynamo
from helpers import make_weights, needs_compiler
from helpers.linear import V, leaves, make_problem, make_token_weights

from pdl_kernels import PDLLinearCrossEntropyLoss, pdl_linear_cross_entropy

N = 5
pytestmark = pytest.mark.usefixtures("_fresh_compiler")


OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {
        "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 20.0, "logit_scale": 0.5, "reduction": "token_mean",
    },
    "normalizer": {"normalizer": 7, "chunk_size": 2, "compact": False},
    "row sampling": {"row_sampling": 0.3, "seed": 5},
    "row sampling, none": {"row_sampling": 0.3, "seed": 5, "reduction": "none"},
}  # fmt: skip


def results(function, problem, weights, u, needs, scale):
    """Loss, gradients and statistics, for an upstream gradient that is nothing special."""
    tensors = leaves(problem, needs)
    loss, stats = function(*tensors, problem.targets, weights, u)
    upstream = torch.linspace(0.0, 2.0, loss.numel(), device=loss.device).view(loss.shape) if loss.dim() else None
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(scale * loss, wanted, upstream), *stats]


def step_of(backend, **options):
    def step(hidden, weight, bias, targets, weights, u):
        return pdl_linear_cross_entropy(
            hidden, weight, targets, weights,
            bias=bias, token_weights=u, backend=backend, return_stats=True, **options,
        )  # fmt: skip

    return step


def assert_all_close(got, expected, rtol=1e-5, atol=1e-6):
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_equals_eager(name, dtype, backend, device):
    weights, u = make_weights("random", V, device), make_token_weights(N, device)
    step = step_of(backend, **OPTIONS[name])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    problem = make_problem(N, dtype=dtype, device=device, ignored=(1,))
    expected, got = (results(f, problem, weights, u, (True,) * 3, 1.5) for f in (step, compiled))
    assert expected[1].abs().max() > 0
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_all_close(got, expected, tolerance, tolerance / 10)


@needs_compiler
def test_the_default_compiler_with_dynamic_shapes(device):
    weights = make_weights("random", V, device)
    step = step_of("eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (6, 9):
        problem = make_problem(2, rows, device=device, ignored=(1,))
        u = make_token_weights(2 * rows, device).view(2, rows)
        expected, got = (results(f, problem, weights, u, (True,) * 3, 1.5) for f in (step, compiled))
        assert_all_close(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_many_numbers_of_rows(reduction, device):
    weights = make_weights("random", V, device)
    step = step_of("eager", reduction=reduction)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in range(4, 10):
        problem, u = make_problem(rows, device=device), make_token_weights(rows, device)
        expected, got = (results(f, problem, weights, u, (True,) * 3, 1.5) for f in (step, compiled))
        assert_all_close(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "static once, then dynamic"


def test_settings_that_follow_a_size_are_symbols(device):
    """`chunk_size` from a number of rows and an `ignore_index` that changes: no graph for each of their values."""

    def step(hidden, weight, bias, targets, ignore_index):
        return pdl_linear_cross_entropy(
            hidden, weight, targets, bias=bias, backend="eager", chunk_size=hidden.shape[0] // 2,
            ignore_index=ignore_index,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for rows in range(4, 14, 2):
        ignore_index = -rows
        problem = make_problem(rows, device=device, ignored=(1,), ignore_index=ignore_index)
        found = []
        for function in (step, compiled):
            tensors = leaves(problem)
            loss = function(*tensors, problem.targets, ignore_index)
            found.append([loss.detach(), *torch.autograd.grad(loss, tensors)])
        assert_all_close(found[1], found[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "static once, then dynamic"


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
    ids=["all", "hidden", "weight", "nothing"],
)  # fmt: skip
def test_one_operator_and_no_more_gradients_than_needed(needs, reduction, device):
    """The graph has the operator once, and no product beside it."""
    graphs = []

    def record(graph, example_inputs):
        graphs.append([node for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    problem, u = make_problem(N, device=device), make_token_weights(N, device)
    step = step_of("eager", reduction=reduction)
    compiled = torch.compile(step, fullgraph=True, backend=record)
    if any(needs):
        expected, got = (results(f, problem, None, u, needs, 2.0) for f in (step, compiled))
        assert_all_close(got, expected)
    else:
        loss, _ = compiled(*leaves(problem, needs), problem.targets, None, u)
        assert not loss.requires_grad
    assert len(graphs) == 1
    (operator,) = (node for node in graphs[0] if "pdl_kernels" in str(node.target))
    assert operator.args[-3:] == needs, "gradients that nobody needs cost products in the operator, too"
    assert not any(
        name in str(node.target) for node in graphs[0] for name in ("matmul", "addmm", "built-in function linear")
    )


def test_compiled_module(device):
    weights = make_weights("random", V, device)
    criterion = PDLLinearCrossEntropyLoss(weights, label_smoothing=0.1)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    problem = make_problem(N, device=device)
    found = []
    for module in (criterion, compiled):
        hidden, weight, bias = tensors = leaves(problem)
        found.append(torch.autograd.grad(module(hidden, weight, problem.targets, bias), tensors))
    assert_all_close(*found)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_under_autocast(reduction, device):
    problem, u = make_problem(N, device=device), make_token_weights(N, device)
    step = step_of("eager", reduction=reduction)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = []
    for function in (step, compiled):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            found.append(results(function, problem, None, u, (True,) * 3, 1.0))
    assert all(t.dtype == torch.float32 for t in found[1][:4])
    assert_all_close(found[1], found[0])


def test_compiled_refuses_a_second_derivative(device):
    problem = make_problem(N, device=device)
    arguments = operator_arguments(problem)
    hidden = arguments[0]
    loss = torch.ops.pdl_kernels.linear_cross_entropy(*arguments)[0]
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(gradient.sum(), hidden)


# ---------------------------------------------------------------------------------------------------------------------
# The operators


def operator_arguments(problem, **changes):
    hidden, weight, bias = leaves(problem)
    arguments = {
        "hidden": hidden, "lm_head_weight": weight, "bias": bias, "targets": problem.targets, "weights": None,
        "token_weights": None, "seed": None, "normalizer": None, "ignore_index": -100, "reduction": "mean",
        "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "logit_scale": 1.0, "return_stats": False,
        "chunk_size": 2, "accumulate_dtype": torch.float32, "compact": None, "row_sampling": 0.0,
        "sequence_parallel": False, "backend": "eager", "dtype": hidden.dtype, "group": "",
        "needs_hidden": True, "needs_weight": True, "needs_bias": True,
    }  # fmt: skip
    unknown = changes.keys() - arguments.keys()
    assert not unknown
    return [*{**arguments, **changes}.values()]


CHANGES = {
    "plain": {},
    "none": {"reduction": "none"},
    "weights, normalizer, statistics": {
        "weights": torch.rand(V) + 0.1, "normalizer": torch.tensor(3.0), "return_stats": True,
    },
    "no bias, frozen weight": {"bias": None, "needs_weight": False, "needs_bias": False},
    "row sampling": {"row_sampling": 0.3, "seed": torch.tensor(1.0), "weights": torch.linspace(0.1, 3, V)},
    "bfloat16 sums": {"accumulate_dtype": torch.bfloat16, "dtype": torch.bfloat16},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_forward_operator_passes_opcheck(name):
    arguments = operator_arguments(make_problem(N, ignored=(1,)), **CHANGES[name])
    results = torch.library.opcheck(torch.ops.pdl_kernels.linear_cross_entropy.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", CHANGES)
def test_backward_operator_passes_opcheck(name):
    arguments = [
        value.detach() if isinstance(value, torch.Tensor) else value
        for value in operator_arguments(make_problem(N, ignored=(1,)), **CHANGES[name])
    ]
    loss, row_state, scalars, _, *gradients = torch.ops.pdl_kernels.linear_cross_entropy(*arguments)
    tensors, settings = arguments[:7], arguments[8:]
    upstream = torch.full_like(loss, 2.0)
    results = torch.library.opcheck(
        torch.ops.pdl_kernels.linear_cross_entropy_backward.default,
        (upstream, *gradients, row_state, scalars, *tensors, *settings),
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("return_stats", [False, True])
def test_operators_leave_no_output_uninitialised(reduction, return_stats, backend, device):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with nan and the largest integers
    try:
        problem = make_problem(N, device=device, ignored=(1,))
        changes = {"reduction": reduction, "return_stats": return_stats, "backend": backend}
        outputs = torch.ops.pdl_kernels.linear_cross_entropy(*operator_arguments(problem, **changes))
    finally:
        torch.use_deterministic_algorithms(False)
    for output in outputs:
        assert output.isfinite().all()
