"""A recipe becomes a record: the only place that sequences the stages of a run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from peftkit.backbones.load import Backbone, base_identity, load_backbone
from peftkit.backbones.spec import BackboneSpec, Head
from peftkit.data.batching import step_order
from peftkit.data.load import load_splits
from peftkit.data.table import Table
from peftkit.digests import digests_of
from peftkit.environment import describe_environment
from peftkit.errors import DeviceBusy, Diverged, DoesNotFit, InputError, OutOfMemory, PeftkitError
from peftkit.files import staged_folder, write_json, write_json_lines
from peftkit.folder import BASE_NAME, HEAD_NAME, RECIPE_NAME, claim_folder, release_folder
from peftkit.methods.base import Adapted, load_peft
from peftkit.plan.gate import Admitted, admit, require_free
from peftkit.plan.sizes import sizes_of
from peftkit.plan.workload import workload_of
from peftkit.prepare import Prepared, Read, head_to_load, load, read
from peftkit.recipe import Recipe, load_recipe
from peftkit.record import (
    PREDICTIONS_NAME,
    Inference,
    Loss,
    Metric,
    Parameters,
    RunRecord,
    Status,
    bare_record,
    read_record,
)
from peftkit.tasks import SHAPES, open_task, read_head
from peftkit.tasks.base import FeatureSet, Prediction, Score, Task
from peftkit.train.fastpath import FastPath
from peftkit.train.inference import Requests, measure_inference
from peftkit.train.loop import Fitted, Loop, Observer
from peftkit.train.meter import Stopwatch
from peftkit.train.progress import PlainObserver
from peftkit.train.retry import explained
from peftkit.train.scoring import mean_loss, predict

FAILURES: dict[type[PeftkitError], Status] = {Diverged: "diverged", OutOfMemory: "oom"}


@dataclass(frozen=True, slots=True)
class Opened:
    """A run's folder, loaded for use: the backbone with what was trained on it."""

    recipe: Recipe
    backbone: Backbone
    adapted: Adapted
    task: Task


@dataclass(frozen=True, slots=True)
class _Asked:
    """The arguments of `train` of the same names."""

    resume: bool
    planned: bool
    inference: bool
    only_if_free: bool


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    planned: bool = True,
    inference: bool = False,
    only_if_free: bool = False,
    observer: Observer | None = None,
) -> RunRecord:
    """Train and evaluate a recipe into the folder `out`; return the record that is written there.

    A folder that already holds the finished run of this recipe is left alone and its record returned.

    Args:
        resume: go on from the newest checkpoint in `out`, or start when there is none.
        planned: plan first, and stop before any weight is loaded where the run cannot fit.
        inference: measure afterwards how fast the result answers.
        only_if_free: stop, too, where others hold the memory that the run needs.

    Raises:
        InputError: a faulty recipe, data, backbone or folder; nothing was trained.
        DoesNotFit: the plan says so; nothing was trained.
        DeviceBusy: with `only_if_free`; nothing was trained.
        PeftkitError: training ran and failed; the record says how.
    """
    out, observer = Path(out), observer or PlainObserver()
    finished = claim_folder(recipe, out, resume=resume)
    if finished is not None:
        return finished
    started, digests = time.time(), digests_of(recipe)
    try:
        with explained("the run", "Try backbone.quantization=nf4 or a smaller backbone."):
            asked = _Asked(resume, planned, inference, only_if_free)
            record = _run(recipe, out, asked, observer=observer)
    except (InputError, DoesNotFit, DeviceBusy):
        release_folder(out)
        raise
    except PeftkitError as fault:
        status = FAILURES.get(type(fault), "failed")
        bare_record(recipe, status, str(fault), environment=describe_environment()).write(out)
        raise
    record = record.model_copy(update={"wall_seconds": time.time() - started, "digests": digests})
    record.write(out)
    return record


