"""PDLSFTTrainer with token weights: gradients of rows and chats that were cut and packed by hand."""

import pytest
import torch
import torch.nn.functional as F
from helpers.chat_tokenizers import make_chat_tokenizer
from helpers.trainer_models import relative_error
from helpers.trl_token_weights import (
    FITS,
    MANY,
    TURNS,
    assert_trains_on,
    by_hand,
    of_sequences,
    sequences,
    stream,
    token_rows,
)
from helpers.trl_trainers import (
    ASSISTANT,
    IGNORED,
    TEXTS,
    W,
    batches_of,
    logs_of,
    lora,
    make_trainer,
    of_batches,
    train,
    training_marks,
)
from helpers.trl_training import WEATHER, WRITTEN, as_dataset, template, trl

pytestmark = training_marks


@pytest.mark.parametrize(
    ("kind", "fit"), [*(("tokens", fit) for fit in FITS), ("examples", "whole"), ("examples", "bfd_split")]
)
def test_a_column_of_weights(kind, fit, tmp_path):
    rows = token_rows(kind)
    assert_trains_on(rows, tmp_path, sequences(rows, fit), **FITS[fit])


def test_masks_in_the_place_of_labels(tmp_path):
    rows = token_rows()
    expected = sequences(rows)
    for row in rows:
        row["completion_mask"] = [int(label != IGNORED) for label in row.pop("labels")]
    assert_trains_on(rows, tmp_path, expected, completion_only_loss=True)


def test_labels_of_32_bits(tmp_path):
    """As many data sets on disk hold them."""
    import datasets

    rows = token_rows()
    integers = datasets.List(datasets.Value("int32"))
    features = {"input_ids": integers, "labels": integers, "u": datasets.List(datasets.Value("float32"))}
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    assert_trains_on(data, tmp_path, sequences(rows))


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_a_data_set_with_a_format(form, tmp_path):
    rows = token_rows()
    assert_trains_on(as_dataset(rows).with_format(form), tmp_path, sequences(rows))


def test_another_column_of_the_same_file(tmp_path):
    """What `datasets` has cached of one is not taken for the other."""
    import datasets

    rows = [row | {"v": [1.0 - u for u in row["u"]]} for row in token_rows()]
    as_dataset(rows).to_parquet(tmp_path / "rows.parquet")
    files = {"data_files": str(tmp_path / "rows.parquet"), "cache_dir": str(tmp_path / "cache"), "split": "train"}
    for column in ("u", "v", "u"):
        expected = sequences([row | {"u": row[column]} for row in rows])
        assert_trains_on(datasets.load_dataset("parquet", **files), tmp_path, expected, column)


