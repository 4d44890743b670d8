"""Conversations and completions -> tokens, and which of them carry loss.

The mask is made from the rendered template, never from a guess of how a template looks:

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello!<|im_end|>⏎
    └────────── render(messages[:i], generation prompt) ─────┘└ the turn: its answer and its stop token ┘

The text is tokenized once, with offsets. A token carries loss when at least one of its characters lies in a turn, so a
token that straddles the border (prompt ends in a space, the answer's first token begins with it) is learned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from peftkit.data.features import IGNORED
from peftkit.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
TrainOn = Literal["assistant", "last-assistant", "everything"]
Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE: list[Message] = [{"role": "user", "content": "x"}]


class ExampleFault(ValueError):
    """One example cannot be encoded; the caller knows its origin and adds it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example in tokens.

    Attributes:
        input_ids: [T] token ids.
        target: [T] the token at t, or `IGNORED` where no loss is.
        truncated: tokens were cut off at the end.
        answer_cut: some of those carried loss, so the example no longer ends like an answer ends.
    """

    input_ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    truncated: bool
    answer_cut: bool


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    train_on: TrainOn,
    system: str | None,
    max_tokens: int,
) -> Encoded:
    """The conversation through the tokenizer's chat template; the chosen turns carry loss, each up to its stop token.

    Args:
        system: the system message of a conversation that has none.
        max_tokens: what is longer is cut at the end.

    Raises:
        ExampleFault: the template refuses the conversation, an answer is not found in what it renders, or the text
            begins with two BOS tokens.
        BackboneError: the tokenizer has no chat template, or no character offsets.
    """
    conversation = _with_system(messages, system)
    text = _render(conversation, tokenizer)
    spans = [(0, len(text))] if train_on == "everything" else assistant_spans(conversation, text, tokenizer)
    if train_on == "last-assistant":
        spans = _last_turn(conversation, spans, tokenizer)
    ids, offsets = _tokenize(text, tokenizer)
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise ExampleFault(
            f"the rendered conversation begins with two {tokenizer.bos_token!r}: the chat template writes it twice, or "
            "the first message begins with it. Remove one."
        )
    return _encoded(ids, _carries_loss(offsets, spans), max_tokens)


def encode_completion(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, separator: str, max_tokens: int
) -> Encoded:
    """Prompt, separator, completion and the eos token; completion and eos carry loss.

    An empty prompt means plain text: no separator, and every token carries loss. BOS is put in front once, if the
    tokenizer adds one; it carries none.

    Raises:
        ExampleFault: nothing to learn, or the text begins with the BOS that the tokenizer adds.
        BackboneError: the tokenizer has no eos token, or no character offsets.
    """
    lead = prompt + separator if prompt else ""
    if not completion:
        raise ExampleFault("the completion is empty: there is nothing to learn")
    if tokenizer.eos_token_id is None:
        raise BackboneError("the tokenizer has no eos token, so a completion could never end. Use another backbone.")
    ids, offsets = _tokenize(lead + completion, tokenizer)
    loss = _carries_loss(offsets, [(len(lead), len(lead) + len(completion))])
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids, loss = [*ids, tokenizer.eos_token_id], [*loss, True]
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("").input_ids[:1] == [bos]:
        if ids[0] == bos:
            raise ExampleFault(
                f"the text begins with {tokenizer.bos_token!r}, which the tokenizer adds as well. Remove it."
            )
        ids, loss = [bos, *ids], [False, *loss]
    return _encoded(ids, loss, max_tokens)


def render_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, system: str | None) -> str:
    """The conversation as text, up to where the assistant begins to answer.

    Raises:
        ExampleFault: the template refuses the conversation.
        BackboneError: the tokenizer has no chat template.
    """
    return _render(_with_system(messages, system), tokenizer, generation=True)


def stop_token_carries_loss(target: npt.NDArray[np.int32], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last token with loss ends a turn: eos, or a token added to the vocabulary, such as `<|eot_id|>`."""
    learned = target[target != IGNORED]
    return learned.size > 0 and int(learned[-1]) in _stops(tokenizer)[1]


