"""A conversation with a model, in a terminal or through a pipe: lines in, answers out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import TextStreamer, set_seed

from peftkit.data.chat import Message
from peftkit.deploy.generate import write_answer
from peftkit.deploy.usable import Usable, open_usable, refuse_classifier
from peftkit.errors import InputError

COMMANDS = "/reset forgets what was said, /quit ends (so does Ctrl-D), Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Manner:
    """How answers are written. `temperature` 0 takes the likeliest token each time."""

    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


class Conversation:
    """Turns, and the model that takes its own.

    Attributes:
        messages: what was said so far, the system message first if there is one.
    """

    def __init__(self, usable: Usable, manner: Manner, *, write: Callable[[str], None]) -> None:
        """
        Args:
            write: told the answer, piece by piece.
        """
        self._usable, self._manner, self._write = usable, manner, write
        self._opening: list[Message] = [{"role": "system", "content": manner.system}] if manner.system else []
        self.messages = list(self._opening)
        set_seed(manner.seed)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._opening)

    def say(self, text: str) -> tuple[str, int]:
        """The answer to this, and how many of the oldest messages had to be left out for it.

        Raises:
            InputError: this alone is too long, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        fixed, left_out = len(self._opening), 0
        while len(tokens := self._usable.conversation(messages)) > self._room():
            if len(messages) - fixed <= 2:
                raise InputError(
                    f"that is {len(tokens)} tokens, and with {self._manner.max_new_tokens} for the answer there is "
                    f"room for {self._room()}. Say less, or lower --max-new-tokens."
                )
            del messages[fixed : fixed + 2]
            left_out += 2
        streamer = TextStreamer(self._usable.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: self._write(text)
        manner = self._manner
        answer = write_answer(
            self._usable,
            tokens,
            max_new_tokens=manner.max_new_tokens,
            temperature=manner.temperature,
            streamer=streamer,
        )
        told = str(self._usable.tokenizer.decode(answer, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": told}]
        return told, left_out

    def _room(self) -> int:
        """Tokens that a prompt may have beside its answer."""
        longest = self._usable.backbone.dims.max_positions or sys.maxsize
        return longest - self._usable.virtual_tokens - self._manner.max_new_tokens


def open_conversation(reference: str, manner: Manner, *, write: Callable[[str], None]) -> Conversation:
    """Load a run, a model, an adapter or a packaged backbone to talk with.

    Raises:
        InputError: it classifies, or knows no conversations.
    """
    usable = open_usable(reference)
    refuse_classifier(usable, reference)
    if usable.tokenizer.chat_template is None or usable.kind == "completion":
        raise InputError(
            f"{reference} was not made for conversations"
            + (": its tokenizer has no chat template." if usable.tokenizer.chat_template is None else ".")
            + f" Let it go on from a text: peftkit generate {reference} 'Once'."
        )
    return Conversation(usable, manner, write=write)


def converse(
    conversation: Conversation, lines: Iterable[str], *, write: Callable[[str], None], say: Callable[[str], None]
) -> list[Message]:
    """Answer line after line until they end or one is /quit; returns what was said.

    Args:
        lines: what the user says, a line a turn.
        write: told that an answer has ended.
        say: told everything that is no answer.
    """
    for line in lines:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            conversation.reset()
            say("forgotten")
        elif text.startswith("/"):
            say(f"there is no {text.split()[0]}. {COMMANDS}.")
        elif text:
            _turn(conversation, text, write, say)
    return conversation.messages


def _turn(conversation: Conversation, text: str, write: Callable[[str], None], say: Callable[[str], None]) -> None:
    left_out: Any = 0
    try:
        left_out = conversation.say(text)[1]
    except KeyboardInterrupt:
        say("\nstopped; that turn is forgotten")
    except InputError as fault:
        say(str(fault))
        return
    write("\n")
    if left_out:
        say(f"the {left_out} oldest messages no longer fit and were left out")
