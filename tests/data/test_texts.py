"""Counting texts, by the tokenizers of both libraries and by functions."""

import numpy as np
import pytest
import torch
from helpers.counting import IDS, TEXTS, V, by_hand, from_texts, oracle
from helpers.tokenizers import ANT, BEE, BOS, CAT, EOS, PAD, WORDS, make_tokenizer, make_transformers_tokenizer

from pdl_kernels import TokenCounts

TOKENIZERS = {"transformers": make_transformers_tokenizer, "tokenizers": make_tokenizer}


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts(kind, shift, batch_size):
    tokenizer = TOKENIZERS[kind]()
    for add_special_tokens in (True, False):
        got = from_texts(
            TEXTS, tokenizer, vocab_size=V, shift=shift, add_special_tokens=add_special_tokens, batch_size=batch_size
        )
        rows = [[BOS] * add_special_tokens + row for row in IDS]
        assert got.counts.tolist() == oracle(rows, shift)
        assert got.sequences == len(TEXTS)
    assert from_texts(TEXTS, tokenizer).vocab_size == len(WORDS) + 1


@pytest.mark.parametrize("convert", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "numpy", "torch"])
def test_a_function_as_tokenizer(convert):
    texts = [text for text in TEXTS if text]
    got = from_texts(iter(texts), lambda text: convert(by_hand(text)), vocab_size=V, documents=True)
    assert got == TokenCounts(V, documents=True).update([row for row in IDS if row], shift=True)
    with pytest.raises(ValueError, match="vocab_size is missing"):
        from_texts(TEXTS, by_hand)


@pytest.mark.parametrize("bos", [True, False])
def test_end_of_text(bos):
    tokenizer = make_transformers_tokenizer(bos)
    got = from_texts(TEXTS, tokenizer, vocab_size=V, append_eos=True)
    assert got.counts.tolist() == oracle([[BOS] * bos + row + [EOS] for row in IDS])
    assert got.counts[EOS] == len(TEXTS) - (not bos), "the EOS of an empty text without BOS is at position 0"
    assert "EOS appended" in got.counted


def test_no_end_of_text_to_append():
    for tokenizer in (make_tokenizer(), by_hand, make_transformers_tokenizer(eos_token=None)):
        with pytest.raises(ValueError, match="no EOS token"):
            from_texts(TEXTS, tokenizer, vocab_size=V, append_eos=True)


@pytest.mark.parametrize(
    "kind",
    [
        "transformers",
        "tokenizers",
    ],
)
def test_stored_padding_and_truncation_are_not_counted(kind):
    """tokenizer.json files of embedding models switch both on; counts are of the texts."""
    tokenizer = make_tokenizer()
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    tokenizer.enable_truncation(3)
    if kind == "transformers":
        import transformers

        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    got = from_texts(["ant bee cat ant bee", "cat"], tokenizer, vocab_size=V)
    assert got.counts.tolist() == oracle([[BOS, ANT, BEE, CAT, ANT, BEE], [BOS, CAT]])
    if kind == "tokenizers":
        assert tokenizer.truncation is not None, "the caller's stays as it was"


@pytest.mark.parametrize(
    ("texts", "tokenizer", "error", "message"),
    [
        ("a text", by_hand, TypeError, "texts is a str"),
        (["ant", None], by_hand, TypeError, r"texts\[1\] is null"),
        (["ant", b"bee"], by_hand, TypeError, r"texts\[1\] is of type bytes"),
        (["ant"], "gpt2", TypeError, "tokenizer is a str"),
        (["ant"], None, TypeError, "tokenizer is a NoneType"),
        (["ant bee", "ant"], lambda text: [0, 1, 55][: len(text)], IndexError, r"the tokens of text 0\[2\] is 55"),
    ],
)
def test_bad_texts_and_tokenizers(texts, tokenizer, error, message):
    with pytest.raises(error, match=message):
        from_texts(texts, tokenizer, vocab_size=V, batch_size=1)


def test_one_warning_of_a_tokenizer_in_python():
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.ByT5Tokenizer()  # takes bytes, and needs no file
    with pytest.warns(UserWarning, match="ByT5Tokenizer is a tokenizer in Python") as caught:
        got = from_texts(["ant", "bee", "cat"], tokenizer, batch_size=1)
    assert len(caught) == 1
    assert got.total == 9
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    chats = [[{"role": "assistant", "content": "ant"}]]
    with pytest.raises(ValueError, match="cannot tell which tokens the assistant says; accepted are one of"):
        TokenCounts.from_chats(chats, tokenizer, progress=False)
    with pytest.warns(UserWarning, match="in Python"):
        assert TokenCounts.from_chats(chats, tokenizer, assistant_only_loss=False, progress=False).total == 2


def test_texts_remember_their_tokenizer(tmp_path):
    tokenizer = make_transformers_tokenizer()
    tokenizer.save_pretrained(tmp_path / "animals")
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "animals")
    got = from_texts(TEXTS, loaded)
    assert got.tokenizer == str(tmp_path / "animals")
    assert got.counts.tolist() == from_texts(TEXTS, tokenizer).counts.tolist()
    assert from_texts(TEXTS, by_hand, vocab_size=V).tokenizer is None
