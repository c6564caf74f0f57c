"""A byte-level BPE tokenizer with merges and the special tokens of two families of chat models."""

import functools

import pytest

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
FAMILIES = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
}
SENTENCES = (
    "system\n\nYou are a helpful assistant.\n",
    "user\n\nWhat is the weather like in the north today, and whatever will it be?\n\n",
    "assistant\n\nThe weather is fine; the wind is weaker than yesterday.\n",
    "Count the tokens that a model is trained on, not the tokens of the prompts.\n",
    '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
)

# Generation markers as Qwen's and SmolLM's training templates have them; `style` is an option of a row.
CHATML = """\
{%- if style is defined %}{{ '<|im_start|>style\\n' + style + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

UNMARKED = "{% for message in messages %}{{ message.role + ': ' + message.content + '<|im_end|>\\n' }}{% endfor %}"


@functools.cache
def trained_bpe():
    """A `tokenizers.Tokenizer`; its vocabulary is that of all tokenizers here."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def make_chat_tokenizer(family="qwen", chat_template=CHATML):
    """A new `transformers.PreTrainedTokenizerFast`; one of the llama family puts BOS in front of texts."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizers.Tokenizer.from_str(trained_bpe().to_str())
    if family == "llama":
        bos = FAMILIES[family]["bos_token"]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **FAMILIES[family])
    made.chat_template = chat_template
    return made


def tokenizer(side="right"):
    """One that pads on this side."""
    made = make_chat_tokenizer()
    made.padding_side = side
    return made
