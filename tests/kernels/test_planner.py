"""Which kernel is launched, by sizes, device and Triton version; and what happens where it cannot be compiled."""

import warnings

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from helpers import check_against_reference, make_logits, make_targets, make_weights, run

from pdl_kernels import pdl_cross_entropy
from pdl_kernels.kernels import launch, planner, single_pass
from pdl_kernels.kernels.planner import SINGLE_PASS, SLICES, TWO_PASSES, Device
from pdl_kernels.options import LossInputs, LossOptions

H200 = Device(132, 32, True, (9, 0))
B200 = Device(148, 32, True, (10, 0))
A100 = Device(108, 32, True, (8, 0))
H100 = Device(132, 32, True, (9, 0), 50 * 2**20)  # as torch describes it; the others' caches are not known here
MI300X = Device(304, 64, False)
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)


def kernels(*arguments, **options):
    return [plan.kernel for plan in planner.plan_loss(*arguments, **options)]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_are_held_where_clusters_compile(vocab_size, itemsize):
    for device in (H200, B200):
        assert kernels(4096, vocab_size, itemsize, device, (3, 9), clusters=True) == [SINGLE_PASS, TWO_PASSES]
    assert kernels(4096, vocab_size, itemsize, MI300X, (3, 9), clusters=True) == [TWO_PASSES]


@pytest.mark.parametrize(
    ("device", "triton_version"), [(H200, (3, 6)), (H200, (3, 7)), (B200, (3, 8)), (A100, (3, 6)), (A100, (3, 9))]
)
def test_without_clusters_what_one_program_holds_is_held(device, triton_version):
    assert kernels(4096, 32000, 2, device, triton_version) == [SINGLE_PASS, TWO_PASSES]
    assert planner.plan_held_row(32000, 2, device, triton_version).ctas == 1
    assert kernels(4096, 16384, 4, device, triton_version) == [SINGLE_PASS, TWO_PASSES]
    for vocab_size in VOCABULARIES[1:]:
        assert kernels(4096, vocab_size, 2, device, triton_version) == [TWO_PASSES]


@pytest.mark.parametrize("triton_version", [(3, 6), (3, 9)])
def test_a_second_read_that_is_near_is_as_good_as_a_held_row(triton_version):
    """As measured on an H100: rows in flight of 17, 27, 34, 40 and 69 MB, of a second-level cache of 52 MB."""
    chosen = {size: kernels(4096, size, 2, H100, (3, 9))[0] for size in VOCABULARIES}
    assert chosen == {
        32000: TWO_PASSES,
        50257: TWO_PASSES,
        128256: TWO_PASSES,
        151936: SINGLE_PASS,
        262144: SINGLE_PASS,
    }
    assert kernels(4096, 50257, 4, H100, triton_version)[0] == TWO_PASSES
    assert kernels(4096, 16384, 2, H100, triton_version)[0] == SINGLE_PASS, "shorter rows were not measured"
    assert kernels(4096, 128256, 4, H100, (3, 9))[0] == SINGLE_PASS
    for device in (B200, B200._replace(cache_bytes=126 * 2**20)):  # nothing is known of others
        assert kernels(4096, 128256, 2, device, (3, 9), clusters=True)[0] == SINGLE_PASS


def test_hopper_holds_a_row_in_as_few_blocks_as_fit():
    assert planner.plan_held_row(32000, 2, H100, (3, 9)) == planner.plan_held_row(32000, 2, H100, (3, 6))
    assert planner.plan_held_row(32000, 2, B200, (3, 9), clusters=True).ctas == 2


def test_newer_tritons_are_like_the_newest_known():
    assert planner.plan_held_row(128256, 2, H200, (4, 0)) == planner.plan_held_row(128256, 2, H200, (3, 9))


@pytest.mark.parametrize("options", [{"smoothing": True}, {"transform": True}, {"vectors": False}])
def test_what_does_not_fit_beside_a_held_row_is_read_twice(options):
    assert kernels(4096, 128256, 2, H200, (3, 9), **options) == [TWO_PASSES]


def test_short_rows_are_read_twice():
    assert kernels(4096, 1000, 2, H200, (3, 9)) == [TWO_PASSES]
    assert planner.plan_held_row(8191, 2, H200, (3, 9)) is None
    assert planner.plan_held_row(8192, 2, H200, (3, 9)).ctas == 1


