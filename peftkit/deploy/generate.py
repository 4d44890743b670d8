"""Use a model: write the answer to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from peftkit.backbones.quiet import quietly
from peftkit.deploy.usable import Usable, open_usable, refuse_classifier


def generate(
    reference: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
) -> str:
    """The answer of a run, a merged model, an adapter or a plain backbone, through its chat template if it has one.

    Args:
        temperature: 0 takes the likeliest token each time.

    Raises:
        InputError: the reference does not generate text.
    """
    usable = open_usable(reference)
    refuse_classifier(usable, reference)
    set_seed(seed)
    answer = write_answer(usable, usable.asked(prompt), max_new_tokens=max_new_tokens, temperature=temperature)
    return str(usable.tokenizer.decode(answer, skip_special_tokens=True)).strip()


@torch.inference_mode()
def write_answer(
    usable: Usable,
    tokens: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float | None = None,
    streamer: Any = None,
    stopping: Any = None,
) -> list[int]:
    """The tokens that follow these, the one that ends them included.

    Args:
        top_p: sample among the likeliest tokens that have this probability together; None: as the model says.
        streamer: of transformers, told of each token.
        stopping: of transformers, asked after each token.
    """
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature} | ({} if top_p is None else {"top_p": top_p})
    ids = torch.tensor([tokens], device=usable.backbone.model.device)
    with quietly():  # peft warns of the positions that transformers passes, and leaves them out
        output = usable.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=usable.stops() or None,
            pad_token_id=usable.tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=stopping,
            **sampling,
        )
    return [int(token) for token in output[0, len(tokens) :]]
