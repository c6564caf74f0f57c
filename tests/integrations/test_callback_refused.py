"""PDLCallback before the first step: arguments, models, tokenizers, counts and schedules that do not fit the loss."""

import contextlib
import warnings

import pytest
import torch
from helpers.trainer_callbacks import EAGER, ROWS, begin, plain_compute_loss, watched
from helpers.trainer_models import V, make_model, transformers
from helpers.trainer_runs import W, by_compute_loss, by_linear_loss, by_loss_function, each_route

from pdl_kernels import PowerLawWeighting, TokenCounts, WeightSchedule
from pdl_kernels.integrations.transformers import PDLCallback, pdl_loss_function
from pdl_kernels.weights.saved import save_weights

pytestmark = pytest.mark.usefixtures("quick")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": V}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def refuses(folder, route, words, **options):
    """Training stops before its first step."""
    trainer, _, gradients = watched(folder, route, **options)
    with pytest.raises(ValueError, match=words):
        trainer.train()
    assert not gradients


def trains(folder, route, **options):
    settings = {"max_steps": 2} | options.pop("settings", {})
    trainer, _, gradients = watched(folder, route, settings=settings, **options)
    trainer.train()
    assert len(gradients) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and models


def test_what_it_is_made_of():
    with pytest.raises(TypeError, match="loss is a function; accepted is what pdl_loss_function"):
        PDLCallback(plain_compute_loss)
    assert PDLCallback(pdl_loss_function(W, **EAGER)).table.equal(W)


@each_route
@pytest.mark.parametrize("accumulate", [1, 2])
def test_another_ignore_index(accumulate, route, tmp_path):
    refuses(
        tmp_path,
        route,
        "ignore_index is 0, and the Trainer counts as targets what is not -100; accepted is -100",
        options={"ignore_index": 0},
        settings={"gradient_accumulation_steps": accumulate},
    )


@each_route
def test_label_smoothing_of_the_trainer(route, tmp_path):
    words = "label_smoothing_factor is 0.1 in the training arguments"
    refuses(tmp_path, route, words, settings={"label_smoothing_factor": 0.1})
    trains(tmp_path, route, options={"label_smoothing": 0.1})


def test_several_gpus_in_one_process():
    """nn.DataParallel would run the first replica's layers in all of them."""
    loss, _ = by_linear_loss(make_model("llama"))
    with pytest.raises(ValueError, match=r"several GPUs are visible to one process.*one process per GPU"):
        begin(loss, n_gpu=2)
    begin(loss, n_gpu=1)


def test_a_loss_function_may_be_copied_to_several_gpus():
    loss, _ = by_loss_function(make_model("llama"))
    begin(loss, n_gpu=2)


def test_an_encoder_decoder_with_a_causal_loss_function(tmp_path):
    words = "the model is an encoder-decoder, and the loss shifts labels as for a causal model"
    refuses(tmp_path, by_loss_function, words, model=make_model("t5"))


def masked_model(name):
    config = getattr(transformers, f"{name}Config")(**SMALL | SPECIAL)
    return getattr(transformers, f"{name}ForMaskedLM")(config).train()


@pytest.mark.parametrize("route", [by_loss_function, by_compute_loss])
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_a_model_of_masked_tokens_with_a_causal_hook(name, route, tmp_path):
    words = f"{name}ForMaskedLM predicts masked tokens, whose labels are not shifted as a causal model's are"
    refuses(tmp_path, route, words, model=masked_model(name))


def test_a_model_of_masked_tokens_with_hooks_for_it(tmp_path):
    trains(tmp_path, by_loss_function, model=masked_model("ModernBert"), options={"encoder_decoder": True})
    trains(tmp_path, by_linear_loss, model=masked_model("ModernBert"))
    trains(tmp_path, by_linear_loss, model=masked_model("Bert"))


@pytest.mark.parametrize("route", [by_loss_function, by_compute_loss])
@pytest.mark.parametrize("width", [V - 1, V + 1])
def test_a_model_with_another_number_of_classes(width, route, tmp_path):
    words = rf"weights have shape \({width},\) and the model has {V} classes"
    refuses(tmp_path, route, words, weights=torch.ones(width))


