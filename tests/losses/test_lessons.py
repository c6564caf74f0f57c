"""Every fault seen in a comparable project has a test here that would have caught it.

The list is this package's reading of what went wrong elsewhere. A test names the lesson it guards with
`@pytest.mark.lesson("short name")`; this file fails for a lesson without a test, and for a name that is no lesson.
"""

import ast
import functools
import itertools
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, make_logits, make_targets, make_weights, run, run_reference, run_torch
from torch.utils.flop_counter import FlopCounterMode

from pdl_kernels import pdl_cross_entropy

TESTS = Path(__file__).resolve().parents[1]

LESSONS = {
    # wrong numbers, silently
    "rows scaled by the first upstream gradient": "per-row losses need a per-row upstream gradient; a zero in front "
    "must not wipe out the rest",
    "upstream gradient with stride 0": "loss.sum() sends an expanded scalar, slices send strides",
    "gradient written over shared logits": "others may still read the logits; writing over them must be asked for, and "
    "autograd must notice",
    "second backward scales again": "the gradient handed to the user may not be scaled or returned a second time",
    "target column rounded before p - 1": "p_y - 1 from a rounded p_y has no correct digit when p_y is near 1",
    "losses kept in a half dtype": "a sum of half-precision row losses stalls or overflows",
    "normalizer counted in a half dtype": "half dtypes hold no integers beyond a few thousand",
    "transposed logits": "a last stride of 1 does not make rows follow one another",
    "misaligned targets": "labels[:, 1:] starts on no 16-byte boundary",
    "padding turned into -softcap": "lanes beyond the vocabulary must be masked after the cap, not before",
    "chunking changes the result": "how rows are split over programs must not show in the numbers",
    "losses of a split batch differ from the whole": "a mean that is some factor too large passes a smoke test",
    "gradient accumulation guesses the denominator": "one explicit denominator, instead of layers that each guess",
    "32-bit offsets": "row * stride passes 2**31 at 32768 rows of 65536",
    "python numbers become compile-time types": "another number must neither recompile nor turn into float64",
    "fused path switched off in silence": "the backend asked for runs, or an error says why it does not",
    "import without Triton": "machines without it import the package and use the eager backend",
    "tests that compare a value with itself": "the yardstick is float64 torch and never the code under test; broken "
    "results must fail the criterion",
    "weights over fourteen orders of magnitude": "weights drawn from [0.1, 1.1] hide everything",
    # nan, inf, crashes
    "all tokens ignored": "0 / 0 in the loss is inf in the gradient",
    "leading block of -inf": "-inf - -inf while the running maximum is still -inf",
    "0 * -inf": "a factor of 0 must win over an infinite term",
    "running maximum that starts at 0": "rows wholly below 0 are ordinary rows",
    "lse - z_y cancels": "under a large common offset both are rounded to the offset's spacing",
    "gather at ignore_index": "-100 is no address",
    "launch on the current device": "kernels run where the tensors are",
    "table as long as the tokenizer": "output layers are padded; the lengths must be compared",
    "sharded heads": "a DTensor is refused by name",
    "masks of -1e9 and -1e30": "finite masks are as common as -inf, and their lanes must not poison the row",
    "ignored rows are read": "padding positions may hold nan",
    "weights rounded with the model": "model.half() must not round the weights",
    # slow or heavy
    "synchronisation on the hot path": "no .item(), no CUDA graph breaks",
    "two roundings of the gradient": "an upstream gradient other than 1 is the rule under loss scaling; the gradient "
    "is rounded once, after it",
    "memory of the size of the logits": "one buffer out of place, none in place",
    "whole weight table read for every row": "without smoothing only w[y] is needed",
    "dispatch through the library in eager mode": "an operator costs tens of microseconds; only compilers need it",
    "too many threads a program": "32 warps of 64 lanes do not exist",
    "options recompile": "another batch size compiles nothing",
    "gradients computed under no_grad": "no gradient buffer where nobody needs one",
}


