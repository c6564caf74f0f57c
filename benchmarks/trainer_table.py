"""The table of docs/training.md, from what tests passed and what memory was measured.

    python -m benchmarks.trainer_table [--write]

Without --write it says whether the table stands as it has to.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pdl_kernels.weights.files import replace_file

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PAGE = ROOT / "docs" / "training.md"
BEGIN = "<!-- routes: written by python -m benchmarks.trainer_table --write -->\n"
END = "<!-- end of routes -->"


class Route(NamedTuple):
    """One way to train with PDL, and the tests that show what it is. Patterns are of names of tests below
    tests/integrations/; every test that one matches must have passed, and one must match; "" is no test."""

    framework: str
    package: str  # whose version is named
    hook: str
    line: str
    accumulation: str
    processes: str
    without_logits: str
    memory: str = ""  # the way of benchmarks.trainer_memory
    compared: str = ""  # and the one that it is compared with


ROUTES = (
    Route(
        "transformers",
        "transformers",
        "a causal model's own loss",
        "model.loss_function = pdl_loss_function(weights)",
        "*::test_gradient_of_a_step[[]*by_loss_function]",
        "test_trainer_ranks.py::test_trainer[[]*",
        "",
        "transformers, model.loss_function",
        "transformers, cross entropy",
    ),
    Route(
        "transformers",
        "transformers",
        "`compute_loss_func`",
        "Trainer(compute_loss_func=pdl_compute_loss(weights))",
        "*::test_gradient_of_a_step[[]*by_compute_loss]",
        "test_trainer_ranks.py::test_trainer[[]*",
        "",
        "transformers, compute_loss_func",
        "transformers, cross entropy",
    ),
    Route(
        "transformers",
        "transformers",
        "the output layer",
        "use_pdl_linear_loss(model, weights)",
        "*::test_gradient_of_a_step[[]*by_linear_loss]",
        "test_trainer_ranks.py::test_trainer[[]*",
        "*linear*::test_no_logits_of_all_tokens",
        "transformers, use_pdl_linear_loss",
        "transformers, cross entropy",
    ),
    Route(
        "TRL",
        "trl",
        "its fused output layer",
        "PDLSFTTrainer(model, args, weights=weights, ...)",
        "*::test_a_step_may_be_cut_as_one_likes*",
        "test_trl_ranks.py::*",
        "test_trl*::test_no_logits",
        "trl, PDLSFTTrainer",
        "trl, cross entropy",
    ),
    Route(
        "Lightning",
        "lightning",
        "`training_step`, on logits",
        "self.configure_pdl(weights)",
        "test_lightning*::test_are_those_of_one_big_batch[[]Model-*",
        "test_lightning*::test_several_processes*",
        "",
        "lightning, logits",
        "lightning, cross entropy",
    ),
    Route(
        "Lightning",
        "lightning",
        "the output layer",
        "self.configure_pdl(use_pdl_linear_loss(network, weights))",
        "test_lightning*::test_are_those_of_one_big_batch[[]LinearModel-*",
        "test_lightning*::test_several_processes*",
        "*linear*::test_no_logits_of_all_tokens",
        "lightning, use_pdl_linear_loss",
        "lightning, cross entropy",
    ),
    Route(
        "accelerate",
        "accelerate",
        "your loop, on logits",
        "pdl_cross_entropy(logits, targets, weights, normalizer=n)",
        "test_accelerate.py::test_the_gradient_of_one_big_batch[[]*logits*",
        "test_accelerate.py::test_several_processes*",
        "",
        "accelerate, logits",
        "accelerate, cross entropy",
    ),
    Route(
        "accelerate",
        "accelerate",
        "the output layer",
        "use_pdl_linear_loss(model, weights)",
        "test_accelerate.py::test_the_gradient_of_one_big_batch[[]*without*",
        "test_accelerate.py::test_several_processes*",
        "*linear*::test_no_logits_of_all_tokens",
        "accelerate, use_pdl_linear_loss",
        "accelerate, cross entropy",
    ),
    Route(
        "torchtitan",
        "torchtitan",
        "`config.loss`, on logits",
        "PDLCrossEntropyLoss.Config(weights=file)",
        "test_torchtitan.py::test_micro_batches_make_one_big_batch[[]logits*",
        "test_torchtitan.py::test_trainer_of_two_processes*",
        "",
    ),
    Route(
        "torchtitan",
        "torchtitan",
        "`config.loss`, chunks of logits",
        "ChunkedLossWrapper.Config(loss_fn=PDLCrossEntropyLoss.Config(weights=file))",
        "test_torchtitan.py::test_micro_batches_make_one_big_batch[[]chunks*",
        "test_torchtitan.py::test_trainer_of_two_processes*",
        "test_torchtitan.py::test_no_logits_of_all_tokens[[]chunks*",
    ),
    Route(
        "torchtitan",
        "torchtitan",
        "`config.loss`, the output layer",
        "PDLLinearCrossEntropyLoss.Config(weights=file)",
        "test_torchtitan.py::test_micro_batches_make_one_big_batch[[]linear*",
        "test_torchtitan.py::test_trainer_of_two_processes*",
        "test_torchtitan.py::test_no_logits_of_all_tokens[[]linear*",
    ),
)
COLUMNS = (
    "framework",
    "hook",
    "one line",
    "exact: accumulation",
    "exact: processes",
    "without logits",
    "tested version",
    "memory of a step",
)


def passed(pattern: str, outcomes: Mapping[str, str]) -> str:
    """What a cell says: "yes", "no" where there is no such test; ValueError where one failed or none was recorded."""
    if not pattern:
        return "no"
    matching = {
        test: outcome
        for test, outcome in outcomes.items()
        if fnmatch.fnmatchcase(test.split("integrations/")[1], pattern)
    }
    if not matching:
        raise ValueError(f"no test that was recorded is called {pattern}")
    failed = [test for test, outcome in matching.items() if outcome != "passed"]
    if failed:
        raise ValueError(f"{failed[0]}: {matching[failed[0]]}")
    return "yes"


def table(record: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for route in ROUTES:
        peak = "not measured"
        if route.memory:
            own, other = (memory["ways"][way]["peak_bytes"] / 2**20 for way in (route.memory, route.compared))
            peak = f"{own:.0f} MiB; cross entropy {other:.0f}"
        tests = (route.accumulation, route.processes, route.without_logits)
        cells = (
            route.framework,
            route.hook,
            f"`{route.line}`",
            *(passed(pattern, record["outcomes"]) for pattern in tests),
            record["versions"][route.package],
            peak,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(text: str, new_table: str) -> str:
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + new_table + text[end:]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args(arguments).write
    record, memory = (json.loads((RESULTS / name).read_text()) for name in ("trainers.json", "trainer_memory.json"))
    text = PAGE.read_text(encoding="utf-8")
    expected = page_with(text, table(record, memory))
    if write:
        replace_file(PAGE, expected.encode())
    elif text != expected:
        print(f"{PAGE} has another table than the records; python -m benchmarks.trainer_table --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
