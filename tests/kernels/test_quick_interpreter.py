"""The quicker interpreter of these tests computes what Triton's own does, and leaves the language as it was."""

import pytest
import torch
from helpers import make_logits, make_targets, make_weights, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

replace = interpreter._patch_builtin
pytestmark = pytest.mark.cpu_only(reason="kernels are compiled there")
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 4.0}


@pytest.fixture
def quick():
    if not hasattr(interpreter._patch_lang, "plain"):
        pytest.skip("this Triton's interpreter is left as it is")
    return interpreter._patch_lang


@triton.jit
def refuse(x):
    tl.static_assert(False, "never")
    return x


@triton.jit
def refusing_kernel(x):
    tl.store(x, refuse(tl.load(x)))


@pytest.mark.parametrize(
    ("kernel", "options"), [("two passes", EVERYTHING), ("slices", EVERYTHING), ("single pass", {"z_loss": 0.1})]
)
def test_it_computes_the_same_bits(quick, kernel, options, monkeypatch, force_kernel):
    force_kernel(kernel)
    problem = make_logits(3, 300), make_targets(3, V=300, ignored=(1,)), make_weights("random", 300)
    quickly = run("triton", *problem, upstream=3.0, return_stats=True, **options)
    monkeypatch.setattr(interpreter, "_patch_lang", quick.plain)
    plainly = run("triton", *problem, upstream=3.0, return_stats=True, **options)
    assert torch.equal(quickly.loss, plainly.loss)
    assert torch.equal(quickly.gradient, plainly.gradient)
    assert all(torch.equal(a, b) for a, b in zip(quickly.stats, plainly.stats, strict=True))


def test_each_module_is_prepared_once_a_launch(quick, monkeypatch):
    asked, replaced = [], []
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: asked.append(function) or quick(function))
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *package: replaced.append(package) or replace(*package))
    run("triton", make_logits(4, 40), make_targets(4, V=40))
    assert len(asked) > 100
    assert len(replaced) < len(asked) / 2


def test_the_language_is_restored_after_a_launch_that_fails(quick):
    assert tl.core.is_builtin(tl.load)
    with pytest.raises(interpreter.InterpreterError, match="never"):
        refusing_kernel[(2,)](torch.zeros(2))
    assert tl.core.is_builtin(tl.load)
    assert not quick.prepared