def test_rows_that_fill_the_device_as_clusters_are_held_and_fewer_are_sliced():
    assert kernels(16, 128256, 2, H200, (3, 9)) == [SLICES]
    assert kernels(65, 128256, 2, H200, (3, 9)) == [SLICES]
    assert kernels(66, 128256, 2, H200, (3, 9)) == [SINGLE_PASS, SLICES]
    assert kernels(264, 128256, 2, H200, (3, 9)) == [SINGLE_PASS, TWO_PASSES]


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("vocab_size", [8192, 8197, 25600, 32000, 50257, 65537, 128256, 151936, 200019, 262143, 262144])
def test_a_held_row_fits(vocab_size, itemsize, head):
    plan = planner.plan_held_row(vocab_size, itemsize, H200, (3, 9), head=head)
    vector = 16 // itemsize
    size = plan.lanes * vector
    assert plan.lanes == plan.ctas * plan.warps * 32
    assert plan.ctas in (1, 2, 4, 8)
    assert (plan.chunks - 1) * size < vocab_size <= plan.chunks * size
    # Full chunks are loaded without a mask: they must lie inside the shortest interior, whatever the row's head is.
    for start in range(vector if head else 1):
        columns = (vocab_size - start) // vector * vector
        assert plan.full_chunks * size <= columns
    assert plan.chunks - plan.full_chunks <= 2
    assert plan.registers <= 255
    assert plan.registers % 8 == 0


def test_rows_that_fit_no_cluster_are_read_twice():
    assert planner.plan_held_row(8 * 128 * 256 + 1, 2, H200, (3, 9)) is None
    assert planner.plan_held_row(8 * 256 * 128 + 1, 4, H200, (3, 9)) is None


def test_registers_grow_with_what_is_asked():
    more = planner.plan_held_row(151936, 2, H200, (3, 9)).registers + planner.EXTRA_REGISTERS
    assert planner.plan_held_row(151936, 2, H200, (3, 9), stats=True).registers == more
    assert planner.plan_held_row(151936, 2, H200, (3, 9), stats=True, z_loss=True).registers == more
    assert planner.plan_held_row(151936, 2, B200, (3, 9), clusters=True).registers == more


@pytest.mark.parametrize("device", [A100, H100])
def test_z_loss_in_one_block_takes_more_registers(device):
    plain = planner.plan_held_row(32000, 2, device, (3, 9))
    assert plain.ctas == 1
    assert planner.plan_held_row(32000, 2, device, (3, 9), stats=True) == plain
    more = plain.registers + planner.EXTRA_IN_ONE_BLOCK
    assert planner.plan_held_row(32000, 2, device, (3, 9), z_loss=True).registers == more


def test_many_columns_take_more_registers_on_sm_100():
    more = planner.plan_held_row(50257, 2, H200, (3, 9)).registers + planner.EXTRA_FOR_MANY_COLUMNS
    assert planner.plan_held_row(50257, 2, B200, (3, 9), clusters=True).registers == more
    assert planner.plan_held_row(50257, 2, B200, (3, 9), clusters=True, stats=True).registers == more


def test_compile_options_of_a_cluster():
    plan = planner.plan_held_row(151936, 2, H200, (3, 9))
    assert planner.row_compile_options(plan, True) == {
        "num_warps": 4,
        "num_ctas": 8,
        "maxnreg": 96,
        "enable_fp_fusion": True,
    }


# ---------------------------------------------------------------------------------------------------------------------
# A Triton that cannot compile the plan


def make_inputs():
    return torch.randn(4, 300, requires_grad=True), torch.randint(300, (4,)), torch.rand(300)


stubbed_plans = pytest.mark.cpu_only(reason="plans are stubbed for the interpreter")


@pytest.fixture
def _held_plans(monkeypatch):
    """Plans as on a device with clusters, in the interpreter."""
    held = planner.held_row(300, 4, warps=4, ctas=1, registers=None, head=False)
    two_passes = planner.plan_rows(planner.MANY_ROWS, 300, 4, 8, two_passes=True)
    monkeypatch.setattr(launch, "_refused", set())
    with launch.planned_by(lambda *_, **__: [held, two_passes]):
        yield


class Failing:
    def __init__(self, error):
        self.error = error
        self.launches = 0

    def __getitem__(self, grid):
        def run(*arguments, **options):
            self.launches += 1
            raise self.error

        return run