def open_run(folder: Path, *, device: str | torch.device = "cpu") -> Opened:
    """Load a finished run: its backbone with the adapter, or the model it trained.

    Raises:
        InputError: the folder holds no finished run.
    """
    record = read_record(folder)
    if record.status != "ok":
        raise InputError(f"{folder} holds a run that ended as {record.status}: {record.error or 'no reason given'}.")
    recipe = load_recipe(folder / RECIPE_NAME)
    kind = next((kind for kind in ("adapter", "model") if (folder / kind).is_dir()), None)
    if kind is None:
        head = read_head(recipe.task, load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed).train)
    else:
        head = read_saved_head(folder / kind)
    set_seed(recipe.seed)
    if kind == "model":
        spec = recipe.backbone.model_copy(update={"name": str(folder / "model"), "revision": None})
        backbone = load_backbone(spec, head, device=device)
        adapted = Adapted(backbone.model, "model")
    else:
        backbone = load_backbone(recipe.backbone, head_to_load(recipe, head), device=device)
        adapted = load_peft(backbone, folder / kind) if kind else recipe.method.attach(backbone)
    adapted.model.eval()
    return Opened(recipe, backbone, adapted, open_task(recipe.task, head))


def read_saved_head(folder: Path) -> Head:
    """The head of a saved adapter or model; a language-model head when none is recorded."""
    path = folder / HEAD_NAME
    if not path.is_file():
        return Head("language")
    content = json.loads(path.read_text(encoding="utf-8"))
    return Head(content["kind"], tuple(content["labels"]), content["problem"])


def evaluate(reference: str | Path, recipe: Recipe | None = None, *, out: Path | None = None) -> dict[str, Metric]:
    """Score a run, a merged model or a plain backbone on the test split of a recipe, or else its validation split.

    Args:
        reference: a run's folder, a model folder, or anything `backbone.name` accepts.
        recipe: whose task and data to use; a run's own when None.
        out: where `eval.json` goes; default: the reference's own folder, or here for a hub id.

    Raises:
        InputError: nothing there to score, or nothing to score it on.
    """
    folder = Path(reference)
    if (folder / RECIPE_NAME).is_file():
        opened = open_run(folder)
        recipe = recipe or opened.recipe
        backbone, adapted, task = opened.backbone, opened.adapted, opened.task
    elif recipe is None:
        raise InputError(f"{reference} is not a run, so it does not say what to score it on. Give a recipe as well.")
    else:
        head = read_saved_head(folder)
        if head.kind == "language" and recipe.task.kind == "classify":
            head = read_head(recipe.task, load_splits(recipe.data, "classification", seed=recipe.seed).train)
        spec = BackboneSpec(**(recipe.backbone.model_dump() | {"name": str(reference), "quantization": "none"}))
        backbone = load_backbone(spec, head)
        adapted, task = Adapted(backbone.model.eval(), "none"), open_task(recipe.task, head)
    splits = load_splits(recipe.data, SHAPES[recipe.task.kind], seed=recipe.seed)
    table = splits.test or splits.validation
    if table is None:
        raise InputError("the recipe has neither data.test nor data.validation to score on.")
    scored = task.encode(table, backbone.tokenizer, backbone.dims, recipe.data, max_tokens=recipe.training.max_tokens)
    pad = _pad_id(backbone)
    found = predict(adapted, task, scored.features, pad_id=pad, max_tokens=recipe.evaluation.batch_tokens)
    metrics = _as_metrics(task.metrics(found, intervals=True))
    where = out or (folder if folder.is_dir() else Path())
    document = {"reference": str(reference), "loss": mean_loss(found, scored.features)}
    document["metrics"] = {name: metric.model_dump(exclude_none=True) for name, metric in metrics.items()}
    write_json(where / "eval.json", document)
    return metrics


def preview_data(recipe: Recipe, *, count: int) -> list[dict[str, Any]]:
    """The first examples of the training split as the model sees them: tokens, and which of them carry loss."""
    from peftkit.data.preview import preview

    known = read(recipe)
    train = known.splits.train
    shown = Table(train.rows[:count], train.origins[:count], "")
    limit = recipe.training.max_tokens
    features = known.task.encode(shown, known.tokenizer, known.dims, recipe.data, max_tokens=limit).features
    labels = known.head.labels or None
    return preview(features, known.tokenizer, origins=shown.origins, count=count, labels=labels)


