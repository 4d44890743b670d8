"""A Modelfile for Ollama: the model's own chat template as a Go template, its stop tokens, its default system prompt.

Ollama does not read Jinja. The template is taken apart instead: a conversation of marked words is rendered, and what
stands between the words is what each role is wrapped in. It is accepted only where those pieces render a longer
conversation, with and without a system prompt, to the very text that the tokenizer renders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.data.chat import ExampleFault, Message, render_prompt
from peftkit.errors import BackboneError

MODELFILE_NAME = "Modelfile"
_SYSTEM, _USER, _ASSISTANT, _NEXT = "zqsystemzq", "zqfirstzq", "zqanswerzq", "zqsecondzq"
_LATER, _LAST = "zqlaterzq", "zqlastzq"


@dataclass(frozen=True, slots=True)
class TurnWraps:
    """What a chat template puts around each turn.

    Attributes:
        system: where a system prompt stands: a turn of its own, inside the first or the last user's turn, or nowhere.
        before_system: text before it; with `inside`, nothing.
        after_system: text behind it.
        before_user: text before a user's words.
        after_user: text behind them, up to where the assistant begins.
        before_assistant: text that a model writes before its words, and a template puts before past ones.
        after_assistant: text behind an answer.
        default_system: the system prompt of a conversation that brings none; None where there is none.
    """

    system: Literal["turn", "first", "last", "none"]
    before_system: str
    after_system: str
    before_user: str
    after_user: str
    before_assistant: str
    after_assistant: str
    default_system: str | None = None

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of a conversation that ends with the user, given the Go template below."""
        system = next((each["content"] for each in messages if each["role"] == "system"), self.default_system)
        turns = [each for each in messages if each["role"] != "system"]
        text = ""
        if system is not None and self.system == "turn":
            text = self.before_system + system + self.after_system
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                text += self.before_assistant + turn["content"] + self.after_assistant
                continue
            chosen = {"first": 0, "last": len(turns) - 1}.get(self.system)
            inside = system + self.after_system if system is not None and index == chosen else ""
            text += self.before_user + inside + turn["content"] + self.after_user
        return text

    def to_go(self) -> str:
        """The same as a Go template over Ollama's `.Messages`, a system prompt being the first of them."""
        user = "{{ .Content }}"
        if self.system in ("first", "last"):
            first = "eq $index 1" if self.system == "first" else "eq (len (slice $.Messages $index)) 1"
            user = f"{{{{ if and ({first}) $.System }}}}{{{{ $.System }}}}{self.after_system}{{{{ end }}}}{user}"
        pieces = {
            "system": f"{self.before_system}{{{{ .Content }}}}{self.after_system}" if self.system == "turn" else "",
            "user": self.before_user + user + self.after_user,
            "assistant": f"{self.before_assistant}{{{{ .Content }}}}{self.after_assistant}",
        }
        turns = [f'{{{{ if eq .Role "{role}" }}}}{piece}{{{{ end }}}}' for role, piece in pieces.items() if piece]
        return "{{- range $index, $message := .Messages }}" + "".join(turns) + "{{ end }}"


def read_wraps(tokenizer: Any, name: str) -> TurnWraps:
    """Take the tokenizer's chat template apart, BOS left to the engine where the tokenizer puts it there.

    Raises:
        BackboneError: no template, or one that does more than wrap its turns.
    """
    if tokenizer.chat_template is None:
        raise BackboneError(
            f"{name} has no chat template, and Ollama's models are chat models. Train with task=chat on a chat "
            "backbone, or serve the GGUF with llama.cpp."
        )
    found = _take_apart(tokenizer)
    if found is None or not _renders_alike(found, tokenizer):
        raise BackboneError(
            f"the chat template of {name} does more than wrap each turn, and Ollama does not read Jinja. Serve the "
            "GGUF with llama.cpp, which renders it as it is: llama-server --jinja -m FILE."
        )
    if any(mark in text for text in _texts(found) for mark in ("{{", "}}", '"""')):
        raise BackboneError(f"the chat template of {name} holds braces or quotes that a Modelfile cannot.")
    return found