def test_the_logs_of_token_weights(tmp_path):
    """Over the targets whose weight is not 0."""
    trainer = assert_trains_on(token_rows(), tmp_path, sequences(token_rows()))
    nll, factors = [], []
    for ids, labels, u in sequences(token_rows()):
        found = F.cross_entropy(
            trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
        )
        for one, label, factor in zip(found.tolist(), labels[1:], u[1:], strict=True):
            if label != IGNORED and factor != 0:
                nll.append(one)
                factors.append(W[label].item() * abs(factor))
    (log,) = logs_of(trainer)
    assert log["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert log["mean_weight"] == pytest.approx(sum(factors) / len(factors), rel=1e-5)


@pytest.mark.parametrize("fit", FITS)
def test_the_data_are_those_of_sft(fit, tmp_path):
    """In the same order, cut and packed in the same way."""
    rows = token_rows()
    ours = make_trainer(tmp_path, rows, pdl={"token_weights": "u"}, **FITS[fit])
    plain = make_trainer(tmp_path, rows, trl.SFTTrainer, **FITS[fit])
    assert len(ours.train_dataset) == len(plain.train_dataset)
    for row, other in zip(ours.train_dataset, plain.train_dataset, strict=True):
        assert row["input_ids"] == other["input_ids"]
        assert row.get("seq_lengths") == other.get("seq_lengths")
        found, expected = ours.data_collator([row]), plain.data_collator([other])
        assert found.keys() - expected.keys() == {"token_weights"}
        assert torch.equal(found["labels"], expected["labels"])


@pytest.mark.parametrize("assistant_only", [True, False])
def test_weights_of_messages(assistant_only, tmp_path):
    expected = [by_hand(chat, assistant_only) for chat in TURNS]
    rows = [{"messages": chat} for chat in TURNS]
    assert_trains_on(rows, tmp_path, expected, "messages", assistant_only_loss=assistant_only)


@pytest.mark.parametrize("fit", ["keep_start", "keep_end", "bfd", "wrapped"])
def test_weights_of_messages_that_are_cut(fit, tmp_path):
    rows = [dict(zip(("input_ids", "labels", "u"), by_hand(chat), strict=True)) for chat in TURNS]
    expected = [row for row in sequences(rows, fit) if set(row[1]) != {IGNORED}]
    chats = [{"messages": chat} for chat in TURNS]
    assert_trains_on(chats, tmp_path, expected, "messages", **ASSISTANT | FITS[fit])


def test_weights_of_messages_of_completions(tmp_path):
    rows = [{"prompt": chat[:-1], "completion": chat[-1:]} for chat in TURNS[1:]]
    rows[1]["prompt"] = [message | {"weight": None} for message in rows[1]["prompt"]]
    whole = [row["prompt"] + row["completion"] for row in rows]
    expected = []
    for row, chat in zip(rows, whole, strict=True):
        ids, _, factors = by_hand([{k: v for k, v in message.items() if v is not None} for message in chat], False)
        begin = len(make_chat_tokenizer().apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        expected.append((ids, [IGNORED] * begin + ids[begin:], factors))
    assert_trains_on(rows, tmp_path, expected, "messages")


def test_weights_of_messages_with_from_and_value(tmp_path):
    """TRL turns them into role and content, and leaves their weight."""
    rows = [
        {"conversations": [{"from": m["role"], "value": m["content"], "weight": m.get("weight")} for m in chat]}
        for chat in TURNS
    ]
    assert_trains_on(rows, tmp_path, [by_hand(chat, False) for chat in TURNS], "messages")


def test_weights_of_messages_by_a_template_that_trl_marks(tmp_path):
    """Qwen's: its own template marks nothing, TRL's training template does."""
    rows = [{"messages": chat} for chat in TURNS]
    more = {"processing_class": make_chat_tokenizer("qwen", template("qwen2_5"))}
    trainer, (found,) = train(tmp_path, rows, pdl={"token_weights": "messages"}, more=more, **ASSISTANT)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5
    batch = trainer.data_collator([trainer.train_dataset[0]])
    said = batch["labels"].ne(IGNORED)
    assert set(batch["token_weights"][said].tolist()) == {-2.0, 0.25}


def test_a_number_beside_text(tmp_path):
    rows = [row | {"score": (-1) ** number * number / 2} for number, row in enumerate(WRITTEN)]
    trainer, (found,) = train(tmp_path, rows, pdl={"token_weights": "score"})
    labelled = make_trainer(tmp_path, rows, trl.SFTTrainer).train_dataset
    expected = [
        (row["input_ids"], row["labels"], [source["score"]] * len(row["labels"]))
        for row, source in zip(labelled, rows, strict=True)
    ]
    assert relative_error(found, of_sequences(trainer.model, expected)) < 1e-5


def test_a_formatting_function(tmp_path):
    rows = [{"said": row["text"], "u": 1.0 - number} for number, row in enumerate(TEXTS)]
    more = {"formatting_func": lambda row: row["said"]}
    trainer, (found,) = train(tmp_path, rows, pdl={"token_weights": "u"}, more=more)
    texts = [{"text": row["said"], "u": row["u"]} for row in rows]
    _, (expected,) = train(tmp_path, texts, pdl={"token_weights": "u"})
    assert relative_error(found, expected) < 1e-6
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_without_a_table_token_weights_are_all_there_is(tmp_path):
    rows = token_rows()
    trainer, (found,) = train(tmp_path, rows, pdl={"token_weights": "u", "weights": None}, **MANY)
    assert relative_error(found, of_sequences(trainer.model, sequences(rows), None)) < 1e-5


def test_lora_with_token_weights(tmp_path):
    rows = token_rows()
    trainer, (found,) = train(tmp_path, rows, pdl={"token_weights": "u"}, more={"peft_config": lora()}, **MANY)
    assert relative_error(found, of_sequences(trainer.model, sequences(rows))) < 1e-5


def test_evaluation_data_without_the_column(tmp_path):
    rows = token_rows()
    more = {"eval_dataset": as_dataset([{name: row[name] for name in ("input_ids", "labels")} for row in rows])}
    pdl = {"token_weights": "u", "weighted_evaluation": True}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more=more, per_device_eval_batch_size=8)
    found = trainer.evaluate()["eval_loss"]
    batch = trainer.data_collator([trainer.eval_dataset[row] for row in range(len(rows))])
    assert batch["token_weights"].eq(batch["labels"].ne(IGNORED)).all(), "every factor is 1"
    assert found == pytest.approx(of_batches(trainer, [batch])[0], rel=1e-5)


def test_several_data_sets_to_evaluate(tmp_path):
    rows = token_rows()
    pdl = {"token_weights": "u", "weighted_evaluation": True}
    more = {"eval_dataset": {"all": as_dataset(rows), "half": as_dataset(rows[:4])}}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more=more, per_device_eval_batch_size=8)
    found = trainer.evaluate()
    for name, number in (("all", 8), ("half", 4)):
        data = trainer.eval_dataset[name]
        expected, _ = of_batches(trainer, [trainer.data_collator([data[row] for row in range(number)])])
        assert found[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-5)


