"""What the fused linear loss refuses, and its module."""

import pytest
import torch
from helpers import make_weights
from helpers.linear import H, V, make_problem, make_token_weights

from pdl_kernels import PDLLinearCrossEntropyLoss, pdl_linear_cross_entropy

N = 6

WRONG = [
    # options
    ({"chunk_size": 0}, ValueError, ["chunk_size is 0", ">= 1"]),
    ({"chunk_size": 2.0}, TypeError, ["chunk_size is a float", "integer"]),
    ({"chunk_size": True}, TypeError, ["chunk_size is a bool"]),
    ({"accumulate_dtype": torch.int32}, TypeError, ["accumulate_dtype is torch.int32", "torch.float32"]),
    ({"accumulate_dtype": "float32"}, TypeError, ["accumulate_dtype is 'float32'"]),
    ({"compact": 1}, TypeError, ["compact is a int", "None"]),
    ({"row_sampling": 1.0}, ValueError, ["row_sampling is 1.0", "< 1"]),
    ({"row_sampling": "0.1"}, TypeError, ["row_sampling is a str"]),
    ({"row_sampling": 0.1, "z_loss": 0.1}, ValueError, ["row_sampling", "z_loss 0.1"]),
    ({"row_sampling": 0.1, "compact": False}, ValueError, ["row_sampling", "compact=None"]),
    ({"reduction": "avg"}, ValueError, ["reduction is 'avg'", "'token_mean'"]),
    ({"backend": "cuda"}, ValueError, ["backend is 'cuda'", "'eager'"]),
    ({"label_smoothing": 1.5}, ValueError, ["label_smoothing is 1.5"]),
    ({"z_loss": -1.0}, ValueError, ["z_loss is -1.0"]),
    ({"softcap": 0.0}, ValueError, ["softcap is 0.0"]),
    ({"logit_scale": 0.0}, ValueError, ["logit_scale is 0.0"]),
    ({"ignore_index": 1.0}, TypeError, ["ignore_index is a float"]),
]


def words_of(case):
    return case[2][0]


def assert_refused(error, words, call):
    with pytest.raises(error) as raised:
        call()
    assert raised.type is error, raised.value
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("who", ["function", "module"])
@pytest.mark.parametrize("case", WRONG, ids=words_of)
def test_wrong_options(who, case, device):
    options, error, words = case
    hidden, weight, _, targets = make_problem(N, device=device)
    if who == "function":
        assert_refused(error, words, lambda: pdl_linear_cross_entropy(hidden, weight, targets, **options))
    else:
        assert_refused(error, words, lambda: PDLLinearCrossEntropyLoss(**options))


@pytest.mark.parametrize(
    "case",
    [
        ({"normalizer": -1.0}, ValueError, ["normalizer is -1.0"]),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, ["normalizer is given with reduction='sum'"]),
        ({"normalizer": torch.ones(2)}, ValueError, ["normalizer has shape (2,)"]),
        ({"seed": "1"}, ValueError, ["seed is '1'"]),
        ({"weight": torch.ones(V)}, TypeError, ["torch's weight= is called weights= here"]),
        ({"inplace": True}, TypeError, ["unexpected keyword argument 'inplace'"]),
    ],
    ids=words_of,
)
def test_wrong_arguments(case, device):
    options, error, words = case
    hidden, weight, _, targets = make_problem(N, device=device)
    assert_refused(error, words, lambda: pdl_linear_cross_entropy(hidden, weight, targets, **options))


