"""PDLSFTTrainer: the gradients of torch's weighted cross entropy, whatever TRL does to the data; nothing is silent."""

import gc
import math
import types

import pytest
import torch
import torch.nn.functional as F
from helpers.chat_tokenizers import CHATML, make_chat_tokenizer
from helpers.trainer_models import V as NARROW
from helpers.trainer_models import make_model, relative_error, transformers
from helpers.trl_training import (
    CHATS,
    PAIRS,
    ROWS,
    WEATHER,
    WRITTEN,
    as_dataset,
    assistant,
    known_warnings,
    template,
    trl,
    user,
)
from ranks.trl_ranks import (
    IGNORED,
    TEXTS,
    Gradients,
    V,
    W,
    lora,
    make_trainer,
    of_batches,
    sharp_model,
    take_gradients,
    train,
)
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer import sft_trainer

from pdl_kernels import PowerLawWeighting, TokenCounts, WeightSchedule
from pdl_kernels.integrations.trl import PDLSFTMixin, PDLSFTTrainer
from pdl_kernels.weights.saved import save_weights

pytestmark = [*known_warnings, pytest.mark.filterwarnings("ignore:.*return_outputs=True:FutureWarning")]
PDL_LOGS = {"nll", "perplexity", "accuracy", "mean_weight", "effective_sample_share"}
TRL_LOGS = ("entropy", "mean_token_accuracy", "num_tokens")


@pytest.fixture(autouse=True, scope="module")
def quick():
    """These models are too small for two threads, which wait for each other; each training collects garbage, and what
    is there already is none."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def logs_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def batches_of(trainer):
    return list(trainer.get_train_dataloader())


# ---------------------------------------------------------------------------------------------------------------------
# The gradient


ASSISTANT = {"assistant_only_loss": True}
PACKED = {"packing": True, "max_length": 20}
LONG = {"max_length": 40}
KINDS = {
    "text": (TEXTS, {}),
    "text, cut": (TEXTS, {"max_length": 12}),
    "prompts and completions": (WRITTEN, {}),
    "prompts and completions, all": (WRITTEN, {"completion_only_loss": False}),
    "messages of prompts and completions": (PAIRS, {}),
    "chats": (ROWS, {}),
    "chats, assistant": (ROWS, ASSISTANT),
    "chats, assistant, keep_end": (ROWS, ASSISTANT | {"max_length": 20, "truncation_mode": "keep_end"}),
    "bfd": (ROWS, ASSISTANT | PACKED | {"per_device_train_batch_size": 1}),
    "bfd, two at once": (TEXTS, PACKED),
    "bfd_split": (TEXTS, PACKED | {"packing_strategy": "bfd_split"}),
    "wrapped": (TEXTS, PACKED | {"packing_strategy": "wrapped"}),
    "padding-free": (WRITTEN, {"padding_free": True}),
    "to a multiple": (TEXTS, {"pad_to_multiple_of": 8}),
    "checkpointing": (ROWS, ASSISTANT | {"gradient_checkpointing": True}),
    "checkpointing, packed": (TEXTS, PACKED | {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("rows", "options"), KINDS.values(), ids=KINDS)
def test_the_gradient_of_a_step(rows, options, tmp_path):
    trainer, (found,) = train(tmp_path, rows, **{"gradient_accumulation_steps": 16} | options)
    loss, expected = of_batches(trainer, batches_of(trainer))
    assert relative_error(found, expected) < 1e-5
    assert logs_of(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4)
    unweighted = of_batches(trainer, batches_of(trainer), weights=None)
    assert relative_error(unweighted[1], expected) > 1e-2, "the weights would not show"


MASKED = ["prompts and completions", "chats, assistant", "bfd", "padding-free"]


@pytest.mark.parametrize("kind", MASKED)
def test_some_of_these_labels_are_masked(kind, tmp_path):
    rows, options = KINDS[kind]
    data = make_trainer(tmp_path, rows, **options).train_dataset
    assert any(IGNORED in row["labels"][1:] for row in data)


@pytest.mark.parametrize("name", ["llama tied", "gemma2", "granite", "cohere"])
def test_models(name, tmp_path):
    """Tied embeddings, a softcap, scales: TRL applies them to its log-probabilities."""
    trainer, (found,) = train(tmp_path, TEXTS, model=sharp_model(name))
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(checkpointing, tmp_path):
    trainer, (found,) = train(tmp_path, WRITTEN, more={"peft_config": lora()}, gradient_checkpointing=checkpointing)
    assert found
    assert all("lora_" in name for name in found)
    assert {name.split(".")[-4] for name in found} == {"q_proj", "v_proj"}
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_a_model_that_is_wrapped_by_peft_already(tmp_path):
    peft = pytest.importorskip("peft")
    trainer, (found,) = train(tmp_path, TEXTS, model=peft.get_peft_model(sharp_model(), lora()))
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_prompt_tuning(tmp_path):
    """TRL then trains on the first token of a row, too, which the last virtual token predicts."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer, (found,) = train(tmp_path, TEXTS, more={"peft_config": config})
    total, number = 0.0, 0
    for batch in batches_of(trainer):
        labels = batch.pop("labels")
        logits = trainer.model(**batch).logits[:, 2:-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=W, reduction="sum")
        number += int(labels[:, 1:].ne(IGNORED).sum())
    (total / number).backward()
    assert relative_error(found, take_gradients(trainer.model)) < 1e-5