@stubbed_plans
@pytest.mark.usefixtures("_held_plans")
@pytest.mark.parametrize(
    "error", [RuntimeError("PassManager::run failed"), launch.TritonError("out of resource: registers")], ids=type
)
def test_the_next_choice_is_taken_with_one_warning(monkeypatch, error):
    failing = Failing(error)
    monkeypatch.setattr(launch, "single_pass_rows_kernel", failing)
    logits, targets, weights = make_inputs()
    expected = pdl_cross_entropy(logits, targets, weights, backend="eager")
    with pytest.warns(UserWarning, match=f"cannot compile the single-pass kernel .{error}"):
        got = pdl_cross_entropy(logits, targets, weights, backend="triton")
    torch.testing.assert_close(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = pdl_cross_entropy(logits, targets, weights, backend="triton")
    assert torch.equal(again, got)
    assert failing.launches == 1, "a plan that failed is not tried again"
    torch.testing.assert_close(torch.autograd.grad(got, logits), torch.autograd.grad(expected, logits))


@stubbed_plans
@pytest.mark.usefixtures("_held_plans")
def test_other_errors_are_not_taken_for_the_compilers(monkeypatch):
    monkeypatch.setattr(launch, "single_pass_rows_kernel", Failing(RuntimeError("CUDA error: an illegal access")))
    logits, targets, weights = make_inputs()
    with pytest.raises(RuntimeError, match="illegal access"):
        pdl_cross_entropy(logits, targets, weights, backend="triton")


# ---------------------------------------------------------------------------------------------------------------------
# One kernel alone


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="only is 'fastest'; accepted are single pass, two passes, slices"):
        kernels(4096, 128256, 2, H200, (3, 9), only="fastest")


def test_one_kernel_alone_is_shaped_as_the_planner_shapes_it():
    for itemsize in (2, 4):
        (held,) = planner.plan_loss(2, 300, itemsize, MI300X._replace(warp_size=32), (3, 6), only=SINGLE_PASS)
        assert held.warps == planner.plan_held_row(8192, itemsize, B200, (3, 9)).warps
    (clusters,) = planner.plan_loss(2, 3000, 2, A100, (3, 6), only=SINGLE_PASS, warps=8, ctas=4)
    assert (clusters.kernel, clusters.warps, clusters.ctas, clusters.lanes) == (SINGLE_PASS, 8, 4, 1024)
    assert kernels(2, 32000, 2, H200, (3, 9), only=TWO_PASSES) == [TWO_PASSES]
    assert kernels(2, 32000, 2, H200, (3, 9), only=SLICES) == [SLICES]
    assert kernels(4096, 32000, 2, H200, (3, 9), only=SLICES) == [SLICES]
    for serves_not in ({"smoothing": True}, {"transform": True}, {"vectors": False}, {"gradient": False}):
        assert SINGLE_PASS not in kernels(4096, 32000, 2, H200, (3, 9), only=SINGLE_PASS, **serves_not)


class Counting:
    """A kernel, or a function of one, whose launches and calls are counted."""

    def __init__(self, real):
        self.real, self.count = real, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.real[grid]

    def __call__(self, *arguments, **keywords):
        self.count += 1
        return self.real(*arguments, **keywords)


@pytest.mark.cpu_only(reason="launches are counted in the interpreter")
@pytest.mark.parametrize("kernel", [SINGLE_PASS, TWO_PASSES])
def test_forced_kernels_are_launched(monkeypatch, force_kernel, kernel):
    held, twice = Counting(launch.single_pass_rows_kernel), Counting(launch.kernels.loss_rows_kernel)
    monkeypatch.setattr(launch, "single_pass_rows_kernel", held)
    monkeypatch.setattr(launch.kernels, "loss_rows_kernel", twice)
    force_kernel(kernel)
    logits, targets, weights = make_inputs()
    pdl_cross_entropy(logits, targets, weights, backend="triton")
    assert (held.count, twice.count) == {SINGLE_PASS: (1, 0), TWO_PASSES: (0, 1)}[kernel]


