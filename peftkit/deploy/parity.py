"""Does an exported file answer like the model in torch? The prompts, the report, and the comparison of token by token.

The engine answers greedily; torch then reads prompt and answer in one forward. Where torch's likeliest token is the
engine's at every step, the stop token included, both give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from peftkit.backbones.quiet import quietly
from peftkit.data.chat import render_prompt
from peftkit.deploy.llama_cpp import INSTALL, Completion, Engine, is_installed, open_engine
from peftkit.record import Part
from peftkit.units import format_bytes

PROMPTS = (
    "What is the capital of France?",
    "What is 2+2?",
    "Name three colours of the rainbow.",
    "Who wrote Romeo and Juliet?",
    "How many days are there in a leap year?",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
    "What do bees make?",
    "Explain gravity to a child in one sentence.",
    "What is the boiling point of water in degrees Celsius?",
    "List two animals that can fly.",
    "Is the earth flat?",
    "Give me a synonym of 'happy'.",
    "def add(a, b):",
    "What comes after Monday?",
    "Wie heißt die Hauptstadt von Deutschland?",
    "What is the largest planet of the solar system?",
    "Continue: once upon a time",
    "In which year did 1999 + 2 fall?",
    "Write a haiku about autumn leaves.",
    "What is H2O?",
    "Which language is spoken in Brazil?",
    "How do I boil an egg? Answer in 20 words.",
    "Say hello to Ms. O'Neil — politely!",
)
NOT_INSTALLED = f"llama.cpp is not installed: {INSTALL}"
ANSWER_TOKENS = 24
LIKELIEST = 64
"""Tokens whose probabilities the engine tells at each step; the rest counts as one more."""
TIE = 2e-3
"""Outputs whose log-probabilities are closer than this are tied: float32 sums in another order differ by some 1e-4."""
SMALLEST_REST = 1e-6
"""Below this, what is left beside the likeliest tokens is the rounding of their sum."""
KL_LIMITS = {"f32": 1e-5, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.05, "q5_1": 0.5, "q5_0": 0.5}
"""Several times what SmolLM2-135M shows, which is small and so more sensitive than most."""
WIDEST_KL = 1.0
"""Above this a file of 4 bits is not the same model any more; see `KL_LIMITS` for the others."""


class Parity(Part):
    """How far an exported file is from torch in float32. What was not measured is absent.

    `identical_answers` counts the prompts at which every token of the greedy answer is the same, and `swapped_ties`
    those that differ only where torch holds both tokens closer than float32 can tell. `mean_kl` is in nats, over the
    likeliest tokens and the rest as one; `kl_limit` is what was allowed. `max_abs_difference` is of log-probabilities
    (GGUF) or of outputs over the largest one (ONNX). `reason` says why no engine was asked.
    """

    status: Literal["ok", "failed", "not checked"]
    engine: str | None = None
    prompts: int | None = None
    same_tokens: int | None = None
    identical_answers: int | None = None
    swapped_ties: int | None = None
    positions: int | None = None
    top1_agreement: float | None = None
    mean_kl: float | None = None
    kl_limit: float | None = None
    max_abs_difference: float | None = None
    tolerance: float | None = None
    reason: str | None = None
    failures: tuple[str, ...] = ()


@dataclass(slots=True)
class _Tally:
    """What is counted over the prompts."""

    same_tokens: int = 0
    doubled: int = 0
    identical: int = 0
    ties: int = 0
    positions: int = 0
    agreed: int = 0
    divergences: list[float] = field(default_factory=list)
    largest: float = 0.0
    first_fault: str | None = None


def unchecked(reason: str) -> Parity:
    """Nothing was asked, and why."""
    return Parity(status="not checked", reason=reason)


def obstacle(num_bytes: int, *, wanted: bool) -> str | None:
    """Why llama.cpp cannot be asked here about a model of so many bytes in float32; None where it can."""
    import psutil

    if not wanted:
        return "left out (--no-parity)"
    free = psutil.virtual_memory().available
    if free < 2 * num_bytes:
        return (
            f"torch and llama.cpp side by side need {format_bytes(2 * num_bytes)} of memory; {format_bytes(free)} free"
        )
    return None if is_installed() else NOT_INSTALLED


def check_gguf(
    model: Any, tokenizer: Any, kind: str, file: Path, lora: Path | None = None, *, prompts: Sequence[str] = PROMPTS
) -> Parity:
    """Ask llama.cpp and torch the same prompts.

    Args:
        model: a causal model, or a `PeftModel`, in float32.
        kind: of the file's matrices.
        lora: a GGUF adapter that llama.cpp puts on the file.

    Raises:
        VerificationFailed: llama.cpp cannot load the file.
    """
    tally = _Tally()
    with open_engine(file, lora) as engine, torch.inference_mode():
        for prompt in prompts:
            ids = _reference_tokens(prompt, tokenizer)
            _compare_tokens(tally, engine, prompt, ids, tokenizer)
            answer = engine.complete(ids, max_tokens=ANSWER_TOKENS, likeliest=LIKELIEST)
            _compare_answer(tally, model, ids, answer)
    return _judge(tally, kind, len(prompts))


def compare_loaded(model: Any, other: Any, tokenizer: Any, kind: str) -> Parity:
    """Two models in torch over the prompts: the original, and what another reader makes of the file."""
    tally = _Tally()
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([_reference_tokens(prompt, tokenizer)])
            ours, theirs = (each(input_ids=ids).logits[0].float().log_softmax(-1) for each in (model, other))
            tally.divergences += (ours.exp() * (ours - theirs)).sum(-1).tolist()
            tally.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            tally.largest = max(tally.largest, float((ours.exp() * (ours - theirs)).abs().max()))
    limit = _limit(kind)
    mean = max(0.0, sum(tally.divergences) / len(tally.divergences))
    failures = [f"the mean KL divergence is {mean:.3g}, allowed is {limit:g}"] if mean > limit else []
    return Parity(
        status="failed" if failures else "ok",
        engine="transformers' GGUF reader",
        prompts=len(PROMPTS),
        positions=len(tally.divergences),
        top1_agreement=tally.agreed / len(tally.divergences),
        mean_kl=mean,
        kl_limit=limit,
        failures=tuple(failures),
    )


def _reference_tokens(prompt: str, tokenizer: Any) -> list[int]:
    """Ids of a prompt as transformers makes them, through the chat template where there is one."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    text = render_prompt([{"role": "user", "content": prompt}], tokenizer, None)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _compare_tokens(tally: _Tally, engine: Engine, prompt: str, ids: Sequence[int], tokenizer: Any) -> None:
    """Whether the engine's own rendering and tokenizing gives the same ids, and BOS once."""
    templated = tokenizer.chat_template is not None
    text = engine.render([{"role": "user", "content": prompt}]) if templated else prompt
    theirs = engine.tokenize(text)
    bos = tokenizer.bos_token_id
    tally.doubled += bos is not None and theirs[:2] == [bos, bos] and ids[:2] != [bos, bos]
    tally.same_tokens += theirs == list(ids)
    if theirs != list(ids) and tally.first_fault is None:
        at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
        words = [tokenizer.convert_ids_to_tokens(list(each[at : at + 3])) for each in (ids, theirs)]
        tally.first_fault = f"{prompt!r} is {words[0]} from token {at} on, and {words[1]} in llama.cpp"


