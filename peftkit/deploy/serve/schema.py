"""What clients may ask, as OpenAI's API names it. What would be ignored is refused, unless it asks for nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from peftkit.spec import Section


def _asks_nothing(value: Any) -> Any:
    """Refuse a value that the engine would have to heed; clients send the neutral ones along."""
    if value in (None, False, 0, "none", "auto", [], {}, {"type": "text"}):
        return value
    raise ValueError("is not supported by this server: leave it out")


def _asks_for_one(value: int | None) -> int | None:
    if value in (None, 1):
        return value
    raise ValueError("is not supported by this server: ask once for each answer")


Unsupported = Annotated[Any, AfterValidator(_asks_nothing)]
Once = Annotated[int | None, AfterValidator(_asks_for_one)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Asked(Section):
    """What every request may say. Unknown fields are refused."""

    model: str | None = None
    user: str | None = None


class StreamOptions(Section):
    """How a stream ends."""

    include_usage: bool = False


class Sampled(Asked):
    """A request for text."""

    max_tokens: PositiveInt | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Stop | list[Stop] | None = Field(None, max_length=200)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Once = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None
    logprobs: Unsupported = None

    def stops(self) -> list[str]:
        """The strings at which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def wanted_tokens(self) -> int | None:
        """How long the answer may become; None where the client does not say."""
        return self.max_tokens


class TextPart(Section):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Section):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampled):
    """`/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    top_logprobs: Unsupported = None
    tools: Unsupported = None
    tool_choice: Unsupported = None
    response_format: Unsupported = None

    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampled):
    """`/v1/completions`."""

    prompt: str
    echo: Unsupported = None
    suffix: Unsupported = None
    best_of: Once = None


class TextPair(Section):
    """Two texts that are classified together."""

    text: str
    text_pair: str | None = None


class ClassifyRequest(Asked):
    """`/classify`, as vLLM names it; pairs are ours."""

    input: str | TextPair | list[str | TextPair]

    def rows(self) -> list[TextPair]:
        """The texts, in order."""
        given = self.input if isinstance(self.input, list) else [self.input]
        return [TextPair(text=one) if isinstance(one, str) else one for one in given]
