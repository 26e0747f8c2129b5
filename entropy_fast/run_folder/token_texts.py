"""The text of every response token by itself, so that the pieces of a response put together are the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTexts"]

NO_CHARACTER = "\ufffd"  # what decoders put for bytes that are no character (yet)
LONGEST = 8  # tokens that one character may be spread over; what is no character after that is none


class TokenTexts:
    """Takes responses apart.

    A token's text depends on those before it: decoders drop a blank at the beginning, and a character may be spread over
    several tokens. So what a token adds is the difference of two decodings, of the tokens since the last whole character with
    and without it. All but the last token of a spread character add nothing.

    Args:
        tokenizer: of the policy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._known: dict[tuple[int, ...], str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens together, special ones by their names."""
        decode = self._tokenizer.decode
        return str(decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def pieces(self, before: int | None, ids: Sequence[int]) -> list[str]:
        """What every token of a response adds.

        Args:
            before: the token in front of the response; None where there is none.
            ids: of the response.
        """
        whole = [] if before is None else [before]
        open_since, found = len(whole), []
        tokens = [*whole, *ids]
        for end in range(len(whole) + 1, len(tokens) + 1):
            context = tokens[max(0, open_since - 1) : open_since]
            held, seen = self._short(context), self._short([*context, *tokens[open_since:end]])
            if seen.endswith(NO_CHARACTER) and end - open_since < LONGEST and end < len(tokens):
                found.append("")
                continue
            found.append(seen[len(held) :] if seen.startswith(held) else self._short(tokens[open_since:end]))
            open_since = end
        return found

    def _short(self, ids: Sequence[int]) -> str:
        """The same of a few tokens, which come again and again."""
        key = tuple(ids)
        if key not in self._known:
            self._known[key] = self.text(ids)
        return self._known[key]
