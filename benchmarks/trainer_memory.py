"""Peak memory of one training step in each framework, with PDL and with plain cross entropy.

    python -m benchmarks.trainer_memory --output results/trainer_memory.json

The model is a Llama of one narrow layer with a large vocabulary, so that the loss is what needs memory. Each way runs
in a fresh process: its trainer makes two steps, and the second one's peak is read, less what was there before it: of
the GPU's allocator where there is a GPU, else of the resident set. Every way trains on the same rows, and the losses of
PDL must agree, as must those of cross entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.counting import environment
from benchmarks.environment import device_name, version
from benchmarks.fresh_process import printed_json
from benchmarks.memory import ALLOCATOR, RESIDENT_PEAK_RESET
from benchmarks.results import write_record

V, HIDDEN, ROWS, LENGTH = 65_536, 64, 4, 256
STEPS = 2
SIZES = {"vocab_size": V, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


class StepPeak:
    """The peak since `begin`, less what was there then; bytes."""

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            return
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        RESIDENT_PEAK_RESET.write_text("5")

    def end(self) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.before
            return
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
        self.bytes = peak - self.before


def weights() -> torch.Tensor:
    """(V,), seeded."""
    return 0.1 + torch.rand(V, generator=torch.Generator().manual_seed(0))


def make_model() -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))


def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(V, (ROWS * STEPS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def watching_callback(peak: StepPeak) -> Any:
    import transformers

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            peak.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            peak.end()

    return Watch()


def trainer_arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": ROWS,
        "max_steps": STEPS,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "optim": "sgd",
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }


def train_with_transformers(folder: str, peak: StepPeak, route: str) -> float:
    import datasets
    import transformers

    from pdl_kernels.integrations.transformers import pdl_compute_loss, pdl_loss_function, use_pdl_linear_loss

    model, more = make_model(), {}
    if route == "loss_function":
        model.loss_function = pdl_loss_function(weights())
    elif route == "compute_loss":
        more["compute_loss_func"] = pdl_compute_loss(weights())
    elif route == "linear":
        use_pdl_linear_loss(model, weights())
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**trainer_arguments(folder)),
        train_dataset=datasets.Dataset.from_list(rows()),
        data_collator=transformers.default_data_collator,
        callbacks=[watching_callback(peak)],
        **more,
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def train_with_trl(folder: str, peak: StepPeak, route: str) -> float:
    import datasets
    import tokenizers
    import transformers
    import trl

    from pdl_kernels.integrations.trl import PDLSFTTrainer

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")
    more = {"weights": weights()} if route == "pdl" else {}
    trainer = (PDLSFTTrainer if route == "pdl" else trl.SFTTrainer)(
        make_model(),
        trl.SFTConfig(**trainer_arguments(folder), bf16=False, gradient_checkpointing=False, max_length=None),
        train_dataset=datasets.Dataset.from_list(rows()),
        processing_class=tokenizer,
        callbacks=[watching_callback(peak)],
        **more,
    )
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def batches() -> list[dict[str, torch.Tensor]]:
    """One for each step."""
    ids = torch.tensor([row["input_ids"] for row in rows()]).split(ROWS)
    return [{"input_ids": step, "labels": step} for step in ids]


def train_with_lightning(folder: str, peak: StepPeak, route: str) -> float:
    import lightning

    from pdl_kernels.integrations.lightning import PDLLightningMixin
    from pdl_kernels.integrations.transformers import use_pdl_linear_loss

    class Plain(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = make_model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.network(**batch).loss
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Weighted(PDLLightningMixin, Plain):
        training_step = PDLLightningMixin.training_step

        def __init__(self) -> None:
            super().__init__()
            self.configure_pdl(use_pdl_linear_loss(self.network, weights()) if route == "linear" else weights())

        def logits_of(self, batch: Any) -> torch.Tensor:
            return self.network(batch["input_ids"]).logits

    losses = []

    class Watch(lightning.Callback):
        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            peak.begin()

        def on_before_optimizer_step(self, *_: Any, **__: Any) -> None:
            peak.end()

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    trainer = lightning.Trainer(
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[Watch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Plain() if route == "stock" else Weighted(), torch.utils.data.DataLoader(batches(), batch_size=None))
    return losses[0]


def train_with_accelerate(folder: str, peak: StepPeak, route: str) -> float:
    """The loop of docs/training_accelerate.md, with one micro-batch in one process."""
    import accelerate
    import torch.nn.functional as F

    from pdl_kernels import pdl_cross_entropy
    from pdl_kernels.integrations.transformers import use_pdl_linear_loss

    accelerator, model = accelerate.Accelerator(cpu=not torch.cuda.is_available()), make_model()
    if route == "linear":
        use_pdl_linear_loss(model, weights())
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    table = weights().to(accelerator.device)
    losses = []
    for cpu_batch in batches():
        peak.begin()
        batch = {name: ids.to(accelerator.device) for name, ids in cpu_batch.items()}
        n = batch["labels"][:, 1:].ne(-100).sum()
        if route == "logits":
            targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
            loss = pdl_cross_entropy(model(input_ids=batch["input_ids"]).logits, targets, table, normalizer=n)
        else:
            loss = model(**batch, num_items_in_batch=n).loss
        accelerator.backward(loss)
        peak.end()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses[0]


# Name: (what trains, its argument, whether it is PDL).
WAYS: dict[str, tuple[Callable[[str, StepPeak, str], float], str, bool]] = {
    "transformers, cross entropy": (train_with_transformers, "stock", False),
    "transformers, model.loss_function": (train_with_transformers, "loss_function", True),
    "transformers, compute_loss_func": (train_with_transformers, "compute_loss", True),
    "transformers, use_pdl_linear_loss": (train_with_transformers, "linear", True),
    "trl, cross entropy": (train_with_trl, "stock", False),
    "trl, PDLSFTTrainer": (train_with_trl, "pdl", True),
    "lightning, cross entropy": (train_with_lightning, "stock", False),
    "lightning, logits": (train_with_lightning, "logits", True),
    "lightning, use_pdl_linear_loss": (train_with_lightning, "linear", True),
    "accelerate, cross entropy": (train_with_accelerate, "stock", False),
    "accelerate, logits": (train_with_accelerate, "logits", True),
    "accelerate, use_pdl_linear_loss": (train_with_accelerate, "linear", True),
}


def measure_here(name: str) -> dict[str, float]:
    """Train in this process: the step's peak in bytes, and the loss of the first step."""
    train, route, _ = WAYS[name]
    peak = StepPeak()
    with tempfile.TemporaryDirectory() as folder:
        loss = train(folder, peak, route)
    return {"peak_bytes": peak.bytes, "first_loss": loss}


