"""What the package asks of a tokenizer, whichever library it comes from."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]

ACCEPTED = "a transformers tokenizer or a tokenizers.Tokenizer"


def _is_transformers(tokenizer: Any) -> bool:
    return callable(tokenizer) and hasattr(tokenizer, "all_special_ids")


def _is_tokenizers(tokenizer: Any) -> bool:
    return hasattr(tokenizer, "encode_batch") and hasattr(tokenizer, "get_added_tokens_decoder")


def encoder_of(tokenizer: Any, add_special_tokens: bool) -> Encode:
    """A function from texts to lists of ids."""
    if _is_transformers(tokenizer):
        warn_if_slow(tokenizer)
        return lambda texts: tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    if _is_tokenizers(tokenizer):
        whole = _without_padding_and_truncation(tokenizer)
        return lambda texts: [e.ids for e in whole.encode_batch(list(texts), add_special_tokens=add_special_tokens)]
    if callable(tokenizer):
        return lambda texts: [tokenizer(text) for text in texts]
    raise TypeError(
        f"tokenizer is a {type(tokenizer).__name__}; accepted are {ACCEPTED}, or a function from a string to ids"
    )


def warn_if_slow(tokenizer: Any) -> None:
    """Warn of one that takes texts one at a time."""
    if not getattr(tokenizer, "is_fast", True):
        warnings.warn(
            f"{type(tokenizer).__name__} is a tokenizer in Python, a text at a time: one of the `tokenizers` library, "
            "where the model has one, is many times faster",
            stacklevel=4,
        )


def encoded(encode: Encode, texts: Sequence[str], names: Sequence[object]) -> Sequence[Sequence[int]]:
    """What `encode` makes of the texts. ValueError, with its name: one that holds half a character."""
    try:
        return encode(texts)
    except (TypeError, UnicodeEncodeError):
        for text, name in zip(texts, names, strict=True):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{name}: it holds a lone surrogate, which is no character; accepted is text"
                ) from None
        raise


def _without_padding_and_truncation(tokenizer: Any) -> Any:
    """Embedding models' tokenizer.json files switch both on; transformers' tokenizers, when called, leave them off."""
    if tokenizer.padding is None and tokenizer.truncation is None:
        return tokenizer
    whole = copy.deepcopy(tokenizer)  # the caller's stays as it is
    whole.no_padding()
    whole.no_truncation()
    return whole


def vocab_size_of(tokenizer: Any) -> int:
    """The tokenizer's length, added tokens included."""
    if _is_transformers(tokenizer):
        return len(tokenizer)
    if _is_tokenizers(tokenizer):
        return int(tokenizer.get_vocab_size(with_added_tokens=True))
    raise ValueError("vocab_size is missing; accepted is an integer >= 1 where the tokenizer is a function")


def name_of(tokenizer: Any) -> str | None:
    return getattr(tokenizer, "name_or_path", None) or None


def end_of_text_id(tokenizer: Any) -> int:
    """The id of EOS, which only transformers' tokenizers know."""
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        raise ValueError("the tokenizer names no EOS token (eos_token_id); append its id to the texts' ids yourself")
    return int(eos)


def end_of_text(tokenizer: Any) -> str:
    """The text of EOS, which only transformers' tokenizers know."""
    eos = getattr(tokenizer, "eos_token", None)
    if eos is None:
        raise ValueError("the tokenizer names no EOS token (eos_token); append_eos=False counts completions without it")
    return str(eos)


def special_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all special tokens, in order: what `neutral_ids` of a weighting takes.

    A transformers tokenizer's `all_special_ids` holds only the named ones (bos, eos, pad, ...); added tokens that are
    flagged special, such as those of a chat template, belong to them: 17 instead of 3 in SmolLM2's tokenizer.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`. TypeError otherwise.
    """
    if _is_transformers(tokenizer):
        named = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
    elif _is_tokenizers(tokenizer):
        named, added = set(), tokenizer.get_added_tokens_decoder()
    else:
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; accepted is {ACCEPTED}")
    return tuple(sorted(named | {index for index, token in added.items() if token.special}))


def token_text(tokenizer: Any, index: int) -> str | None:
    """The token as a reader sees it: its own text, not decoded inside a sequence. None where there is no such id."""
    if _is_transformers(tokenizer):
        text = tokenizer.decode([index], clean_up_tokenization_spaces=False)
        # Bytes that are no character on their own decode to a replacement sign, which tells nothing.
        return text if text and "�" not in text else tokenizer.convert_ids_to_tokens(index)
    if not _is_tokenizers(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; accepted is {ACCEPTED}")
    text = tokenizer.decode([index], skip_special_tokens=False)
    return text if text and "�" not in text else tokenizer.id_to_token(index)
