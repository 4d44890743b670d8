"""Models opened for use: asked as they were trained, whatever they are kept as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.deploy.generate import generate, write_answer
from peftkit.deploy.usable import open_together, open_usable
from peftkit.errors import InputError
from peftkit.run import train


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, talks_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat run that saw a system message, and a chat template of its own."""
    from peftkit.recipe import build_recipe

    folder = tmp_path_factory.mktemp("runs")
    template = folder / "own.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    content = {
        "backbone": {"name": str(tiny_llama), "dtype": "float32"},
        "method": "lora",
        "task": {"kind": "chat", "system": "Be brief.", "template": str(template)},
        "data": {"train": str(talks_file)},
        "training": {"max_steps": 2},
    }
    train(build_recipe(content, []), folder / "run")
    template.unlink()
    return folder / "run"


def test_a_run_is_asked_in_its_own_template_with_its_own_system_message(trained: Path) -> None:
    usable = open_usable(trained)
    tokens = usable.conversation([{"role": "user", "content": "Hi"}])
    assert usable.tokenizer.decode(tokens) == "<system>Be brief.<|im_end|><user>Hi<|im_end|><assistant>"
    own = usable.conversation([{"role": "system", "content": "Sing."}, {"role": "user", "content": "Hi"}])
    assert usable.tokenizer.decode(own).startswith("<system>Sing.<|im_end|><user>")


def test_a_run_and_the_adapter_in_it_are_the_same_model(trained: Path) -> None:
    answers = [generate(reference, "Hi", max_new_tokens=8) for reference in (trained, trained / "adapter")]
    assert answers[0] == answers[1]


def test_an_adapter_from_elsewhere_is_put_on_the_base_it_names(make_lora: Any, loaded: Any, tmp_path: Path) -> None:
    folder = make_lora(tmp_path / "lora", amount=0.5)
    usable = open_usable(folder)
    tokens = usable.asked("Hello")
    with torch.inference_mode():
        logits = loaded(folder)(torch.tensor([tokens])).logits[0, -1]
    assert write_answer(usable, tokens, max_new_tokens=1) == [int(logits.argmax())]


def test_what_would_change_the_shared_base_is_not_put_on_it(
    make_lora: Any, make_peft: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    plain = make_lora(tmp_path / "plain")
    biased = make_lora(tmp_path / "biased", bias="lora_only")
    with pytest.raises(InputError, match=r"two: .* biases, so it cannot share"):
        open_together(tiny_llama, {"one": plain, "two": biased}, name="base")
    rewriting = make_lora(tmp_path / "pissa", init_lora_weights="pissa")
    with pytest.raises(InputError, match=r"two: .* changes its base when it is loaded"):
        open_together(tiny_llama, {"one": plain, "two": rewriting}, name="base")


def test_adapters_of_another_base_are_not_taken_together(make_lora: Any, tiny_llama: Path, tmp_path: Path) -> None:
    import json

    folder = make_lora(tmp_path / "lora")
    known = json.loads((folder / "base.json").read_text())
    (folder / "base.json").write_text(json.dumps(known | {"weights_digest": "another"}))
    with pytest.raises(InputError, match="is not the base of"):
        open_together(tiny_llama, {"one": folder}, name="base")
