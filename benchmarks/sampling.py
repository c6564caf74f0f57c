"""What row_sampling leaves out, and saves, on real text.

    python -m benchmarks.sampling corpus.jsonl --tokenizer TOKENIZER --output results/sampling.json

The targets of a corpus, as `pdl-kernels count --append-eos` counts them, in batches as they come. For each alpha: the
share of rows that stay out of the backward products, over all batches; and the time of forward + backward of
`pdl_linear_cross_entropy` on random hidden states with the first batch's targets, with and without sampling in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import environment
from benchmarks.results import write_record
from pdl_kernels import PowerLawWeighting, TokenCounts, pdl_linear_cross_entropy
from pdl_kernels.cli.arguments import load_tokenizer
from pdl_kernels.data.corpora import open_corpus
from pdl_kernels.data.tokenizers import encoder_of, end_of_text_id, vocab_size_of
from pdl_kernels.ops.row_sampling import sample_rows

ALPHAS = (0.4, 0.75, 1.0)


def targets_of(corpus: str, tokenizer: Any) -> Tensor:
    """(T,) every token that a causal model predicts: all but each text's first, and EOS after each text."""
    encode, end = encoder_of(tokenizer, False), end_of_text_id(tokenizer)
    texts = list(open_corpus([corpus]).rows)
    return torch.tensor([token for ids in encode(texts) for token in [*ids[1:], end]])


def batches(targets: Tensor, size: int) -> Iterator[Tensor]:
    yield from targets[: len(targets) // size * size].view(-1, size)


def left_out(targets: Tensor, weights: Tensor, share: float, batch: int) -> float:
    """The share of all rows that do not enter the backward products, a new seed for each batch."""
    out = [
        1 - sample_rows(weights[rows], share, torch.tensor(float(step))).kept.double().mean().item()
        for step, rows in enumerate(batches(targets, batch))
    ]
    return statistics.mean(out)


def step_seconds(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, share: float) -> float:
    hidden.grad = head.grad = None
    start = time.perf_counter()
    pdl_linear_cross_entropy(hidden, head, targets, weights, row_sampling=share, seed=0).backward()
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("corpus", help="a file as `pdl-kernels count` takes it")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--share", type=float, default=2**-6, help="row_sampling (default 2**-6)")
    parser.add_argument("--batch", type=int, default=8192, help="rows (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the timed step (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/sampling.json"))
    options = parser.parse_args(arguments)

    try:
        tokenizer = load_tokenizer(options.tokenizer)
        targets = targets_of(options.corpus, tokenizer)
        if len(targets) < options.batch:
            found = f"{options.corpus} has {len(targets)} targets"
            raise ValueError(f"{found}; accepted are at least as many as --batch, {options.batch}")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = TokenCounts(vocab_size_of(tokenizer)).update(targets, shift=False)
    torch.manual_seed(0)
    hidden = torch.randn(options.batch, options.hidden, requires_grad=True)
    head = (torch.randn(counts.vocab_size, options.hidden) / options.hidden**0.5).requires_grad_()
    first = next(batches(targets, options.batch))
    found = []
    for alpha in tqdm(ALPHAS, desc="alpha"):
        weights = PowerLawWeighting(alpha=alpha).table(counts)
        seconds: dict[str, list[float]] = {"all rows": [], "sampled": []}
        step_seconds(hidden, head, first, weights, options.share)  # warm-up
        for _ in range(options.rounds):
            seconds["all rows"].append(step_seconds(hidden, head, first, weights, 0.0))
            seconds["sampled"].append(step_seconds(hidden, head, first, weights, options.share))
        out = left_out(targets, weights, options.share, options.batch)
        found.append({"alpha": alpha, "left_out": out, "seconds": seconds})

    print("| alpha | rows left out of backward | forward + backward, ms | with row_sampling, ms | times as fast |")
    print("|---|---|---|---|---|")
    for row in found:
        full, sampled = (statistics.median(row["seconds"][name]) for name in ("all rows", "sampled"))
        times = f"{full * 1e3:.0f} | {sampled * 1e3:.0f} | {full / sampled:.2f}"
        print(f"| {row['alpha']:g} | {row['left_out']:.0%} | {times} |")
    record = {
        "environment": environment.describe(torch.device("cpu"), []),
        "targets": len(targets),
        "vocab_size": counts.vocab_size,
        "batch": options.batch,
        "hidden_size": options.hidden,
        "share": options.share,
        "rows": found,
    }
    write_record(options.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
