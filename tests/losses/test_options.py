"""Options are declared once, in options.py. Signatures, keywords, modules, operators and pages agree with it."""

import inspect
import math
import re
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from typing_extensions import get_overloads

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
    overloads = get_overloads(function)
    assert len(overloads) == 3
    for overload in overloads:
        named = {name for name in keywords_of(overload) if name != "return_stats"}
        assert named == PER_CALL & set(keywords_of(function))
        (rest,) = typing.get_args(typing.get_type_hints(overload)["options"])
        assert rest is keywords


OTHER_VALUES = {
    "ignore_index": 3, "reduction": "mean", "label_smoothing": 0.25, "z_loss": 0.0, "softcap": 5.0, "logit_scale": 0.5,
    "return_stats": True, "normalizer": 7.0, "expected_upstream": 2.0, "inplace": True, "backend": "eager",
    "chunk_size": 4, "accumulate_dtype": torch.float64, "compact": True, "row_sampling": 0.5,
    "group": None, "sequence_parallel": True,
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_a_module_takes_what_its_function_takes(loss):
    _, module, *_ = LOSSES[loss]
    given = {name: OTHER_VALUES[name] for name in declared_for(loss)}
    criterion = module(torch.ones(3), **given)
    assert {**criterion.options, "normalizer": criterion.normalizer} == given
    names = list(inspect.signature(module).parameters)
    assert names[0] == "weights"
    assert set(names[1:]) == set(given)
    arguments = inspect.getdoc(module).split("Args:")[1].split("`forward(")[0]
    assert set(re.findall(r"\w+", arguments)) >= set(given)


def test_a_module_shows_itself():
    assert repr(PDLCrossEntropyLoss(torch.ones(3), softcap=30.0)) == (
        "PDLCrossEntropyLoss(weights=(3,), ignore_index=-100, reduction='mean', label_smoothing=0.0, z_loss=0.0, "
        "softcap=30.0, logit_scale=1.0, return_stats=False, backend='auto', expected_upstream=1.0, inplace=False, "
        "group=None)"
    )
    assert repr(PDLLinearCrossEntropyLoss()) == (
        "PDLLinearCrossEntropyLoss(weights=None, ignore_index=-100, reduction='mean', label_smoothing=0.0, z_loss=0.0, "
        "softcap=None, logit_scale=1.0, return_stats=False, backend='auto', expected_upstream=1.0, chunk_size=None, "
        "accumulate_dtype=torch.float32, compact=None, row_sampling=0.0, sequence_parallel=False, group=None)"
    )


def test_type_checkers_see_what_a_module_takes(tmp_path):
    api = pytest.importorskip("mypy.api", reason="the extra dev is not installed")
    program = tmp_path / "program.py"
    program.write_text(
        "from pdl_kernels import PDLCrossEntropyLoss, PDLLinearCrossEntropyLoss\n"
        "PDLCrossEntropyLoss(z_loss=1e-4, return_stats=True)\n"
        "PDLCrossEntropyLoss(z_loss='a')\n"
        "PDLLinearCrossEntropyLoss(None, 2)\n"
        "PDLCrossEntropyLoss(chunk_size=3)\n"
    )
    output, _, _ = api.run(["--config-file", str(ROOT / "pyproject.toml"), str(program)])
    lines = [int(line) for line in re.findall(r"program\.py:(\d+): error", output)]
    assert sorted(set(lines)) == [3, 4, 5], output


def test_a_module_keeps_its_options_and_refuses_others():
    criterion = PDLCrossEntropyLoss(z_loss=1, normalizer=2.0)
    assert criterion.normalizer == 2.0
    assert set(criterion.options) == set(declared_for("logits")) - {"normalizer"}
    assert criterion.options["z_loss"] == 1
    with pytest.raises(TypeError, match=r"PDLCrossEntropyLoss.* unexpected keyword argument 'chunk_size'"):
        PDLCrossEntropyLoss(chunk_size=3)


LOSS_SCHEMA = (
    "SymInt ignore_index, str reduction, float label_smoothing, float z_loss, float? softcap, float logit_scale, "
    "bool return_stats, "
)
LINEAR_SCHEMA = (
    "SymInt? chunk_size, ScalarType accumulate_dtype, bool? compact, float row_sampling, bool sequence_parallel, "
)


@pytest.mark.parametrize("operator", ["cross_entropy", "sharded_cross_entropy", "linear_cross_entropy"])
@pytest.mark.parametrize("direction", ["", "_backward"])
def test_an_operator_takes_what_is_declared(operator, direction):
    schema = str(getattr(torch.ops.pdl_kernels, operator + direction).default._schema)
    expected = LOSS_SCHEMA + (LINEAR_SCHEMA if operator.startswith("linear") else "") + "str backend"
    assert f", {expected}" in schema


@pytest.mark.parametrize("loss", LOSSES)
def test_the_docstring_names_every_option(loss):
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "name", ["label_smoothing", "z_loss", "softcap", "logit_scale", "normalizer", "expected_upstream"]
)
def test_numbers_of_numpy_are_numbers(name, kind):
    """Their own comparison would round the bounds to their dtype: 5e-324 to 0, the largest float to inf."""
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    expected = pdl_cross_entropy(logits, targets, **{name: 0.5})
    assert torch.equal(pdl_cross_entropy(logits, targets, **{name: kind(0.5)}), expected)
    refused = [math.inf, math.nan, -1.0, *([0.0] if name in ("softcap", "logit_scale", "expected_upstream") else [])]
    for value in refused:
        if name == "expected_upstream" and value == -1:
            continue
        with pytest.raises(ValueError, match=f"{name} is "):
            pdl_cross_entropy(logits, targets, **{name: kind(value)})


@pytest.mark.parametrize("bound", [0, 1])
def test_bounds_are_open_or_closed_as_declared(bound):
    logits, targets = torch.randn(3, 5), torch.tensor([0, 1, 2])
    pdl_cross_entropy(logits, targets, label_smoothing=bound)
    hidden, head = torch.randn(3, 4), torch.randn(5, 4)
    if bound == 1:
        with pytest.raises(ValueError, match="row_sampling is 1"):
            pdl_linear_cross_entropy(hidden, head, targets, row_sampling=bound)
    else:
        pdl_linear_cross_entropy(hidden, head, targets, row_sampling=bound)
    for beside in (-1e-300, 1 + 2**-52):
        with pytest.raises(ValueError, match="label_smoothing is"):
            pdl_cross_entropy(logits, targets, label_smoothing=beside)
    for ignored in (-(2**63), 2**63 - 1):
        pdl_cross_entropy(logits, targets, ignore_index=ignored)
    for outside in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match="ignore_index is"):
            pdl_cross_entropy(logits, targets, ignore_index=outside)
