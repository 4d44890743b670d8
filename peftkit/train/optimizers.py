"""Optimizers by their recipe names, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from peftkit.errors import InputError
from peftkit.recipe import Training


def build_optimizer(parameters: Iterable[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay leaves vectors (biases, norms, magnitudes) alone.

    Raises:
        InputError: a bitsandbytes optimizer without a CUDA device.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=fused)
    if trained[0].device.type != "cuda":
        raise InputError(
            f"training.optimizer={training.optimizer} runs on CUDA devices only, and this run is on "
            f"{trained[0].device.type}. Set training.optimizer=adamw."
        )
    from bitsandbytes import optim

    kinds = {"adamw-8bit": optim.AdamW8bit, "paged-adamw": optim.PagedAdamW, "paged-adamw-8bit": optim.PagedAdamW8bit}
    built: torch.optim.Optimizer = kinds[training.optimizer](groups, lr=training.learning_rate, betas=training.betas)
    return built


def learning_rate(training: Training, step: int, total_steps: int) -> float:
    """The rate of a step, counted from 0: linear warm-up that starts above zero, then cosine or linear to zero."""
    warmup = training.warmup * total_steps if training.warmup < 1 else training.warmup
    if step < warmup:
        return training.learning_rate * (step + 1) / (math.ceil(warmup) + 1)
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - warmup) / max(1.0, total_steps - warmup)
    factor = 1 - done if training.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return training.learning_rate * factor
