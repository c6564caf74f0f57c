"""Tiny models of transformers, rows of unequal length for them, and the gradient of one big batch to compare with.

Their logits begin near 0, where a forgotten softcap or weight hardly shows; those of `sharp_model` are larger.
"""

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

V = 64
PADDING = 0
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
COMMON = {"vocab_size": V, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
DECODER = SIZES | HEADS | COMMON
T5 = COMMON | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
BART_DROPOUTS = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
BART_SIZES = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 16))}
BART_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
GPT2 = COMMON | {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CAUSAL = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "granite": ("GraniteForCausalLM", "GraniteConfig", DECODER | {"logits_scaling": 4.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", DECODER | {"logit_scale": 0.25}),
}
ENCODER_DECODER = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"decoder_start_token_id": PADDING}),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        COMMON | {"d_model": 16} | BART_DROPOUTS | BART_SIZES | BART_HEADS,
    ),
}
OPT = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "dropout": 0.0}
MORE_CAUSAL = {
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),  # its output layer has a bias
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        DECODER | {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", COMMON | OPT),
}


def make_model(name, seed=0, **changes):
    """A tiny model in training mode, the same for the same seed, without dropout."""
    model, config, options = (CAUSAL | ENCODER_DECODER | MORE_CAUSAL)[name]
    torch.manual_seed(seed)
    return getattr(transformers, model)(getattr(transformers, config)(**options | changes)).train()


def sharp_model(name, **changes):
    """A model whose logits differ by some units, and whose biases are not 0."""
    model = make_model(name, **changes)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(20)
        for bias in (head.bias, getattr(model, "final_logits_bias", None)):
            if bias is not None:
                bias.copy_(torch.linspace(-2, 2, bias.shape[-1]))
    return model


def make_weights(seed=0):
    """(V,) weights between 0.1 and 3."""
    return 0.1 + 2.9 * torch.rand(V, generator=torch.Generator().manual_seed(seed))


def make_rows(number=8, seed=0, longest=16):
    """Rows of input ids and labels of unequal length, with a masked beginning of unequal length."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(number):
        length = draw(4, longest)
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        masked = draw(0, length - 2)
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def without_weights(rows):
    return [{name: value for name, value in row.items() if name != "token_weights"} for row in rows]


def collate(rows, **more):
    """Rows padded on the right to one batch."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values, fill):
        return torch.tensor([[*row, *[fill] * (length - len(row))] for row in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], PADDING),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], -100),
    }


def next_labels(labels):
    """(B, L) labels of a causal model -> its targets."""
    return F.pad(labels, (0, 1), value=-100)[..., 1:]


def big_batch_gradients(model, rows, weights, count=None):
    """{name: gradient} of sum_i w(y_i) ce_i / n over all rows at once, by torch's cross entropy; the model has none."""
    batch = collate(rows)
    targets = next_labels(batch["labels"])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weights, reduction="sum")
    (total / (targets.ne(-100).sum() if count is None else count)).backward()
    return take_gradients(model)


class Gradients(transformers.TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append(found)


def take_gradients(model):
    """{name: gradient} of the model, which has none afterwards."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def relative_error(found, expected):
    """The largest relative error of a gradient, in the 2-norm, over parameters whose gradient is not rounding alone."""
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    telling = [name for name, value in expected.items() if value.norm() > 1e-4 * largest]
    assert telling
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in telling)
