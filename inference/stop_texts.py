"""Texts that end an answer when they come up in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

SPARE_TOKENS = 8  # that may spell nothing: parts of characters, special tokens


class StopTexts:
    """Looks for texts in answers that grow token by token."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        if not all(texts):
            raise ValueError("an empty stop text ends every answer at once; leave it out")
        self._texts = tuple(texts)
        self._decode = decode
        # Those that a text can have come up with, if each of them spells a byte or more.
        self._num_tokens = SPARE_TOKENS + max((len(text.encode()) for text in texts), default=0)

    def are_in(self, token_ids: Sequence[int]) -> bool:
        """Whether one of them came up with the newest token."""
        tail = self._decode(token_ids[-self._num_tokens :])
        return any(text in tail for text in self._texts)

    def cut(self, text: str) -> str:
        """`text` before the first of them."""
        found = [place for each in self._texts if (place := text.find(each)) >= 0]
        return text[: min(found)] if found else text