@functools.lru_cache(maxsize=1)
def _marked_tests():
    """[(lesson, test, needs a GPU)], read from the sources, so that nothing has to be imported or run."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.lesson":
                    name = ast.literal_eval(decorator.args[0])
                    found.append((name, f"{path.name}::{node.name}", "pytest.mark.gpu" in decorators))
    return found


def test_every_lesson_has_a_test():
    found = _marked_tests()
    named = {name for name, _, _ in found}
    untested = sorted(set(LESSONS) - named)
    unknown = sorted({(name, test) for name, test, _ in found if name not in LESSONS})
    assert not untested, f"lessons without a test: {untested}"
    assert not unknown, f"markers that are no lesson of the list: {unknown}"


def test_few_lessons_rest_on_tests_that_need_a_gpu():
    """Where there is no GPU they are skipped, and a skipped test guards nothing."""
    anywhere = {name for name, _, needs_gpu in _marked_tests() if not needs_gpu}
    only_on_gpu = {"32-bit offsets", "launch on the current device", "synchronisation on the hot path"}
    assert set(LESSONS) - anywhere <= only_on_gpu


# ---------------------------------------------------------------------------------------------------------------------
# Lessons that have their test here


@pytest.mark.lesson("tests that compare a value with itself")
@pytest.mark.parametrize(
    "fault", ["none", "loss off by 1e-5", "one element", "a row of zeros", "nan", "rounded twice", "half a row factor"]
)
def test_the_criterion_can_fail(fault, monkeypatch, device):
    """The helper that most tests rely on rejects results that are slightly wrong."""
    import helpers

    logits = make_logits(4, 30, dtype=torch.float16, device=device)
    targets = make_targets(4, V=30, device=device)
    weights = make_weights("power_law", 30, device)
    right = run("eager", logits, targets, weights)

    def faulty(*args, **kwargs):
        loss, gradient = right.loss.clone(), right.gradient.clone()
        heaviest = int(gradient.abs().amax(-1).argmax())
        if fault == "loss off by 1e-5":
            loss *= 1 + 1e-5
        elif fault == "one element":
            gradient.view(-1)[int(gradient.abs().argmax())] *= 1.002
        elif fault == "a row of zeros":
            gradient[heaviest] = 0
        elif fault == "nan":
            gradient[0, 0] = torch.nan
        elif fault == "rounded twice":
            gradient = gradient.bfloat16().half()
        elif fault == "half a row factor":
            gradient[heaviest] *= 0.5
        return helpers.Result(loss, gradient, None)

    monkeypatch.setattr(helpers, "run", faulty)
    if fault == "none":
        helpers.check_against_reference("eager", logits, targets, weights)
    else:
        with pytest.raises(AssertionError):
            helpers.check_against_reference("eager", logits, targets, weights)


@pytest.mark.lesson("tests that compare a value with itself")
def test_the_yardsticks_do_not_import_the_package():
    tree = ast.parse((TESTS.parent / "reference" / "pdl.py").read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"typing", "torch"}


@pytest.mark.lesson("whole weight table read for every row")
def test_only_the_targets_weights_are_read(backend, device):
    """Without smoothing the weights of classes that are nobody's target cannot matter: here they are nan."""
    V = 40
    logits = make_logits(3, V, device=device)
    targets = torch.tensor([5, 9, 9], device=device)
    weights = make_weights("random", V, device) + 0.1
    expected = run(backend, logits, targets, weights, return_stats=True)
    poisoned = torch.full_like(weights, torch.nan)
    poisoned[[5, 9]] = weights[[5, 9]]
    got = run(backend, logits, targets, poisoned, return_stats=True)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.gradient, expected.gradient)
    assert got.stats.weight_sum.isfinite()


@pytest.mark.lesson("python numbers become compile-time types")
@pytest.mark.parametrize("options", [{"z_loss": 1}, {"softcap": 4}, {"logit_scale": 2}, {"label_smoothing": 1}])
def test_integers_and_floats_are_the_same_options(backend, options, device):
    logits, targets = make_logits(3, 40, device=device), make_targets(3, V=40, device=device)
    (name, value) = next(iter(options.items()))
    whole = run(backend, logits, targets, **options)
    real = run(backend, logits, targets, **{name: float(value)})
    assert torch.equal(whole.loss, real.loss)
    assert torch.equal(whole.gradient, real.gradient)
    assert whole.loss.dtype == torch.float32
    expected = run_reference(logits, targets, **options)
    torch.testing.assert_close(whole.loss.cpu().double(), expected.loss, rtol=1e-6, atol=0)


@pytest.mark.lesson("dispatch through the library in eager mode")
def test_eager_mode_calls_no_operator_of_ours(backend, device):
    logits, targets = make_logits(2, 40, device=device), make_targets(2, V=40, device=device)

    def operators():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(backend, logits, targets, upstream=3.0)
        return {event.name for event in profile.events()}

    assert "aten::empty" in operators()
    assert not [name for name in operators() if "pdl_kernels" in name]
    # What would be seen: a mode makes a call an operator.
    with FlopCounterMode(display=False):
        assert {"pdl_kernels::cross_entropy", "pdl_kernels::cross_entropy_backward"} <= operators()


@pytest.mark.lesson("too many threads a program")
@pytest.mark.parametrize("warp_size", [32, 64])
def test_a_program_has_at_most_1024_threads(warp_size):
    launch = pytest.importorskip("pdl_kernels.kernels.launch")
    sizes = itertools.product((1, 300, 100_000), (1, 1000, 32_000, 262_144), (2, 4), (False, True))
    for rows, vocab_size, itemsize, two_passes in sizes:
        plan = launch.plan_rows(rows, vocab_size, itemsize, 132, two_passes=two_passes, warp_size=warp_size)
        assert 1 <= plan.warps * warp_size <= 1024, (rows, vocab_size, itemsize, two_passes, plan)


@pytest.mark.needs_driver(reason="torch.compile asks for the current stream")
@pytest.mark.lesson("options recompile")
def test_torch_compile_takes_other_sizes_and_other_numbers(device):
    """Through the operators, one graph, no break; dynamic sizes compile once."""
    frames = 0

    def count(graph, _):
        nonlocal frames
        frames += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def loss(logits, targets, weights):
        return pdl_cross_entropy(logits, targets, weights, label_smoothing=0.1, backend="eager")

    weights = make_weights("random", 40, device)
    for rows in (3, 5, 8):
        logits = make_logits(rows, 40, device=device).requires_grad_()
        targets = make_targets(rows, V=40, device=device)
        got = loss(logits, targets, weights)
        torchs = run_torch(logits, targets, weights, label_smoothing=0.1)
        torch.testing.assert_close(got.detach(), torchs.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(got, logits)[0], torchs.gradient, rtol=1e-5, atol=1e-7)
    assert frames == 1


@pytest.mark.gpu
@pytest.mark.lesson("options recompile")
def test_another_batch_size_compiles_no_kernel():
    from pdl_kernels.kernels import row_kernels as kernels

    assert not INTERPRETED
    names = [name for name in dir(kernels) if name.endswith("_kernel")]

    def compiled():
        return sum(len(entry[0]) for name in names for entry in getattr(kernels, name).device_caches.values())

    run("triton", make_logits(300, 64, device="cuda"), make_targets(300, V=64, device="cuda"))
    before = compiled()
    for rows in (301, 320, 1000):
        run("triton", make_logits(rows, 64, device="cuda"), make_targets(rows, V=64, device="cuda"), upstream=1.0)
    assert compiled() == before > 0
