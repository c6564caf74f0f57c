"""Errors name the argument, what came and what is accepted."""

import pytest
import torch
from helpers import assert_error, make_logits, make_targets

from pdl_kernels import PDLCrossEntropyLoss, pdl_cross_entropy

V = 20


@pytest.fixture
def inputs(device):
    return make_logits(2, 3, V, device=device), make_targets(2, 3, V=V, device=device)


WRONG_OPTIONS = [
    ({"reduction": "avg"}, ValueError, ["reduction", "'avg'", "'mean'", "'token_mean'", "'sum'", "'none'"]),
    ({"reduction": None}, ValueError, ["reduction", "None", "'none'"]),
    ({"backend": "cuda"}, ValueError, ["backend", "'cuda'", "'auto'", "'triton'", "'eager'"]),
    ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", -0.1, "0", "1"]),
    ({"label_smoothing": 1.5}, ValueError, ["label_smoothing", 1.5]),
    ({"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "nan"]),
    ({"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "str"]),
    ({"label_smoothing": False}, TypeError, ["label_smoothing", "bool"]),  # equal to the default, of another type
    ({"ignore_index": -100.0}, TypeError, ["ignore_index", "float"]),
    ({"z_loss": -1.0}, ValueError, ["z_loss", -1.0]),
    ({"z_loss": float("inf")}, ValueError, ["z_loss", "inf"]),
    ({"z_loss": None}, TypeError, ["z_loss", "NoneType"]),
    ({"softcap": 0.0}, ValueError, ["softcap", 0.0, "None"]),
    ({"softcap": -3.0}, ValueError, ["softcap", -3.0]),
    ({"softcap": float("nan")}, ValueError, ["softcap", "nan"]),
    ({"softcap": "30"}, TypeError, ["softcap", "str"]),
    ({"logit_scale": 0.0}, ValueError, ["logit_scale", 0.0]),
    ({"logit_scale": float("inf")}, ValueError, ["logit_scale", "inf"]),
    ({"logit_scale": None}, TypeError, ["logit_scale", "NoneType"]),
    ({"ignore_index": 1.0}, TypeError, ["ignore_index", "float", "integer"]),
    ({"ignore_index": None}, TypeError, ["ignore_index", "NoneType"]),
]


@pytest.mark.parametrize("who", ["function", "module"])
@pytest.mark.parametrize(("option", "error", "words"), WRONG_OPTIONS, ids=[str(o) for o, _, _ in WRONG_OPTIONS])
def test_wrong_options(who, option, error, words, inputs):
    if who == "function":
        assert_error(error, lambda: pdl_cross_entropy(*inputs, **option), *words)
    else:  # at construction, not at the first batch
        assert_error(error, lambda: PDLCrossEntropyLoss(**option), *words)


@pytest.mark.parametrize("name", ["weight", "temperature"])
def test_unknown_names(name, inputs):
    """torch's weight= gets a hint."""
    words = [f"'{name}'", "weights="] if name == "weight" else [f"'{name}'"]
    assert_error(TypeError, lambda: pdl_cross_entropy(*inputs, **{name: torch.ones(V)}), *words)
    assert_error(TypeError, lambda: PDLCrossEntropyLoss(**{name: torch.ones(V)}), *words)


@pytest.mark.parametrize(("torchs", "ours"), [("input", "logits"), ("target", "targets")])
def test_torchs_names_of_the_tensors(torchs, ours, inputs):
    given = dict(zip(("logits", "targets"), inputs, strict=True))
    given[torchs] = given.pop(ours)
    assert_error(TypeError, lambda: pdl_cross_entropy(**given), f"'{ours}'")


@pytest.mark.parametrize(
    ("normalizer", "reduction", "error", "words"),
    [
        (-1.0, "mean", ValueError, ["normalizer", -1.0]),
        (float("nan"), "mean", ValueError, ["normalizer", "nan"]),
        (float("inf"), "mean", ValueError, ["normalizer", "inf"]),
        ("4", "mean", TypeError, ["normalizer", "str"]),
        (torch.ones(2), "mean", ValueError, ["normalizer", "(2,)", "0-d"]),
        (torch.ones(1), "mean", ValueError, ["normalizer", "(1,)", "0-d"]),
        (torch.tensor(1j), "mean", TypeError, ["normalizer", "complex"]),
        (4.0, "sum", ValueError, ["normalizer", "'sum'", "'mean'"]),
        (4.0, "none", ValueError, ["normalizer", "'none'", "'mean'"]),
        (4.0, "token_mean", ValueError, ["normalizer", "'token_mean'", "'mean'"]),
    ],
)
def test_wrong_normalizers(normalizer, reduction, error, words, inputs):
    assert_error(error, lambda: pdl_cross_entropy(*inputs, normalizer=normalizer, reduction=reduction), *words)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn])
def test_wrong_dtype_of_logits(dtype):
    logits = torch.zeros(2, V).to(dtype)
    call = lambda: pdl_cross_entropy(logits, torch.zeros(2, dtype=torch.int64))  # noqa: E731
    assert_error(TypeError, call, "logits", dtype, "float16", "bfloat16", "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_wrong_dtype_of_targets(dtype):
    call = lambda: pdl_cross_entropy(torch.zeros(2, V), torch.zeros(2, dtype=dtype))  # noqa: E731
    assert_error(TypeError, call, "targets", dtype, "int32", "int64")


@pytest.mark.parametrize("name", ["weights", "token_weights"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_wrong_dtype_of_factors(name, dtype, inputs):
    shape = (V,) if name == "weights" else (2, 3)
    factors = torch.ones(shape, dtype=dtype, device=inputs[0].device)
    assert_error(TypeError, lambda: pdl_cross_entropy(*inputs, **{name: factors}), name, dtype, "floating")


@pytest.mark.parametrize("name", ["logits", "targets", "weights", "token_weights"])
def test_what_is_no_tensor(name, inputs):
    given = dict(zip(("logits", "targets"), inputs, strict=True)) | {name: [1.0, 2.0]}
    assert_error(TypeError, lambda: pdl_cross_entropy(**given), name, "list", "Tensor")


def test_logits_without_classes():
    assert_error(ValueError, lambda: pdl_cross_entropy(torch.tensor(1.0), torch.tensor(0)), "logits", "()", "(..., V)")
    empty = torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64)
    assert_error(ValueError, lambda: pdl_cross_entropy(*empty), "logits", "(2, 0)")


def test_shapes_that_do_not_match(inputs):
    logits, targets = inputs
    assert_error(
        ValueError, lambda: pdl_cross_entropy(logits, targets[:1]), "targets", "(1, 3)", "(2, 3, 20)", "(2, 3)"
    )
    assert_error(ValueError, lambda: pdl_cross_entropy(logits, targets.view(-1)), "targets", "(6,)", "(2, 3)")
    u = torch.ones(3, device=logits.device)
    assert_error(
        ValueError, lambda: pdl_cross_entropy(logits, targets, token_weights=u), "token_weights", "(3,)", "(2, 3)"
    )
    table = torch.ones(2, V, device=logits.device)
    assert_error(ValueError, lambda: pdl_cross_entropy(logits, targets, table), "weights", "(2, 20)")


@pytest.mark.lesson("table as long as the tokenizer")
@pytest.mark.parametrize("length", [V - 1, V + 1, 1])
def test_a_weight_table_of_another_length(length, inputs):
    table = torch.ones(length, device=inputs[0].device)
    call = lambda: pdl_cross_entropy(*inputs, table)  # noqa: E731
    assert_error(ValueError, call, "weights", f"({length},)", f"({V},)", "tokenizer")


def test_torchs_layout_gets_a_hint(inputs):
    """torch puts the classes second: (N, C, d) logits and (N, d) targets."""
    logits, targets = inputs
    assert_error(ValueError, lambda: pdl_cross_entropy(logits.transpose(1, 2), targets), "targets", "class", "last")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["targets", "weights", "token_weights"])
def test_tensors_on_another_device(name, inputs):
    given = dict(zip(("logits", "targets"), inputs, strict=True))
    given |= {"weights": torch.ones(V).cuda(), "token_weights": torch.ones(2, 3).cuda()}
    given[name] = given[name].cpu()
    assert_error(ValueError, lambda: pdl_cross_entropy(**given), name, "cpu", "cuda")


def test_a_meta_tensor_is_on_another_device(inputs):
    assert_error(ValueError, lambda: pdl_cross_entropy(inputs[0], inputs[1].to("meta")), "targets", "meta")


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("name", ["logits", "targets"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(layout, name, inputs, backend):
    given = dict(zip(("logits", "targets"), inputs, strict=True))
    given[name] = torch.nested.nested_tensor(list(given[name].unbind()), layout=layout)
    assert_error(TypeError, lambda: pdl_cross_entropy(**given, backend=backend), name, "nested", "values()")


class _Sharded(torch.Tensor):
    """Looks like a DTensor: it has a device mesh."""

    device_mesh = "mesh"


@pytest.mark.lesson("sharded heads")
@pytest.mark.parametrize("name", ["targets", "weights", "token_weights"])
def test_a_dtensor_beside_plain_logits_is_refused_by_name(name, backend, inputs):
    given = {"logits": inputs[0], "targets": inputs[1], "weights": torch.ones(V), "token_weights": torch.ones(2, 3)}
    given[name] = given[name].as_subclass(_Sharded)
    assert_error(TypeError, lambda: pdl_cross_entropy(**given, backend=backend), name, "DTensor", "to_local()")


@pytest.mark.lesson("gather at ignore_index")
@pytest.mark.parametrize("wrong", [V, V + 10**6, -1, -101, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_target_out_of_range(backend, wrong, dtype, inputs, monkeypatch):
    monkeypatch.setenv("PDL_KERNELS_VALIDATE", "1")  # a CPU always checks
    logits, targets = inputs
    targets = targets.to(dtype)
    targets[0, 0] = -100
    targets[1, 2] = wrong
    call = lambda: pdl_cross_entropy(logits, targets, backend=backend)  # noqa: E731
    assert_error(IndexError, call, "targets[1, 2]", wrong, V - 1, "-100")


@pytest.mark.cpu_only(reason="a GPU row with such a target is nan instead")
def test_a_target_out_of_range_counts_even_with_token_weight_zero(backend, inputs):
    """Of 0-d and 1-D targets the position is named in their own shape."""
    single = torch.tensor(V)
    assert_error(IndexError, lambda: pdl_cross_entropy(inputs[0][0, 0], single, backend=backend), "targets", V)
    line = torch.tensor([0, 1, V + 2])
    assert_error(IndexError, lambda: pdl_cross_entropy(inputs[0][0], line, backend=backend), "targets[2]", V + 2)


def test_ignore_index_is_never_out_of_range(backend, inputs):
    logits, targets = inputs
    for ignore_index in (-1, V, 10**12):
        wide = targets.clone()
        wide[0, 1] = ignore_index
        assert pdl_cross_entropy(logits, wide, ignore_index=ignore_index, backend=backend).isfinite()


@pytest.mark.gpu
def test_the_variable_that_asks_for_validation_counts_at_every_call(inputs, monkeypatch):
    logits, targets = inputs
    targets[1, 2] = V
    for value, raises in (("1", True), ("0", False), ("1", True)):
        monkeypatch.setenv("PDL_KERNELS_VALIDATE", value)
        call = lambda: pdl_cross_entropy(logits, targets, backend="triton")  # noqa: E731
        if raises:
            assert_error(IndexError, call, "targets[1, 2]", V)
        else:
            assert call().isnan()
    monkeypatch.delenv("PDL_KERNELS_VALIDATE")
    assert pdl_cross_entropy(logits, targets, backend="triton").isnan()


@pytest.mark.gpu
def test_target_out_of_range_is_nan_on_a_gpu(inputs, monkeypatch):
    monkeypatch.delenv("PDL_KERNELS_VALIDATE", raising=False)
    logits, targets = inputs
    targets[1, 2] = V
    leaf = logits.clone().requires_grad_()
    loss = pdl_cross_entropy(leaf, targets, reduction="none", backend="triton")
    assert loss.isnan().sum().item() == 1
    assert loss[1, 2].isnan()
    loss.sum().backward()
    assert leaf.grad[1, 2].isnan().all()
    assert leaf.grad[0].isfinite().all()


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (torch.distributed.GroupMember.NON_GROUP_MEMBER, ValueError, "does not hold this process"),
        ("tp", TypeError, "group is a str"),
    ],
    ids=["of others", "a name"],
)
def test_what_is_no_group_of_this_process(group, error, words, inputs):
    assert_error(error, lambda: pdl_cross_entropy(*inputs, group=group), "group", words)
