"""One file per task: examples -> features -> loss -> metrics. The set of tasks is `spec.AnyTask`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.backbones.spec import LANGUAGE_HEAD, Head
from peftkit.data.table import Shape, Table
from peftkit.tasks.spec import AnyTask, Chat, Classify, Completion

if TYPE_CHECKING:
    from peftkit.tasks.base import Task

SHAPES: dict[str, Shape] = {"chat": "conversation", "completion": "completion", "classify": "classification"}
"""The rows that each task reads."""


def read_head(spec: AnyTask, train: Table) -> Head:
    """The head a task needs on the backbone, read off the training split.

    Raises:
        DataError: labels that no head can be made for.
    """
    if isinstance(spec, Classify):
        from peftkit.tasks.classify import read_head as read_labels

        return read_labels(spec, train)
    return LANGUAGE_HEAD


def assume_head(spec: AnyTask) -> Head:
    """The head a task needs, before any data are read."""
    if isinstance(spec, Classify):
        from peftkit.tasks.classify import assume_head as assume_labels

        return assume_labels(spec)
    return LANGUAGE_HEAD


def open_task(spec: AnyTask, head: Head) -> Task:
    """The runtime of a task spec."""
    match spec:
        case Chat():
            from peftkit.tasks.chat import ChatTask

            return ChatTask(spec)
        case Completion():
            from peftkit.tasks.completion import CompletionTask

            return CompletionTask(spec)
        case Classify():
            from peftkit.tasks.classify import ClassifyTask

            return ClassifyTask(spec, head)
