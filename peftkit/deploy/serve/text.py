"""Tokens become text as they come, up to where a client wants it to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Text of a growing answer. Whatever may be the beginning of a stop string is held back until that is known."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._decoder = DecodeStream([], skip_special_tokens=True)
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; it and what follows are not part of the text."""

    def push(self, token: int) -> str:
        """The text that is certain with this token; nothing while a character or a stop string may be unfinished."""
        text = self._held + (self._decoder.step(self._backend, token) or "")
        ends = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held, self.stopped = "", True
            return text[: min(ends)]
        kept = max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was held back, when nothing more will come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many of the last characters are the first ones of the stop string."""
        longest = min(len(stop) - 1, len(text))
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
