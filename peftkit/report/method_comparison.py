"""Result files of PEFT's `method_comparison`, read as rows and written from rows.

The layout is that of `log_results` in `method_comparison/MetaMathQA/utils.py` of huggingface/peft (Apache-2.0): one
JSON a run with `run_info`, `train_info`, `meta_info`; older files say `cuda_memory_*` and `gpu` where newer ones say
`accelerator_*`. Its numbers mean other things than ours: the memory peak is that of the whole process over what was
reserved before the model was loaded, evaluation included; a step's time has tokenisation in it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from peftkit.errors import InputError
from peftkit.record import Loss, Memory, Metric, Parameters, RunRecord, Status
from peftkit.report.rows import CellRow, Outside
from peftkit.stats.bootstrap import share_interval

SOURCE = "PEFT method_comparison"
TEST_ROWS = {"gsm8k": 1319}
"""Rows of the test splits that these results use whole; the files do not say how many there are."""
STATUSES: Mapping[str, Status] = {"success": "ok", "failed": "failed", "canceled": "killed"}
NORMAL_95 = 1.959964
ONE_SEED = "one seed each: their intervals (Wilson) are over examples alone, and another seed may score otherwise"
NO_ANSWERS = "no answers by example: nothing can be compared in pairs"
OTHER_MEASURES = (
    "memory is the peak reserved by the whole run, evaluation included; time has tokenisation in it, and no evaluation"
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _RunInfo(_Part):
    experiment_name: str = Field(min_length=1)
    total_time: float
    train_config: dict[str, Any]
    peft_config: dict[str, Any] | None
    error_msg: str = ""


class _TrainInfo(_Part):
    status: Literal["success", "failed", "canceled"]
    file_size: int
    num_trainable_params: int
    num_total_params: int
    memory_max: int = Field(validation_alias=AliasChoices("accelerator_memory_max", "cuda_memory_max"))
    metrics: list[dict[str, Any]]


class _MetaInfo(_Part):
    dataset_info: dict[str, Any] = {}
    package_info: dict[str, str | None] = {}
    system_info: dict[str, str] = {}
    peftkit: dict[str, Any] = {}


class _Result(_Part):
    """One file."""

    run_info: _RunInfo
    train_info: _TrainInfo
    meta_info: _MetaInfo

    @property
    def scores(self) -> dict[str, float]:
        """The test scores, which the last line of the log has."""
        last = self.train_info.metrics[-1] if self.train_info.metrics else {}
        return {key.removeprefix("test "): value for key, value in last.items() if key.startswith("test ")}

    @property
    def data(self) -> dict[str, str]:
        """What it was trained and scored on, as far as the file says."""
        told = self.meta_info.peftkit.get("data")
        if isinstance(told, dict):
            return told
        named = [key for key, value in self.meta_info.dataset_info.items() if isinstance(value, dict)]
        named = named or [str(self.run_info.train_config.get("dataset_id", "unknown"))]
        return {"train": named[0], "test": named[-1]}

    @property
    def test_rows(self) -> int | None:
        """How many examples were scored."""
        told = self.meta_info.peftkit.get("test_examples", self.run_info.train_config.get("test_size"))
        return TEST_ROWS.get(self.data.get("test", ""), told)


def read_results(folder: Path) -> tuple[list[CellRow], list[str]]:
    """The runs of a folder's result files, by name; and a message for each file that is none.

    Raises:
        InputError: there is no such folder, or no result in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Name PEFT's method_comparison/MetaMathQA/results, or one like it.")
    rows: list[CellRow] = []
    faults: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows.append(_row(path))
        except InputError as fault:
            faults.append(str(fault))
    if not rows:
        told = "".join(f"\n  - {fault}" for fault in faults) or " It holds no .json file."
        raise InputError(f"{folder} holds no result of PEFT's method_comparison.{told}")
    return rows, faults


def caveats(outside: Sequence[CellRow], own: Sequence[CellRow] = ()) -> list[str]:
    """What is not comparable among the imported runs, and between them and one's own, in words."""
    found = []
    for what, read in (("backbone", _backbone), ("data", _test_data), ("card", lambda row: row.machine)):
        theirs, mine = ({read(row) for row in rows if row.record is not None} - {""} for rows in (outside, own))
        if mine and theirs - mine:
            found.append(f"other {what}: {', '.join(sorted(theirs - mine))}, and not {', '.join(sorted(mine))}")
        elif not mine and len(theirs) > 1:
            found.append(f"more than one {what}: {', '.join(sorted(theirs))}")
    found += _near_the_best(outside)
    return [*found, *dict.fromkeys(text for row in outside if row.outside is not None for text in row.outside.caveats)]


def _near_the_best(rows: Sequence[CellRow]) -> list[str]:
    """How many accuracies cannot be told from the highest: a z-test of two proportions, as pairs are not to be had."""
    scored = [
        (metric.value, metric.n, row.variant)
        for row in rows
        if row.record is not None and (metric := row.record.metrics.get("accuracy")) is not None
    ]
    if len(scored) < 3:
        return []
    best, rows_of_best, name = max(scored)
    near = 0
    for value, size, other in scored:
        pooled = (best * rows_of_best + value * size) / (rows_of_best + size)
        error = math.sqrt(pooled * (1 - pooled) * (1 / rows_of_best + 1 / size))
        near += other != name and best - value < NORMAL_95 * error
    return [
        f"{near} of the other {len(scored) - 1} accuracies cannot be told from the best, {name}, at "
        f"n={rows_of_best:,} (z-test of two proportions at 0.05, unpaired and for each alone)"
    ]