def assistant_spans(messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Character spans of the assistant's turns in `text`, the conversation's rendering, in order.

    They are the template's own `{% generation %}` blocks if it has them, else one span a turn.

    Raises:
        ExampleFault: a turn is not found, or there is none.
    """
    if _GENERATION_MARK.search(_template(tokenizer)):
        spans = _generation_blocks(messages, tokenizer)
    else:
        spans, cursor, header = [], 0, _generation_header(tokenizer, _template(tokenizer))
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(_turn_span(messages, turn, text, cursor=cursor, header=header, tokenizer=tokenizer))
                cursor = spans[-1][1]
    spans = [_ending_with_stop(text, span, tokenizer) for span in spans if span[1] > span[0]]
    if not spans:
        raise ExampleFault("the chat template renders no assistant turn, so nothing carries loss")
    return spans


def _last_turn(messages: Sequence[Message], spans: list[Span], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans of the last assistant turn: one, or as many blocks as the template marks in it."""
    if not _GENERATION_MARK.search(_template(tokenizer)):
        return spans[-1:]
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    earlier = [block for block in _generation_blocks(messages[:last], tokenizer) if block[1] > block[0]] if last else []
    return spans[len(earlier) :]


def _turn_span(
    messages: Sequence[Message], turn: int, text: str, *, cursor: int, header: str, tokenizer: PreTrainedTokenizerBase
) -> Span:
    """The span of one assistant turn: from after the generation prompt to where the template ends the turn."""
    before = _try_render(messages[:turn], tokenizer, generation=True)
    after = _try_render(messages[: turn + 1], tokenizer)
    if before and after and len(after) > len(before) and text.startswith(before) and text.startswith(after):
        if header:
            return len(before), len(after)
        return _answer_at_the_end(messages[turn]["content"], text, (len(before), len(after)), tokenizer)
    return _searched(messages, turn, text, cursor=cursor, header=header, tokenizer=tokenizer)


def _answer_at_the_end(content: str, text: str, span: Span, tokenizer: PreTrainedTokenizerBase) -> Span:
    """The answer within a turn, for a template without generation prompt: its own heading of the turn is no answer."""
    start, end = _ending_with_stop(text, span, tokenizer)
    body = text[start:end].rstrip()
    stop = _stops(tokenizer)[0]
    endings = [found.start() for found in stop.finditer(body) if found.end() == len(body)]
    body = (body[: endings[-1]] if endings else body).rstrip()
    for answer in _forms(content):
        if body.endswith(answer.rstrip()):
            return start + len(body) - len(answer.rstrip()), end
    raise ExampleFault(_not_found(content))


def _searched(
    messages: Sequence[Message], turn: int, text: str, *, cursor: int, header: str, tokenizer: PreTrainedTokenizerBase
) -> Span:
    """The span of a turn that later turns changed (earlier reasoning dropped, another stop token), found by content."""
    head = _try_render(messages[:turn], tokenizer)
    prompt_end: int | None = None
    if head and text.startswith(head):
        prompt_end = len(head) + _shared_length(text[len(head) : len(head) + len(header)], header)
    elif (at := text.find(header, cursor)) >= 0:
        prompt_end = at + len(header)
    for answer in _forms(messages[turn]["content"]):
        found = text.find(answer, cursor if prompt_end is None else prompt_end)
        if found >= 0:
            end = found + len(answer)
            stop = re.compile(rf"\s*(?:{_stops(tokenizer)[0].pattern})").match(text, end)
            start = prompt_end if header and prompt_end is not None else found
            return start, (stop.end() if stop else end)
    raise ExampleFault(_not_found(messages[turn]["content"]))


def _shared_length(text: str, header: str) -> int:
    """Length of the header's beginning that `text` repeats, without half a tag.

    A generation prompt may say more than a finished turn does: it may open `<think>`, where the turn has `<table>`.
    """
    same = next((at for at, (mine, other) in enumerate(zip(text, header, strict=False)) if mine != other), len(text))
    half_tag = header.rfind("<", 0, same)
    return half_tag if same < len(header) and half_tag > header.rfind(">", 0, same) else same


def _forms(content: str) -> list[str]:
    """How a template may write an answer: as it is, trimmed, without its reasoning."""
    forms = (content, content.strip(), content.rpartition("</think>")[2].strip())
    return [form for form in dict.fromkeys(forms) if form]


def _not_found(content: str) -> str:
    shown = content if len(content) <= 40 else content[:40] + "..."
    return f"the answer {shown!r} is not found in what the chat template renders. Use a template with generation marks."


@lru_cache(maxsize=8)
def _generation_header(tokenizer: PreTrainedTokenizerBase, _template: str) -> str:
    """What the tokenizer's template writes before an answer (`<|im_start|>assistant⏎`), or nothing."""
    finished, asked = _try_render(_PROBE, tokenizer), _try_render(_PROBE, tokenizer, generation=True)
    return asked[len(finished) :] if finished and asked and asked.startswith(finished) else ""


def _generation_blocks(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Character spans of the template's `{% generation %}` blocks."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        _, blocks = render_jinja_template(
            conversations=[list(messages)],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as fault:
        raise ExampleFault(f"the chat template refuses the conversation: {fault}") from fault
    return [(start, end) for start, end in blocks[0]]


def _ending_with_stop(text: str, span: Span, tokenizer: PreTrainedTokenizerBase) -> Span:
    """The span without the white space that the template writes after the turn's stop token."""
    start, end = span
    found = list(_stops(tokenizer)[0].finditer(text, start, end))
    if found and not text[found[-1].end() : end].strip():
        return start, found[-1].end()
    return span


def _stops(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], frozenset[int]]:
    """Pattern and ids of the tokens that can end a turn: eos and all added ones but white space."""
    return _stop_tokens(tokenizer, len(tokenizer), tokenizer.eos_token_id)


@lru_cache(maxsize=8)
def _stop_tokens(
    tokenizer: PreTrainedTokenizerBase, _size: int, eos: int | None
) -> tuple[re.Pattern[str], frozenset[int]]:
    # size and eos are part of the key, so that tokens added or chosen later are seen
    tokens = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    if eos is not None:
        tokens[eos] = tokenizer.eos_token
    longest_first = sorted(set(tokens.values()), key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
    return re.compile(pattern), frozenset(tokens)


def _with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    if system is None or any(message["role"] == "system" for message in messages):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as fault:
        raise BackboneError(
            "the tokenizer has no chat template. Set task.template to a Jinja file, or use task.kind=completion."
        ) from fault
    return template


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, generation: bool = False) -> str:
    from jinja2 import TemplateError

    _template(tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except (TemplateError, ValueError, TypeError) as fault:
        raise ExampleFault(f"the chat template refuses the conversation: {fault}") from fault
    return text


def _try_render(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, generation: bool = False
) -> str | None:
    """The beginning of a conversation, or None where the template accepts only whole ones."""
    if not messages:
        return None
    try:
        return _render(messages, tokenizer, generation=generation)
    except ExampleFault:
        return None


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Span]]:
    if not tokenizer.is_fast:
        raise BackboneError(
            f"{type(tokenizer).__name__} gives no character offsets. Use the backbone's tokenizer.json."
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    return list(encoding["input_ids"]), [(start, end) for start, end in encoding["offset_mapping"]]


def _carries_loss(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token whether a character of it lies in a span; a token without characters counts where it stands."""
    loss, turn = [], 0
    for start, end in offsets:
        while turn < len(spans) and spans[turn][1] <= start:
            turn += 1
        loss.append(turn < len(spans) and max(end, start + 1) > spans[turn][0])
    return loss


def _encoded(ids: list[int], loss: list[bool], max_tokens: int) -> Encoded:
    input_ids = np.asarray(ids, dtype=np.int32)
    target = np.where(np.asarray(loss, dtype=np.bool_), input_ids, IGNORED).astype(np.int32)
    return Encoded(
        input_ids=input_ids[:max_tokens],
        target=target[:max_tokens],
        truncated=len(ids) > max_tokens,
        answer_cut=any(loss[max_tokens:]),
    )
