"""The bytes that operations move and keep are those of the plan in benchmarks/traffic.py, counted for real.

Eager operations are watched through torch's dispatcher, kernels through Triton's interpreter. Worsened implementations
show that the counting notices.
"""

import pytest
import torch
from helpers.traffic_counters import Allocations, KernelAccesses, Span, kernel_accesses

from benchmarks.inputs import Case, make_inputs
from benchmarks.operations import FORWARD, OPERATIONS, SCALED_TRAINING, TRAINING, Run
from benchmarks.peers.contender import Contender
from benchmarks.traffic import floor_bytes, planned_traffic
from pdl_kernels import pdl_cross_entropy
from pdl_kernels.backends import interpreted

# Many pieces of the eager backend, and whole rows of the kernels (few rows would be sliced).
CASES = {"eager": Case(512, 4099, "bfloat16"), "triton": Case(20, 2051, "bfloat16")}
FEW_ROWS = Case(5, 3003, "bfloat16")
COUNTING_TOLERANCE = 0.01  # the target's logit is read once more by itself
# A buffer is large from half of the logits' elements on: pieces of the eager backend are a few percent of them.
LARGE = 0.5

pytestmark = pytest.mark.cpu_only(reason="accesses are counted on a CPU")


def contender(backend, inplace, loss=pdl_cross_entropy, expected=True):
    def build(inputs):
        return lambda logits: loss(
            logits, inputs.targets, inputs.weights,
            inplace=inplace, backend=backend, expected_upstream=inputs.upstream if expected else 1.0,
        )  # fmt: skip

    return Contender("under test", "test", build, overwrites=inplace)


class Counted:
    """One operation, run once while everything is counted."""

    def __init__(
        self, monkeypatch, case, operation, *, backend, inplace, loss=pdl_cross_entropy, held=False, expected=True
    ):
        """`expected`: the upstream gradient is named to the loss."""
        self.case, self.backend = case, backend
        inputs = make_inputs(case, torch.device("cpu"))
        scratch = torch.empty_like(inputs.logits)
        run = Run(contender(backend, inplace, loss, expected), inputs, scratch)
        run.prepare(operation)()  # makes the upstream gradient
        call = run.prepare(operation)
        if backend == "triton":
            with kernel_accesses(monkeypatch) as self.kernels, Allocations() as self.allocations:
                outcome = call()
        else:
            with Allocations() as self.allocations:
                outcome = call()
        self.logits = scratch if inplace else inputs.logits
        self.gradient = outcome.gradient
        self.plan = planned_traffic(
            case, operation, backend=backend, inplace=inplace, held=held, expected=expected or operation.upstream == 1
        )

    @property
    def large(self):
        return self.allocations.large(LARGE * self.case.rows * self.case.vocab_size)

    def logit_reads(self):
        """Average over counted logits; in place, reads of the gradient that lies there count too."""
        if self.backend == "triton":
            elements = KernelAccesses.within(self.kernels.loads, Span.of(self.logits)) / self.case.itemsize
        else:
            elements = self.allocations.read.get(self.logits.untyped_storage().data_ptr(), 0)
        return elements / (self.case.counted * self.case.vocab_size)

    def gradient_writes(self):
        """Average over all elements."""
        if self.gradient is None:
            return 0
        if self.backend == "triton":
            elements = KernelAccesses.within(self.kernels.stores, Span.of(self.gradient)) / self.case.itemsize
        else:
            elements = self.allocations.written.get(self.gradient.untyped_storage().data_ptr(), 0)
        return elements / (self.case.rows * self.case.vocab_size)


def assert_buffers(counted):
    large = [(tuple(tensor.shape), tensor.dtype) for tensor in counted.large]
    assert len(large) == counted.plan.buffers, f"buffers as large as the logits: {large}"
    assert all(dtype != torch.float32 for _, dtype in large), f"a float32 copy of the logits: {large}"


def assert_accesses(counted):
    ignored = 1 - counted.case.counted / counted.case.rows
    reads, writes = counted.logit_reads(), counted.gradient_writes()
    planned = counted.plan
    # Reads of a gradient in place take in its ignored rows, which are zero; eager writes leave out rows set to zero.
    most_reads = planned.logit_reads * (1 + COUNTING_TOLERANCE) + ignored / (1 - ignored)
    assert planned.logit_reads * (1 - COUNTING_TOLERANCE) <= reads <= most_reads
    fewest_writes = planned.gradient_writes * (1 - ignored - COUNTING_TOLERANCE)
    assert fewest_writes <= writes <= planned.gradient_writes * (1 + COUNTING_TOLERANCE)


CONFIGURATIONS = [
    pytest.param(
        backend,
        inplace,
        operation,
        id=f"{backend}-{'in place' if inplace else 'new memory'}-{operation.name}",
    )
    for backend in ("eager", "triton")
    for inplace in (False, True)
    for operation in OPERATIONS.values()
]


@pytest.mark.parametrize(("backend", "inplace", "operation"), CONFIGURATIONS)
def test_bytes_are_those_of_the_plan(monkeypatch, backend, inplace, operation):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        assert interpreted()
    counted = Counted(monkeypatch, CASES[backend], operation, backend=backend, inplace=inplace)
    assert_buffers(counted)
    assert_accesses(counted)