def _run(recipe: Recipe, out: Path, asked: _Asked, *, observer: Observer) -> RunRecord:
    project = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "trackers"))
    accelerator = Accelerator(log_with=list(recipe.tracking.to) or None, project_config=project)
    if recipe.tracking.to:
        accelerator.init_trackers(recipe.tracking.project, config={"label": recipe.label, "digest": recipe.digest})
    watch = Stopwatch()
    with watch.phase("read"):
        known = read(recipe)
        trains = recipe.method.shots is None
        encoded = _encode(recipe, known, observer) if trains else {}
    with watch.phase("plan"):
        admitted = _admit(recipe, known, encoded["train"], observer) if trains and asked.planned else None
        if admitted is not None and asked.only_if_free:
            require_free(admitted.plan)
    with watch.phase("load"):
        prepared = load(recipe, known, observer, device=accelerator.device)
    backbone, adapted = prepared.backbone, prepared.adapted
    fitted: Fitted | None = None
    fast = FastPath(pad_id=_pad_id(backbone))
    if trains:
        kernels, attention = recipe.training.kernels, recipe.backbone.attention
        fast = FastPath.open(adapted.model, kernels, attention=attention, pad_id=_pad_id(backbone), say=observer.say)
        loop = _open_loop(
            recipe, prepared, encoded, out, admitted, fast=fast, observer=observer, accelerator=accelerator
        )
        with watch.phase("train"):
            fitted = loop.fit(resume=asked.resume)
        _save_artifact(adapted, backbone, out)
    with watch.phase("score"):
        validation = _score(recipe, prepared, "validation", encoded, fast=fast)
        test = _score(recipe, prepared, "test", encoded, fast=fast)
    if test is not None:
        write_json_lines(out / PREDICTIONS_NAME, test[0])
    with watch.phase("answer"):
        wanted = asked.inference and trains
        answers = _measure_answers(recipe, prepared, encoded, fast=fast, observer=observer) if wanted else {}
    accelerator.end_training()
    folder = out / adapted.artifact
    trainable = sum(parameter.numel() for parameter in adapted.trainable().values())
    loss = fitted.loss if fitted else None
    if validation is not None:
        values = (loss.model_dump() if loss else {}) | {"validation": validation[2]}
        loss = Loss(**values)
    memory = fitted.meter.memory() if fitted else None
    if memory is not None and admitted is not None:
        found = admitted.plan.simulation
        update = {"predicted_tensor_peak_bytes": found.step_bytes, "predicted_terms": found.step_terms}
        # of a card the allocator's share is measured, of the host all that the process holds
        peak = found.reserved_bytes if memory.kind == "cuda-reserved" else found.total_bytes
        memory = memory.model_copy(update=update | {"predicted_peak_bytes": peak})
    return bare_record(recipe, "ok", None, environment=describe_environment()).model_copy(
        update={
            "parameters": Parameters(
                total=backbone.dims.num_params,
                trainable=trainable,
                artifact_bytes=sum(f.stat().st_size for f in folder.rglob("*")) if folder.is_dir() else None,
            ),
            "memory": memory,
            "throughput": fitted.meter.throughput() if fitted else None,
            "inference": answers,
            "phases": watch.seconds,
            "energy": fitted.meter.energy() if fitted else None,
            "loss": loss,
            "metrics": test[1] if test else {},
            "validation_metrics": validation[1] if validation else {},
            "guards": fitted.guards if fitted else {},
            "history": fitted.history if fitted else [],
            "artifacts": {adapted.artifact: adapted.artifact} if folder.is_dir() else {},
        }
    )


def _encode(recipe: Recipe, known: Read, observer: Observer) -> dict[str, FeatureSet]:
    """Every split that there is, tokenized."""
    tables = {"train": known.splits.train, "validation": known.splits.validation, "test": known.splits.test}
    return {split: known.encode(recipe, table, split, observer) for split, table in tables.items() if table is not None}


def _admit(recipe: Recipe, known: Read, train: FeatureSet, observer: Observer) -> Admitted:
    """The run's plan, from the lengths of its own examples."""
    workload = workload_of(recipe, sizes_of(train.features))
    return admit(recipe, known.head, workload, say=observer.say)


