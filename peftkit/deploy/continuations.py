"""Whether two models go on writing alike: greedy continuations of the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftkit.record import Part

NEW_TOKENS = 16


class Continuations(Part):
    """Prompts continued greedily by both. `tied` of those that are not identical part at two tokens that the reference
    holds closer together than rounding can tell."""

    prompts: int
    tokens: int
    identical: int
    tied: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """One continuation: its tokens, and the logits [T, V] that each was chosen by."""

    tokens: list[int]
    logits_TV: Tensor


@torch.inference_mode()
def write(model: Any, prompts: Sequence[Sequence[int]]) -> list[Written]:
    """Continue each prompt by itself, taking the likeliest token each time."""
    written = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=NEW_TOKENS,
            use_cache=True,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits_TV = torch.cat([step.float().cpu() for step in found.logits])
        written.append(Written(found.sequences[0, len(prompt) :].tolist(), logits_TV))
    return written


def compare_written(ours: Sequence[Written], theirs: Sequence[Written], *, tie: float) -> Continuations:
    """How many continuations are the same; outputs whose logits differ by up to `tie` are tied."""
    identical = tied = 0
    for mine, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(mine.tokens, other.tokens, strict=False))
        apart = next((at for at, (one, two) in pairs if one != two), None)
        if apart is None:
            identical += len(mine.tokens) == len(other.tokens)
        else:
            step_V = mine.logits_TV[apart]
            tied += bool(step_V.max() - step_V[other.tokens[apart]] <= tie)
    return Continuations(
        prompts=len(ours), tokens=sum(len(each.tokens) for each in ours), identical=identical, tied=tied
    )