FORMS = {"one": lambda data: data, "by name": lambda data: {"a": data, "b": data}}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("kind", "fit"), [("tokens", "keep_end"), ("tokens", "bfd"), ("messages", "keep_end")])
def test_data_given_to_evaluate(form, kind, fit, tmp_path):
    """It is prepared when it is given, and for several data sets it passes TRL's preparation twice."""
    rows = [{"messages": chat} for chat in TURNS] if kind == "messages" else token_rows(kind)
    column = "messages" if kind == "messages" else "u"
    pdl = {"token_weights": column, "weighted_evaluation": True}
    data = form(as_dataset(rows))
    options = {"per_device_eval_batch_size": 16} | FITS[fit] | (ASSISTANT if kind == "messages" else {})
    trainer = make_trainer(tmp_path, rows, pdl=pdl, **options)
    prepared = trainer.train_dataset
    expected, _ = of_batches(trainer, [trainer.data_collator([prepared[row] for row in range(len(prepared))])])
    found = trainer.evaluate(data)
    losses = [value for name, value in found.items() if name.endswith("loss")]
    assert losses == pytest.approx([expected] * len(losses), rel=1e-5)
    assert losses


@pytest.mark.parametrize("fit", ["whole", "keep_end", "bfd"])
def test_data_that_was_prepared_may_be_given_to_evaluate(fit, tmp_path):
    """As in plain SFTTrainer, which leaves it as it is."""
    rows = token_rows()
    pdl = {"token_weights": "u", "weighted_evaluation": True}
    more = {"eval_dataset": as_dataset(rows)}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more=more, **FITS[fit])
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("change", ["shuffle", "select", "copy"])
def test_prepared_data_that_were_changed_since(change, tmp_path):
    """Nothing but their labels says that the weights are inside."""
    rows = token_rows()
    pdl = {"token_weights": "u", "weighted_evaluation": True}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more={"eval_dataset": as_dataset(rows)}, eval_packing=False)
    changed = {
        "shuffle": lambda data: data.shuffle(seed=0),
        "select": lambda data: data.select(range(len(data))),
        "copy": lambda data: as_dataset(data.to_list()),
    }[change](trainer.eval_dataset)
    trainer.args.per_device_eval_batch_size = len(rows)  # a mean over batches depends on their order
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(changed)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_prompt_tuning_adds_tokens_without_weights(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"token_weights have shape .* accepted are models that add none"):
        train(tmp_path, token_rows(), pdl={"token_weights": "u"}, more={"peft_config": config})


each_stream = pytest.mark.parametrize("form", ["of a data set", "of a generator"])


@each_stream
@pytest.mark.parametrize("fit", ["whole", "keep_end", "bfd"])
def test_streams(form, fit, tmp_path):
    rows = token_rows()
    number = len(sequences(rows, fit))
    options = FITS[fit] | {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 1}
    assert number <= 16
    assert_trains_on(stream(rows, form), tmp_path, sequences(rows, fit), **options)


@each_stream
def test_streams_of_chats(form, tmp_path):
    rows = [{"messages": chat} for chat in TURNS]
    expected = [by_hand(chat) for chat in TURNS]
    # The Trainer never ends where a stream holds less than a step.
    options = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 3, "max_steps": 1}
    assert_trains_on(stream(rows, form), tmp_path, expected, "messages", **options | ASSISTANT)


def test_weights_that_nobody_uses(tmp_path):
    with pytest.warns(UserWarning, match="messages have a weight, which is not used; accepted is token_weights='mess"):
        make_trainer(tmp_path, [{"messages": chat} for chat in TURNS])


def test_weights_that_nobody_uses_in_a_later_row(tmp_path):
    rows = [{"messages": chat} for chat in [WEATHER, *TURNS]]
    with pytest.warns(UserWarning, match="messages have a weight, which is not used"):
        make_trainer(tmp_path, rows)