def _compare_answer(tally: _Tally, model: Any, ids: Sequence[int], answer: Completion) -> None:
    """Torch's view of the engine's answer."""
    steps = len(answer.tokens)
    if not steps:
        return
    sequence = torch.tensor([[*ids, *answer.tokens]], device=model.device)
    ours = model(input_ids=sequence).logits[0, len(ids) - 1 : -1].double().log_softmax(-1).cpu()
    chosen = torch.tensor(answer.tokens)
    margin = ours.amax(-1) - ours.gather(-1, chosen[:, None])[:, 0]
    tally.positions += steps
    tally.agreed += int((margin == 0).sum())
    tally.identical += bool((margin == 0).all())
    tally.ties += bool((margin > 0).any()) and bool((margin <= TIE).all())
    for step, told in enumerate(answer.likeliest):
        if not told:
            continue
        known = torch.tensor(list(told))
        theirs, mine = torch.tensor(list(told.values()), dtype=torch.float64), ours[step, known]
        tally.divergences.append(_coarse_kl(mine, theirs))
        tally.largest = max(tally.largest, float((mine - theirs)[:3].abs().max()))


def _coarse_kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The KL divergence over some tokens, given by their log-probabilities, and all the others as one."""
    inner = float((ours.exp() * (ours - theirs)).sum())
    rest, other = (max(1 - float(each.exp().sum()), SMALLEST_REST) for each in (ours, theirs))
    return inner + rest * float(torch.tensor(rest / other).log())


def _limit(kind: str) -> float:
    return KL_LIMITS.get(kind, WIDEST_KL)


def _judge(tally: _Tally, kind: str, count: int) -> Parity:
    from importlib.metadata import version

    positions, limit = tally.positions, _limit(kind)
    mean = max(0.0, sum(tally.divergences) / len(tally.divergences)) if tally.divergences else 0.0
    failures: list[str] = []
    if tally.same_tokens < count:
        failures.append(f"{count - tally.same_tokens} of {count} prompts have other tokens: {tally.first_fault}")
    if tally.doubled:
        failures.append(f"{tally.doubled} prompts begin with two BOS tokens")
    if not tally.divergences:
        failures.append("llama.cpp told no probabilities")
    if mean > limit:
        failures.append(f"the mean KL divergence is {mean:.3g}, allowed for {kind} is {limit:g}")
    if kind == "f32" and tally.identical + tally.ties < count:
        failures.append(f"{count - tally.identical - tally.ties} of {count} greedy answers differ")
    return Parity(
        status="failed" if failures else "ok",
        engine=f"llama.cpp (xllamacpp {version('xllamacpp')})",
        prompts=count,
        same_tokens=tally.same_tokens,
        identical_answers=tally.identical,
        swapped_ties=tally.ties,
        positions=positions,
        top1_agreement=tally.agreed / positions if positions else None,
        mean_kl=mean if tally.divergences else None,
        kl_limit=limit,
        max_abs_difference=tally.largest,
        failures=tuple(failures),
    )


def read_back(model: Any, tokenizer: Any, kind: str, file: Path) -> Parity | None:
    """The file through transformers' own GGUF reader; None where that does not know the architecture.

    It is no engine, and knows nothing of template and tokens; it finds what was written wrongly.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    if model.config.model_type not in GGUF_CONFIG_MAPPING:
        return None
    with quietly():
        other = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    return compare_loaded(model, other, tokenizer, kind)