def measure(name: str) -> dict[str, float]:
    found, problem = printed_json("benchmarks.trainer_memory", "--way", name, **ALLOCATOR)
    if found is None:
        raise SystemExit(f"{name}: {problem}")
    return found


def disagreement(found: dict[str, dict[str, float]]) -> str | None:
    """Which ways that should compute the same loss do not, or None."""
    for pdl in (False, True):
        losses = {name: found[name]["first_loss"] for name in found if WAYS[name][2] is pdl}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
            return f"losses differ: {losses}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("results/trainer_memory.json"))
    parser.add_argument("--way", choices=WAYS, help="measure this one in this process, and print JSON")
    options = parser.parse_args(arguments)
    if options.way is not None:
        torch.set_num_threads(2)
        print(json.dumps(measure_here(options.way)))
        return 0
    if not torch.cuda.is_available() and not RESIDENT_PEAK_RESET.exists():
        print("only Linux resets the peak of the resident set", file=sys.stderr)
        return 1
    from tqdm import tqdm

    found = {name: measure(name) for name in tqdm(WAYS, desc="training", unit="way")}
    if problem := disagreement(found):
        print(problem, file=sys.stderr)
        return 1
    logits = ROWS * LENGTH * V * 4
    versions = {name: version(name) for name in ("transformers", "trl", "accelerate", "lightning")}
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts = {"environment": environment() | versions | {"device": device}, "logits_bytes": logits}
    facts |= {"tokens": ROWS * LENGTH, "vocab_size": V, "hidden_size": HIDDEN}
    for name, numbers in found.items():
        print(f"{name:36} {numbers['peak_bytes'] / 2**20:8.0f} MiB   loss {numbers['first_loss']:.4f}")
    print(f"the logits of a step take {logits / 2**20:.0f} MiB in float32")
    write_record(options.output, facts | {"ways": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
