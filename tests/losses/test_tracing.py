"""Fake, meta and traced tensors: both losses work wherever F.cross_entropy does, through functional operators.

The yardstick `torch` runs in the same tests as the losses: what torch itself does not support is not asked of them.
"""

import contextlib
import functools
import io
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import inherited
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from pdl_kernels import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss, pdl_cross_entropy, pdl_linear_cross_entropy
from pdl_kernels.ops import cross_entropy as logits_operation
from pdl_kernels.ops import linear_cross_entropy as linear_operation

N, V, H = 9, 11, 4
NUMBER = "the 0-d tensor among the inputs"
OPTIONAL = ("bias", "weights", "token_weights")
OURS = ("logits", "linear")


pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # it names every check of a shape
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated:FutureWarning"),
]


# ---------------------------------------------------------------------------------------------------------------------
# Calls: every one takes the same tensors and returns (loss, *statistics)


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


@pytest.fixture
def _no_operators(monkeypatch):
    """The operators raise, so that what runs is the eager path."""

    def refuse(*_):
        raise AssertionError("an operator was called")

    monkeypatch.setattr(logits_operation, "_forward_operator", refuse)
    monkeypatch.setattr(linear_operation, "_forward_operator", refuse)


# ---------------------------------------------------------------------------------------------------------------------
# Fake tensors


def fake_copies(inputs, device, grad=True):
    """Called inside a FakeTensorMode."""
    copies = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in inputs]
    return Inputs(*(t.requires_grad_(grad) for t in copies[:3]), *copies[3:])


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


# ---------------------------------------------------------------------------------------------------------------------
# Meta tensors


@every_case
@pytest.mark.parametrize("shape", [(N,), (2, 5)], ids=str)
def test_meta_tensors(case, shape):
    expected = step_of(case)(*make_inputs(*shape))
    assert_alike(step_of(case)(*make_inputs(*shape, device="meta")), expected, "meta")


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["meta", "fake", "symbolic graph"])
def test_no_rows(loss, reduction, kind):
    case = Case(loss, {"reduction": reduction})
    inputs = make_inputs(5)
    empty = [t[:0] if t.shape[:1] == (5,) else t for t in make_inputs(5, grad=False)]
    empty = Inputs(*(t.requires_grad_() for t in empty[:3]), *empty[3:])
    if kind == "meta":
        got = step_of(case)(*(t.to("meta").detach().requires_grad_(t.requires_grad) for t in empty))
    elif kind == "fake":
        with FakeTensorMode():
            got = step_of(case)(*fake_copies(empty, "cpu"))
    else:
        got = make_fx(step_of(case), tracing_mode="symbolic")(*inputs)(*empty)
        assert all(not gradient.any() for gradient in got[1:])
    assert [tuple(t.shape) for t in got] == [(0,) if reduction == "none" else (), (0, H), (V, H), (V,)]


@all_losses
def test_meta_tensors_under_autocast_of_another_device(loss):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = step_of(Case(loss))(*make_inputs(device="meta"))
    assert all(t.is_meta and t.dtype == torch.float32 for t in got)


def test_meta_row_sampling_without_a_seed():
    got = step_of(Case("linear", {"row_sampling": 0.5}))(*make_inputs(device="meta"))
    assert all(t.is_meta for t in got)


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


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_model_built_on_meta(loss, reduction):
    """Its forward and backward cost nothing; with memory and values it computes what the model built at once does."""
    model = Model(loss, reduction=reduction)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    expected = trained(model, hidden, targets)
    with torch.device("meta"):
        other = Model(loss, reduction=reduction)
        on_meta = trained(other, torch.empty(N, H), torch.empty(N, dtype=torch.int64))
    assert_alike(on_meta, expected, "meta")
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), strict=False)
    name = "weight" if loss == "torch" else "weights"
    setattr(other.criterion, name, getattr(model.criterion, name))  # ours stay out of checkpoints
    assert_close(trained(other, hidden, targets), expected)


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("options", [{}, {"normalizer": 7}], ids=str)
def test_ordinary_tensors_while_the_default_device_is_meta(loss, options):
    expected = step_of(Case(loss, options))(*make_inputs())
    inputs = make_inputs()
    with torch.device("meta"):
        got = step_of(Case(loss, options))(*inputs)
    assert_close(got, expected)


