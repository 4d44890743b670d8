"""Finished runs as result files of PEFT's `method_comparison`, which its own tables and plots read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peftkit.errors import InputError
from peftkit.files import write_json
from peftkit.record import RECORD_NAME, RunRecord
from peftkit.report.rows import CellRow

UPPER_BOUNDS = ("accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th")
"""The layout wants them and we measure only the peak, which they cannot exceed."""
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_results(rows: Sequence[CellRow], out: Path) -> list[str]:
    """Write a file for each finished run that trained into `out`; why each of the others has none, in words.

    What that layout has no place for (test examples, data, which numbers are upper bounds) is in `meta_info.peftkit`,
    which its readers pass over.

    Raises:
        InputError: no run can be written.
        OutputError: `out` cannot be written.
    """
    skipped = []
    documents = {}
    for row in rows:
        record = row.record
        if row.outside is not None:
            continue
        if record is None or record.status != "ok":
            skipped.append(f"{row.variant} seed {row.seed}: {row.status}")
        elif not _has_all(record):
            skipped.append(f"{row.variant} seed {row.seed}: it trained nothing, or was not scored on a test split")
        else:
            document = _document(row, record)
            documents[document["run_info"]["experiment_name"].replace("/", "--")] = document
    if not documents:
        raise InputError(f"no finished run that could be exported. {'; '.join(skipped)}")
    for name, document in documents.items():
        write_json(out / f"{name}.json", document)
    return skipped


def _has_all(record: RunRecord) -> bool:
    """Whether everything that the layout's readers ask for was measured."""
    memory, parameters = record.memory, record.parameters
    sizes = (memory.peak_bytes if memory else None, parameters.artifact_bytes if parameters else None)
    return None not in sizes and record.throughput is not None and bool(record.metrics)


def _document(row: CellRow, record: RunRecord) -> dict[str, Any]:
    content = record.model_dump(mode="json", exclude_none=True)
    parameters, throughput = content["parameters"], content["throughput"]
    peak = content["memory"]["peak_bytes"]
    kind = record.recipe.get("method", {}).get("kind", record.label)
    written = datetime.fromtimestamp((row.folder / RECORD_NAME).stat().st_mtime, UTC)
    return {
        "run_info": {
            "created_at": written.isoformat(timespec="seconds"),
            "total_time": record.wall_seconds or throughput["train_seconds"],
            "experiment_name": f"{kind}/{row.folder.resolve().name}",
            "peft_branch": "main",
            "train_config": _train_config(record),
            "peft_config": _adapter_config(row.folder, record, kind),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_max": peak,
            **dict.fromkeys(UPPER_BOUNDS, peak),
            "train_time": throughput["train_seconds"],
            "file_size": parameters["artifact_bytes"],
            "num_trainable_params": parameters["trainable"],
            "num_total_params": parameters["total"],
            "status": "success",
            "metrics": _metrics(record, throughput),
        },
        "meta_info": _meta_info(record),
    }


def _metrics(record: RunRecord, throughput: dict[str, Any]) -> list[dict[str, Any]]:
    """The evaluations on the way, then the test."""
    lines = [
        {"step": line["step"]} | {f"valid {key}": line[key] for key in line if key not in ("step", "epoch")}
        for line in record.history
        if "step" in line
    ]
    lines = [line | {"train time": throughput["train_seconds"] * (i == 0)} for i, line in enumerate(lines)]
    if not lines:
        lines = [{"step": 0, "train time": throughput["train_seconds"]}]
    loss = {} if record.loss is None or record.loss.last is None else {"train loss": record.loss.last}
    test = {f"test {name}": metric.value for name, metric in record.metrics.items()}
    totals = {"train samples": throughput["samples"], "train total tokens": throughput["tokens"]}
    return [*lines, {"step": lines[-1]["step"]} | test | loss | totals]


def _train_config(record: RunRecord) -> dict[str, Any]:
    """The settings that both sides have, under that layout's names; then ours as they are."""
    backbone, training = record.recipe.get("backbone", {}), record.recipe.get("training", {})
    return {
        "model_id": backbone.get("name"),
        "dtype": backbone.get("dtype"),
        "max_seq_length": training.get("max_tokens"),
        "batch_size": training.get("batch_size"),
        "max_steps": training.get("max_steps"),
        "seed": record.seed,
        "optimizer_type": training.get("optimizer"),
        "optimizer_kwargs": {"lr": training.get("learning_rate"), "weight_decay": training.get("weight_decay")},
        "lr_scheduler": training.get("schedule"),
        "training": training,
    }


def _adapter_config(folder: Path, record: RunRecord, kind: str) -> dict[str, Any] | None:
    """The adapter's own configuration; the method's settings where its files are gone; None for full finetuning."""
    path = folder / record.artifacts.get("adapter", "adapter") / "adapter_config.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    method = {key: value for key, value in record.recipe.get("method", {}).items() if key != "kind"}
    return None if kind == "full" else {"peft_type": kind.upper()} | method


def _meta_info(record: RunRecord) -> dict[str, Any]:
    environment, data = record.environment, record.recipe.get("data", {})
    versions = environment.get("packages", {})
    named = {key: str(data[key]) for key in ("train", "test") if data.get(key)}
    return {
        "model_info": {"sha": None, "created_at": None},
        "dataset_info": {name: {"sha": None, "created_at": None} for name in named.values()},
        "package_info": {
            key: value
            for name in PACKAGES
            for key, value in ((f"{name}-version", versions.get(name)), (f"{name}-commit-hash", None))
        },
        "system_info": {
            "system": str(environment.get("platform", "")),
            "accelerator": str(environment.get("device_name") or environment.get("device") or ""),
        },
        "pytorch_info": f"torch {versions.get('torch', 'unknown')}",
        "peftkit": {
            "version": record.peftkit_version,
            "recipe_digest": record.recipe_digest,
            "data": named,
            "test_examples": next(iter(record.metrics.values())).n,
            "upper_bounds": list(UPPER_BOUNDS),
        },
    }
