"""One of several processes in which TRL trains."""

import sys
import tempfile
import warnings

import torch
import torch.distributed as dist
from helpers.ranks import leave
from helpers.trainer_models import relative_error
from helpers.trl_trainers import IGNORED, TEXTS, V, W, lora, make_trainer, of_batches, train
from helpers.trl_training import as_dataset, trl

from pdl_kernels.integrations.trl import PDLSFTTrainer


def rows_of_tokens():
    """Rows with weights; some have no target at all, so that a process has micro-batches without one."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number, length in enumerate((9, 4, 17, 6, 12, 5, 3, 20, 8, 7, 11, 15)):
        ids = torch.randint(10, 300, (length,), generator=generator).tolist()
        masked = length if number in (1, 6, 7) else number % 3
        weights = torch.randn(length, generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:], "u": weights})
    return rows


TWELVE = [*TEXTS, *({"text": row["text"][::-1]} for row in TEXTS[:4])]
CASES = {
    "text": (TWELVE, {}),
    "without weights": (TWELVE, {"pdl": {"weights": None}}),
    "token weights": (rows_of_tokens(), {"pdl": {"token_weights": "u"}}),
    "packing": (TWELVE, {"packing": True, "max_length": 24}),
    "padding-free": (TWELVE, {"padding_free": True, "per_device_train_batch_size": 3}),
    "lora": (TWELVE, {"adapters": lora}),
    "checkpointing": (TWELVE, {"gradient_checkpointing": True}),
    "a mean for each process": (TWELVE, {"average_tokens_across_devices": False}),
}


class Recording(PDLSFTTrainer):
    """Keeps the batches that it trains on."""

    def compute_loss(self, model, inputs, *arguments, **named):
        self.batches = [*getattr(self, "batches", []), {name: torch.as_tensor(x).clone() for name, x in inputs.items()}]
        return super().compute_loss(model, inputs, *arguments, **named)


def from_all(value):
    """What each process gives, in their order."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def usable(batch):
    """What a model takes, without numbers that were tensors for a while."""
    return {name: x if x.dim() else int(x) for name, x in batch.items()}


def check_case(name, folder):
    """The gradient is that of all batches of all processes at once, in one process."""
    rows, options = CASES[name]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8} | options
    if "adapters" in options:  # made here, since only this case needs peft
        options["more"] = {"peft_config": options.pop("adapters")()}
    trainer, steps = train(folder, rows, Recording, **options)
    assert len(steps) == 1
    seen = [[usable(batch) for batch in part] for part in from_all(trainer.batches)]
    targets = [sum(int(batch["labels"][:, 1:].ne(IGNORED).sum()) for batch in part) for part in seen]
    assert len(set(targets)) > 1, "every process has as many targets"
    batches = [batch for part in seen for batch in part]
    weights = options.get("pdl", {}).get("weights", W)
    if options.get("average_tokens_across_devices", True):
        loss, expected = of_batches(trainer, batches, weights)
    else:
        parts = [of_batches(trainer, part, weights) for part in seen]
        loss = sum(found for found, _ in parts) / len(parts)
        expected = {key: sum(gradients[key] for _, gradients in parts) / len(parts) for key in parts[0][1]}
    error = relative_error(steps[0], expected)
    assert error < 1e-5, (name, error)
    assert all(torch.equal(steps[0][key], other[key]) for other in from_all(steps[0]) for key in other)
    logs = trainer.state.log_history[0]
    assert abs(logs["loss"] - loss) < 1e-4 * abs(loss), (name, logs["loss"], loss)
    check_logs(name, logs, batches, weights)
    if dist.get_rank() == 0:
        print(name, targets, error)


def check_logs(name, logs, batches, weights):
    """The numbers of the callback are those of all processes."""
    table = torch.ones(V) if weights is None else weights
    labels = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
    factors = table[labels[labels != IGNORED]]
    if "token_weights" in batches[0]:
        factors = factors * torch.cat([batch["token_weights"][:, 1:].flatten() for batch in batches])[labels != IGNORED]
        factors = factors[factors != 0].abs()
    found = logs["mean_weight"]
    assert abs(found - factors.mean().item()) < 1e-5 * found, (name, found, factors.mean())
    share = (factors.sum() ** 2 / (len(factors) * factors.square().sum())).item()
    assert abs(logs["effective_sample_share"] - share) < 1e-5, (name, logs, share)


def check_evaluation(folder):
    """The loss of an evaluation is what plain SFTTrainer finds, whatever the weights."""
    losses = []
    for kind, pdl in ((PDLSFTTrainer, {"token_weights": "u"}), (trl.SFTTrainer, None)):
        data = as_dataset(rows_of_tokens())
        made = make_trainer(folder, rows_of_tokens(), kind, pdl=pdl, more={"eval_dataset": data})
        losses.append(made.evaluate()["eval_loss"])
    assert losses[0] == losses[1], losses


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in sys.argv[1:] or CASES:
        check_case(case, tempfile.mkdtemp())
    check_evaluation(tempfile.mkdtemp())
    leave()