@pytest.mark.parametrize("inplace", [False, True], ids=["new memory", "in place"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_an_unexpected_upstream_gradient_is_one_more_read_and_write(monkeypatch, backend, inplace):
    counted = Counted(monkeypatch, CASES[backend], SCALED_TRAINING, backend=backend, inplace=inplace, expected=False)
    assert_buffers(counted)
    assert_accesses(counted)


@pytest.mark.parametrize("inplace", [False, True], ids=["new memory", "in place"])
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_a_row_on_chip_is_read_once(monkeypatch, force_kernel, operation, inplace):
    pytest.importorskip("triton", reason="Triton is not installed")
    force_kernel("single pass")
    counted = Counted(monkeypatch, CASES["triton"], operation, backend="triton", inplace=inplace, held=True)
    assert_buffers(counted)
    assert_accesses(counted)
    if operation is TRAINING:
        assert counted.logit_reads() == pytest.approx(1, abs=COUNTING_TOLERANCE)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=lambda operation: operation.name)
def test_slices_of_few_rows_follow_the_same_plan(monkeypatch, operation):
    pytest.importorskip("triton", reason="Triton is not installed")
    counted = Counted(monkeypatch, FEW_ROWS, operation, backend="triton", inplace=False)
    assert_buffers(counted)
    assert_accesses(counted)


def test_float32_logits_are_read_as_planned(monkeypatch):
    case = CASES["eager"]._replace(dtype="float32")
    for operation in (FORWARD, TRAINING):
        assert_accesses(Counted(monkeypatch, case, operation, backend="eager", inplace=False))


def test_rows_cost_what_the_plan_says(monkeypatch):
    """Targets, weights, losses and row state: the plan's numbers, up to the scalars that every row also loads."""
    pytest.importorskip("triton", reason="Triton is not installed")
    case = CASES["triton"]
    counted = Counted(monkeypatch, case, FORWARD, backend="triton", inplace=False)
    kernels = counted.kernels
    logits = KernelAccesses.within(kernels.loads, Span.of(counted.logits))
    assert KernelAccesses.total(kernels.loads) - logits <= 2 * (counted.plan.read - floor(case, FORWARD))
    assert KernelAccesses.total(kernels.stores) <= 2 * counted.plan.written


def floor(case, operation):
    return floor_bytes(case, operation)


def test_the_plan_meets_its_floor():
    """Nothing moved beyond the floor but per-row numbers, except where the gradient is formed twice."""
    case = Case(4096, 128256, "bfloat16")
    small = 100 * case.rows
    for backend in ("eager", "triton"):
        for inplace in (False, True):
            plans = {
                operation: planned_traffic(case, operation, backend=backend, inplace=inplace)
                for operation in OPERATIONS.values()
            }
            for operation in (FORWARD, TRAINING):
                assert 0 < plans[operation].moved - floor(case, operation) <= small
            assert plans[SCALED_TRAINING] == plans[TRAINING]
            other = planned_traffic(case, SCALED_TRAINING, backend=backend, inplace=inplace, expected=False)
            assert other.moved / floor(case, TRAINING) == pytest.approx(2, abs=0.1)
            assert plans[TRAINING].kept <= (0 if inplace else case.logits_bytes + 8 * case.rows)


# ---------------------------------------------------------------------------------------------------------------------
# Worse on purpose


def with_a_float32_copy(logits, targets, weights, **options):
    return pdl_cross_entropy(logits.float(), targets, weights, **{**options, "inplace": False})


def with_an_extra_read(logits, targets, weights, **options):
    logits.detach().amax()
    return pdl_cross_entropy(logits, targets, weights, **options)


def with_an_extra_buffer(logits, targets, weights, **options):
    return pdl_cross_entropy(logits * 1, targets, weights, **options)


@pytest.mark.parametrize("operation", [FORWARD, TRAINING], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("loss", [with_a_float32_copy, with_an_extra_buffer])
@pytest.mark.parametrize("backend_name", ["eager", "triton"])
def test_a_copy_is_caught(monkeypatch, backend_name, loss, operation):
    counted = Counted(monkeypatch, CASES[backend_name], operation, backend=backend_name, inplace=False, loss=loss)
    with pytest.raises(AssertionError, match="buffers as large as the logits"):
        assert_buffers(counted)


@pytest.mark.parametrize("operation", [FORWARD, TRAINING], ids=["forward", "forward-backward"])
def test_an_extra_pass_over_the_logits_is_caught(monkeypatch, operation):
    counted = Counted(monkeypatch, CASES["eager"], operation, backend="eager", inplace=False, loss=with_an_extra_read)
    with pytest.raises(AssertionError):
        assert_accesses(counted)


def test_an_extra_pass_in_a_kernel_is_caught(monkeypatch):
    """The row kernel runs twice: every logit is loaded, and every gradient stored, once more than planned."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from pdl_kernels.kernels import launch

    run_once = launch.launch_loss_rows

    def run_twice(*arguments):
        run_once(*arguments)
        run_once(*arguments)

    monkeypatch.setattr(launch, "launch_loss_rows", run_twice)
    for operation in (FORWARD, TRAINING):
        counted = Counted(monkeypatch, CASES["triton"], operation, backend="triton", inplace=False)
        assert_buffers(counted)
        with pytest.raises(AssertionError):
            assert_accesses(counted)
