"""Adapters of random weights on the tiny models, made by PEFT itself, with what peftkit writes beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from peftkit.backbones.load import base_identity, load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec, Head
from peftkit.files import write_json


@pytest.fixture(autouse=True)
def proven_here(proving_here: None) -> None:
    """No merge of these tests starts a process; `test_proof` asks for one by itself."""


PROMPT = torch.tensor([[5, 17, 300, 42, 7, 99]])


@pytest.fixture(scope="session")
def make_peft(tiny_llama: Path) -> Callable[..., Path]:
    """Writes an adapter of any PEFT configuration, all its trainable numbers moved by `amount` times a normal value."""

    def make(
        folder: Path,
        config: Any,
        *,
        seed: int = 1,
        base: Path = tiny_llama,
        head: Head = LANGUAGE_HEAD,
        identity: bool = True,
        amount: float = 0.1,
    ) -> Path:
        from peft import get_peft_model

        torch.manual_seed(seed)
        backbone = load_backbone(BackboneSpec(name=str(base), dtype="float32"), head)
        if identity:
            write_json(folder / "base.json", base_identity(backbone))
        model = get_peft_model(backbone.model, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += amount * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder)
        write_json(folder / "head.json", asdict(head))
        return folder

    return make


@pytest.fixture(scope="session")
def make_lora(make_peft: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a LoRA adapter of random B and A."""

    def make(folder: Path, *, seed: int = 1, rank: int = 4, base: Path | None = None, **settings: Any) -> Path:
        from peft import LoraConfig

        beside = {key: settings.pop(key) for key in ("head", "identity", "amount") if key in settings}
        usual = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 2 * rank}
        config = LoraConfig(r=rank, **{**usual, **settings})
        return make_peft(folder, config, seed=seed, **beside, **({"base": base} if base else {}))

    return make


@pytest.fixture(scope="session")
def bare_model(tiny_llama: Path) -> Any:
    """The tiny causal model alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def loaded(tiny_llama: Path) -> Callable[..., Any]:
    """The tiny causal model with adapters on it, as plain PEFT reads them; the first is active."""

    def load(first: Path, *others: Path) -> Any:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, first, adapter_name="0")
        for number, other in enumerate(others, 1):
            model.load_adapter(other, adapter_name=str(number))
        return model.eval()

    return load


@torch.inference_mode()
def answers(model: Any) -> torch.Tensor:
    """Logits of a fixed prompt."""
    found: torch.Tensor = model(PROMPT).logits
    return found


@pytest.fixture(scope="session")
def ask() -> Callable[[Any], torch.Tensor]:
    """Logits of a fixed prompt."""
    return answers


@pytest.fixture(scope="session")
def deltas(loaded: Callable[..., Any]) -> Callable[[Path], dict[str, torch.Tensor]]:
    """What PEFT itself says a LoRA adds to each weight."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return peft_deltas(loaded(folder), "0")

    return read


def peft_deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """The delta of every layer that an adapter of a `PeftModel` changes, by the layer's path in the base."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
