"""Options are declared once, in options.py. Signatures, keywords, modules, operators and pages agree with it."""

import inspect
import re
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pdl_kernels import (
    PDLCrossEntropyLoss,
    PDLLinearCrossEntropyLoss,
    pdl_cross_entropy,
    pdl_linear_cross_entropy,
)
from pdl_kernels.options import (
    DECLARED,
    CallOptions,
    CrossEntropyKeywords,
    LinearKeywords,
    LinearOptions,
    LossOptions,
)

ROOT = Path(__file__).resolve().parents[2]
# Tensors, or numbers that stand for one: checked against the call's other tensors, and given to each call.
PER_CALL = {"token_weights", "bias", "seed"}
LOSSES = {
    "logits": (pdl_cross_entropy, PDLCrossEntropyLoss, CrossEntropyKeywords, (LossOptions, CallOptions), ()),
    "linear": (
        pdl_linear_cross_entropy,
        PDLLinearCrossEntropyLoss,
        LinearKeywords,
        (LossOptions, LinearOptions, CallOptions),
        ("inplace",),
    ),
}


def declared_for(loss):
    """The options of this loss by name."""
    *_, kinds, without = LOSSES[loss]
    return {one.name: one for kind in kinds for one in DECLARED[kind] if one.name not in without}


def annotation_of(declared):
    """The type as it is declared, without what else is declared."""
    for kind, options in DECLARED.items():
        if declared in options:
            return typing.get_type_hints(kind)[declared.name]
    raise AssertionError(declared)


def keywords_of(function):
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_function_takes_what_is_declared(loss):
    function, options = LOSSES[loss][0], declared_for(loss)
    taken = {name: one for name, one in keywords_of(function).items() if name not in PER_CALL}
    assert set(taken) == set(options)
    hints = typing.get_type_hints(function)
    for name, declared in options.items():
        assert taken[name].default == declared.default, name
        assert type(taken[name].default) is type(declared.default), name
        assert hints[name] == annotation_of(declared), name


@pytest.mark.parametrize("loss", LOSSES)
def test_editors_are_shown_what_is_declared(loss):
    keywords, options = LOSSES[loss][2], declared_for(loss)
    hints = typing.get_type_hints(keywords)
    assert set(hints) == set(options) - {"return_stats"}, "return_stats has overloads of its own"
    for name, hint in hints.items():
        assert hint == annotation_of(options[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_every_overload_takes_the_same(loss):
    function, _, keywords, *_ = LOSSES[loss]
    overloads = typing.get_overloads(function) if hasattr(typing, "get_overloads") else []
    for overload in overloads:
        named = {name for name in keywords_of(overload) if name != "return_stats"}
        assert named == PER_CALL & set(keywords_of(function))
        (rest,) = typing.get_args(typing.get_type_hints(overload)["options"])
        assert rest is keywords


@pytest.mark.parametrize("loss", LOSSES)
def test_a_module_takes_what_its_function_takes(loss):
    function, module, *_ = LOSSES[loss]
    weights, *options = inspect.signature(module).parameters.values()
    assert weights.name == "weights"
    assert weights.default is None
    assert {one.name: one.default for one in options} == {
        name: one.default for name, one in keywords_of(function).items() if name not in PER_CALL
    }
    assert all(name in inspect.getdoc(module) for name in declared_for(loss))


def test_a_module_keeps_its_options_and_refuses_others():
    criterion = PDLCrossEntropyLoss(z_loss=1, normalizer=2.0)
    assert criterion.normalizer == 2.0
    assert set(criterion.options) == set(declared_for("logits")) - {"normalizer"}
    assert criterion.options["z_loss"] == 1
    with pytest.raises(TypeError, match=r"PDLCrossEntropyLoss.* unexpected keyword argument 'chunk_size'"):
        PDLCrossEntropyLoss(chunk_size=3)


@pytest.mark.parametrize("operator", ["cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("direction", ["", "_backward"])
def test_an_operator_takes_what_is_declared(operator, direction):
    schema = getattr(torch.ops.pdl_kernels, operator + direction).default._schema
    kinds = (LossOptions, LinearOptions) if operator.startswith("linear") else (LossOptions,)
    expected = [one.name for kind in kinds for one in DECLARED[kind]]
    names = [argument.name for argument in schema.arguments]
    start = names.index("ignore_index")
    assert names[start : start + len(expected)] == expected
    assert names[start + len(expected)] == "backend"


@pytest.mark.parametrize("loss", LOSSES)
def test_the_docstring_and_the_page_name_every_option(loss):
    docstring = inspect.getdoc(LOSSES[loss][0])
    # The fused loss explains what it has beyond the other one.
    own = set(declared_for("linear")) - set(declared_for("logits")) if loss == "linear" else set(declared_for(loss))
    for name in own:
        assert re.search(rf"^ +{name}[:,]", docstring, re.MULTILINE), name


def shown(value):
    return f'"{value}"' if isinstance(value, str) else repr(value)


def row(declared):
    accepted = declared.option.accepted or "anything that is true or false"
    return f"| `{declared.name}` | `{shown(declared.default)}` | {accepted} | {declared.option.help} |"


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/loss.md", list(declared_for("logits"))),
        ("docs/linear.md", [one.name for one in DECLARED[LinearOptions]]),
    ],
)
def test_the_tables_of_options_are_the_declarations(page, names):
    text = (ROOT / page).read_text()
    found = text.split("<!-- options: begin -->")[1].split("<!-- options: end -->")[0].strip().splitlines()
    options = {**declared_for("logits"), **declared_for("linear")}
    expected = [
        "| option | default | accepted | meaning |",
        "|---|---|---|---|",
        *(row(options[name]) for name in names),
    ]
    assert found == expected, "\n".join(["the table should be", *expected])


def test_declared_types_are_what_a_schema_can_say():
    for kind in (LossOptions, LinearOptions):
        for one in DECLARED[kind]:
            assert Tensor not in typing.get_args(annotation_of(one))
            assert one.schema.endswith(f" {one.name}")
