"""One vocabulary of nine words behind both tokenizer libraries."""

import pytest

WORDS = ("<unk>", "<s>", "</s>", "<pad>", "ant", "bee", "cat", "dog")
UNK, BOS, EOS, PAD, ANT, BEE, CAT, DOG, TURN = range(9)
TURN_TEXT = "<|turn|>"  # an added special token that no role such as bos names


def make_tokenizer(bos=True):
    """A `tokenizers.Tokenizer` that splits at spaces and puts BOS in front."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*WORDS[BOS : PAD + 1], TURN_TEXT])
    if bos:
        template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.post_processor = template
    return tokenizer


def make_transformers_tokenizer(bos=True, **options):
    """The same as a `transformers.PreTrainedTokenizerFast`."""
    transformers = pytest.importorskip("transformers")
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(bos), **(roles | options))
