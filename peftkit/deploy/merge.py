"""Fold an adapter into a model that plain transformers loads, and prove from the files that it answers the same.

The delta is folded in float32 onto the frozen weights that the adapter was trained on, and the result is rounded once,
to the dtype these were held in; `rounding` says how a delta finer than that dtype survives. Tensors pass through memory
one by one (`fold`). Nothing stands at the output folder before the proof has passed.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from peftkit import __version__
from peftkit.cache import file_sha256
from peftkit.deploy.adapter import WEIGHTS_NAME, Onto, Source, read_source
from peftkit.deploy.answers import Difference
from peftkit.deploy.fold import Folded, fold_by_tensor
from peftkit.deploy.fold_memory import fold_in_memory
from peftkit.deploy.model_card import render_card
from peftkit.deploy.parts import require_free
from peftkit.deploy.proof import prove
from peftkit.deploy.verification import REPORT_NAME, Proof, Question, Say, Verification
from peftkit.deploy.weights import NotByTensor, folder_of
from peftkit.errors import InputError, OutputError, VerificationFailed
from peftkit.files import staged_folder, write_json, write_text
from peftkit.folder import HEAD_NAME
from peftkit.record import Part
from peftkit.units import format_bytes

REJECTED_SUFFIX = ".rejected"
EXTRAS_BYTES = 64 * 2**20
"""Room for tokenizer, configuration and report beside the weights."""
LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


class Base(Part):
    """The base that was folded onto, and how it was recognised: by its weights, its config, or shapes alone."""

    name: str
    revision: str | None = None
    quantization: str
    recognised_by: str
    trained_on: str


class MergeReport(Part):
    """What was merged, and the proof. `weights` is there for quantized bases: the merge onto each kind of weights,
    measured against the quantized model that was trained. `files` are the SHA-256 of the weights' files."""

    peftkit_version: str
    source: str
    status: Literal["ok", "rejected"]
    adapter_digest: str
    method: str
    recipe_digest: str | None = None
    base: Base
    onto: Onto | None = None
    folded: Literal["by tensor", "in memory"] = "by tensor"
    dtype: str
    num_params: int
    num_bytes: int
    folded_modules: int
    dithered_tensors: int
    files: dict[str, str] = Field(default_factory=dict)
    verification: Verification
    weights: dict[Onto, Difference] = Field(default_factory=dict)
    fold_seconds: float | None = None
    wall_seconds: float | None = None


