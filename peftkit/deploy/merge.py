"""Fold an adapter into a model that plain transformers loads, and prove from the files that it answers the same.

The delta is folded in float32 onto the frozen weights that the adapter was trained on, and the result is rounded once,
to the dtype these were held in; `rounding` says how a delta finer than that dtype survives. Nothing stands at the
output folder before the proof has passed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from peftkit import __version__
from peftkit.cache import file_sha256
from peftkit.deploy.adapter import (
    WEIGHTS_NAME,
    Source,
    attach,
    check_base,
    fold,
    read_source,
    touched_modules,
)
from peftkit.deploy.answers import POSITIONS, Difference, Probes, Reference, difference, take_reference
from peftkit.deploy.model_card import render_card
from peftkit.deploy.rounding import dequantize, round_parameters, snapshot, to_float32
from peftkit.deploy.verify import Verification, fingerprints, verify
from peftkit.errors import InputError, OutputError, VerificationFailed
from peftkit.files import staged_folder, write_json, write_text
from peftkit.folder import HEAD_NAME
from peftkit.record import Part
from peftkit.units import format_bytes

if TYPE_CHECKING:
    import torch

    from peftkit.backbones.dims import Dims
    from peftkit.backbones.load import Backbone
    from peftkit.data.table import Table

REPORT_NAME = "merge_report.json"
REJECTED_SUFFIX = ".rejected"
EXTRAS_BYTES = 64 * 2**20
"""Room for tokenizer, configuration and report beside the weights."""

Onto = Literal["dequantized", "original"]
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Question: How many days are there in a leap year?\nAnswer: A leap year has 366 days, one more than a common year.",
    "I did not expect to like this film, but the second half is so well acted that I watched it twice.",
    "Dear Ms. Okafor, thank you for your letter of 3 May. We are sorry that the parcel arrived late and damaged.",
    "def factorial(n):\n    if n == 0:\n        return 1\n    return n * factorial(n - 1)\n",
    "Water boils at 100 degrees Celsius at sea level; on a high mountain it boils at a lower temperature.",
    "Once upon a time a fox lived at the edge of a dark wood, and every evening she counted the stars.",
    "To make bread you need flour, water, salt and yeast. Mix them, wait for the dough to rise, and bake it.",
    "The committee voted seven to two against the proposal, which critics had called vague and far too costly.",
    "Das Wetter ist heute schön. Il fait beau aujourd'hui. Hoy hace buen tiempo.",
)
"""What an adapter without a run is asked."""


class Base(Part):
    """The base that was folded onto, and how it was recognised: by its weights, its config, or shapes alone."""

    name: str
    revision: str | None = None
    quantization: str
    recognised_by: str
    trained_on: str


class MergeReport(Part):
    """What was merged, and the proof. `weights` is there for quantized bases: the merge onto each kind of weights,
    measured against the quantized model that was trained."""

    peftkit_version: str
    source: str
    status: Literal["ok", "rejected"]
    adapter_digest: str
    method: str
    recipe_digest: str | None = None
    base: Base
    onto: Onto | None = None
    dtype: str
    num_params: int
    num_bytes: int
    folded_modules: int
    dithered_tensors: int
    verification: Verification
    weights: dict[Onto, Difference] = Field(default_factory=dict)
    wall_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Merged:
    """A folded model in memory, and what its proof needs."""

    model: Any
    dtype: torch.dtype
    dims: Dims
    tokenizer: Any
    before: dict[str, str]
    touched: frozenset[str]
    trained: Reference
    reference: Reference
    codes: dict[str, torch.Tensor]
    dithered: int


def merge(
    run_or_adapter: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    onto: Onto = "dequantized",
    max_examples: int = 200,
    say: Callable[[str], None] = lambda text: None,
) -> MergeReport:
    """Merge the adapter of a run, or a bare PEFT adapter, into the folder `out`; prove it, and return the report.

    `out` appears whole, proven, or not at all. When the proof fails, the report alone goes to `OUT.rejected`. A folder
    that already holds this very merge is left alone and its report returned.

    Args:
        base: the base's name, where the adapter doesn't know it or it has moved.
        onto: for a quantized base, the weights to fold onto: those the adapter was trained on, or the original ones.
        max_examples: test examples that the task's metrics are measured on, for adapter and merged model.
        say: told what is being done: a large model takes minutes.

    Raises:
        InputError: a folder that is no adapter, a method that can't be folded, a wrong base, an output that is in use.
        VerificationFailed: the merged model doesn't answer like the adapter.
    """
    started = time.perf_counter()
    out = Path(out).absolute()
    source = read_source(Path(run_or_adapter), base)
    if onto == "original" and source.spec.quantization == "none":
        raise InputError("--onto original would be ignored: the base of this adapter is not quantized. Leave it out.")
    done = _finished(out, source, onto)
    if done is not None:
        return done
    dims = _require_room(out, source)
    say(f"asking {source.spec.name} with the adapter, then folding it")
    recognised, merged = _fold_source(source, dims, onto, max_examples)
    rejected = out.with_name(out.name + REJECTED_SUFFIX)
    with staged_folder(out) as staging:
        say(f"writing {format_bytes(dims.num_params * merged.dtype.itemsize)}")
        num_bytes = _write_model(merged, source, staging)
        say("asking the merged model from the files just written")
        verdict, model = verify(
            merged.reference, staging, spec=source.spec, dims=dims, before=merged.before, touched=merged.touched
        )
        report = _report(str(run_or_adapter), source, merged, verdict, onto, recognised=recognised, num_bytes=num_bytes)
        if report.onto is not None:
            say("measuring the fold onto each kind of weights")
            report = report.model_copy(update={"weights": _weigh(source, merged, model, onto)})
        report = report.model_copy(update={"wall_seconds": time.perf_counter() - started})
        if not verdict.passed:
            write_json(rejected / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
            raise VerificationFailed(
                f"the merged model does not answer like {source.adapter}: {'; '.join(verdict.failures)}. "
                f"Nothing was written to {out}; {rejected / REPORT_NAME} has the numbers."
            )
        write_text(staging / "README.md", render_card(source, verdict, onto=report.onto))
        write_json(staging / REPORT_NAME, report.model_dump(mode="json", exclude_none=True))
    return report


def _report(
    origin: str, source: Source, merged: _Merged, verdict: Verification, onto: Onto, *, recognised: str, num_bytes: int
) -> MergeReport:
    return MergeReport(
        peftkit_version=__version__,
        source=origin,
        status="ok" if verdict.passed else "rejected",
        adapter_digest=file_sha256(source.adapter / WEIGHTS_NAME),
        method=source.method,
        recipe_digest=source.recipe.digest if source.recipe else None,
        base=Base(
            name=source.spec.name,
            revision=source.spec.revision,
            quantization=source.spec.quantization,
            recognised_by=recognised,
            trained_on=source.trained_on,
        ),
        onto=onto if source.spec.quantization != "none" else None,
        dtype=verdict.dtype,
        num_params=merged.dims.num_params,
        num_bytes=num_bytes,
        folded_modules=len(merged.touched),
        dithered_tensors=merged.dithered,
        verification=verdict,
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


def _require_room(out: Path, source: Source) -> Dims:
    """The base's dimensions, once `out` is known to be free and to have room.

    Raises:
        OutputError: `out` is in use, or its disk is too full.
    """
    from peftkit.backbones.load import DTYPES, dims_of

    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputError(f"{out} is not empty. Choose another --out, or move what is there.")
    dims = dims_of(source.spec, source.head)
    needed = dims.num_params * DTYPES[source.spec.dtype].itemsize + EXTRAS_BYTES
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.is_dir())).free
    if free < needed:
        raise OutputError(
            f"{out.parent} has {format_bytes(free)} free and the merged model needs {format_bytes(needed)}. "
            "Choose another --out, or free space there."
        )
    return dims


def _fold_source(source: Source, dims: Dims, onto: Onto, max_examples: int) -> tuple[str, _Merged]:
    """How the base was recognised, and the folded model with the adapter's own answers."""
    from peftkit.backbones.load import load_backbone

    backbone = load_backbone(source.spec, source.head)
    recognised = check_base(source, backbone)
    probes = _probes(source, backbone, max_examples)
    dtype = backbone.compute_dtype
    if source.spec.quantization == "none":
        codes: dict[str, torch.Tensor] = {}
        before, grid = fingerprints(backbone.model, dtype), snapshot(backbone.model, dtype)
        adapted = to_float32(attach(source, backbone))
        reference = trained = take_reference(adapted, probes)
    else:
        codes = dequantize(backbone.model)
        if source.spec.quantization == "int8":  # its kernel rounds activations too, which no fold can copy
            backbone = _plain(source, codes)
        trained = take_reference(to_float32(attach(source, backbone)), probes)
        backbone = _plain(source, codes if onto == "dequantized" else {})
        before, grid = fingerprints(backbone.model, dtype), snapshot(backbone.model, dtype)
        adapted = to_float32(attach(source, backbone))
        reference = trained
        if onto == "original":  # the fold itself is proven on the weights it was asked for
            own = take_reference(adapted, replace(probes, metrics=None))
            reference = replace(own, probes=probes, metrics=trained.metrics)
    touched = touched_modules(adapted)
    model = fold(source, adapted)
    dithered = round_parameters(model, dtype, grid)
    return recognised, _Merged(
        model=model,
        dtype=dtype,
        dims=dims,
        tokenizer=backbone.tokenizer,
        before=before,
        touched=touched,
        trained=trained,
        reference=reference,
        codes=codes,
        dithered=dithered,
    )