@pytest.mark.cpu_only(reason="calls are counted in the interpreter")
@pytest.mark.parametrize(("shape", "merges"), [({}, 3), ({"warps": 8}, 7), ({"warps": 4, "ctas": 8}, 31)], ids=str)
def test_a_held_row_is_merged_over_its_warps(monkeypatch, force_kernel, shape, merges):
    """The heart of the kernel: one (max, sum) of two warps from those of each, a row's over all of its warps."""
    counted = Counting(single_pass.merge.fn)
    monkeypatch.setattr(single_pass.merge, "fn", counted)
    force_kernel(SINGLE_PASS, **shape)
    logits, targets, weights = make_inputs()
    got = pdl_cross_entropy(logits, targets, weights, backend="triton")
    assert counted.count == merges * len(targets)
    torch.testing.assert_close(got, pdl_cross_entropy(logits, targets, weights, backend="eager"))


@pytest.mark.cpu_only(reason="which clusters a GPU and its Triton take is the planner's to know")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [{"warps": 8}, {"warps": 4, "ctas": 2}, {"warps": 4, "ctas": 8}], ids=str)
@pytest.mark.parametrize("vocab_size", [5, 1100, 1103])
@pytest.mark.parametrize("inplace", [False, True])
def test_more_warps_and_blocks(force_kernel, dtype, shape, vocab_size, inplace):
    force_kernel(SINGLE_PASS, **shape)
    logits = make_logits(4, vocab_size, dtype=dtype)
    targets = make_targets(4, V=vocab_size, ignored=(2,))
    weights = make_weights("power_law", vocab_size)
    check_against_reference("triton", logits, targets, weights, upstream=0.3)
    check_against_reference("triton", logits, targets, weights, z_loss=1e-3, return_stats=True)
    if inplace:
        out_of_place = run("triton", logits, targets, weights).gradient
        leaf = logits.clone().requires_grad_()
        pdl_cross_entropy(leaf * 1, targets, weights, inplace=True, backend="triton").backward()
        assert torch.equal(leaf.grad, out_of_place)


# ---------------------------------------------------------------------------------------------------------------------
# Clusters of more than one block


def test_clusters_are_chosen_by_themselves_only_where_a_run_has_shown_them_right():
    """On an H100, with Triton 3.9: benchmarks/results/nvidia-h100-80gb-hbm3/doctor-kit.json."""
    assert planner.plan_held_row(262144, 2, H100, (3, 9)).ctas == 8
    assert planner.plan_held_row(262144, 2, B200, (3, 9)) is None
    assert planner.plan_held_row(32000, 2, B200, (3, 9)).ctas == 1
    assert planner.plan_held_row(32000, 2, B200, (3, 9), z_loss=True) == planner.plan_held_row(32000, 2, B200, (3, 9))
    assert planner.plan_held_row(262144, 2, B200._replace(capability=(12, 0)), (3, 9)) is None


def test_clusters_can_be_asked_for_and_refused():
    assert planner.plan_held_row(262144, 2, B200, (3, 9), clusters=True).ctas == 8
    assert planner.plan_held_row(262144, 2, H100, (3, 9), clusters=False) is None
    for cannot in ((A100, (3, 9)), (B200, (3, 8)), (H100, (3, 6))):
        assert planner.plan_held_row(262144, 2, *cannot, clusters=True) is None


@pytest.mark.parametrize(("value", "wanted"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_the_setting(monkeypatch, value, wanted):
    if value is None:
        monkeypatch.delenv("PDL_KERNELS_CLUSTERS", raising=False)
    else:
        monkeypatch.setenv("PDL_KERNELS_CLUSTERS", value)
    assert launch.clusters_wanted() is wanted
    monkeypatch.setattr(launch, "device_of", lambda device: B200)
    monkeypatch.setattr(launch, "TRITON_VERSION", (3, 9))
    logits = torch.empty(1, 4096, 262144, dtype=torch.bfloat16, device="meta")
    inputs = LossInputs(logits, logits.new_empty(4096, dtype=torch.int64), None, None)
    best, *_ = launch.loss_plans(inputs, LossOptions(), logits)
    assert best.launch.ctas == (8 if wanted else 1)
    assert best.compile_options.get("num_ctas", 1) == best.launch.ctas


@pytest.mark.usefixtures("on_the_device")
def test_another_value_of_the_setting_is_refused(monkeypatch):
    monkeypatch.setenv("PDL_KERNELS_CLUSTERS", "yes")
    with pytest.raises(ValueError, match="PDL_KERNELS_CLUSTERS is 'yes'; accepted are 0, 1, or not set"):
        pdl_cross_entropy(*make_inputs(), backend="triton")
