"""The README of a merged model: where it comes from, how it was trained, what it scores, and what was proven."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.backbones.packaged import PACKAGED
from peftkit.deploy.answers import Difference
from peftkit.deploy.verification import Verification

if TYPE_CHECKING:
    from peftkit.deploy.adapter import Source

PROOF_ROWS = (
    ("largest logit difference", "max_abs_logit", ".3g"),
    ("mean KL divergence (nats)", "mean_kl", ".3g"),
    ("top-1 agreement", "top1_agreement", ".2%"),
)


def render_card(source: Source, verification: Verification, *, onto: str | None) -> str:
    """Markdown with the hub's front matter; what is not known is not mentioned.

    Args:
        onto: for a quantized base, which weights the adapter was folded onto.
    """
    language = source.head.kind == "language"
    licence = licence_of(source)
    front = [
        f"base_model: {_quoted(_base_name(source))}",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if language else 'text-classification'}",
        *([f"license: {licence.lower()}"] if licence else []),
        "tags: [peftkit, merged-adapter]",
    ]
    auto = "AutoModelForCausalLM" if language else "AutoModelForSequenceClassification"
    sections = [
        "\n".join(["---", *front, "---"]),
        f"# {_escaped(_base_name(source))}, finetuned with {_escaped(source.method)} and merged",
        f"```python\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f"model, tokenizer = {auto}.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH)\n```",
        _origin(source, verification, licence, onto),
        _scores(source),
        _proof(verification),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def summarise(verification: Verification, weights: Mapping[Any, Difference]) -> list[str]:
    """The proof as lines for a terminal; for a quantized base, how far each kind of merge is from what was trained."""
    lines = [] if verification.difference is None else _measured(verification)
    lines += [
        f"{'onto ' + kind + ' weights':<28}{other.top1_agreement:>10.2%}   KL {other.mean_kl:.3g} to what was trained"
        for kind, other in weights.items()
        if other.top1_agreement is not None and other.mean_kl is not None
    ]
    return lines


def _measured(verification: Verification) -> list[str]:
    found = verification.difference.model_dump() if verification.difference else {}
    allowed = verification.tolerance.model_dump() if verification.tolerance else {}
    lines = [f"read back from disk, on {verification.prompts}, {found['positions']} positions"]
    lines += [
        f"{name:<28}{found[key]:>10{form}}   allowed {allowed[key]:{form}}"
        for name, key, form in PROOF_ROWS
        if found[key] is not None
    ]
    written = verification.continuations
    if written is not None:
        tied = f", {written.tied} more part at a tie" if written.tied else ""
        lines.append(f"{'identical continuations':<28}{f'{written.identical} of {written.prompts}':>10}{tied}")
    if verification.compared_tensors:
        changed = f"{verification.changed_tensors} of {verification.compared_tensors}"
        lines.append(f"{'tensors changed':<28}{changed:>10}")
    for name, pair in verification.metrics.items():
        known = pair.low is not None and pair.high is not None
        interval = f"   difference [{pair.low:+.4f}, {pair.high:+.4f}]" if known else ""
        lines.append(f"{name:<28}{pair.merged:>10.4f}   adapter {pair.adapter:.4f}   n={pair.n}{interval}")
    return lines


def licence_of(source: Source) -> str | None:
    """The base's licence: of a packaged backbone, or what a local folder's model card says."""
    if source.spec.name in PACKAGED:
        return PACKAGED[source.spec.name].package.licence
    card = Path(source.spec.name) / "README.md"
    if not card.is_file():
        return None
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (front := [line.strip() for line in lines[1:]]):
        return None
    for line in front[: front.index("---")]:
        key, _, value = line.partition(":")
        if key == "license" and value.strip():
            return value.strip()
    return None


def _base_name(source: Source) -> str:
    """The base as its owner would call it: a local folder by its last part, so that no private path is published."""
    name = source.spec.name
    return Path(name).name if Path(name).exists() else name


def _origin(source: Source, verification: Verification, licence: str | None, onto: str | None) -> str:
    quantization = "" if source.spec.quantization == "none" else f", trained in {source.spec.quantization}"
    rows = [("Base", _base_name(source) + quantization), ("Method", source.method), ("Weights", verification.dtype)]
    if onto:
        rows.append(("Folded onto", f"the {onto} weights of the base"))
    if source.recipe:
        rows += [
            ("Task", source.recipe.task.kind),
            ("Data", source.recipe.data.train),
            ("Recipe digest", source.recipe.digest),
            ("Seed", str(source.recipe.seed)),
        ]
    if licence:
        rows.append(("Licence of the base", licence))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_escaped(value)} |" for name, value in rows)])


def _scores(source: Source) -> str:
    if source.record is None or not source.record.metrics:
        return ""
    lines = [
        "## Scores of the adapter on the test split",
        "",
        "| metric | value | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for name, metric in source.record.metrics.items():
        known = metric.low is not None and metric.high is not None
        interval = f"{metric.low:.4g} to {metric.high:.4g}" if known else ""
        lines.append(f"| {_escaped(name)} | {metric.value:.4g} | {interval} | {metric.n} |")
    return "\n".join(lines)


def _proof(verification: Verification) -> str:
    if verification.difference is None or verification.tolerance is None:
        return ""
    found = verification.difference.model_dump()
    bound = verification.tolerance.model_dump()
    written = verification.continuations
    lines = [
        "## Proof of the merge",
        "",
        f"Read back from disk and compared with the adapter at {verification.difference.positions} positions of "
        f"{verification.prompts}, in {verification.arithmetic} arithmetic.",
        "",
        "| | measured | allowed |",
        "|---|---|---|",
        *(
            f"| {name} | {found[key]:{form}} | {bound[key]:{form}} |"
            for name, key, form in PROOF_ROWS
            if found[key] is not None
        ),
        *([f"| identical greedy continuations | {written.identical} of {written.prompts} | |"] if written else []),
        *(
            f"| {_escaped(name)}, adapter and merged | {pair.adapter:.4g} | {pair.merged:.4g} |"
            for name, pair in verification.metrics.items()
        ),
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
