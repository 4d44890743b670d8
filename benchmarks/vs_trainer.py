"""Classification with peftkit and with transformers' Trainer and PEFT: `python benchmarks/vs_trainer.py --job lora`.

MiniLM-L6 on builtin:movie-sentiment, 32 reviews an optimizer step.

peers  as-is    Trainer's defaults, the 32 in one forward in their shuffled order, padded to the longest
       tuned    the same in the dtype that is fastest on this machine, cut into forwards of 16
       grouped  tuned, and each optimizer step's examples ordered by length before they are cut into forwards of 8
jobs   lora     rank 16 on every linear layer, with the new head
       full     every weight
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from paired import Script, main
from sides import Comparison, Ground, Sample, initial_config, shared_arguments, train_with_trainer


def train_with_transformers(comparison: Comparison, ground: Ground, folder: Path) -> Sample:
    """Train the peer: Trainer, with PEFT's wrapper around the model where an adapter trains."""
    import torch
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    settings = shared_arguments(comparison, ground, folder)
    loading: dict[str, Any] = {"num_labels": 2, "dtype": torch.float32}
    dropout = comparison.training["dropout"]
    if dropout is not None:
        loading |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if comparison.peer != "as-is":
        settings |= {"bf16": comparison.dtype == "bfloat16", "fp16": comparison.dtype == "float16"}
        if ground.adapter is not None:
            loading["dtype"] = getattr(torch, comparison.dtype)
    model: Any = AutoModelForSequenceClassification.from_pretrained(ground.model, **loading)
    config = initial_config(ground)
    if config is not None:
        model = get_peft_model(model, config)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        data_collator=DataCollatorWithPadding(AutoTokenizer.from_pretrained(ground.tokenizer)),
        train_dataset=Dataset.from_list(ground.cut(comparison)),
    )
    # Trainer would leave accumulated gradients undivided: it takes BERT's loss for one that divides by all examples
    trainer.model_accepts_loss_kwargs = False
    return train_with_trainer(trainer, ground)


CLASSIFY = Script(
    file=__file__,
    doc=str(__doc__),
    packages=("transformers", "peft"),
    base={
        "backbone": {"name": "minilm-l6"},
        "method": {"kind": "lora", "rank": 16, "alpha": 32},
        "task": {"kind": "classify"},
        "data": {"train": "builtin:movie-sentiment", "validation": "builtin:movie-sentiment"},
        "training": {"learning_rate": 1e-3, "max_tokens": 128, "warmup": 0.1},
    },
    jobs={
        "lora": {},
        "full": {"method": {"kind": "full"}, "training": {"learning_rate": 1e-4}},
    },
    epochs={},
    batch_size=32,
    steps=30,
    per_device={"as-is": 32, "tuned": 16, "grouped": 8},
    train_peer=train_with_transformers,
)

if __name__ == "__main__":
    sys.exit(main(CLASSIFY, sys.argv[1:]))
