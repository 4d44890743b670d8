"""Use a model: write the answer to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from peftkit.backbones.load import load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec
from peftkit.data.chat import render_prompt
from peftkit.errors import InputError
from peftkit.folder import RECIPE_NAME
from peftkit.run import open_run


def generate(
    reference: str | Path, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
) -> str:
    """The answer of a run, a merged model or a plain backbone, through its chat template if it has one.

    Args:
        temperature: 0 takes the likeliest token each time.

    Raises:
        InputError: the reference does not generate text.
    """
    folder, system = Path(reference), None
    if (folder / RECIPE_NAME).is_file():
        opened = open_run(folder)
        if opened.recipe.task.kind == "classify":
            raise InputError(f"{reference} classifies; it does not write text. Use `peftkit eval {reference}`.")
        model: Any = opened.adapted.model
        tokenizer, chat = opened.backbone.tokenizer, opened.recipe.task.kind == "chat"
        system = getattr(opened.recipe.task, "system", None)
    else:
        backbone = load_backbone(BackboneSpec(name=str(reference)), LANGUAGE_HEAD)
        model, tokenizer = backbone.model, backbone.tokenizer
        chat = tokenizer.chat_template is not None
    text = render_prompt([{"role": "user", "content": prompt}], tokenizer, system) if chat else prompt
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    set_seed(seed)
    model.eval()
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=max_new_tokens,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            **sampling,
        )
    return str(tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