def test_a_mixture_of_experts(tmp_path):
    """The loss that balances them comes on top, unweighted."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(output_router_logits=True, **sizes, **heads))
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.5}
    trainer, (found,) = train(tmp_path, TEXTS, model=model.train(), **options)
    (batch,) = batches_of(trainer)
    targets = batch.pop("labels")[:, 1:]
    outputs = trainer.model(**batch, output_router_logits=True)
    total = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), weight=W, reduction="sum")
    (total / targets.ne(IGNORED).sum() + 0.5 * outputs.aux_loss).backward()
    assert relative_error(found, take_gradients(trainer.model)) < 1e-5


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_a_step_may_be_cut_as_one_likes(accumulate, tmp_path):
    cut = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    trainer, (found,) = train(tmp_path, TEXTS, **cut)
    targets = [int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches_of(trainer)]
    assert len(targets) == accumulate
    assert accumulate == 1 or len(set(targets)) > 1
    whole = trainer.data_collator([trainer.train_dataset[row] for row in range(8)])
    loss, expected = of_batches(trainer, [whole])
    assert relative_error(found, expected) < 1e-5
    assert logs_of(trainer)[0]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_last_step_of_an_epoch_is_smaller(tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    trainer, steps = train(tmp_path, TEXTS[:7], per_device_train_batch_size=2, gradient_accumulation_steps=3, **order)
    assert len(steps) == 2
    batches = batches_of(trainer)
    for found, part in zip(steps, (batches[:3], batches[3:]), strict=True):
        assert relative_error(found, of_batches(trainer, part)[1]) < 1e-5


def test_bfloat16(tmp_path):
    trainer, (found,) = train(tmp_path, TEXTS, bf16=True)
    _, expected = of_batches(trainer, batches_of(trainer))
    _, unweighted = of_batches(trainer, batches_of(trainer), weights=None)
    assert relative_error(found, expected) < 0.05
    assert relative_error(unweighted, expected) > 0.1


def test_weights_from_a_file(tmp_path):
    save_weights(tmp_path / "weights.safetensors", W)
    trainer, (found,) = train(tmp_path, TEXTS, pdl={"weights": tmp_path / "weights.safetensors"})
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


def test_a_schedule(tmp_path):
    schedule = WeightSchedule(W, steps=2)
    one_each = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3}
    pdl = {"weights": schedule.weights_at(0), "schedule": schedule}
    trainer, steps = train(tmp_path, TEXTS, pdl=pdl, **one_each)
    for step, found in enumerate(steps):
        _, expected = of_batches(trainer, batches_of(trainer), weights=schedule.weights_at(step))
        assert relative_error(found, expected) < 1e-5
    assert len(steps) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Beside plain SFTTrainer


def train_both(folder, rows, pdl, **options):
    """What SFTTrainer and PDLSFTTrainer log, and the gradients of their steps."""
    return [
        train(folder, rows, kind, pdl=pdl, **options) for kind, pdl in ((trl.SFTTrainer, None), (PDLSFTTrainer, pdl))
    ]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(WRITTEN, {}), (ROWS, ASSISTANT | PACKED), (TEXTS, {"gradient_checkpointing": True})],
    ids=["completions", "bfd", "checkpointing"],
)
def test_without_weights_it_is_sft(rows, options, tmp_path):
    """Bit by bit, over several steps that change the model."""
    several = {"gradient_accumulation_steps": 2, "learning_rate": 1e-2, "num_train_epochs": 2}
    (plain, expected), (ours, found) = train_both(tmp_path, rows, {"weights": None}, **options | several)
    assert len(found) == len(expected) > 1
    for step, other in zip(found, expected, strict=True):
        assert step.keys() == other.keys()
        assert all(torch.equal(step[name], other[name]) for name in step)
    for entry, other in zip(logs_of(ours), logs_of(plain), strict=True):
        assert {name: value for name, value in entry.items() if name not in PDL_LOGS} == other
    assert not torch.equal(ours.model.lm_head.weight, sharp_model().lm_head.weight)


@pytest.mark.parametrize("options", [{}, PACKED, {"padding_free": True}], ids=["padded", "bfd", "padding-free"])
def test_the_metrics_of_trl_are_unweighted(options, tmp_path):
    rows = [*TEXTS, {"text": "it" + " it" * 12}]  # a model with tied embeddings says again what it read
    (plain, _), (ours, _) = (
        train(tmp_path, rows, kind, model=sharp_model("llama tied"), **options | {"gradient_accumulation_steps": 16})
        for kind in (trl.SFTTrainer, PDLSFTTrainer)
    )
    first, other = logs_of(ours)[0], logs_of(plain)[0]
    assert [first[name] for name in TRL_LOGS] == [other[name] for name in TRL_LOGS]
    assert 0 < first["mean_token_accuracy"] < 1
    assert first["loss"] != pytest.approx(other["loss"], rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"eval_packing": True, "packing": True, "max_length": 20}], ids=str)
def test_evaluation_is_unweighted(options, tmp_path):
    losses = []
    for kind, pdl in ((trl.SFTTrainer, None), (PDLSFTTrainer, {"token_weights": "u"})):
        rows = [row | {"u": -2.0} for row in WRITTEN]
        more = {"eval_dataset": as_dataset(rows[:4])}
        found = make_trainer(tmp_path, rows, kind, pdl=pdl, more=more, **options).evaluate()
        losses.append({name: value for name, value in found.items() if "per_second" not in name and "time" not in name})
    assert losses[0] == losses[1]
    assert {"eval_loss", "eval_entropy", "eval_mean_token_accuracy"} <= losses[0].keys()


@pytest.mark.parametrize("token_weights", [None, "u"])
def test_weighted_evaluation(token_weights, tmp_path):
    rows = [row | {"u": 0.5 - number} for number, row in enumerate(WRITTEN)]
    pdl = {"weighted_evaluation": True, "token_weights": token_weights}
    more = {"eval_dataset": as_dataset(rows)}
    trainer = make_trainer(tmp_path, rows, pdl=pdl, more=more, per_device_eval_batch_size=8)
    found = trainer.evaluate()
    data = trainer.eval_dataset
    expected, _ = of_batches(trainer, [trainer.data_collator([data[row] for row in range(len(data))])])
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_between_steps(tmp_path):
    """It is not taken for training: neither logs nor checks see it."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 1}
    trainer, steps = train(tmp_path, TEXTS, more={"eval_dataset": as_dataset(TEXTS)}, **options)
    assert len(steps) == 4
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len({entry["eval_loss"] for entry in evaluated}) == 1
    assert len(logs_of(trainer)) == 4
    assert not evaluated[0].keys() & PDL_LOGS


