"""What the model sees of an example, token by token, and which tokens carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftkit.data.features import IGNORED, Features

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

LOSS_OPEN, LOSS_CLOSE, BETWEEN = "⟦", "⟧", "·"


def preview(
    features: Sequence[Features],
    tokenizer: PreTrainedTokenizerBase,
    *,
    origins: Sequence[str],
    count: int,
    labels: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The first `count` examples as plain data.

    Each has `origin`, `num_tokens`, `loss_tokens` and `tokens` (`text`, `id`, `loss`); sequence tasks also have
    `target`. The texts of the tokens add up to the example's text; a character of several tokens is the last one's. The
    first token never carries loss: nothing predicts it.

    Args:
        origins: places by row of the table, as `Features.row` counts.
        labels: names of the classes, by index.
    """
    return [_one(example, tokenizer, origins[example.row], labels) for example in features[:count]]


def render_preview(previews: Sequence[dict[str, Any]]) -> Text:
    """The previews for a terminal: tokens parted by `·`, those with loss in bold green and within ⟦ ⟧."""
    from rich.text import Text

    text = Text()
    for one in previews:
        text.append(f"{_visible(one['origin'])}", style="bold")
        text.append(f"  {one['num_tokens']} tokens, {one['loss_tokens']} with loss\n", style="dim")
        inside = False
        for position, token in enumerate(one["tokens"]):
            if token["loss"] != inside:
                text.append(LOSS_OPEN if token["loss"] else LOSS_CLOSE, style="bold green")
            elif position:
                text.append(BETWEEN, style="dim")
            inside = token["loss"]
            text.append(_visible(token["text"]), style="bold green" if inside else "")
        text.append(LOSS_CLOSE if inside else "", style="bold green")
        if "target" in one:
            text.append(f"  -> {LOSS_OPEN}{_visible(str(one['target']))}{LOSS_CLOSE}", style="bold green")
        text.append("\n\n")
    return text


def _one(
    example: Features, tokenizer: PreTrainedTokenizerBase, origin: str, labels: Sequence[str] | None
) -> dict[str, Any]:
    ids = [int(token) for token in example.input_ids]
    target = example.target
    per_token = isinstance(target, np.ndarray) and target.dtype == np.int32
    loss = [False] * len(ids)
    if isinstance(target, np.ndarray) and per_token:
        loss = [position > 0 and int(label) != IGNORED for position, label in enumerate(target)]
    texts = _token_texts(ids, tokenizer)
    tokens = [{"text": text, "id": token, "loss": flag} for text, token, flag in zip(texts, ids, loss, strict=True)]
    shown = {"origin": origin, "num_tokens": len(ids), "loss_tokens": sum(loss), "tokens": tokens}
    return shown if per_token else {**shown, "target": _target(target, labels)}


def _target(target: npt.NDArray[Any] | int | float, labels: Sequence[str] | None) -> Any:
    """A class's name (its index where no names are known), a number, or the names of several classes."""
    if isinstance(target, np.ndarray):
        given = [int(index) for index in np.flatnonzero(target)]
        return [labels[index] for index in given] if labels else given
    if isinstance(target, float):
        return target
    return labels[target] if labels else int(target)


def _token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text so far, so that spaces that belong to a token are seen."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text.startswith(before) and not (text.endswith("\ufffd") and end < len(ids))
        texts.append(text[len(before) :] if whole else "")
        before = text if whole else before
    return texts


def _visible(text: str) -> str:
    """The text with line breaks marked and control characters spelled out, so that data cannot steer the terminal."""
    return "".join(
        "↵\n" if char == "\n" else char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
