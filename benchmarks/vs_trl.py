"""Chat finetuning with peftkit and with TRL's SFTTrainer: `python benchmarks/vs_trl.py --job lora --peer tuned as-is`.

SmolLM2-135M on builtin:chatterbot-en, loss on the assistant's tokens. Needs `pip install -e ".[peers]"`.

peers  as-is    SFTConfig's defaults: activations are checkpointed, mixed precision in bfloat16
       tuned    no checkpointing, and the dtype that is fastest on this machine
       grouped  tuned, and each optimizer step's examples ordered by length before they are cut into forwards
jobs   lora     rank 16 on every linear layer
       qlora    the same on NF4 weights
       full     every weight
       lora-top LoRA on the upper ten of thirty blocks, three epochs; peftkit keeps the output of the lower ones
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from paired import Script, main
from sides import Comparison, Ground, Sample, initial_config, shared_arguments, train_with_trainer

LORA = {"kind": "lora", "rank": 16, "alpha": 32}
LORA_RATE, FULL_RATE = 5e-4, 5e-5


def train_with_trl(comparison: Comparison, ground: Ground, folder: Path) -> Sample:
    """Train the peer: SFTTrainer from a path, as its documentation shows."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    settings = shared_arguments(comparison, ground, folder)
    quantized = comparison.recipe["backbone"].get("quantization", "none") != "none"
    compute = torch.bfloat16 if comparison.peer == "as-is" else getattr(torch, comparison.dtype)
    if comparison.peer != "as-is":
        narrow_weights = ground.adapter is not None
        settings |= {
            "gradient_checkpointing": False,
            "bf16": comparison.dtype == "bfloat16",
            "fp16": comparison.dtype == "float16",
            "model_init_kwargs": {"dtype": comparison.dtype if narrow_weights else "float32"},
        }
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    trainer = SFTTrainer(
        model=ground.model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(ground.cut(comparison)),
        processing_class=AutoTokenizer.from_pretrained(ground.tokenizer),
        quantization_config=nf4 if quantized else None,
        peft_config=initial_config(ground),
    )
    if quantized and compute == torch.float32:
        # TRL rounds adapters on quantized weights to bfloat16, which this machine is slow at
        raise_adapter(trainer.model)
    return train_with_trainer(trainer, ground)


def raise_adapter(model: Any) -> None:
    """Hold what trains in float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


CHAT = Script(
    file=__file__,
    doc=str(__doc__),
    packages=("trl", "transformers"),
    base={
        "backbone": {"name": "smollm2-135m"},
        "method": LORA,
        "task": {"kind": "chat"},
        "data": {"train": "builtin:chatterbot-en", "validation": "builtin:chatterbot-en"},
        "training": {"learning_rate": LORA_RATE, "max_tokens": 512},
    },
    jobs={
        "lora": {},
        "qlora": {"backbone": {"quantization": "nf4"}},
        "full": {"method": {"kind": "full"}, "training": {"learning_rate": FULL_RATE}},
        "lora-top": {"method": LORA | {"layers": "top-10"}, "training": {"activation_cache": True}},
    },
    epochs={"lora-top": 3},
    batch_size=16,
    steps=12,
    per_device={"as-is": 8, "tuned": 8, "grouped": 4},
    train_peer=train_with_trl,
)

if __name__ == "__main__":
    sys.exit(main(CHAT, sys.argv[1:]))
