"""docs/recipes.md: what can run without the frameworks does: their hooks, called as they call them."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


def block(name):
    (found,) = [code for code in BLOCKS if f"class {name}(" in code]
    return found


def test_every_block_is_one_that_is_tested():
    names = [node.name for code in BLOCKS for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    assert names == ["PDLLoss", "UsePDL", "PDLArguments", "PDLPlugin"]  # the first in test_torchtune.py


def run(code, monkeypatch, **modules):
    """The names that a block defines, where these modules stand in for a framework."""
    for name, contents in modules.items():
        parts = name.split("__")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
        vars(sys.modules[".".join(parts)]).update(contents)
    names = {"__name__": "recipe"}
    exec(code, names)
    return names


@pytest.fixture
def trained(tmp_path):
    """A Trainer of two steps of two unequal micro-batches, its rows, and the gradients of each step."""
    models = pytest.importorskip("helpers.trainer_models", reason="it needs transformers")
    transformers = models.transformers

    class Gradients(transformers.TrainerCallback):
        def __init__(self):
            self.found = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **events):
            self.found.append({name: p.grad.detach().clone() for name, p in model.named_parameters()})

    rows = models.make_rows(8)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=2,
        learning_rate=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )

    def train(model, callbacks=(), before=lambda trainer: None):
        gradients = Gradients()
        trainer = transformers.Trainer(model, arguments, models.collate, rows, callbacks=[*callbacks, gradients])
        before(trainer)
        trainer.train()
        assert len(gradients.found) == 2
        for number, found in enumerate(gradients.found):
            window = rows[4 * number : 4 * number + 4]
            expected = models.big_batch_gradients(models.make_model("llama"), window, models.make_weights())
            assert models.relative_error(found, expected) < 1e-5
        assert "nll" in trainer.state.log_history[0]

    return models, train


def test_callbacks_of_llamafactory(trained, monkeypatch):
    """It passes them to its Trainer; PDLCallback checks each step."""
    models, train = trained
    names = run(block("UsePDL"), monkeypatch, llamafactory__train__tuner={"run_exp": None})
    loss = names["pdl_loss_function"](models.make_weights())
    train(models.make_model("llama"), [names["UsePDL"](loss), names["PDLCallback"](loss)])


def test_plugin_of_axolotl(trained, monkeypatch, tmp_path):
    models, train = trained
    from pdl_kernels import save_weights

    names = run(block("PDLPlugin"), monkeypatch, axolotl__integrations__base={"BasePlugin": object})
    assert names["PDLPlugin"]().get_input_args().endswith("." + names["PDLArguments"].__name__)
    path = str(tmp_path / "weights.safetensors")
    save_weights(path, models.make_weights())
    config, plugin, model = names["PDLArguments"](pdl_weights=path), names["PDLPlugin"](), models.make_model("llama")
    plugin.post_model_load(config, model)
    train(model, before=lambda trainer: plugin.post_trainer_create(config, trainer))