def test_metrics_of_logits(tmp_path):
    """TRL makes logits for them in another call."""
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"one": 1.0}

    rows = [row | {"u": 2.0} for row in WRITTEN]
    more = {"eval_dataset": as_dataset(rows), "compute_metrics": metrics}
    found = make_trainer(tmp_path, rows, pdl={"token_weights": "u"}, more=more, per_device_eval_batch_size=8).evaluate()
    plain = make_trainer(tmp_path, rows, trl.SFTTrainer, more={"eval_dataset": as_dataset(rows)})
    assert found["eval_one"] == 1.0
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=0.2)
    ((logits, labels),) = shapes
    assert logits == (*labels, V)


# ---------------------------------------------------------------------------------------------------------------------
# Logs


def test_logs(tmp_path):
    trainer, _ = train(tmp_path, WRITTEN, per_device_train_batch_size=6, gradient_accumulation_steps=1)
    (log,) = logs_of(trainer)
    nll, _ = of_batches(trainer, batches_of(trainer), weights=None)
    targets = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches_of(trainer)])
    w = W[targets[targets != IGNORED]]
    assert log["nll"] == pytest.approx(nll, rel=1e-5)
    assert log["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert log["accuracy"] == pytest.approx(log["mean_token_accuracy"], rel=1e-5)
    assert log["mean_weight"] == pytest.approx(w.mean().item(), rel=1e-5)
    assert log["effective_sample_share"] == pytest.approx((w.sum() ** 2 / (len(w) * w.square().sum())).item(), rel=1e-5)


def count_chats(rows, tokenizer, **options):
    return TokenCounts.from_chats(rows, tokenizer, progress=False, **options)


def count_completions(rows, tokenizer, **options):
    return TokenCounts.from_completions(rows, tokenizer, progress=False, **options)


@pytest.mark.parametrize(
    ("count", "rows", "options", "counted"),
    [
        (count_chats, ROWS, ASSISTANT, ASSISTANT),
        (count_chats, ROWS, {}, {"assistant_only_loss": False}),
        (count_completions, WRITTEN, {}, {}),
        (count_completions, PAIRS, {}, {}),
        (count_chats, ROWS, ASSISTANT | PACKED | LONG, ASSISTANT | {"packing": "bfd"} | LONG),
    ],
    ids=["chats, assistant", "chats", "completions", "completions of messages", "bfd"],
)
@pytest.mark.filterwarnings("error:.*never_counted.*|.*counts do not hold.*")
def test_counts_of_what_it_trains_on(count, rows, options, counted, tmp_path):
    """Weights of these counts have mean 1 over the targets of an epoch, and no target is of a type never counted."""
    counts = count(rows, make_chat_tokenizer(), **counted)
    weighting = PowerLawWeighting()
    pdl = {"weights": weighting.table(counts, V), "counts": counts, "weighting": weighting}
    trainer, _ = train(tmp_path, rows, pdl=pdl, **{"gradient_accumulation_steps": 16} | options)
    targets = sum(int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in batches_of(trainer))
    assert counts.total == targets
    assert logs_of(trainer)[0]["mean_weight"] == pytest.approx(1, abs=1e-5)
    assert len(set(pdl["weights"].tolist())) > 3


def test_counts_of_other_data_are_noticed(tmp_path):
    counts = count_completions(WRITTEN[:1], make_chat_tokenizer())
    pdl = {"weights": PowerLawWeighting().table(counts, V), "counts": counts}
    with pytest.warns(UserWarning, match="of the targets are of types that the counts do not hold"):
        train(tmp_path, TEXTS, pdl=pdl)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_no_logits(tmp_path):
    """TRL has a block of its own for 32768 columns; three of them make the vocabulary."""
    width = 3 * 32768
    model = sharp_model(width=width)
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    trainer = make_trainer(tmp_path, TEXTS[1:6:2] * 2, model=model, pdl={"weights": torch.ones(width)}, **options)
    batch = batches_of(trainer)[0]
    rows, length = batch["labels"].shape
    logits = rows * (length - 1) * width
    assert logits > 2 * model.lm_head.weight.numel(), "parameters and their gradients are smaller"
    trainer.pdl_loss.keep_record()
    with Largest() as ours:
        trainer.training_step(trainer.model, batch, torch.tensor(100.0))
    assert model.lm_head.weight.grad.norm() > 0
    assert ours.numel < logits
    with torch.no_grad(), Largest() as plain:
        model(input_ids=batch["input_ids"])
    assert plain.numel >= logits, "the watch would have seen them"


# ---------------------------------------------------------------------------------------------------------------------
# Token weights, beside gradients of rows that were cut and packed by hand


LENGTHS = (20, 31, 12, 25, 9, 18, 33, 15)
SIZE = 20
WHOLE = {}
KEEP_END = {"max_length": SIZE, "truncation_mode": "keep_end"}
FITS = {
    "whole": WHOLE,
    "keep_start": {"max_length": SIZE},
    "keep_end": KEEP_END,
    "bfd": {"max_length": SIZE, "packing": True},
    "bfd_split": {"max_length": SIZE, "packing": True, "packing_strategy": "bfd_split"},
    "wrapped": {"max_length": SIZE, "packing": True, "packing_strategy": "wrapped"},
    "padding-free": {"padding_free": True},
    "shuffled": {"max_length": SIZE, "packing": True, "shuffle_dataset": True},
}
MANY = {"gradient_accumulation_steps": 16}


def token_rows(kind="tokens", lengths=LENGTHS):
    """Rows of ids and masked labels, with weights of both signs and 0: a number, or one for each token."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(7, V - 5, (length,), generator=generator).tolist()
        drawn = torch.randn(length, generator=generator)
        drawn[::5] = 0
        masked = 3 * (number % 3)
        weights = drawn.tolist() if kind == "tokens" else drawn[1].item()
        rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:], "u": weights})
    return rows


def sequences(rows, fit="whole"):
    """[(ids, labels, factors)] of what is trained on, without padding."""
    all_of = [
        (row["input_ids"], row["labels"], torch.as_tensor(row["u"]).expand(len(row["labels"])).tolist()) for row in rows
    ]
    if fit in ("whole", "padding-free"):
        return all_of
    if fit == "keep_end":
        return [tuple(part[-SIZE:] for part in row) for row in all_of]
    if fit in ("keep_start", "bfd", "shuffled"):
        return [tuple(part[:SIZE] for part in row) for row in all_of]
    if fit == "wrapped":
        all_of = [tuple([value for row in all_of for value in row[part]] for part in range(3))]
    return [tuple(part[at : at + SIZE] for part in row) for row in all_of for at in range(0, len(row[0]), SIZE)]


def of_sequences(model, rows, weights=W):
    """Gradients of sum_i w(y_i) u_i ce_i / n, sequence by sequence."""
    total, number = 0.0, 0
    for ids, labels, factors in rows:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        targets, u = torch.tensor(labels)[1:], torch.tensor(factors)[1:]
        total = total + (F.cross_entropy(logits, targets, weight=weights, reduction="none") * u).sum()
        number += int(targets.ne(IGNORED).sum())
    (total / number).backward()
    return take_gradients(model)


def assert_trains_on(rows, folder, expected_rows, column="u", **options):
    expected = of_sequences(sharp_model(), expected_rows)
    ones = [(ids, labels, [1.0] * len(ids)) for ids, labels, _ in expected_rows]
    assert relative_error(of_sequences(sharp_model(), ones), expected) > 0.05, "the token weights would not show"
    trainer, (found,) = train(folder, rows, pdl={"token_weights": column}, **MANY | options)
    assert relative_error(found, expected) < 1e-5
    return trainer


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


TURNS = [
    [
        user("What is the weather like?"),
        assistant(
            "The weather is fine.",
        )
        | {"weight": -2.0},
        user("And in the north?"),
        assistant("Whatever it is today.") | {"weight": 0.25},
    ],
    [user("So?"), assistant("The wind is weaker.") | {"weight": 3.0}],
    [user("And today?"), assistant("It is fine; it will be.") | {"weight": 0.0}, user("Sure?"), assistant("No.")],
]


def by_hand(chat, assistant_only=True):
    """(ids, labels, factors) of a chat in CHATML, piece by piece: special tokens keep its pieces apart."""
    tokenizer = make_chat_tokenizer()
    ids, labels, factors = [], [], []

    def add(text, said, factor):
        new = tokenizer(text)["input_ids"]
        ids.extend(new)
        labels.extend(new if said or not assistant_only else [IGNORED] * len(new))
        factors.extend([factor] * len(new))

    for message in chat:
        add(f"<|im_start|>{message['role']}\n", False, 1.0)
        is_assistant = message["role"] == "assistant"
        add(message["content"] + "<|im_end|>", is_assistant, message.get("weight", 1.0) if is_assistant else 1.0)
        add("\n", False, 1.0)
    assert ids == tokenizer.apply_chat_template(chat)["input_ids"]
    return ids, labels, factors


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


def stream(rows, form):
    import datasets

    if form == "of a data set":
        return as_dataset(rows).to_iterable_dataset()
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


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


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


REFUSED = {
    "dft": ({"loss_type": "dft"}, {}, {}, "loss_type is 'dft'; accepted is 'nll'"),
    "compute_loss_func": ({}, {}, {"compute_loss_func": print}, "compute_loss_func is given, which would take the"),
    "smoothing": ({"label_smoothing_factor": 0.1}, {}, {}, "label_smoothing_factor is 0.1; accepted is 0"),
    "short": ({}, {"weights": W[:-1]}, {}, r"weights have shape \(364,\); accepted is \(365,\), one per row of the"),
    "long": ({}, {"weights": torch.ones(V + 1)}, {}, r"weights have shape \(366,\); accepted is \(365,\)"),
    "negative": ({}, {"weights": -W}, {}, "weights"),
    "column": ({}, {"token_weights": "weight"}, {}, "token_weights is 'weight', which is no column of the data; acc"),
}


@pytest.mark.parametrize(("options", "pdl", "more", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor:FutureWarning")
def test_arguments_that_are_refused(options, pdl, more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, TEXTS, pdl=pdl, more=more, **options)


def test_the_columns_there_are(tmp_path):
    with pytest.raises(
        ValueError, match=r"accepted are text, score, .*input_ids, labels, and 'messages' for the weight"
    ):
        make_trainer(tmp_path, [row | {"score": 1.0} for row in TEXTS], pdl={"token_weights": "scores"})


def test_weights_are_asked_for(tmp_path):
    with pytest.raises(TypeError, match="weights"):
        PDLSFTTrainer(sharp_model(), train_dataset=as_dataset(TEXTS), processing_class=make_chat_tokenizer())


def test_lora_on_the_output_layer(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        make_trainer(tmp_path, TEXTS, more={"peft_config": config})


def test_an_output_layer_that_lora_saves(tmp_path):
    """A copy of it trains, in the place of the model's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    trainer, (found,) = train(tmp_path, TEXTS, more={"peft_config": config})
    assert any("lm_head" in name for name in found)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize("data", ["rows", "stream"])
def test_token_weights_of_data_that_trl_does_not_prepare(data, tmp_path):
    rows = token_rows() if data == "rows" else stream(token_rows(), "of a data set")
    with pytest.raises(ValueError, match="token_weights are given for data that the trainer does not prepare"):
        make_trainer(
            tmp_path, rows, pdl={"token_weights": "u"}, dataset_kwargs={"skip_prepare_dataset": True}, max_steps=1
        )


def test_data_that_trl_does_not_prepare(tmp_path):
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in token_rows()]
    trainer, (found,) = train(tmp_path, rows, dataset_kwargs={"skip_prepare_dataset": True})
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0] * 3, "u of a row of train are 3 values; accepted are a number, or 31 numbers"),
        ([1.0] * 30 + [math.nan], "u of a row of train hold nan; accepted are finite numbers"),
    ],
    ids=["length", "nan"],
)
def test_numbers_that_are_refused(weights, words, tmp_path):
    rows = token_rows()
    rows[1]["u"] = weights
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, rows, pdl={"token_weights": "u"})