# ---------------------------------------------------------------------------------------------------------------------
# make_fx


def operators_in(graph):
    return [str(node.target) for node in graph.graph.nodes if "pdl_kernels" in str(node.target)]


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


# ---------------------------------------------------------------------------------------------------------------------
# torch.jit.trace


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


# ---------------------------------------------------------------------------------------------------------------------
# torch.export


MODEL_OPTIONS = {
    "torch": ("torch", {}),
    "logits": ("logits", {}),
    "logits, none": ("logits", {"reduction": "none"}),
    "logits, normalizer": ("logits", {"normalizer": 7, "inplace": True, "expected_upstream": 0.25}),
    "linear": ("linear", {}),
    "linear, none": ("linear", {"reduction": "none"}),
    "linear, row sampling": ("linear", {"row_sampling": 0.5, "seed": 3}),
    "linear, normalizer": ("linear", {"normalizer": 7, "expected_upstream": 0.25, "chunk_size": 3}),
}


@pytest.mark.parametrize(
    ("name", "strict"), [(name, False) for name in MODEL_OPTIONS] + [(loss, True) for loss in ("torch", *OURS)]
)
def test_export_with_a_dynamic_batch(name, strict):
    loss, options = MODEL_OPTIONS[name]
    model = Model(loss, **options)
    hidden, _, _, targets, *_ = make_inputs(3, 5, grad=False)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(model, (hidden, targets), dynamic_shapes=(batch, batch), strict=strict)
    for rows in (3, 6):
        other, _, _, other_targets, *_ = make_inputs(rows, 5, grad=False, seed=rows)
        expected = trained(model, other, other_targets)
        assert_close(trained(program.module(), other, other_targets), expected)
    assert len(operators_in(program.graph_module)) == (loss != "torch")


@all_losses
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_without_grad_it_can_still_be_trained(loss, strict):
    model = Model(loss)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    with torch.no_grad():
        program = torch.export.export(model, (hidden, targets), strict=strict)
    assert_close(trained(program.module(), hidden, targets), trained(model, hidden, targets))


@all_losses
def test_an_exported_program_decomposed_saved_and_loaded(loss):
    model = Model(loss)
    hidden, _, _, targets, *_ = make_inputs(grad=False)
    program = torch.export.export(model, (hidden, targets)).run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    other, _, _, other_targets, *_ = make_inputs(grad=False, seed=1)
    torch.testing.assert_close(loaded(other, other_targets), model(other, other_targets))


# ---------------------------------------------------------------------------------------------------------------------
# FlopCounterMode


def counted(function, inputs):
    """What `function` returns, and the operations that it counts."""
    with FlopCounterMode(display=False) as counter:
        found = function(*inputs)
    return found, counter.get_total_flops()


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


# ---------------------------------------------------------------------------------------------------------------------
# Other modes


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


@few_cases
def test_nested_modes(case):
    inputs = make_inputs()
    expected = step_of(case)(*inputs)
    with Record() as outer, FlopCounterMode(display=False), Record() as inner:
        got = step_of(case)(*inputs)
    assert_close(got, expected)
    for record in (outer, inner):
        assert len(record.ours) == (0 if case.loss == "torch" else 2)


@every_case
def test_fake_operators_return_what_real_ones_do(case):
    """Autograd would hide a gradient of another dtype, and memory estimators would count it."""
    inputs = make_inputs(dtype=torch.bfloat16)
    with Record() as real:
        step_of(case)(*inputs)
    with FakeTensorMode(), Record() as fake:
        step_of(case)(*fake_copies(inputs, "cpu"))
    assert len(real.ours) == (0 if case.loss == "torch" else 2)
    for got, expected in zip(fake.ours, real.ours, strict=True):
        assert_alike(got, expected, "cpu")


