"""Whether two tokenizers say the same: chat template, special tokens, and the ids of rendered conversations."""

from __future__ import annotations

from typing import Any

from peftkit.deploy.probes import TEXTS

TALK = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And of Italy?"},
)


def text_faults(ours: Any, theirs: Any) -> list[str]:
    """What the candidate's tokenizer does differently from the reference's, in words; empty where nothing."""
    faults = []
    if _template(ours) != _template(theirs):
        was, now = ("a" if _template(each) else "no" for each in (ours, theirs))
        same = "another chat template" if was == now else f"{now} chat template, where the reference has {was.lower()}"
        faults.append(f"it has {same}")
    for kind in ("bos_token_id", "eos_token_id", "unk_token_id"):
        mine, other = getattr(ours, kind), getattr(theirs, kind)
        if mine != other:
            faults.append(f"{kind} is {other}, and was {mine}")
    different = [text for text in TEXTS if list(ours(text)["input_ids"]) != list(theirs(text)["input_ids"])]
    if different:
        faults.append(f"{len(different)} of {len(TEXTS)} texts become other tokens, such as {different[0][:40]!r}")
    if _template(theirs):
        mine, other = (_rendered(each) if _template(each) else None for each in (ours, theirs))
        if (
            other is not None
            and _begins_twice(other, theirs.bos_token_id)
            and not _begins_twice(mine, ours.bos_token_id)
        ):
            faults.append("a rendered conversation begins with two BOS tokens")
        elif mine != other:
            faults.append("a rendered conversation becomes other tokens")
    return faults


def _template(tokenizer: Any) -> Any:
    return tokenizer.chat_template or None


def _rendered(tokenizer: Any) -> list[int] | None:
    """Ids of a conversation rendered and tokenized as servers do it; None where the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(TALK), tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError):
        return None
    return [int(token) for token in tokenizer(text)["input_ids"]]


def _begins_twice(ids: list[int] | None, bos: int | None) -> bool:
    return ids is not None and bos is not None and ids[:2] == [bos, bos]
