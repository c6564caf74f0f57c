"""Fine-tune a causal language model with Power-Law Decay Loss by TRL's SFTTrainer, and compare with cross entropy.

    python examples/finetune_trl.py --quick
    python examples/finetune_trl.py --model MODEL --data chats.jsonl --lora

Model and text are those of finetune_transformers.py, which also resumes. Both runs start from the same weights and see
the same batches in the same order.

Exit status: 0, 1 when the results would show nothing, 2 for a mistake in the call or the installation, 130 after
Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from causal_models import held_out_scores, load_model, load_tokenizer, model_location
from docstring_options import UserError, prepare_output
from docstring_report import print_tables, save_json, save_plot
from finetune_docstrings import CROSS_ENTROPY, PDL, UNTOUCHED
from finetune_options import make_parser, parse
from frequency_buckets import ShowsNothingError, assign_buckets, describe_buckets, require_every_bucket
from torch import Tensor
from training_rows import CHATS, IGNORED, read_data

from pdl_kernels import PowerLawWeighting, TokenCounts, describe
from pdl_kernels.errors import first_line

NAME = "finetune_trl"
NEEDED_MODULES = ("trl", "datasets", "accelerate", "gguf", "matplotlib", "rich")
RUN_FOLDERS = {PDL: "pdl", CROSS_ENTROPY: "cross_entropy"}


def make_trainer(
    location: str,
    tokenizer: Any,
    parts: tuple[list[Any], list[Any]],  # rows to train on, and held out
    masks: dict[str, Any],
    weights: Tensor | None,  # (V,); None: plain cross entropy
    options: argparse.Namespace,
    **of_callback: Any,  # counts and weighting, which checkpoints keep
) -> Any:
    import datasets
    from trl import SFTConfig

    from pdl_kernels.integrations.trl import PDLSFTTrainer

    adapters = None
    if options.lora:
        from peft import LoraConfig

        adapters = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")  # all but the output layer
    training, held_out = map(datasets.Dataset.from_list, parts)
    arguments = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        gradient_checkpointing=False,
        learning_rate=options.learning_rate,
        bf16=torch.cuda.is_available(),
        seed=options.seed,
        save_strategy="no",
        logging_steps=max(1, options.steps // 8),
        report_to="none",
        disable_tqdm=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **masks,
    )
    return PDLSFTTrainer(
        load_model(location, 0 if options.lora else options.layers),
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapters,
        weights=weights,
        **of_callback,
    )


def run(options: argparse.Namespace) -> None:
    needed = (*NEEDED_MODULES, "peft") if options.lora else NEEDED_MODULES
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prepare_output(options.output)
    for folder in RUN_FOLDERS.values():
        if (options.output / folder).exists():
            raise UserError(f"{options.output / folder} holds a model; move it away, or give another --output")
    data = read_data(options)
    location = model_location(options.model, options.output)
    tokenizer = load_tokenizer(location)
    parts = [row for _, row in data.training], [row for _, row in data.held_out[: options.held_out]]

    # The trainer masks, cuts and ends its rows. Counting with its own options gives the targets that it trains on.
    masks = {"assistant_only_loss": data.kind == CHATS, "max_length": options.max_length}
    vocabulary = len(load_model(location).get_output_embeddings().weight)  # which may be more than the tokenizer has
    count = TokenCounts.from_chats if data.kind == CHATS else TokenCounts.from_completions
    weighting = PowerLawWeighting(alpha=options.alpha)
    print(f"\nCounting the targets of {len(parts[0]):,} rows to train on: {data.source}.")
    try:
        counts = count(parts[0], tokenizer, vocab_size=vocabulary, **masks)
        if counts.total == 0:
            raise UserError(f"--max-length {options.max_length} cuts off whatever could be learned")
        weights = weighting.table(counts)  # (V,)
    except (ValueError, TypeError) as error:
        raise UserError(first_line(error)) from None
    print(f"Weights by the power law, alpha {options.alpha:g}:", describe(weights, counts, tokenizer), sep="\n")
    bucket_of = assign_buckets(counts.counts)  # (V,)

    scores, buckets, histories = {}, {}, {}
    for name, table in ((PDL, weights), (CROSS_ENTROPY, None)):
        kept = {} if table is None else {"counts": counts, "weighting": weighting}
        trainer = make_trainer(location, tokenizer, parts, masks, table, options, **kept)
        batches = list(trainer.get_eval_dataloader())
        if not scores:
            targets = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
            buckets = describe_buckets(counts.counts, weights, bucket_of, targets[targets != IGNORED].cpu())
            require_every_bucket(buckets)
            scores[UNTOUCHED] = held_out_scores(trainer.model, batches, bucket_of, UNTOUCHED)
        print(f"\nTraining with {name}, {options.steps} steps.")
        trainer.train()
        trainer.save_model(str(options.output / RUN_FOLDERS[name]))
        scores[name] = held_out_scores(trainer.model, batches, bucket_of, name)
        histories[name] = trainer.state.log_history
    scores = {name: scores[name] for name in (UNTOUCHED, CROSS_ENTROPY, PDL)}
    settings = {name: str(value) for name, value in vars(options).items() if value is not None}
    print_tables(scores, buckets, {"settings": ", ".join(f"{name} {value}" for name, value in settings.items())})
    found = {name: {row: asdict(score) for row, score in by_row.items()} for name, by_row in scores.items()}
    path = options.output / NAME
    save_plot(path.with_suffix(".png"), scores, f"{options.steps} steps of cross entropy or PDL, alpha {options.alpha}")
    record = {"settings": settings, "source": data.source, "scores": found, "training": histories}
    save_json(path.with_suffix(".json"), record)
    print(f"written: {path}.png and .json")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser((__doc__ or "").split("\n")[0], f"results/{NAME}")
    parser.add_argument(
        "--lora", action="store_true", help="train adapters in all layers, instead of the last --layers"
    )
    options = parse(parser, arguments)
    try:
        run(options)
    except ShowsNothingError as error:
        print(f"nothing to show: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finetune_transformers.py is the one that resumes", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
