"""Modelfiles: chat templates taken apart and put together again, stop tokens, and what Ollama cannot render."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from peftkit.deploy.export import export
from peftkit.deploy.ollama import TurnWraps, read_wraps
from peftkit.errors import BackboneError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
COUNTING = "{% for message in messages %}{{ loop.index ~ message['role'] ~ message['content'] }}{% endfor %}"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("template", "system"),
    [(CHATML, "turn"), (LLAMA3, "turn"), (PHI3, "turn"), (MISTRAL, "last"), (None, "first")],
    ids=["chatml", "llama3", "phi3", "mistral", "gemma"],
)
def test_the_pieces_render_what_the_template_renders(
    template: str | None, system: str, make_sentencepiece: Any
) -> None:
    tokenizer = make_sentencepiece(space_first=False)
    tokenizer.chat_template = template or tokenizer.chat_template
    found = read_wraps(tokenizer, "model")
    assert found.system == system
    for talk in (TALK, TALK[1:], TALK[:2], TALK[1:2]):
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert found.render(talk) == text.removeprefix("<s>")  # the tokenizer adds it, so the engine does


def test_a_default_system_prompt_becomes_system(tiny_llama: Path) -> None:
    found = read_wraps(AutoTokenizer.from_pretrained(tiny_llama), "smollm2")
    assert found == TurnWraps(
        system="turn",
        before_system="<|im_start|>system\n",
        after_system="",
        before_user="<|im_end|>\n<|im_start|>user\n",
        after_user="<|im_end|>\n<|im_start|>assistant\n",
        before_assistant="",
        after_assistant="",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    )


def test_a_template_that_does_more_is_refused(make_sentencepiece: Any) -> None:
    with pytest.raises(BackboneError, match="llama-server --jinja"):
        read_wraps(make_sentencepiece(space_first=False, template=COUNTING), "model")
    with pytest.raises(BackboneError, match="has no chat template"):
        read_wraps(make_sentencepiece(space_first=False, template=None), "model")


def test_the_folder_holds_model_adapter_and_a_modelfile_that_names_them(
    make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    report = export(make_lora(tmp_path / "tuned"), "ollama", tmp_path / "out", kind="f16", parity=False)
    assert sorted(report.files) == ["Modelfile", "base-f16.gguf", "tuned-lora.gguf"]
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./base-f16.gguf", "ADAPTER ./tuned-lora.gguf"]
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert "PARAMETER num_ctx 512" in lines
    assert any(line.startswith('SYSTEM """You are a helpful') for line in lines)
    template = "\n".join(lines).partition('TEMPLATE """')[2].partition('"""')[0]
    assert template == (
        "{{- range $index, $message := .Messages }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}{{ end }}'
        '{{ if eq .Role "user" }}<|im_end|>\n<|im_start|>user\n{{ .Content }}'
        "<|im_end|>\n<|im_start|>assistant\n{{ end }}"
        '{{ if eq .Role "assistant" }}{{ .Content }}{{ end }}{{ end }}'
    )
