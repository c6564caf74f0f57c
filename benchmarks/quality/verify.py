"""Are the recorded scores those of the recorded texts? Makes the held-out pairs anew from the data and scores again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality import records
from benchmarks.quality.errors import UserError
from benchmarks.quality.language_model import load_tokenizer
from benchmarks.quality.matrix import describe_references, scores_against_references
from benchmarks.quality.metrics.per_text import common_words_of
from benchmarks.quality.prepare import choose_pairs, digest_of, pairs_of
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import TASKS


def verify(folder: Path, tasks: Sequence[str]) -> None:
    """UserError at the first record whose scores are others; prints how many sets of texts were scored."""
    for task in tasks:
        path = records.task_path(folder, task)
        if not path.exists():
            print(f"{task}: no records in {folder}")
            continue
        document = records.read(path)
        settings = Settings(**document["settings"])
        chosen = choose_pairs(TASKS[task], load_tokenizer(settings.model), settings)
        held_out = pairs_of(chosen["held_out"])
        if digest_of(held_out) != document["held_out_digest"]:
            raise UserError(
                f"{task}: the held-out pairs were made from {document['versions']}; here are "
                f"{chosen['made from']['versions']}, which give others"
            )
        common_words = common_words_of([pair.reference for pair in pairs_of(chosen["training"])])
        if document["references"] != describe_references(held_out, common_words):
            raise UserError(f"{path}: the recorded scores of the references are not those of the references")
        count = 0
        for file in tqdm(sorted(path.parent.glob("*-seed*.json.xz")), desc=task, unit="model", leave=False):
            run = records.read(file)
            for name, kept in run["texts"].items():
                if kept["scores"] != scores_against_references(kept["texts"], held_out, common_words):
                    raise UserError(f"{file}, {name}: the recorded scores are not those of the recorded texts")
                count += 1
        print(f"{task}: {count} sets of {len(held_out)} texts have the scores that are recorded")
