"""The pieces of a response put together are the response, whatever kind of tokenizer made it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from entropy_fast.run_folder.token_texts import NO_CHARACTER, TokenTexts


def by_bytes() -> PreTrainedTokenizerFast:
    """Every byte a token, and a few longer ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate(letters)} | {"ab": 256, "Ġa": 257, "<eos>": 258}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("a", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def by_words() -> PreTrainedTokenizerFast:
    """As sentencepiece has it: a mark for the blank in front of a word, which the first word loses."""
    vocabulary = {"▁what": 0, "▁is": 1, "x": 2, "▁": 3, "<eos>": 4, "<0xC3>": 5, "<0xA4>": 6}
    backend = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


BYTES, WORDS = by_bytes(), by_words()


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@given(st.text(min_size=1, max_size=12), st.sampled_from([None, 0, 258]))
def test_pieces_of_a_text_are_the_text(text, before):
    ids = BYTES(text)["input_ids"]
    pieces = TokenTexts(BYTES).pieces(before, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 258), max_size=16))
def test_any_tokens_have_a_piece_each(ids):
    """Bytes that are no text are marked, no token is lost, and whole characters stand as they are."""
    pieces = TokenTexts(BYTES).pieces(0, ids)
    assert len(pieces) == len(ids)
    whole = decoded(BYTES, ids)
    if NO_CHARACTER not in whole:
        assert "".join(pieces) == whole


def test_a_character_of_several_tokens_stands_at_its_last():
    ids = BYTES("a😀b")["input_ids"]
    assert TokenTexts(BYTES).pieces(None, ids) == ["a", "", "", "", "😀", "b"]
    # A response that ends in the middle of one.
    assert TokenTexts(BYTES).pieces(None, ids[:4]) == ["a", "", "", NO_CHARACTER]


@pytest.mark.parametrize(
    ("before", "ids", "expected"),
    [
        (None, [0, 1, 2], ["what", " is", "x"]),  # decoders drop the first blank
        (0, [1, 2, 4], [" is", "x", "<eos>"]),  # after a prompt there is none to drop
        (1, [0, 5, 6, 1], [" what", "", "ä", " is"]),
        (2, [3, 3, 2], [" ", " ", "x"]),
    ],
)
def test_blanks_of_words(before, ids, expected):
    assert TokenTexts(WORDS).pieces(before, ids) == expected
