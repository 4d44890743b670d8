"""Optimizers by their recipe names, when their steps happen, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from peftkit.errors import InputError
from peftkit.recipe import Training
from peftkit.train.lowprecision import Rounding, RoundingAdamW


class Updates(Protocol):
    """How parameters are updated around the backward passes of an optimizer step, in the order of these calls."""

    def set_rate(self, rate: float) -> None:
        """The learning rate of this step."""

    def begin_last_micro_batch(self) -> None:
        """Say that the next backward pass completes the gradients."""

    def gradient_norm(self) -> Tensor:
        """Norm of the step's whole gradient, before clipping, once the last backward pass is done."""

    def received(self) -> set[str]:
        """Names of the parameters that had a gradient in this step."""

    def finish(self) -> None:
        """Update what is not updated yet, and drop the gradients."""

    def abandon(self) -> bool:
        """Instead of finishing, drop the gradients; False when a part of the update was applied already."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def open_updates(
    trainable: Mapping[str, torch.nn.Parameter], training: Training, rounding: Rounding | None = None
) -> Updates:
    """The recipe's optimizer on these parameters, stepping after or within the backward pass.

    Args:
        rounding: how bfloat16 parameters take updates finer than they can hold; None when there are none.

    Raises:
        InputError: an optimizer that cannot run here or on these weights.
    """
    if training.optimizer_in_backward:
        return InBackward(trainable, training, rounding)
    return AfterBackward(trainable, training, rounding)


class AfterBackward:
    """One step of one optimizer over all parameters, from the whole gradient, clipped as the recipe says."""

    def __init__(
        self, trainable: Mapping[str, torch.nn.Parameter], training: Training, rounding: Rounding | None = None
    ) -> None:
        self._trainable, self._clip = trainable, training.clip
        self._optimizer = build_optimizer(trainable.values(), training, rounding)
        self._norm: Tensor | None = None

    def set_rate(self, rate: float) -> None:
        _set_rate(self._optimizer, rate)

    def begin_last_micro_batch(self) -> None:
        """Nothing to do: every micro-batch adds to the gradients alike."""

    def gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return self._norm

    def received(self) -> set[str]:
        return {name for name, parameter in self._trainable.items() if parameter.grad is not None}

    def finish(self) -> None:
        if self._clip is not None:
            assert self._norm is not None, "the gradient's norm is asked for before the step ends"
            torch.nn.utils.clip_grads_with_norm_(self._trainable.values(), self._clip, self._norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def abandon(self) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None
        return True

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state_dict)


class InBackward:
    """Each parameter updated by an optimizer of its own as soon as its gradient is whole; no gradient outlives that.

    With several micro-batches a step the updates happen in the backward pass of the last, and gradients are held until
    then. A step whose gradient is not finite is found out after its updates: stop the run, do not save it.
    """

    def __init__(
        self, trainable: Mapping[str, torch.nn.Parameter], training: Training, rounding: Rounding | None = None
    ) -> None:
        assert training.clip is None, "the norm of the whole gradient is not known when the first parameter is updated"
        self._trainable = trainable
        self._optimizers = {name: build_optimizer([p], training, rounding) for name, p in trainable.items()}
        self._norms: dict[str, Tensor] = {}
        self._last = False
        for name, parameter in trainable.items():
            parameter.register_post_accumulate_grad_hook(partial(self._see, name))  # type: ignore[no-untyped-call]

    def set_rate(self, rate: float) -> None:
        for optimizer in self._optimizers.values():
            _set_rate(optimizer, rate)

    def begin_last_micro_batch(self) -> None:
        self._last = True

    def gradient_norm(self) -> Tensor:
        self._update_rest()
        return torch.nn.utils.get_total_norm(list(self._norms.values()))

    def received(self) -> set[str]:
        return set(self._norms)

    def finish(self) -> None:
        self._update_rest()
        self._norms, self._last = {}, False

    def abandon(self) -> bool:
        untouched = not self._norms
        for parameter in self._trainable.values():
            parameter.grad = None
        self._norms, self._last = {}, False
        return untouched

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state_dict[name])

    def _see(self, name: str, parameter: Tensor) -> None:
        if self._last:
            self._update(name, parameter)

    def _update(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        dtype = torch.promote_types(parameter.grad.dtype, torch.float32)
        self._norms[name] = torch.linalg.vector_norm(parameter.grad, dtype=dtype)
        self._optimizers[name].step()
        parameter.grad = None

    def _update_rest(self) -> None:
        """Parameters that took part in earlier micro-batches of the step, and not in the last."""
        for name, parameter in self._trainable.items():
            if parameter.grad is not None:
                self._update(name, parameter)


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], training: Training, rounding: Rounding | None = None
) -> torch.optim.Optimizer:
    """The recipe's optimizer; weight decay leaves vectors (biases, norms, magnitudes) alone.

    Raises:
        InputError: an optimizer that pages to the host without a CUDA device, or one that rounds bfloat16 to nearest.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate, betas, device = training.learning_rate, training.betas, trained[0].device.type
    if rounding is not None:
        if training.optimizer != "adamw":
            raise InputError(
                f"training.optimizer={training.optimizer} would round bfloat16 weights to nearest, which "
                f"method.weights={rounding} is there to avoid. Set training.optimizer=adamw, or method.weights=float32."
            )
        return RoundingAdamW(groups, rounding, lr=rate, betas=betas)
    if training.optimizer == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=fused)
    known = ("cuda", "cpu") if training.optimizer == "adamw-8bit" else ("cuda",)
    if device not in known:
        raise InputError(
            f"training.optimizer={training.optimizer} runs on {' and '.join(known)} devices only, and this run is on "
            f"{device}. Set training.optimizer=adamw{' or adamw-8bit' if device == 'cpu' else ''}."
        )
    from bitsandbytes import optim

    kinds = {"adamw-8bit": optim.AdamW8bit, "paged-adamw": optim.PagedAdamW, "paged-adamw-8bit": optim.PagedAdamW8bit}
    built: torch.optim.Optimizer = kinds[training.optimizer](groups, lr=rate, betas=betas)
    return built


def learning_rate(training: Training, step: int, total_steps: float) -> float:
    """The rate of a step, counted from 0: linear warm-up that starts above zero, then cosine or linear to zero."""
    warmup = training.warmup * total_steps if training.warmup < 1 else training.warmup
    if step < warmup:
        return training.learning_rate * (step + 1) / (math.ceil(warmup) + 1)
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - warmup) / max(1.0, total_steps - warmup)
    factor = 1 - done if training.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return training.learning_rate * factor


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for settings in optimizer.param_groups:
        settings["lr"] = rate