def _open_loop(
    recipe: Recipe,
    prepared: Prepared,
    encoded: dict[str, FeatureSet],
    out: Path,
    admitted: Admitted | None,
    *,
    fast: FastPath,
    observer: Observer,
    accelerator: Accelerator,
) -> Loop:
    """The training loop, after a last look at what it is given."""
    expected = recipe.method.trainable_params(prepared.backbone.dims)
    trainable = sum(parameter.numel() for parameter in prepared.adapted.trainable().values())
    assert trainable == expected, f"{trainable} parameters train, and the method counts {expected}"
    fast.check_recomputing(recipe)
    observer.say(f"{recipe.label}: {trainable:,} of {prepared.backbone.dims.num_params:,} parameters train")
    features = encoded["train"].features
    for warning in prepared.task.inspect(features, prepared.backbone.tokenizer):
        observer.say(f"warning: {warning}")
    return Loop(
        prepared.adapted,
        prepared.task,
        recipe.training if admitted is None else admitted.training,
        recipe.evaluation,
        train=features,
        validation=encoded["validation"].features if "validation" in encoded else None,
        fast=fast,
        seed=recipe.seed,
        folder=out,
        accelerator=accelerator,
        observer=observer,
        watch=None if admitted is None else admitted.watch(accelerator.device, observer.say),
    )


def _score(
    recipe: Recipe,
    prepared: Prepared,
    split: Literal["validation", "test"],
    encoded: dict[str, FeatureSet],
    *,
    fast: FastPath,
) -> tuple[list[Prediction], dict[str, Metric], float | None] | None:
    """Predictions, metrics with intervals, and mean loss on a split; None without the split."""
    table = prepared.splits.validation if split == "validation" else prepared.splits.test
    if table is None:
        return None
    task, backbone = prepared.task, prepared.backbone
    shots = recipe.method.shots
    if shots is None:
        features = encoded[split].features
        tokens = recipe.evaluation.batch_tokens
        found = predict(prepared.adapted, task, features, pad_id=_pad_id(backbone), max_tokens=tokens, fast=fast)
        return found, _as_metrics(task.metrics(found, intervals=True)), mean_loss(found, features)
    train = prepared.splits.train
    order = step_order(len(train), len(train), seed=recipe.seed, epoch=0)[0]
    shown = Table([train.rows[i] for i in order], [train.origins[i] for i in order], "")
    limit = recipe.training.max_tokens
    scored = task.prompt(backbone, table, shown, shots=shots, data=recipe.data, max_tokens=limit)
    if isinstance(scored, list):
        return scored, _as_metrics(task.metrics(scored, intervals=True)), None
    found = predict(
        prepared.adapted,
        task,
        scored.features,
        pad_id=_pad_id(backbone),
        max_tokens=recipe.evaluation.batch_tokens,
        fast=fast,
    )
    return found, _as_metrics(task.metrics(found, intervals=True)), mean_loss(found, scored.features)


def _measure_answers(
    recipe: Recipe, prepared: Prepared, encoded: dict[str, FeatureSet], *, fast: FastPath, observer: Observer
) -> dict[str, Inference]:
    """How fast the trained model answers examples of the test split, or else of validation or training."""
    asked = next(encoded[split] for split in ("test", "validation", "train") if split in encoded)
    writes = recipe.task.kind != "classify"
    limit = recipe.evaluation.batch_tokens
    requests = Requests(prepared.adapted, prepared.task, asked.features, fast, limit, writes)
    return measure_inference(requests, foldable=recipe.backbone.quantization == "none", say=observer.say)


def _save_artifact(adapted: Adapted, backbone: Backbone, out: Path) -> None:
    """The adapter or model, with tokenizer, head and the identity of the base it belongs to."""
    if adapted.artifact == "none":
        return
    with staged_folder(out / adapted.artifact) as staging:
        adapted.save(staging)
        backbone.tokenizer.save_pretrained(staging)
        write_json(staging / HEAD_NAME, asdict(backbone.dims.head))
        write_json(staging / BASE_NAME, base_identity(backbone))


def _as_metrics(scores: dict[str, Score]) -> dict[str, Metric]:
    return {name: Metric(**asdict(score)) for name, score in scores.items()}


def _pad_id(backbone: Backbone) -> int:
    return int(backbone.tokenizer.pad_token_id or 0)
