"""PDLSFTTrainer where data or a trainer were changed since: weights that are lost or misread are an error."""

import pytest
from helpers.trainer_models import relative_error
from helpers.trl_token_weights import of_sequences, sequences, token_rows
from helpers.trl_trainers import (
    V,
    W,
    batches_of,
    logs_of,
    make_trainer,
    of_batches,
    sharp_model,
    train,
    training_marks,
)
from helpers.trl_training import as_dataset, datasets, trl

from pdl_kernels.integrations.trl import PDLSFTTrainer

pytestmark = training_marks
ROWS = token_rows()
U = {"token_weights": "u"}


def without_column(row):
    return {name: value for name, value in row.items() if name != "u"}


PLAIN = [without_column(row) for row in ROWS]


# ---------------------------------------------------------------------------------------------------------------------
# The collator


def test_the_collator_is_replaced_after_construction(tmp_path):
    """The labels keep the weights inside, and none of them is a class."""
    trainer = make_trainer(tmp_path, ROWS, pdl=U)
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss; accepted is "):
        trainer.train()


def test_a_collator_that_drops_the_weights(tmp_path):
    """It splits the labels, and they are right; but the weights are gone."""
    trainer = make_trainer(tmp_path, ROWS, pdl=U)
    own = trainer.data_collator

    def dropping(examples):
        return {name: value for name, value in own(examples).items() if name != "token_weights"}

    trainer.data_collator = dropping
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss"):
        trainer.train()


def test_a_collator_around_the_trainers_own(tmp_path):
    trainer = make_trainer(tmp_path, ROWS, pdl=U, gradient_accumulation_steps=16)
    own, calls = trainer.data_collator, []
    trainer.data_collator = lambda examples: calls.append(len(examples)) or own(examples)
    trainer.train()
    assert sum(calls) == len(ROWS)
    assert trainer.state.global_step == 1


# ---------------------------------------------------------------------------------------------------------------------
# Data that a trainer prepared


FITS = {"whole": {}, "packed": {"max_length": 20, "packing": True}}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
@pytest.mark.parametrize("weights", [W, None], ids=["weights", "none"])
def test_prepared_data_for_a_trainer_without_token_weights(weights, options, tmp_path):
    prepared = make_trainer(tmp_path, ROWS, pdl=U, **options).train_dataset
    words = "the labels of the train data have token weights inside, from a trainer with token_weights"
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, prepared, pdl={"weights": weights})


def test_prepared_data_that_begin_without_targets(tmp_path):
    """Labels with weights inside train nothing that anybody asked for."""
    masked = {"input_ids": [7, 8, 9], "labels": [-100] * 3, "u": [1.0] * 3}
    prepared = make_trainer(tmp_path, [masked] * 100 + ROWS, pdl=U).train_dataset
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        train(tmp_path, prepared, pdl={"weights": None})


def test_prepared_data_to_evaluate_without_token_weights(tmp_path):
    prepared = make_trainer(tmp_path, ROWS, pdl=U).train_dataset
    with pytest.raises(ValueError, match="the labels of the eval data have token weights inside"):
        make_trainer(tmp_path, PLAIN, more={"eval_dataset": prepared})
    trainer = make_trainer(tmp_path, PLAIN)
    with pytest.raises(ValueError, match="have token weights inside"):
        trainer.evaluate(prepared)


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_prepared_data_for_another_trainer_with_token_weights(options, tmp_path):
    """Their weights are those of the first trainer, and count once."""
    prepared = make_trainer(tmp_path, ROWS, pdl=U, **options).train_dataset
    fit = "bfd" if options else "whole"
    trainer, (found,) = train(tmp_path, prepared, pdl=U, gradient_accumulation_steps=16, **options)
    assert len(trainer.train_dataset) == len(prepared)
    assert relative_error(found, of_sequences(sharp_model(), sequences(ROWS, fit))) < 1e-5


def test_data_that_was_not_prepared_may_be_used_again(tmp_path):
    """Preparing it for one trainer leaves it as it was for the next."""
    data = as_dataset(ROWS)
    make_trainer(tmp_path, data, pdl=U)
    trainer, (found,) = train(tmp_path, data.remove_columns("u"))
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Labels that are no classes