def test_messages_that_are_refused(tmp_path):
    of_user = [TURNS[1][0] | {"weight": 2.0}, TURNS[1][1]]
    with pytest.raises(
        ValueError, match=r"a message of 'user' has the weight 2\.0; accepted are weights on the assist"
    ):
        make_trainer(tmp_path, [{"messages": of_user}], pdl={"token_weights": "messages"})


def test_a_template_that_is_shown_otherwise_with_markers(tmp_path):
    """Whole chats by Qwen 3's template; TRL's template with markers keeps the thoughts that it leaves out."""
    more = {"processing_class": make_chat_tokenizer("qwen", template("qwen3"))}
    rows = [{"messages": chat} for chat in TURNS]
    with pytest.raises(ValueError, match="the template with generation markers makes other ids than the trainer's"):
        make_trainer(tmp_path, rows, pdl={"token_weights": "messages"}, more=more)
    make_trainer(tmp_path, rows, pdl={"token_weights": "messages"}, more=more, **ASSISTANT)


# ---------------------------------------------------------------------------------------------------------------------
# Another TRL: an error, and never another loss


def fails_with(folder, words, trainer=PDLSFTTrainer, **options):
    with pytest.raises(RuntimeError, match=words):
        train(folder, TEXTS, trainer, **options)


