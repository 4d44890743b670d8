"""Score a language model on tasks of EleutherAI's lm-evaluation-harness, beside peftkit's own metrics."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peftkit.backbones.load import load_backbone
from peftkit.backbones.spec import LANGUAGE_HEAD, BackboneSpec
from peftkit.errors import InputError, nearest
from peftkit.files import write_json
from peftkit.folder import RECIPE_NAME
from peftkit.record import Metric
from peftkit.run import open_run
from peftkit.stats.bootstrap import share_interval

SCORES_NAME = "lm_eval.json"
BATCH = 8
FEWSHOT_SEED = 1234
"""The harness's own default."""
NORMAL_95 = 1.959964
SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics of the harness that are shares of examples answered right."""


def evaluate_tasks(
    reference: str | Path,
    tasks: Sequence[str],
    *,
    tasks_folder: Path | None = None,
    limit: int | None = None,
    chat: bool = False,
    out: Path | None = None,
) -> dict[str, Metric]:
    """Scores by `TASK METRIC`, of a run, a merged model or a plain causal backbone; written to `lm_eval.json` too.

    Intervals (95 %) are Wilson's for shares of right answers, else normal ones over the harness's standard errors.

    Args:
        tasks_folder: of task files, in which relative data files are found; None: the harness's own tasks, from a hub.
        limit: so many examples of each task.
        chat: ask through the model's chat template.
        out: where `lm_eval.json` goes; default: the reference's own folder, or here for a hub id.

    Raises:
        InputError: no lm-eval, no such task or data, or a model that writes no text.
    """
    harness = _harness()
    if tasks_folder is not None and not tasks_folder.is_dir():
        raise InputError(f"{tasks_folder} is not a folder. Name one with task files (*.yaml) of lm-eval.")
    loaded = _loaded(tasks, tasks_folder)
    model, tokenizer = _opened(reference)
    if chat and tokenizer.chat_template is None:
        raise InputError(f"{reference} has no chat template. Leave --lm-eval-chat out.")
    from lm_eval.models.huggingface import HFLM

    found = harness.evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
        task_dict=loaded,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
        apply_chat_template=chat,
    )
    metrics = _metrics(found)
    where = out or (Path(reference) if Path(reference).is_dir() else Path())
    document = {
        "reference": str(reference),
        "lm_eval_version": version("lm-eval"),
        "task_versions": {name: str(number) for name, number in found["versions"].items()},
        "limit": limit,
        "chat": chat,
        "metrics": {name: metric.model_dump(exclude_none=True) for name, metric in metrics.items()},
    }
    write_json(where / SCORES_NAME, document)
    return metrics


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as fault:
        raise InputError("--lm-eval needs lm-eval. Install it: pip install 'peftkit[lm-eval]'.") from fault
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is handed to it loaded
    return lm_eval


def _loaded(tasks: Sequence[str], folder: Path | None) -> Any:
    """The tasks with their data, few-shot examples drawn by a fixed seed.

    Raises:
        InputError: a task that is not there, or that cannot be read.
    """
    from lm_eval.tasks import TaskManager

    place = None if folder is None else folder.resolve()
    with _within(place), _explained(", ".join(tasks)):
        manager = TaskManager(include_path=None if place is None else str(place), include_defaults=place is None)
        for name in tasks:
            if name not in manager.all_tasks:
                known = list(manager.all_tasks)
                listed = f" It has {', '.join(known)}." if len(known) <= 12 else f" It has {len(known)} others."
                raise InputError(f"no task {name!r} in {folder or 'lm-eval'}{nearest(name, known)}.{listed}")
        loaded = manager.load(list(tasks))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


@contextlib.contextmanager
def _within(folder: Path | None) -> Iterator[None]:
    """Work in the folder of the task files: that is where their data files are looked for."""
    with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
        yield


@contextlib.contextmanager
def _explained(tasks: str) -> Iterator[None]:
    """Turn what a faulty task file or absent data raise into a message that names the tasks."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        told = " ".join(str(fault).split())[:300]
        raise InputError(f"lm-eval cannot read {tasks} and its data: {type(fault).__name__}: {told}.") from fault


def _opened(reference: str | Path) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        InputError: it classifies.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(reference)
    if (folder / RECIPE_NAME).is_file():
        opened = open_run(folder, device=device)
        if opened.recipe.task.kind == "classify":
            raise InputError(f"{reference} classifies; lm-eval scores models that write text. Leave --lm-eval out.")
        return opened.adapted.model.eval(), opened.backbone.tokenizer
    backbone = load_backbone(BackboneSpec(name=str(reference)), LANGUAGE_HEAD, device=device)
    return backbone.model.eval(), backbone.tokenizer


def _metrics(found: Mapping[str, Any]) -> dict[str, Metric]:
    """The numbers of `results`, whose keys are `METRIC,FILTER` and `METRIC_stderr,FILTER`."""
    metrics = {}
    for task, scores in found["results"].items():
        counts = found["n-samples"].get(task, {})
        for key, value in scores.items():
            name, comma, way = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            size = counts.get("effective", scores.get("sample_len"))
            told = f"{task} {name}" if way == "none" else f"{task} {way} {name}"
            low, high = _interval(name, value, scores.get(f"{name}_stderr,{way}"), size)
            metrics[told] = Metric(value=value, low=low, high=high, n=size)
    return metrics


def _interval(name: str, value: float, error: Any, size: int) -> tuple[float | None, float | None]:
    """A normal interval is empty where all are right or all wrong; a share's own is not."""
    found = share_interval(value, size) if name in SHARES else None
    if found is not None:
        return found
    if not isinstance(error, int | float):
        return None, None
    return value - NORMAL_95 * error, value + NORMAL_95 * error