def write_modelfile(
    folder: Path, *, model: str, adapter: str | None, wraps: TurnWraps, stops: Sequence[str], context: int
) -> None:
    """Write the Modelfile beside the GGUF files that it names."""
    lines = [f"FROM ./{model}"]
    if adapter:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f'TEMPLATE """{wraps.to_go()}"""')
    if wraps.default_system is not None:
        lines.append(f'SYSTEM """{wraps.default_system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    lines.append(f"PARAMETER num_ctx {context}")
    (folder / MODELFILE_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _take_apart(tokenizer: Any) -> TurnWraps | None:
    """The pieces between marked words; None where the words do not come out once and in order."""
    talk: list[Message] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "user", "content": _NEXT},
    ]
    plain = _between(tokenizer, talk, (_USER, _ASSISTANT, _NEXT))
    if plain is None or not plain[1].startswith(plain[3]):
        return None
    opening, turn, between, after_user = plain
    lead = turn.removeprefix(after_user)
    spoken = _between(tokenizer, [{"role": "system", "content": _SYSTEM}, *talk], (_SYSTEM, _USER, _ASSISTANT, _NEXT))
    if spoken is not None and spoken[0] == opening:
        return TurnWraps("first", "", spoken[1], opening, after_user, lead, between.removesuffix(opening))
    if spoken is not None:
        before, inside = spoken[:2]
        given = None
        user = opening if inside.endswith(opening) else _shared_end(inside, between)
        if opening.startswith(before) and opening.endswith(inside) and len(opening) > len(before) + len(inside):
            given = opening[len(before) : len(opening) - len(inside)]
        ends = inside.removesuffix(user), between.removesuffix(user)
        return TurnWraps("turn", before, ends[0], user, after_user, lead, ends[1], given)
    late = _between(tokenizer, [{"role": "system", "content": _SYSTEM}, *talk], (_USER, _ASSISTANT, _SYSTEM, _NEXT))
    if late is not None:
        return TurnWraps("last", "", late[3], opening, after_user, lead, between.removesuffix(opening))
    return TurnWraps("none", "", "", opening, after_user, lead, between.removesuffix(opening))


def _renders_alike(wraps: TurnWraps, tokenizer: Any) -> bool:
    """Whether the pieces render conversations that they were not taken from."""
    long: list[Message] = [
        {"role": "user", "content": _USER},
        {"role": "assistant", "content": _ASSISTANT},
        {"role": "user", "content": _NEXT},
        {"role": "assistant", "content": _LATER},
        {"role": "user", "content": _LAST},
    ]
    talks = [long[:1], long[:3], long]
    if wraps.system != "none":
        talks += [[{"role": "system", "content": _SYSTEM}, *talk] for talk in talks]
    return all(_rendered(tokenizer, talk) == wraps.render(talk) for talk in talks)


def _between(tokenizer: Any, talk: Sequence[Message], words: Sequence[str]) -> list[str] | None:
    """The text before, between and behind words that must come in this order, each once."""
    text = _rendered(tokenizer, talk)
    if text is None or any(text.count(word) != 1 for word in words):
        return None
    pieces = []
    for word in words:
        piece, found, text = text.partition(word)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _rendered(tokenizer: Any, talk: Sequence[Message]) -> str | None:
    """What the tokenizer renders, without the BOS that it puts in front of any text itself; None where it refuses."""
    try:
        text = render_prompt(talk, tokenizer, None)
    except ExampleFault:
        return None
    bos = tokenizer.bos_token
    adds = bos is not None and tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    return text.removeprefix(bos) if adds else text


def _shared_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _texts(wraps: TurnWraps) -> list[str]:
    return [str(getattr(wraps, key) or "") for key in wraps.__slots__]