@pytest.mark.parametrize("pdl", [{}, U], ids=["weights", "token weights"])
@pytest.mark.parametrize("which", ["all", "one"])
def test_labels_beyond_the_vocabulary(which, pdl, tmp_path):
    """Plain SFTTrainer may train on; with weights there is none for them."""
    rows = [{**row, "labels": list(row["labels"])} for row in (ROWS if pdl else PLAIN)]
    for row in rows if which == "all" else rows[-1:]:
        row["labels"] = [label if label == -100 else label + V for label in row["labels"]]
    trainer = make_trainer(tmp_path, rows, pdl=pdl)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        trainer.train()
    assert not logs_of(trainer)


# ---------------------------------------------------------------------------------------------------------------------
# The number of targets of the whole step


class Uncounted(PDLSFTTrainer):
    """Keeps the number of targets from TRL."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize(("rows", "pdl"), [(PLAIN, {}), (PLAIN, {"weights": None}), (ROWS, U)])
def test_the_number_of_targets_is_missing(rows, pdl, tmp_path):
    with pytest.raises(RuntimeError, match="num_items_in_batch is None, and a step has several micro-batches"):
        train(tmp_path, rows, Uncounted, pdl=pdl, gradient_accumulation_steps=2)


def test_the_number_of_targets_of_one_micro_batch(tmp_path):
    """It is that of the step."""
    trainer, (found,) = train(tmp_path, PLAIN, Uncounted, gradient_accumulation_steps=1, per_device_train_batch_size=8)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_evaluation_needs_no_number_of_targets(tmp_path):
    trainer = make_trainer(tmp_path, PLAIN, Uncounted, more={"eval_dataset": as_dataset(PLAIN)})
    plain = make_trainer(tmp_path, PLAIN, trl.SFTTrainer, more={"eval_dataset": as_dataset(PLAIN)})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation data


EMPTY = {"input_ids": [], "labels": []}


@pytest.mark.parametrize("columns", [EMPTY, EMPTY | {"u": []}], ids=["without the column", "with it"])
def test_empty_evaluation_data(columns, tmp_path):
    """As plain SFTTrainer takes it."""
    empty = datasets.Dataset.from_dict(columns)
    plain = make_trainer(tmp_path, PLAIN, trl.SFTTrainer, more={"eval_dataset": empty})
    trainer = make_trainer(tmp_path, ROWS, pdl=U, more={"eval_dataset": empty})
    assert len(plain.eval_dataset) == len(trainer.eval_dataset) == 0
    trainer.train()
    assert trainer.state.global_step > 0


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("missing", [(0,), (3,), (0, 1, 7), range(8)], ids=["first", "later", "some", "all"])
def test_rows_without_a_weight(missing, name, tmp_path):
    """No weight is made up for them."""
    data = as_dataset([{**row, "u": None} if number in missing else row for number, row in enumerate(ROWS)])
    assert data[missing[0]]["u"] is None
    with pytest.raises(ValueError, match=f"u of a row of {name} hold nan; accepted are finite numbers"):
        make_trainer(tmp_path, data if name == "train" else ROWS, pdl=U, more={"eval_dataset": data})


def evaluated_stream(folder, missing):
    """What becomes of streamed evaluation data of which one row has no such column."""

    def rows():
        for number, row in enumerate(ROWS):
            yield without_column(row) if number == missing else row

    stream = datasets.IterableDataset.from_generator(rows)
    trainer = make_trainer(folder, ROWS, pdl=U, more={"eval_dataset": stream})
    return list(trainer.eval_dataset)


def test_a_later_row_of_a_stream_lacks_the_column(tmp_path):
    with pytest.raises(ValueError, match="u of a row of eval hold nan"):
        evaluated_stream(tmp_path, 3)


def test_the_first_row_of_a_stream_lacks_the_column(tmp_path):
    with pytest.raises(ValueError, match="u of a row of eval"):
        evaluated_stream(tmp_path, 0)