@few_cases
@pytest.mark.parametrize("where", ["forward", "backward", "backward of a checkpoint"])
def test_one_half_in_a_mode_and_the_other_outside(case, where):
    inputs = make_inputs()
    mode = Record()
    with mode if where == "forward" else contextlib.nullcontext():
        if where == "backward of a checkpoint":
            outputs = checkpoint(forward_of(case), *inputs, use_reentrant=False)
        else:
            outputs = forward_of(case)(*inputs)
    with contextlib.nullcontext() if where == "forward" else mode:
        got = differentiate(case, outputs, inputs)
    assert_close(got, step_of(case)(*inputs))
    assert mode.seen


@few_cases
def test_fake_forward_inside_and_backward_outside_of_their_mode(case):
    inputs = make_inputs()
    with FakeTensorMode():
        fakes = fake_copies(inputs, "cpu")
        outputs = forward_of(case)(*fakes)
    assert_alike(differentiate(case, outputs, fakes), step_of(case)(*inputs), "cpu")


class Wrapped(torch.Tensor):
    """A tensor class that intercepts operators and computes on what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        arguments, keywords = tree_map_only(cls, lambda wrapped: wrapped.held, (arguments, keywords or {}))
        return tree_map_only(torch.Tensor, cls, function(*arguments, **keywords))


@few_cases
def test_a_tensor_class_that_intercepts_operators(case):
    inputs = make_inputs(grad=False)
    wrapped = [Wrapped(t) for t in inputs]
    wrapped = [*(t.requires_grad_() for t in wrapped[:3]), *wrapped[3:]]
    got = step_of(case)(*wrapped)
    assert all(type(t) is Wrapped for t in got)
    assert_close([t.held for t in got], step_of(case)(*make_inputs()))


OPERATORS = {
    "torch": torch.ops.aten.nll_loss_forward.default,
    "logits": torch.ops.pdl_kernels.cross_entropy.default,
    "linear": torch.ops.pdl_kernels.linear_cross_entropy.default,
}


@all_losses
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("saved", ["the loss", "products", "nothing"])
def test_selective_checkpointing(loss, reduction, saved, monkeypatch):
    case, inputs = Case(loss, {"reduction": reduction}), make_inputs()
    runs = []

    def counting(function):
        return lambda *arguments, **options: runs.append(function) or function(*arguments, **options)

    monkeypatch.setattr(logits_operation, "_run_forward", counting(logits_operation._run_forward))
    monkeypatch.setattr(linear_operation, "Run", counting(linear_operation.Run))

    def policy(_, operator, *__, **___):
        keep = {"the loss": (OPERATORS[loss],), "products": (torch.ops.aten.addmm.default,), "nothing": ()}[saved]
        return CheckpointPolicy.MUST_SAVE if operator in keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    outputs = checkpoint(forward_of(case), *inputs, use_reentrant=False, context_fn=contexts)
    got = differentiate(case, outputs, inputs)
    expected_runs = {"torch": 0, "logits": 2, "linear": 2 + (reduction == "none")}[loss]
    assert len(runs) == expected_runs - (saved == "the loss" and loss != "torch"), "forward and backward of the loss"
    assert_close(got, step_of(case)(*inputs))


@both_losses
def test_memory_estimators(loss):
    """MemTracker on fake tensors: no more than torch needs."""
    from torch.distributed._tools.mem_tracker import MemTracker

    def peak(loss):
        rows = 256
        with FakeTensorMode():
            model = Model(loss)
            hidden, targets = torch.empty(rows, H), torch.empty(rows, dtype=torch.int64)
            tracker = MemTracker()
            tracker.track_external(model, hidden, targets)
            with tracker:
                model(hidden, targets).backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    assert 0 < peak(loss) < peak("torch")


# ---------------------------------------------------------------------------------------------------------------------
# Errors


LOGITS_ERRORS = {
    "targets' shape": (lambda i: {"targets": i.targets[:-1]}, ValueError, "targets have shape"),
    "targets' dtype": (lambda i: {"targets": i.targets.float()}, TypeError, "targets are torch.float32"),
    "weights' shape": (lambda i: {"weights": i.weights[:-1]}, ValueError, "weights have shape"),
    "weights' dtype": (lambda i: {"weights": i.weights.long()}, TypeError, "weights are torch.int64"),
    "weights' grad": (lambda i: {"weights": i.weights.requires_grad_()}, NotImplementedError, "weights require grad"),
    "token weights' shape": (
        lambda i: {"token_weights": i.token_weights[:-1]}, ValueError, "token_weights have shape",
    ),
    "normalizer's shape": (lambda i: {"normalizer": i.weights}, ValueError, "normalizer has shape"),
    "normalizer's sign": (lambda i: {"normalizer": -1.0}, ValueError, "normalizer is -1"),
    "normalizer of a sum": (lambda i: {"normalizer": i.number, "reduction": "sum"}, ValueError, "normalizer is given"),
    "expected upstream": (lambda i: {"expected_upstream": i.weights}, ValueError, "expected_upstream has shape"),
    "expected upstream of 0": (lambda i: {"expected_upstream": 0.0}, ValueError, "expected_upstream is 0"),
    "reduction": (lambda i: {"reduction": "median"}, ValueError, "reduction is 'median'"),
    "backend": (lambda i: {"backend": "cuda"}, ValueError, "backend is 'cuda'"),
}  # fmt: skip
LINEAR_ERRORS = {
    "hidden's shape": (lambda i: {"hidden": i.hidden[:, 1:]}, ValueError, "accepted is hidden of shape"),
    "hidden's dtype": (lambda i: {"hidden": i.hidden.bfloat16()}, TypeError, "accepted is one dtype for all"),
    "hidden of integers": (lambda i: {"hidden": i.hidden.long()}, TypeError, "hidden is torch.int64"),
    "bias' shape": (lambda i: {"bias": i.bias[1:]}, ValueError, "bias has shape"),
    "seed's shape": (lambda i: {"seed": i.weights, "row_sampling": 0.5}, ValueError, "seed has shape"),
}
ERRORS = [
    pytest.param(loss, *error, id=f"{loss}: {name}")
    for loss, errors in (("logits", LOGITS_ERRORS), ("linear", LOGITS_ERRORS | LINEAR_ERRORS))
    for name, error in errors.items()
]


@pytest.mark.parametrize("kind", ["fake", "meta", "make_fx"])
@pytest.mark.parametrize(("loss", "change", "error", "message"), ERRORS)
def test_errors_are_ours(loss, change, error, message, kind):
    def call(*tensors):
        inputs = Inputs(*tensors)
        arguments = {
            "targets": inputs.targets, "weights": inputs.weights, "token_weights": inputs.token_weights,
        }  # fmt: skip
        if loss == "linear":
            arguments |= {"hidden": inputs.hidden, "lm_head_weight": inputs.lm_head_weight, "bias": inputs.bias}
            return pdl_linear_cross_entropy(**(arguments | change(inputs)))
        arguments["logits"] = F.linear(*inputs[:3])
        return pdl_cross_entropy(**(arguments | change(inputs)))

    inputs = make_inputs(device="meta" if kind == "meta" else "cpu")
    if kind == "make_fx":
        call = make_fx(call, tracing_mode="symbolic")
    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    with mode:
        inputs = fake_copies(inputs, "cpu") if kind == "fake" else inputs
        with pytest.raises(error, match=message):
            call(*inputs)


# ---------------------------------------------------------------------------------------------------------------------
# Ordinary tensors keep the eager path


class Named(torch.Tensor):
    """A tensor class that intercepts functions, not operators."""


EAGER = {"logits": "_CrossEntropyBackward", "linear": "_LinearCrossEntropyBackward"}


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("kind", ["leaves", "parameters", "buffers", "a subclass", "no grad", "inference mode"])
def test_ordinary_tensors_meet_no_operator(loss, kind):
    inputs = make_inputs(grad=kind not in ("no grad", "inference mode"))
    if kind == "parameters":
        inputs = Inputs(*map(nn.Parameter, inputs[:3]), *inputs[3:])
    elif kind == "buffers":
        inputs = inputs._replace(weights=nn.Buffer(inputs.weights), token_weights=nn.Buffer(inputs.token_weights))
    elif kind == "a subclass":
        inputs = inputs._replace(targets=inputs.targets.as_subclass(Named))
    if kind == "inference mode":
        with torch.inference_mode():
            (found,) = forward_of(Case(loss))(*inputs)
    else:
        (found,) = forward_of(Case(loss))(*inputs)
    if inputs.hidden.requires_grad:
        assert found.grad_fn.name() == EAGER[loss]
    else:
        assert found.grad_fn is None


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("context", ["autocast", "device", "profiler", "saved tensors", "on cpu", "anomaly"])
def test_contexts_that_intercept_no_operator(loss, context):
    inputs, packed = make_inputs(), []
    contexts = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("cpu"),
        "profiler": torch.profiler.profile,
        "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.shape) or t, lambda t: t
        ),
        "on cpu": torch.autograd.graph.save_on_cpu,
        "anomaly": torch.autograd.detect_anomaly,
    }
    with contexts[context]():
        (found,) = forward_of(Case(loss))(*inputs)
    assert found.grad_fn.name() == EAGER[loss]
    tolerance = 0.1 if context == "autocast" else 1e-5
    assert_close(differentiate(Case(loss), (found,), inputs), step_of(Case(loss))(*inputs), tolerance)
    if context == "saved tensors":
        assert {"logits": (N, V), "linear": (V, H)}[loss] in packed


@pytest.mark.usefixtures("_no_operators")
@both_losses
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_keeps_the_eager_path(loss, reentrant):
    inputs, names = make_inputs(), []

    def forward(*tensors):
        (found,) = forward_of(Case(loss))(*tensors)
        names.append(found.grad_fn and found.grad_fn.name())
        return found

    expected = step_of(Case(loss))(*inputs)
    found = checkpoint(forward, *inputs, use_reentrant=reentrant)
    (found * 1.5).backward()
    assert_close((found.detach(), *(t.grad for t in inputs[:3])), expected)
    assert names == ([None, EAGER[loss]] if reentrant else [EAGER[loss]]), "recomputation may stop early"


@pytest.mark.usefixtures("_no_operators")
def test_inplace_still_overwrites_the_logits():
    inputs = make_inputs()
    logits = F.linear(*inputs[:3])
    loss = pdl_cross_entropy(logits, inputs.targets, inputs.weights, inplace=True)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("mode", ["make_fx", "jit"])
def test_inplace_has_no_effect_on_traced_logits(mode):
    """Eager mode refuses it for a leaf."""
    inputs = make_inputs()
    logits = F.linear(*inputs[:3]).detach()
    trace = torch.jit.trace if mode == "jit" else lambda function, arguments: make_fx(function)(*arguments)
    graph = trace(lambda *t: pdl_cross_entropy(*t, inplace=True), (logits.clone().requires_grad_(), inputs.targets))
    leaf = logits.clone().requires_grad_()
    graph(leaf, inputs.targets).backward()
    assert torch.equal(leaf, logits)
    expected = logits.clone().requires_grad_()
    F.cross_entropy(expected, inputs.targets).backward()
    torch.testing.assert_close(leaf.grad, expected.grad)
