"""The peers' adapters against the reference, so that none is first tried on the one GPU run that counts.

Liger's and FLA's kernels run in Triton's interpreter here; the others need a GPU to be imported.
"""

import importlib.util

import pytest
import torch

from benchmarks import peers
from benchmarks.correctness import check
from benchmarks.inputs import Case, make_inputs
from benchmarks.operations import OPERATIONS, make_run

CASE = Case(16, 307, "float32")
LINEAR_CASE = Case(16, 307, "float32", hidden_size=24)
INTERPRETED = ("liger", "liger linear", "fla", "fla in place")
CPU = torch.device("cpu")


@pytest.fixture
def _floats_as_compiled(monkeypatch):
    """Compiled kernels receive Python floats as float32 scalars; the interpreter passes them on as they are."""
    numpy = pytest.importorskip("numpy")
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def convert_floats_too(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_floats_too)


def checked(name, case=CASE):
    contender = peers.CONTENDERS[name]
    inputs = make_inputs(LINEAR_CASE._replace(dtype=case.dtype) if contender.linear else case, CPU)
    return check(make_run(contender, inputs), list(OPERATIONS.values()))


def assert_right(verdicts):
    assert set(verdicts) == set(OPERATIONS)
    for operation, verdict in verdicts.items():
        assert verdict.problem is None, f"{operation}: {verdict.problem}"


@pytest.mark.usefixtures("_floats_as_compiled")
@pytest.mark.filterwarnings("ignore:Triton is not supported:UserWarning")
@pytest.mark.cpu_only(reason="on a GPU the benchmark suite checks them before it times them")
@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_peers_are_called_right(name):
    pytest.importorskip("liger_kernel" if name.startswith("liger") else "fla")
    assert_right(checked(name))


@pytest.mark.parametrize("name", ["pdl", "pdl in place", "pdl linear", "torch", "torch linear", "torch chunked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_cpu_contenders_are_called_right(name, dtype):
    reason = peers.CONTENDERS[name].problem(CPU)
    if reason:  # an older torch
        pytest.skip(reason)
    assert_right(checked(name, CASE._replace(dtype=dtype)))


def test_torch_compile_is_called_right():
    reason = peers.CONTENDERS["torch.compile"].problem(CPU)
    if reason:
        pytest.skip(reason)
    assert_right(checked("torch.compile"))


def test_every_contender_is_described():
    assert next(iter(peers.CONTENDERS)) == "pdl", "the first one runs twice"
    for name, contender in peers.CONTENDERS.items():
        assert contender.name == name
        assert name.endswith("in place") <= contender.overwrites
        assert contender.problem(CPU) is None or len(contender.problem(CPU)) > 10


def test_absent_peers_are_left_out_with_their_reasons():
    found, reasons = peers.available(CPU, peers.PEERS)
    names = {contender.name for contender in found}
    assert {"pdl", "pdl in place", "torch"} <= names
    assert set(reasons) >= {"liger", "quack", "flash-attention", "fla", "unsloth"}
    gpu = torch.device("cuda")
    if importlib.util.find_spec("flash_attn") is None:
        assert peers.CONTENDERS["flash-attention"].problem(gpu) == "not installed"


def test_what_a_contender_lacks_leaves_the_others_of_its_peer(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    found, reasons = peers.available(CPU, ["torch"])
    assert {contender.name for contender in found if contender.peer == "torch"} == {"torch", "torch linear"}
    assert reasons == {"torch chunked": "F.linear_cross_entropy came with torch 2.13"}
    found, reasons = peers.available(CPU, ["torch"], ["logits"])
    assert {contender.name for contender in found} == {"pdl", "pdl in place", "torch"}
    assert reasons == {}, "what is not measured is not mentioned"