def _weigh(source: Source, merged: _Merged, model: Any, onto: Onto) -> dict[Onto, Difference]:
    """The chosen fold and the other one, both against the quantized model that was trained."""
    other: Onto = "original" if onto == "dequantized" else "dequantized"
    plain = _plain(source, merged.codes if other == "dequantized" else {})
    grid = snapshot(plain.model, merged.dtype)
    alternative = fold(source, to_float32(attach(source, plain)))
    round_parameters(alternative, merged.dtype, grid)
    found = {onto: difference(merged.trained, model), other: difference(merged.trained, to_float32(alternative))}
    return {kind: found[kind] for kind in ("dequantized", "original")}


def _plain(source: Source, codes: dict[str, torch.Tensor]) -> Backbone:
    """The base without quantization, with the weights of `codes` put in place of its own."""
    from peftkit.backbones.load import load_backbone

    backbone = load_backbone(source.spec.model_copy(update={"quantization": "none"}), source.head)
    for path, weight in codes.items():
        backbone.model.get_submodule(path).weight.data = weight
    return backbone


def _write_model(merged: _Merged, source: Source, folder: Path) -> int:
    """Write weights, configurations, tokenizer and head; returns the bytes of the weights."""
    from transformers import AutoTokenizer

    from peftkit.backbones.quiet import quietly

    model = merged.model
    model.config.dtype = merged.dtype
    model.config.use_cache = merged.dims.config.to_dict().get("use_cache", True)
    own = (source.adapter / "tokenizer_config.json").is_file()
    with quietly():
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(str(source.adapter)) if own else merged.tokenizer
        tokenizer.save_pretrained(folder)
    write_json(folder / HEAD_NAME, asdict(source.head))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _probes(source: Source, backbone: Backbone, max_examples: int) -> Probes:
    """The run's held-out prompts through its task, and its metrics; built-in texts for an adapter without a run."""
    if source.recipe is None:
        return Probes(_text_features(backbone), source.head, "the built-in prompts")
    from peftkit.data.load import load_splits
    from peftkit.tasks import SHAPES, open_task

    recipe = source.recipe
    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    task = open_task(recipe.task, source.head)

    def encode(table: Table) -> list[Any]:
        longest = recipe.training.max_tokens
        return task.encode(table, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=longest).features

    held_out = {"validation": splits.validation, "test": splits.test}
    named = held_out if any(held_out.values()) else {"train": splits.train}
    features: list[Any] = []
    used: list[str] = []
    for name, table in named.items():
        if table is not None and sum(feature.loss_units for feature in features) < POSITIONS:
            features += encode(table)
            used.append(name)
    origin = f"the {' and '.join(used)} split{'s'[: len(used) != 1]}"
    if splits.test is None:
        return Probes(features, source.head, origin)
    tested = encode(splits.test)[:max_examples]
    pad_id = int(backbone.tokenizer.pad_token_id or 0)

    def metrics(model: torch.nn.Module) -> dict[str, tuple[float, int]]:
        from peftkit.data.batching import collate, micro_batches

        device = next(model.parameters()).device
        batches = micro_batches(tested, max_tokens=recipe.evaluation.batch_tokens)
        predictions = [row for batch in batches for row in task.predict(model, collate(batch, pad_id).to(device))]
        return {name: (score.value, score.n) for name, score in task.metrics(predictions, intervals=False).items()}

    return Probes(features, source.head, origin, metrics=metrics)


def _text_features(backbone: Backbone) -> list[Any]:
    import numpy as np

    from peftkit.data.features import Features

    features = []
    for row, text in enumerate(TEXTS):
        ids = np.array(backbone.tokenizer(text)["input_ids"], dtype=np.int32)[: backbone.dims.max_positions]
        features.append(Features(ids, ids, len(ids) - 1, row))
    return features
