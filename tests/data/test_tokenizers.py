"""What the package asks of a tokenizer."""

import pytest
from helpers.tokenizers import BOS, EOS, PAD, TURN, TURN_TEXT, UNK, WORDS, make_tokenizer, make_transformers_tokenizer

from pdl_kernels import special_token_ids
from pdl_kernels.data.tokenizers import token_text, vocab_size_of

TOKENIZERS = {"transformers": make_transformers_tokenizer, "tokenizers": make_tokenizer}


def test_special_tokens_that_have_no_role_are_found():
    tokenizer = make_transformers_tokenizer()
    assert TURN not in tokenizer.all_special_ids, "otherwise this test shows nothing"
    assert special_token_ids(tokenizer) == (UNK, BOS, EOS, PAD, TURN)


def test_added_tokens_that_are_words_are_not_special():
    tokenizer = make_transformers_tokenizer()
    tokenizer.add_tokens(["eel"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    eel, tool = tokenizer.convert_tokens_to_ids(["eel", "<|tool|>"])
    assert special_token_ids(tokenizer) == (UNK, BOS, EOS, PAD, TURN, tool)
    assert eel == TURN + 1


def test_special_tokens_of_a_tokenizers_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["eel"])
    assert special_token_ids(tokenizer) == (BOS, EOS, PAD, TURN)


@pytest.mark.parametrize("tokenizer", [None, "gpt2", str.split], ids=["none", "str", "function"])
def test_special_tokens_of_something_else(tokenizer):
    with pytest.raises(TypeError, match=r"tokenizer is a \w+; accepted is a transformers tokenizer"):
        special_token_ids(tokenizer)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_and_size(kind):
    tokenizer = TOKENIZERS[kind]()
    assert [token_text(tokenizer, index) for index in range(TURN + 1)] == [*WORDS, TURN_TEXT]
    assert token_text(tokenizer, TURN + 100) is None
    assert vocab_size_of(tokenizer) == TURN + 1


@pytest.mark.parametrize("kind", ["transformers", "tokenizers"])
def test_pieces_of_characters_are_shown_as_the_vocabulary_has_them(kind):
    """A byte that is no character on its own decodes to a replacement sign, for all of them the same."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    first, last = tokenizer.encode("é").ids
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = [token_text(tokenizer, index) for index in (first, last)]
    assert texts == [alphabet[first], alphabet[last]]
    assert token_text(tokenizer, alphabet.index("Ġ")) == " "
