"""The recipe for torchtune in docs/recipes.md, in torchtune's own recipe for fine-tuning, on a CPU."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchtune")

import torchtune
from omegaconf import OmegaConf
from torchtune.models.llama3 import llama3

from pdl_kernels import save_weights

ROOT = Path(__file__).resolve().parents[2]
STOCK = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
V = 64
W = 0.1 + 2.9 * torch.rand(V, generator=torch.Generator().manual_seed(0))
MODEL = {
    "vocab_size": V,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "embed_dim": 16,
    "max_seq_len": 32,
    "intermediate_dim": 16,
}
ROWS, PIECES = 8, 4  # and as many micro-batches a step, of one row
DATA = """
class Tokenizer:
    pad_id = 0


def dataset(tokenizer):
    import torch

    torch.manual_seed(0)
    rows = []
    for length in (3, 14, 2, 9, 6, 20, 4, 5):
        tokens = torch.randint(1, 64, (length,)).tolist()
        rows.append({"tokens": tokens, "labels": [-100, *tokens[1:]]})
    return rows
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The module that the page shows, and data, where torchtune finds them."""
    blocks = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL | re.MULTILINE)
    (code,) = [block for block in blocks if "class PDLLoss" in block]
    (tmp_path / "torchtune_pdl.py").write_text(code)
    (tmp_path / "tiny_data.py").write_text(DATA)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("torchtune_pdl", "tiny_data"):
        sys.modules.pop(name, None)


def make_recipe(folder, loss):
    torch.manual_seed(0)
    model = llama3(**MODEL)
    (folder / "start").mkdir()
    torch.save(model.state_dict(), folder / "start" / "model.pt")
    config = {
        "device": "cpu",
        "dtype": "fp32",
        "seed": 0,
        "output_dir": str(folder / "out"),
        "resume_from_checkpoint": False,
        "gradient_accumulation_steps": PIECES,
        "optimizer_in_bwd": False,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "compile": False,
        "shuffle": False,
        "batch_size": 1,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(folder)},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpoint_dir": str(folder / "start"),
            "checkpoint_files": ["model.pt"],
            "output_dir": str(folder / "out"),
            "model_type": "LLAMA3",
        },
        "model": {"_component_": "torchtune.models.llama3.llama3", **MODEL},
        "tokenizer": {"_component_": "tiny_data.Tokenizer"},
        "dataset": {"_component_": "tiny_data.dataset"},
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1},
        "loss": loss,
    }
    spec = importlib.util.spec_from_file_location("full_finetune_single_device", STOCK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = OmegaConf.create(config)
    recipe = module.FullFinetuneRecipeSingleDevice(cfg=config)
    recipe.setup(cfg=config)
    return recipe, model


def expected_of(model, rows, weights):
    """Loss and gradients of all rows of a step, in plain torch."""
    total = 0
    for row in rows:
        logits = model(torch.tensor([row["tokens"]]))[0, :-1].double()
        total = total + F.cross_entropy(logits, torch.tensor(row["labels"][1:]), weight=weights, reduction="sum")
    loss = total / sum(len(row["tokens"]) - 1 for row in rows)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("weights", [W, None], ids=["weights", "without"])
def test_two_steps(weights, page):
    """Their gradients and logs are those of one batch of the step's rows, whatever the micro-batches."""
    loss = {"_component_": "torchtune_pdl.PDLLoss", "weights": None}
    if weights is not None:
        save_weights(page / "weights.safetensors", weights)
        loss["weights"] = str(page / "weights.safetensors")
    recipe, model = make_recipe(page, loss)
    rows = __import__("tiny_data").dataset(None)
    step, losses = recipe._optimizer.step, []

    def compare():
        model.load_state_dict(recipe._model.state_dict())
        number = len(losses)
        expected, gradients = expected_of(
            model, rows[number * PIECES :][:PIECES], None if weights is None else weights.double()
        )
        losses.append(float(expected.detach()))
        for parameter, gradient in zip(recipe._model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        step()

    recipe._optimizer.step = compare
    recipe.train()
    logs = "".join(path.read_text() for path in page.glob("log_*.txt"))
    logged = [float(number) for number in re.findall(r"loss:([\d.]+)", logs)]
    assert logged == pytest.approx(losses, rel=1e-5)
    assert len(losses) == ROWS // PIECES