def test_a_schedule_of_other_weights():
    loss = pdl_loss_function(W, **EAGER)
    words = "schedule is given for a loss with other weights; accepted is one of the loss's own table"
    for refused in (loss, pdl_loss_function(None, **EAGER)):
        with pytest.raises(ValueError, match=words):
            PDLCallback(refused, schedule=WeightSchedule(torch.ones(V + 1), steps=5))
    PDLCallback(loss, schedule=WeightSchedule(W, steps=5))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers and counts


class Tokenizer:
    """As much of one as the Trainer and the callback look at."""

    def __init__(self, name, length=V):
        self.name_or_path, self.length = name, length

    def __len__(self):
        return self.length


def counts_of(name, vocab_size=V, rows=ROWS):
    counts = TokenCounts(vocab_size=vocab_size, tokenizer=name)
    return counts.update([row["labels"] for row in rows], shift=True)


@contextlib.contextmanager
def warned():
    """The texts of the warnings of this package so far."""
    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(one.message) for one in caught if "/pdl_kernels/" in one.filename or "counts" in str(one.message)]


@each_route
def test_a_tokenizer_with_more_entries_than_weights(route, tmp_path):
    words = f"the tokenizer has {V + 1} entries and there are {V} weights"
    refuses(tmp_path, route, words, processing_class=Tokenizer("org/own", V + 1))
    trains(tmp_path, route, processing_class=Tokenizer("org/own", V))
    trains(tmp_path, route, processing_class=Tokenizer("org/own", V - 9))
    trains(tmp_path, route, processing_class=Tokenizer("org/own", V + 1), weights=None)


OTHER = "the counts are of the tokenizer 'org/other', and training uses 'org/own'"


@each_route
def test_counts_of_another_tokenizer(route, tmp_path):
    own = Tokenizer("org/own")
    with warned() as texts:
        trains(tmp_path, route, processing_class=own, pdl={"counts": counts_of("org/other")})
    assert [OTHER in text for text in texts] == [True]


@pytest.mark.parametrize("name", ["org/own", "copies/own", "", None])
def test_counts_of_the_same_tokenizer_or_of_one_without_a_name(name, tmp_path):
    with warned() as texts:
        trains(tmp_path, by_loss_function, processing_class=Tokenizer("org/own"), pdl={"counts": counts_of(name)})
    assert not texts


@pytest.mark.parametrize(("name", "expected"), [("org/other", [True]), ("org/own", [])])
def test_weights_of_a_file_know_their_tokenizer(name, expected, tmp_path):
    counts = counts_of(name)
    weighting = PowerLawWeighting()
    save_weights(tmp_path / "weights.safetensors", weighting.table(counts), weighting, counts)
    with warned() as texts:
        trains(
            tmp_path,
            by_loss_function,
            weights=tmp_path / "weights.safetensors",
            processing_class=Tokenizer("org/own"),
        )
    assert [OTHER in text for text in texts] == expected


def test_counts_with_more_classes_than_weights():
    with pytest.raises(ValueError, match=f"counts are of {V + 1} classes and the weights of {V}"):
        PDLCallback(pdl_loss_function(W, **EAGER), counts=counts_of(None, V + 1))
    PDLCallback(pdl_loss_function(W, **EAGER), counts=counts_of(None, V))


@each_route
def test_targets_that_were_never_counted(route, tmp_path):
    """One warning for the run, of more than a tenth of them."""
    seen, settings = counts_of(None, rows=ROWS[:2]), {"max_steps": 10}
    with warned() as texts:
        trainer, *_ = watched(tmp_path, route, pdl={"counts": seen}, settings=settings)
        trainer.train()
    assert len(texts) == 1
    assert "of the targets are of types that the counts do not hold" in texts[0]


def test_counts_with_fewer_classes_than_weights(tmp_path):
    """The classes beyond them were not counted, which is no error where the data have none of them."""
    rows = [{"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7]}] * 8
    with warned() as texts:
        trains(tmp_path, by_loss_function, rows=rows, pdl={"counts": counts_of(None, 8, rows)})
    assert not texts
