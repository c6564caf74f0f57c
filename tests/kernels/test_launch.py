"""The launch planner and the alignment rules: pure functions of sizes and strides."""

import inspect

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from pdl_kernels.eager import cross_entropy as eager
from pdl_kernels.kernels import launch, planner
from pdl_kernels.ops.rows import as_rows, empty_gradient
from pdl_kernels.options import LossInputs, LossOptions, RowOutputs

SMS = 132


@pytest.mark.parametrize(
    ("vocab_size", "itemsize", "warps"),
    [
        (1, 2, 1),
        (1000, 2, 1),
        (2048, 2, 2),
        (20000, 2, 8),
        (32000, 2, 16),
        (32000, 4, 32),
        (50257, 2, 16),
        (128256, 2, 32),
    ],
)
def test_two_passes_keep_few_rows_in_flight(vocab_size, itemsize, warps):
    plan = planner.plan_rows(4096, vocab_size, itemsize, SMS, two_passes=True)
    assert (plan.warps, plan.lanes, plan.slices) == (warps, warps * 32, 1)
    rows_in_flight = SMS * max(1, 32 // plan.warps)
    if vocab_size <= 151936:
        assert rows_in_flight * vocab_size * itemsize < 48e6


def test_forward_alone_needs_no_second_read():
    assert planner.plan_rows(4096, 128256, 2, SMS, two_passes=False).warps == 8


def test_large_programs_name_their_registers():
    assert planner.plan_rows(4096, 128256, 2, SMS, two_passes=True).registers == 64
    assert planner.plan_rows(4096, 128256, 2, SMS, two_passes=True, smoothing=True).registers == 128
    assert planner.plan_rows(4096, 128256, 2, SMS, two_passes=False).registers is None
    assert planner.row_compile_options(planner.plan_rows(4096, 128256, 2, SMS, two_passes=True), False) == {
        "num_warps": 32,
        "enable_fp_fusion": True,
    }


@pytest.mark.parametrize(("softcap", "fused"), [(None, True), (30.0, False)])
def test_the_product_of_a_capped_logit_is_not_fused_with_what_follows(monkeypatch, softcap, fused):
    """Fused, exp(z - z) is not 1: on an H100 the gradient was off by 6e-6 at V = 262144, float32."""
    logits = torch.empty(1, 8, 8192, device="meta")
    options = LossOptions(softcap=softcap)
    device = planner.Device(SMS, 32, True, (9, 0))
    given = []

    class Hearing:
        def __getitem__(self, grid):
            return lambda *arguments, **compile_options: given.append(compile_options["enable_fp_fusion"])

    for kernel in ("loss_rows_kernel", "slice_rows_kernel", "merge_rows_kernel", "gradient_rows_kernel"):
        monkeypatch.setattr(launch.kernels, kernel, Hearing())
    inputs = LossInputs(logits, logits.new_empty(8, dtype=torch.int64), None, None)
    outputs = RowOutputs(logits.new_empty(8), logits.new_empty(2, 8), None)
    for rows in (planner.MANY_ROWS, 1):  # whole rows; slices
        shape = planner.plan_rows(rows, 8192, 4, SMS, two_passes=True)
        plan = launch.make_plan(logits, options, logits, planner.layout_of(logits, logits), shape, device)
        launch.launch_loss_rows(plan, inputs, logits.new_empty(7), logits, outputs)
    assert given == [fused] * 4


def test_both_backends_offer_the_same_functions():
    for name in ("forward", "backward", "scale", "denominators", "loss_rows", "reduce_rows"):
        ours, eagers = (inspect.signature(getattr(module, name)) for module in (launch, eager))
        assert list(ours.parameters) == list(eagers.parameters), name


def test_a_load_per_column_takes_half_the_threads():
    """64 registers a thread, as with 1024 threads, would spill: benchmarks.roofline shows it."""
    plan = planner.plan_rows(4096, 128256, 2, SMS, two_passes=True, vectors=False)
    assert (plan.lanes, plan.unroll, plan.registers) == (512, 4, 128)


def test_vectors_need_aligned_logits_and_an_aligned_gradient():
    storage = torch.empty(4 * 128 + 1, dtype=torch.bfloat16)
    aligned, offset = storage[:-1].view(1, 4, 128), storage[1:].view(1, 4, 128)
    odd = torch.empty(1, 4, 129, dtype=torch.bfloat16)
    assert planner.layout_of(aligned, None).vectors
    assert planner.layout_of(aligned, aligned).vectors
    assert planner.layout_of(odd, odd).vectors
    assert not planner.layout_of(offset, None).vectors
    assert not planner.layout_of(aligned, offset).vectors
    assert not planner.layout_of(aligned.transpose(1, 2), None).vectors


def test_programs_stay_within_the_device():
    for warp_size in (32, 64):
        for smoothing in (False, True):
            plan = planner.plan_rows(4096, 262144, 4, SMS, two_passes=True, smoothing=smoothing, warp_size=warp_size)
            assert plan.lanes == plan.warps * warp_size <= (512 if smoothing else 1024)


@pytest.mark.parametrize("rows", [1, 2, 7, 100, 263, 264, 10000])
@pytest.mark.parametrize("vocab_size", [1, 127, 32000, 131077, 262144])
def test_slices_cover_every_column(rows, vocab_size):
    plan = planner.plan_rows(rows, vocab_size, 2, SMS, two_passes=False)
    tile = plan.lanes * plan.unroll * 8
    assert plan.slices * plan.slice_tiles * tile >= vocab_size
    assert (plan.slices - 1) * plan.slice_tiles * tile < vocab_size, "an empty slice"
    assert plan.slices <= planner.MAX_SLICES
    if rows >= 2 * SMS:
        assert plan.slices == 1
    if rows == 1 and vocab_size == 262144:
        assert plan.slices >= 16


def test_smoothing_is_not_sliced():
    assert planner.plan_rows(1, 262144, 2, SMS, two_passes=True, smoothing=True).slices == 1


def variant(logits, gradient=None):
    plan = planner.plan_rows(4096, logits.shape[-1], logits.element_size(), SMS, two_passes=True)
    layout = planner.layout_of(logits, gradient)
    return planner.make_variant(logits.shape[-1], logits.element_size(), LossOptions(), layout, plan)


def test_layouts():
    def rows(*shape):
        return as_rows(torch.empty(*shape, dtype=torch.bfloat16))

    aligned = rows(4, 128)
    assert variant(aligned, empty_gradient(aligned))[6:10] == ("aligned", "aligned", True, False)
    odd = rows(4, 129)
    assert variant(odd, empty_gradient(odd))[6:10] == ("head", "head", True, True)
    assert variant(odd, torch.empty(1, 4, 136, dtype=torch.bfloat16)[..., :129])[6:8] == ("head", "any")
    padded = rows(4, 136)[..., :129]
    assert variant(padded, empty_gradient(padded))[6:10] == ("aligned", "aligned", True, True)
    sliced = as_rows(torch.empty(2, 5, 129, dtype=torch.bfloat16)[:, :-1])
    assert variant(sliced, empty_gradient(sliced))[6:10] == ("head", "head", True, True)
    offset = as_rows(torch.empty(4 * 128 + 1, dtype=torch.bfloat16)[1:].view(4, 128))
    assert variant(offset, empty_gradient(offset))[6:9] == ("any", "any", True)
    columns = as_rows(torch.empty(128, 4, dtype=torch.bfloat16).t())
    assert variant(columns, empty_gradient(columns))[6:9] == ("any", "any", False)


def test_as_rows_is_a_view_where_two_dimensions_suffice():
    for logits, shape in (
        (torch.empty(5), (1, 1, 5)),
        (torch.empty(3, 5), (1, 3, 5)),
        (torch.empty(2, 3, 5), (1, 6, 5)),
        (torch.empty(2, 4, 5)[:, :-1], (2, 3, 5)),
        (torch.empty(4, 2, 5).transpose(0, 1), (2, 4, 5)),
        (torch.empty(2, 3, 4, 5), (1, 24, 5)),
        (torch.empty(2, 1, 3, 5).expand(2, 7, 3, 5), None),
        (torch.empty(0, 3, 5), (1, 0, 5)),
    ):
        rows = as_rows(logits)
        if shape is not None:
            assert rows.shape == shape
            assert rows.data_ptr() == logits.data_ptr()
        torch.testing.assert_close(rows.reshape(logits.shape), logits, equal_nan=True, rtol=0, atol=0)


def test_gradient_memory():
    logits = torch.empty(2, 9, 8)[:, :-1]
    assert empty_gradient(as_rows(logits)).stride() == as_rows(logits).stride()
    wasteful = torch.empty(4, 80)[:, :8]
    assert empty_gradient(as_rows(wasteful)).is_contiguous()
    assert empty_gradient(as_rows(torch.empty(1, 8).expand(4, 8))).is_contiguous()
