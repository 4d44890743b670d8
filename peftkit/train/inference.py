"""How fast a trained model answers: with its adapter, with the adapter folded into the weights, and without it.

Requests are a fixed set of examples of the split that is scored. A classifier's are scored in batches for the rates and
one at a time for the latencies; a causal model's prompts are answered one at a time, each with as many tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from peftkit.data.features import IGNORED, Features
from peftkit.methods.base import Adapted
from peftkit.record import Inference
from peftkit.tasks.base import Task
from peftkit.train.fastpath import FastPath
from peftkit.train.scoring import computing, predict

SCORED, ALONE, WRITTEN = 64, 16, 4
"""Examples: that a classifier scores in batches, those of them that it scores alone too, that a model answers."""
NEW_TOKENS = 16
"""Tokens of each answer; its end does not stop it."""
WARMUPS = 1
"""Requests before those that count."""


@dataclass(frozen=True, slots=True)
class Requests:
    """What a model is asked, and how.

    Attributes:
        max_tokens: of one scoring forward.
        writes: the model answers in tokens, not by a score.
    """

    adapted: Adapted
    task: Task
    examples: Sequence[Features]
    fast: FastPath
    max_tokens: int
    writes: bool

    def measure(self) -> Inference:
        """Rates and latencies of the model as it stands."""
        chosen = self.examples[: WRITTEN if self.writes else SCORED]
        answer = self._write if self.writes else self._score
        for example in chosen[:WARMUPS]:
            answer([example])
        latencies = [self._seconds(answer, [example]) for example in chosen[:ALONE]]
        seconds, tokens = sum(latencies), len(chosen) * NEW_TOKENS
        if not self.writes:
            answer(chosen)
            seconds, tokens = self._seconds(answer, chosen), sum(map(len, chosen))
        return Inference(
            examples=len(chosen),
            samples_per_second=len(chosen) / seconds,
            tokens_per_second=tokens / seconds,
            latency_seconds_p50=float(np.percentile(latencies, 50)),
            latency_seconds_p90=float(np.percentile(latencies, 90)),
        )

    def _score(self, examples: Sequence[Features]) -> None:
        predict(self.adapted, self.task, examples, pad_id=self.fast.pad_id, max_tokens=self.max_tokens, fast=self.fast)

    @torch.no_grad()
    def _write(self, examples: Sequence[Features]) -> None:
        model: Any = self.adapted.model
        for example in examples:
            prompt_1T = torch.from_numpy(_prompt(example).astype(np.int64))[None].to(self._device)
            with computing(self.adapted, self._device):
                model.generate(
                    input_ids=prompt_1T,
                    attention_mask=torch.ones_like(prompt_1T),
                    min_new_tokens=NEW_TOKENS,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=self.fast.pad_id,
                )

    def _seconds(self, answer: Callable[[Sequence[Features]], None], examples: Sequence[Features]) -> float:
        started = time.perf_counter()
        answer(examples)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    @property
    def _device(self) -> torch.device:
        return next(self.adapted.model.parameters()).device


def measure_inference(requests: Requests, *, foldable: bool, say: Callable[[str], None]) -> dict[str, Inference]:
    """Rates and latencies by way of answering: `adapter`, `base` with the adapter off, `merged` where the method folds.

    A model that trained as a whole is `merged`. To be called last: folding and unfolding rounds weights.

    Args:
        foldable: the weights under the adapter can take a sum; quantized ones would be rounded anew.
        say: told which way a library could not take, which is then absent: a trained model is not lost over it.
    """
    found: dict[str, Inference] = {}

    def measure(way: str, asked: Requests) -> None:
        try:
            found[way] = asked.measure()
        except (RuntimeError, ValueError, TypeError, AttributeError) as fault:
            told = (str(fault).strip() or type(fault).__name__).splitlines()[0]
            say(f"warning: how fast it answers as {way!r} was not measured: {told}")

    model: Any = requests.adapted.model
    model.eval()
    if requests.adapted.artifact != "adapter":
        measure("merged", requests)
        return found
    measure("adapter", requests)
    with _bare(requests) as bare:
        measure("base", bare)
    if foldable:
        with _folded(model) as folds:
            if folds:
                measure("merged", requests)
    return found


@contextmanager
def _bare(requests: Requests) -> Iterator[Requests]:
    """The same requests to the backbone without its adapter."""
    model: Any = requests.adapted.model
    if model.active_peft_config.is_prompt_learning:  # peft cannot switch these off on an encoder
        plain = FastPath(pad_id=requests.fast.pad_id)
        yield replace(requests, adapted=replace(requests.adapted, model=model.get_base_model()), fast=plain)
        return
    with model.disable_adapter():
        yield requests


@contextmanager
def _folded(model: Any) -> Iterator[bool]:
    """The adapter added to the weights in place, then taken out again. Yields False where the method has no fold."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    from peftkit.backbones.quiet import quietly

    if not isinstance(model.base_model, BaseTuner):
        yield False
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        with quietly():
            model.base_model.merge_adapter()
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError):  # what peft's methods raise
        yield False
        return
    try:
        yield all(layer.merged for layer in layers)
    finally:
        model.base_model.unmerge_adapter()


def _prompt(example: Features) -> npt.NDArray[np.int32]:
    """The tokens [T] before the answer; the first half of a text that is all answer."""
    labelled = np.flatnonzero(np.asarray(example.target) != IGNORED)
    first = int(labelled[0]) if len(labelled) else len(example)
    return example.input_ids[: first if first > 1 else max(1, len(example) // 2)]