def targets_of(inputs):
    return inputs["labels"][:, 1:]


def from_the_models_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    return model(**inputs, num_items_in_batch=num_items_in_batch).loss


def from_logits(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """The fused layer is called for metrics alone."""
    with torch.no_grad():
        model(**inputs, fused_lm_head=True)
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), targets_of(inputs).flatten(), reduction="sum")
    return total / num_items_in_batch


def without_the_denominator(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    """A mean over the micro-batch, as TRL had it once."""
    outputs = model(**inputs, fused_lm_head=True)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def weighted_by_confidence(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    outputs = model(**inputs, fused_lm_head=True)
    return -(outputs.log_probs * outputs.log_probs.exp().detach()).sum() / num_items_in_batch


ROUTES = {
    from_the_models_loss: "TRL computed a loss without its fused output layer",
    from_logits: "PDL did not train the model in step 1",
    without_the_denominator: "TRL's loss is .* and the weighted log-probabilities give",
    weighted_by_confidence: "TRL's loss is .* and the weighted log-probabilities give",
}


@pytest.mark.parametrize(("route", "words"), ROUTES.items())
def test_trl_computes_its_loss_another_way(route, words, monkeypatch, tmp_path):
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", route)
    fails_with(tmp_path, words=words)


@pytest.mark.parametrize("pdl", [{"weights": None}, {"weights": torch.ones(V)}], ids=["none", "ones"])
def test_another_denominator_shows_without_weights_too(pdl, monkeypatch, tmp_path):
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", without_the_denominator)
    fails_with(tmp_path, words="TRL's loss is", pdl=pdl)


def test_trl_takes_the_loss_of_the_fused_layer(monkeypatch, tmp_path):
    """It is unweighted, and so it is not there."""

    def route(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, fused_lm_head=True, num_items_in_batch=num_items_in_batch)
        return 1.0 * outputs.loss

    trainer = make_trainer(tmp_path, TEXTS)
    assert trainer.model(**batches_of(trainer)[0], fused_lm_head=True).loss is None
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", route)
    with pytest.raises((RuntimeError, TypeError)):
        trainer.train()


def test_a_loss_that_is_not_a_number_is_not_blamed_on_trl(tmp_path):
    """A model that broke down is logged as in plain SFTTrainer."""
    model = sharp_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    trainer, _ = train(tmp_path, TEXTS, model=model, logging_nan_inf_filter=False)
    assert math.isnan(logs_of(trainer)[0]["loss"])


def test_a_loss_function_by_its_position(tmp_path):
    """It would take the place of PDL."""
    arguments = make_trainer(tmp_path, TEXTS).args
    data, tokenizer = as_dataset(TEXTS), make_chat_tokenizer()

    def loss(outputs, labels, num_items_in_batch):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    with pytest.raises((ValueError, RuntimeError), match=r"compute_loss_func|PDL did not train the model"):
        PDLSFTTrainer(sharp_model(), arguments, None, data, None, tokenizer, loss, weights=W).train()


def test_an_evaluation_that_takes_another_way(monkeypatch, tmp_path):
    trainer = make_trainer(tmp_path, TEXTS, more={"eval_dataset": as_dataset(TEXTS)})
    monkeypatch.setattr(trl.SFTTrainer, "compute_loss", from_the_models_loss)
    with pytest.raises(RuntimeError, match="TRL computed a loss without its fused output layer"):
        trainer.evaluate()


def test_the_model_gets_no_fused_layer(monkeypatch, tmp_path):
    monkeypatch.setattr(sft_trainer, "add_fused_lm_head", lambda model, **options: None)
    with pytest.raises(RuntimeError, match="SFTTrainer did not give the model a fused output layer; accepted is TRL"):
        make_trainer(tmp_path, TEXTS)


def other_outputs(monkeypatch, change):
    """Have the fused layer return what `change` makes of its outputs."""
    add = sft_trainer.add_fused_lm_head

    def added(model, **options):
        add(model, **options)
        fused = model.forward

        def forward(self, *arguments, **named):
            outputs = fused(*arguments, **named)
            if named.get("fused_lm_head"):
                change(outputs)
            return outputs

        model.forward = types.MethodType(forward, model)

    monkeypatch.setattr(sft_trainer, "add_fused_lm_head", added)


def without(name):
    return lambda outputs: setattr(outputs, name, None)


def compact(outputs):
    """Only the targets, one after the other."""
    outputs.log_probs = outputs.log_probs[outputs.label_mask]


def as_long_as_the_inputs(outputs):
    outputs.log_probs = F.pad(outputs.log_probs, (1, 0))
    outputs.label_mask = F.pad(outputs.label_mask, (1, 0))


@pytest.mark.parametrize(
    "change",
    [without("log_probs"), without("label_mask"), compact, as_long_as_the_inputs],
    ids=["no log_probs", "no label_mask", "compact", "as long as the inputs"],
)
def test_the_fused_layer_returns_something_else(change, monkeypatch, tmp_path):
    other_outputs(monkeypatch, change)
    fails_with(tmp_path, words="TRL's fused output layer returned no log_probs and label_mask of its targets' shape")


def test_the_forward_is_replaced_afterwards(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    del trainer.model.forward
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        trainer.train()


def test_the_fused_layer_is_added_once_more(tmp_path):
    """Over our forward, which then is not called with fused_lm_head=True."""
    trainer = make_trainer(tmp_path, TEXTS)
    sft_trainer.add_fused_lm_head(trainer.model, outputs=("log_probs", "entropy", "is_top1"))
    with pytest.raises(RuntimeError, match="TRL computed a loss without its fused output layer"):
        trainer.train()


class Another(PDLSFTTrainer):
    """Drops the loss in the end."""

    def compute_loss(self, model, inputs, *arguments, **named):
        super().compute_loss(model, dict(inputs), *arguments, **named)
        return model(**inputs).loss


class Forgetful(PDLSFTTrainer):
    """Keeps token weights from the model."""

    def compute_loss(self, model, inputs, *arguments, **named):
        inputs = {name: value for name, value in inputs.items() if name != "token_weights"}
        return super().compute_loss(model, inputs, *arguments, **named)


def test_token_weights_that_do_not_reach_the_loss(tmp_path):
    with pytest.raises(RuntimeError, match="the batches have token weights that did not reach the loss"):
        train(tmp_path, token_rows(), Forgetful, pdl={"token_weights": "u"})


def test_a_subclass_trains_with_another_loss(tmp_path):
    fails_with(tmp_path, words="its gradient never came back: another loss trains the model", trainer=Another)


def test_the_weights_are_changed_behind_its_back(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    trainer.pdl_loss.set_weights(torch.ones(V))
    with pytest.raises(RuntimeError, match="the loss had other weights in step 1 than it was given"):
        trainer.train()


def test_shifted_labels_need_shifted_token_weights(tmp_path):
    """Context parallelism shifts labels itself; token weights that stay unshifted would belong to other labels."""
    trainer = make_trainer(tmp_path, token_rows(), pdl={"token_weights": "u"})
    batch = batches_of(trainer)[0]
    shifted = F.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
    with pytest.raises(ValueError, match="token_weights"):
        trainer.model(**batch, shift_labels=shifted, fused_lm_head=True)


def test_shifted_labels(tmp_path):
    trainer = make_trainer(tmp_path, TEXTS)
    batch = batches_of(trainer)[0]
    expected = trainer.model(**batch, fused_lm_head=True)
    shifted = F.pad(batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:]
    found = trainer.model(**batch, shift_labels=shifted, fused_lm_head=True)
    assert torch.allclose(found.log_probs[:, :-1], expected.log_probs)
    assert not found.log_probs[:, -1].any()


def test_calls_without_the_fused_layer_are_the_models_own(tmp_path):
    rows = token_rows()
    trainer = make_trainer(tmp_path, rows, pdl={"token_weights": "u"})
    batch = batches_of(trainer)[0]
    plain = sharp_model()
    found, expected = trainer.model(**batch), plain(**{k: v for k, v in batch.items() if k != "token_weights"})
    assert torch.equal(found.logits, expected.logits)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    made = trainer.model.eval().generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(made, plain.eval().generate(batch["input_ids"][:1, :5], max_new_tokens=4, do_sample=False))


def test_a_model_that_was_trained_before(tmp_path):
    """Its weights do not come on top of the new ones."""
    model = sharp_model()
    train(tmp_path, TEXTS, model=model, pdl={"weights": torch.full((V,), 7.0)})
    trainer, (found,) = train(tmp_path, TEXTS, model=model)
    assert relative_error(found, of_batches(trainer, batches_of(trainer))[1]) < 1e-5
    _, (plain,) = train(tmp_path, TEXTS, trl.SFTTrainer, model=model)
    assert relative_error(plain, of_batches(trainer, batches_of(trainer), weights=None)[1]) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and subclasses


@pytest.mark.parametrize("token_weights", [None, "u"])
def test_resuming_is_as_one_go(token_weights, tmp_path):
    rows = token_rows("examples")
    pdl = {"token_weights": token_weights}
    options = {"learning_rate": 1e-2, "max_steps": 4, "gradient_accumulation_steps": 1, "save_steps": 2}
    options["save_strategy"] = "steps"
    through, steps = train(tmp_path, rows, pdl=pdl, **options)
    assert len(steps) == 4
    folder = tmp_path / "checkpoint-2"
    saved = {"weights": folder} | pdl
    gradients = Gradients()
    resumed = make_trainer(tmp_path, rows, pdl=saved, more={"callbacks": [gradients]}, **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert len(gradients.steps) == 2
    for found, expected in zip(gradients.steps, steps[2:], strict=True):
        assert relative_error(found, expected) < 1e-6
    for found, expected in zip(resumed.model.parameters(), through.model.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-7)
    other = make_trainer(tmp_path, rows, pdl={"weights": 2 * W}, **options)
    with pytest.raises(ValueError, match="training goes on at step 2 with other weights than"):
        other.train(resume_from_checkpoint=str(folder))


class Mine(trl.SFTTrainer):
    """A trainer of a user's own."""

    def __init__(self, *arguments, name, **named):
        super().__init__(*arguments, **named)
        self.name = name
        self.calls = 0

    def compute_loss(self, *arguments, **named):
        self.calls += 1
        return super().compute_loss(*arguments, **named)


class PDLMine(PDLSFTMixin, Mine):
    pass


def test_a_trainer_of_ones_own(tmp_path):
    rows = token_rows()
    trainer, (found,) = train(tmp_path, rows, PDLMine, pdl={"token_weights": "u"}, more={"name": "mine"}, **MANY)
    assert (trainer.name, trainer.calls) == ("mine", 4)
    assert relative_error(found, of_sequences(trainer.model, sequences(rows))) < 1e-5
    assert trainer.pdl_callback.loss is trainer.pdl_loss


def test_what_these_tests_train_on():
    assert len(make_chat_tokenizer()) < V
    assert NARROW < V
    assert CHATML.count("generation") >= 2
    assert len(CHATS) == len(ROWS)
    assert make_model("llama", vocab_size=V).config.vocab_size == V