SHAPES_AND_DTYPES = [
    ({"hidden": torch.zeros(N, H + 1)}, ValueError, ["hidden has shape (6, 9)", "(37, 8)", "(..., 8)"]),
    ({"hidden": torch.tensor(1.0)}, ValueError, ["hidden has shape ()"]),
    ({"hidden": torch.zeros(N, H, dtype=torch.int64)}, TypeError, ["hidden is torch.int64", "bfloat16"]),
    ({"hidden": [0.0]}, TypeError, ["hidden is a list"]),
    (
        {"lm_head_weight": torch.zeros(H, V)},
        ValueError,
        ["lm_head_weight (8, 37), which is transposed", "(V, H)", "here (V, 8)", "lm_head_weight.T"],
    ),
    ({"lm_head_weight": torch.zeros(V)}, ValueError, ["lm_head_weight has shape (37,)", "(V, H)"]),
    ({"lm_head_weight": torch.zeros(2, V, H)}, ValueError, ["lm_head_weight has shape (2, 37, 8)"]),
    (
        {"lm_head_weight": torch.zeros(V, H, dtype=torch.bfloat16)},
        TypeError,
        ["lm_head_weight is torch.bfloat16 and hidden torch.float32", "autocast"],
    ),
    ({"lm_head_weight": torch.zeros(V, H, dtype=torch.int32)}, TypeError, ["lm_head_weight is torch.int32"]),
    ({"bias": torch.zeros(V + 1)}, ValueError, ["bias has shape (38,)", "(37,)"]),
    ({"bias": torch.zeros(V, 1)}, ValueError, ["bias has shape (37, 1)"]),
    ({"bias": torch.zeros(V).half()}, TypeError, ["bias is torch.float16 and hidden torch.float32"]),
    ({"bias": 0.0}, TypeError, ["bias is a float"]),
    ({"targets": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, ["targets have shape (7,)", "(6,)"]),
    ({"targets": torch.zeros(N)}, TypeError, ["targets are torch.float32", "int64"]),
    ({"targets": None}, TypeError, ["targets is a NoneType"]),
    ({"weights": torch.ones(V + 1)}, ValueError, ["weights have shape (38,)", "longer than the tokenizer"]),
    ({"weights": torch.ones(V, dtype=torch.int64)}, TypeError, ["weights are torch.int64"]),
    ({"token_weights": torch.ones(N, 1)}, ValueError, ["token_weights have shape (6, 1)", "(6,)"]),
    ({"token_weights": torch.ones(N, dtype=torch.bool)}, TypeError, ["token_weights are torch.bool"]),
]


@pytest.mark.parametrize("case", SHAPES_AND_DTYPES, ids=words_of)
def test_shapes_and_dtypes(case):
    change, error, words = case
    hidden, weight, _, targets = make_problem(N)
    arguments = {"hidden": hidden, "lm_head_weight": weight, "targets": targets, **change}
    assert_refused(error, words, lambda: pdl_linear_cross_entropy(**arguments))


@pytest.mark.parametrize("name", ["lm_head_weight", "bias", "targets", "weights", "token_weights"])
def test_devices(name):
    hidden, weight, bias, targets = make_problem(N)
    arguments = {
        "lm_head_weight": weight, "bias": bias, "targets": targets, "weights": torch.ones(V),
        "token_weights": torch.ones(N),
    }  # fmt: skip
    arguments[name] = arguments[name].to("meta")
    assert_refused(ValueError, [name, "on meta", "hidden"], lambda: pdl_linear_cross_entropy(hidden, **arguments))


# ---------------------------------------------------------------------------------------------------------------------
# Parameters that are not there, or not all there


class _Sharded(torch.Tensor):
    """Looks like a DTensor, without a process group."""

    device_mesh = "a mesh"


@pytest.mark.lesson("sharded heads")
@pytest.mark.parametrize(
    ("name", "hint"),
    [("hidden", ".full_tensor()"), ("lm_head_weight", "inside the forward"), ("bias", "group=mesh.get_group()")],
)
def test_a_dtensor_is_refused_by_name(name, hint):
    hidden, weight, bias, targets = make_problem(N)
    arguments = {"hidden": hidden, "lm_head_weight": weight, "bias": bias, "targets": targets}
    arguments[name] = arguments[name].as_subclass(_Sharded)
    assert_refused(TypeError, [f"{name} is a DTensor", hint], lambda: pdl_linear_cross_entropy(**arguments))


def test_a_real_dtensor_is_refused():
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    hidden, weight, _, targets = make_problem(N)
    init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        assert_refused(
            TypeError, ["lm_head_weight is a DTensor", "full_tensor"],
            lambda: pdl_linear_cross_entropy(hidden, sharded, targets),
        )  # fmt: skip
    finally:
        destroy_process_group()


@pytest.mark.lesson("sharded heads")
@pytest.mark.parametrize("name", ["lm_head_weight", "bias"])
@pytest.mark.parametrize("shape", [(0,), (0, H)], ids=["0", "0x8"])
def test_parameters_sharded_away(name, shape):
    hidden, weight, _, targets = make_problem(N)
    arguments = {"hidden": hidden, "lm_head_weight": weight, "targets": targets, name: torch.empty(shape)}
    words = [f"{name} has no elements", "ZeRO", "FSDP", "GatheredParameters"]
    assert_refused(ValueError, words, lambda: pdl_linear_cross_entropy(**arguments))


class _Adapter(torch.nn.Module):
    def __init__(self, attribute):
        super().__init__()
        setattr(self, attribute, torch.nn.Linear(H, V))


@pytest.mark.parametrize("attribute", ["base_layer", "lora_A"])
def test_an_adapter_is_refused_with_what_to_do(attribute):
    hidden, _, _, targets = make_problem(N)
    words = ["lm_head_weight is a _Adapter module", "wrapped by an adapter", "merge", "pdl_cross_entropy"]
    assert_refused(TypeError, words, lambda: pdl_linear_cross_entropy(hidden, _Adapter(attribute), targets))


def test_a_plain_module_is_told_to_pass_its_tensor():
    hidden, weight, _, targets = make_problem(N)
    head = torch.nn.Linear(H, V)
    for arguments, hint in (({"lm_head_weight": head}, "module.weight"), ({"bias": head}, "module.bias")):
        given = {"hidden": hidden, "lm_head_weight": weight, "targets": targets, **arguments}
        assert_refused(TypeError, ["Linear module", hint], lambda given=given: pdl_linear_cross_entropy(**given))


@pytest.mark.lesson("gather at ignore_index")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", [V, -1, 2**40])
def test_a_target_out_of_range(backend, target, weighted, device):
    hidden, weight, _, targets = make_problem(N, device=device)
    targets[4] = target
    weights = torch.ones(V, device=device) if weighted else None
    if device.type == "cpu":
        with pytest.raises(IndexError, match=rf"targets\[4\] is {target}"):
            pdl_linear_cross_entropy(hidden, weight, targets, weights, backend=backend)
    else:
        loss = pdl_linear_cross_entropy(hidden, weight, targets, weights, backend=backend, reduction="none")
        assert loss[4].isnan()
        assert loss[:4].isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# The module


def test_the_module_gives_the_functions_numbers(backend, device):
    hidden, weight, bias, targets = make_problem(N, device=device)
    weights = make_weights("random", V, device)
    u = make_token_weights(N, device)
    criterion = PDLLinearCrossEntropyLoss(weights, reduction="mean", softcap=5.0, chunk_size=4, backend=backend)
    got = criterion(hidden, weight, targets, bias, u, 6.0)
    expected = pdl_linear_cross_entropy(
        hidden, weight, targets, weights,
        bias=bias, token_weights=u, normalizer=6.0, softcap=5.0, chunk_size=4, backend=backend,
    )  # fmt: skip
    assert torch.equal(got, expected)
    fixed = PDLLinearCrossEntropyLoss(weights, normalizer=torch.tensor(6.0), softcap=5.0, backend=backend)
    torch.testing.assert_close(fixed(hidden, weight, targets, bias, u), expected)
    torch.testing.assert_close(fixed(hidden, weight, targets, bias, u, normalizer=3), 2 * expected)


def test_the_module_passes_the_seed(device):
    hidden, weight, _, targets = make_problem(40, device=device)
    weight.requires_grad_()
    weights = torch.logspace(-3, 0, V, device=device)
    criterion = PDLLinearCrossEntropyLoss(weights, row_sampling=0.2)
    gradients = [torch.autograd.grad(criterion(hidden, weight, targets, seed=s), weight)[0] for s in (1, 1, 2)]
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


@pytest.mark.lesson("weights rounded with the model")
def test_the_modules_weights_stay_float32_and_out_of_checkpoints(device):
    table = torch.tensor([1.0, 1 / 3, 1e-7])
    criterion = PDLLinearCrossEntropyLoss(table.double(), reduction="sum")
    table.fill_(0)
    assert criterion.state_dict() == {}
    for move in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.to(device)):
        move(criterion)
        assert criterion.weights.dtype == torch.float32
        assert criterion.weights[1].item() == torch.tensor(1 / 3).item()
    assert criterion.weights.device.type == device.type
    shown = repr(criterion)
    assert shown.startswith("PDLLinearCrossEntropyLoss(weights=(3,)")
    for name in ("reduction='sum'", "chunk_size=None", "row_sampling=0.0", "accumulate_dtype=torch.float32"):
        assert name in shown