def merge(
    run_or_adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    onto: Onto = "dequantized",
    max_examples: int = 200,
    streamed: bool | None = None,
    say: Say = lambda text: None,
) -> MergeReport:
    """Merge the adapter of a run, or a bare PEFT adapter, into the folder `out`; prove it, and return the report.

    `out` appears whole, proven, or not at all. When the proof fails, the report alone goes to `OUT.rejected`. A folder
    that already holds this very merge is left alone and its report returned. What a merge that was killed has left
    beside `out` is cleared away.

    Args:
        base: the base's name, where the adapter doesn't know it or it has moved.
        onto: for a quantized base, the weights to fold onto: those the adapter was trained on, or the original ones;
            or the former, quantized again.
        max_examples: test examples that the task's metrics are measured on, for adapter and merged model.
        streamed: prove layer by layer, without either model in memory; None decides by the memory that is free.
        say: told what is being done: a large model takes minutes.

    Raises:
        InputError: a folder that is no adapter, a method that can't be folded, a wrong base, an output that is in use.
        VerificationFailed: the merged model doesn't answer like the adapter.
    """
    started = time.perf_counter()
    out = Path(out).absolute()
    source = read_source(Path(run_or_adapter), base)
    if onto != "dequantized" and source.spec.quantization == "none":
        raise InputError(f"--onto {onto} would be ignored: the base of this adapter is not quantized. Leave it out.")
    if onto == "requantized" and source.spec.quantization != "nf4":
        raise InputError(f"--onto requantized writes NF4, and this base was held in {source.spec.quantization}.")
    done = _finished(out, source, onto)
    if done is not None:
        return done
    _require_room(out, source)
    rejected = out.with_name(out.name + REJECTED_SUFFIX)
    with staged_folder(out) as staging:
        folded, how = _fold(source, staging, onto=onto, say=say)
        _write_beside(source, staging)
        fold_seconds = time.perf_counter() - started
        say("proving it from the files just written")
        question = Question(
            reference=str(run_or_adapter),
            candidate=str(staging),
            base=base,
            onto=onto if source.spec.quantization != "none" else None,
            max_examples=max_examples,
            streamed=streamed,
            digests=folded.digests,
        )
        proof = prove(question, say)
        report = _report(str(run_or_adapter), source, folded, proof, question.onto).model_copy(
            update={"folded": how, "fold_seconds": fold_seconds, "wall_seconds": time.perf_counter() - started}
        )
        verdict = proof.verification
        if not verdict.passed:
            write_json(rejected / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
            raise VerificationFailed(
                f"the merged model does not answer like {source.adapter}: {'; '.join(verdict.failures)}. "
                f"Nothing was written to {out}; {rejected / REPORT_NAME} has the numbers."
            )
        write_text(staging / "README.md", render_card(source, verdict, onto=report.onto))
        write_json(staging / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
    return report


def _fold(source: Source, folder: Path, *, onto: Onto, say: Say) -> tuple[Folded, Literal["by tensor", "in memory"]]:
    """The merged weights in `folder`, and how they came there."""
    try:
        return fold_by_tensor(source, folder, onto=onto, say=say), "by tensor"
    except NotByTensor as reason:
        say(f"loading the whole base to fold it, since {reason}")
        return fold_in_memory(source, folder, onto=onto), "in memory"


def _report(origin: str, source: Source, folded: Folded, proof: Proof, onto: Onto | None) -> MergeReport:
    return MergeReport(
        peftkit_version=__version__,
        source=origin,
        status="ok" if proof.verification.passed else "rejected",
        adapter_digest=file_sha256(source.adapter / WEIGHTS_NAME),
        method=source.method,
        recipe_digest=source.recipe.digest if source.recipe else None,
        base=Base(
            name=source.spec.name,
            revision=source.spec.revision,
            quantization=source.spec.quantization,
            recognised_by=folded.recognised,
            trained_on=source.trained_on,
        ),
        onto=onto,
        dtype=str(folded.dtype).removeprefix("torch."),
        num_params=folded.num_params,
        num_bytes=folded.num_bytes,
        folded_modules=folded.modules,
        dithered_tensors=folded.dithered,
        files=folded.digests,
        verification=proof.verification,
        weights=proof.weights,
    )


def _finished(out: Path, source: Source, onto: Onto) -> MergeReport | None:
    """The report of a merge of the same adapter, in the same way, that stands at `out` already."""
    path = out / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = MergeReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        return None
    same = report.adapter_digest == file_sha256(source.adapter / WEIGHTS_NAME) and report.onto in (None, onto)
    return report if same and report.base.name == source.spec.name else None


def _require_room(out: Path, source: Source) -> None:
    """See that `out` is free and has room.

    Raises:
        OutputError: `out` is in use, or its disk is too full.
    """
    from peftkit.backbones.load import DTYPES, dims_of

    require_free(out)
    dims = dims_of(source.spec, source.head)
    head = (
        dims.vocab * dims.hidden if source.head.kind == "language" else 0
    )  # it may have to be told from the embedding
    needed = (dims.num_params + head) * DTYPES[source.spec.dtype].itemsize + EXTRAS_BYTES
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.is_dir())).free
    if free < needed:
        raise OutputError(
            f"{out.parent} has {format_bytes(free)} free and the merged model needs {format_bytes(needed)}. "
            "Choose another --out, or free space there."
        )


def _write_beside(source: Source, folder: Path) -> None:
    """Write tokenizer, chat template and head, and the base's licence."""
    from peftkit.backbones.load import load_tokenizer
    from peftkit.backbones.quiet import quietly

    own = (source.adapter / "tokenizer_config.json").is_file()
    with quietly():
        load_tokenizer(source.spec, source.adapter if own else None).save_pretrained(folder)
    write_json(folder / HEAD_NAME, asdict(source.head))
    base = folder_of(source.spec)
    for pattern in LICENCES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
