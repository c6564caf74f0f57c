"""Tiny models of kinds that `use_pdl_linear_loss` has to treat with care: experts, encoder-decoders, masked tokens."""

import torch

from helpers.trainer_models import BART_DROPOUTS, BART_HEADS, BART_SIZES, COMMON, DECODER, V, transformers

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BART = COMMON | {"d_model": 16} | BART_DROPOUTS | BART_SIZES | BART_HEADS
JETMOE = COMMON | {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "kv_channels": 8} | EXPERTS
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SEEING_ROPE = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
SEEING_TEXT = DECODER | QWEN_EXPERTS | {"hidden_size": 32, "head_dim": 16, "rope_parameters": SEEING_ROPE}
SEEING_EYE = {"depth": 1, "hidden_size": 32, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
SEEING_EYE |= {"patch_size": 4, "deepstack_visual_indexes": [0], "num_position_embeddings": 4}
SEEING_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")  # the last four
SWITCH = COMMON | {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 4}
SWITCH |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "dropout_rate": 0.0}
SWITCH |= {"router_jitter_noise": 0.0, "decoder_start_token_id": 0}
NLLB = BART | {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64}
NLLB |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "moe_token_dropout": 0.0}
BERT = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT_DROPOUTS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODERN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PROPHET = {"vocab_size": V, "hidden_size": 16, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
for side in ("encoder", "decoder"):
    PROPHET |= {f"{side}_ffn_dim": 16, f"num_{side}_layers": 1, f"num_{side}_attention_heads": 2}
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 8, "patch_size": 4}


def build(model, config, **options):
    """The same model for the same arguments, in training mode."""
    torch.manual_seed(0)
    config = getattr(transformers, config)(**options) if isinstance(config, str) else config
    return getattr(transformers, model)(config).train()


def mixtral(**more):
    return build("MixtralForCausalLM", "MixtralConfig", **DECODER | EXPERTS | more)


def granite(**more):
    return build("GraniteMoeForCausalLM", "GraniteMoeConfig", **DECODER | EXPERTS | more)


def jetmoe(coefficient, **more):
    return build("JetMoeForCausalLM", "JetMoeConfig", **JETMOE | {"aux_loss_coef": coefficient} | more)


def qwen(coefficient, **more):
    options = DECODER | QWEN_EXPERTS | {"router_aux_loss_coef": coefficient}
    return build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **options | more)


def seeing_qwen(coefficient, **more):
    """Its coefficient is in the configuration of its text part alone."""
    ids = dict(zip(SEEING_IDS, range(V - 4, V), strict=True))
    text = SEEING_TEXT | {"router_aux_loss_coef": coefficient}
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=SEEING_EYE, **ids, **more)
    return build("Qwen3VLMoeForConditionalGeneration", config)


def switch(**more):
    return build("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **SWITCH | more)


def nllb(**more):
    return build("NllbMoeForConditionalGeneration", "NllbMoeConfig", **NLLB | more)


def translator(name):
    """An encoder-decoder of BART's kind, by the name of its class."""
    config = name.replace("ForConditionalGeneration", "Config").replace("MTModel", "Config")
    return build(name, config, **BART)


def masked(name):
    options = BERT | (BERT_DROPOUTS if name == "Bert" else MODERN_IDS)
    return build(f"{name}ForMaskedLM", f"{name}Config", **options)


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
    return build("WhisperForConditionalGeneration", "WhisperConfig", **BART | sizes)


def prophet():
    return build("ProphetNetForConditionalGeneration", "ProphetNetConfig", **PROPHET)


def seeing_encoder():
    parts = transformers.ViTConfig(**EYE), transformers.BertConfig(**BERT)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return build("VisionEncoderDecoderModel", config)