def _row(path: Path) -> CellRow:
    """The run of one file.

    Raises:
        InputError: the file is no result; what is amiss, in one line.
    """
    try:
        found = _Result.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise InputError(f"{path} is not JSON: {fault}.") from fault
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"{path} is no result of method_comparison: {where}: {first['msg'].lower()}.") from fault
    record = _record(found, path)
    outside = Outside(SOURCE, {"throughput": _throughput(found)}, (ONE_SEED, NO_ANSWERS, OTHER_MEASURES))
    return CellRow(found.run_info.experiment_name, record.seed, path, record, outside=outside)


def _record(found: _Result, path: Path) -> RunRecord:
    info, config = found.train_info, found.run_info.train_config
    status = STATUSES[info.status]
    error = found.run_info.error_msg.strip() or (f"it was {info.status}" if status != "ok" else "")
    if "out of memory" in error.lower():
        status = "oom"
    recipe = _recipe(found)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()[:16]
    seed = config.get("seed", 0)
    history = [
        {"step": line["step"]} | {key.removeprefix("valid "): line[key] for key in line if key.startswith("valid ")}
        for line in info.metrics
        if "step" in line and any(key.startswith("valid ") for key in line)
    ]
    return RunRecord(
        peftkit_version=str(found.meta_info.peftkit.get("version", "none")),
        recipe=recipe,
        recipe_digest=digest,
        label=recipe["method"]["kind"],
        seed=seed if isinstance(seed, int) else 0,
        status=status,
        error=error or None,
        environment=_environment(found.meta_info),
        parameters=Parameters(
            total=info.num_total_params, trainable=info.num_trainable_params, artifact_bytes=info.file_size
        ),
        memory=Memory(kind="cuda-reserved", peak_bytes=info.memory_max),
        loss=Loss(last=info.metrics[-1].get("train loss")) if info.metrics else None,
        metrics=_metrics(found, path) if status == "ok" else {},
        history=history,
        wall_seconds=found.run_info.total_time,
    )


def _metrics(found: _Result, path: Path) -> dict[str, Metric]:
    if not found.scores:
        raise InputError(f"{path} is no result of method_comparison: its last metrics have no test score.")
    rows = found.test_rows
    if not isinstance(rows, int) or rows < 1:
        raise InputError(f"{path} does not say how many examples it was scored on.")
    return {name: _metric(name, value, rows, path) for name, value in found.scores.items()}


def _metric(name: str, value: Any, rows: int, path: Path) -> Metric:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputError(f"{path} is no result of method_comparison: test {name} is {value!r}, and no number.")
    low, high = (share_interval(value, rows) if name == "accuracy" else None) or (None, None)
    return Metric(value=value, low=low, high=high, n=rows)


def _throughput(found: _Result) -> dict[str, float]:
    """Of the training steps, evaluations left out."""
    seconds = sum(line["train time"] for line in found.train_info.metrics if isinstance(line.get("train time"), float))
    last = found.train_info.metrics[-1] if found.train_info.metrics else {}
    told = {"samples": last.get("train samples"), "tokens": last.get("train total tokens")}
    measured: dict[str, float] = {key: value for key, value in told.items() if isinstance(value, int)}
    if seconds <= 0:
        return measured
    rate = {"tokens_per_second": measured["tokens"] / seconds} if "tokens" in measured else {}
    return measured | {"train_seconds": seconds} | rate


def _recipe(found: _Result) -> dict[str, Any]:
    """Its settings under the names that a recipe has."""
    config = dict(found.run_info.train_config)
    adapter = {key: value for key, value in (found.run_info.peft_config or {}).items() if value is not None}
    kind = str(adapter.pop("peft_type", "full")).lower()
    backbone = {"name": str(config.pop("model_id", "unknown")), "dtype": config.pop("dtype", None)}
    return {
        "backbone": backbone,
        "method": {"kind": kind} | adapter,
        "task": {"kind": "completion"},
        "data": found.data,
        "training": config,
    }


def _environment(meta: _MetaInfo) -> dict[str, Any]:
    packages = {
        key.removesuffix("-version"): version
        for key, version in meta.package_info.items()
        if key.endswith("-version") and version
    }
    system = meta.system_info
    card = system.get("accelerator") or system.get("gpu")
    platform = "-".join(system[key] for key in ("system", "release", "machine") if key in system)
    told = {"device_name": card, "platform": platform or None, "packages": packages or None}
    return {key: value for key, value in told.items() if value is not None}


def _backbone(row: CellRow) -> str:
    return str(row.record.recipe.get("backbone", {}).get("name", "")) if row.record is not None else ""


def _test_data(row: CellRow) -> str:
    return str(row.record.recipe.get("data", {}).get("test") or "") if row.record is not None else ""
