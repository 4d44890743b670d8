"""Cells as tasks of a Ray cluster, one that is there or one that is started on this machine.

Each task runs its cell in a process of its own, as the local executor does. Where a node sees the results' folder, the
cell runs in it and goes on from its checkpoints; elsewhere it runs in a folder of the node, which comes back as the
task's result. A task whose worker is lost is run again by Ray, wherever there is room.
"""

from __future__ import annotations

import io
import logging
import platform
import secrets
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.bench.cell import finished, holding
from peftkit.bench.process import CellResult, Conditions, FreshProcess, Say, Settler
from peftkit.bench.suite import Cell
from peftkit.errors import InputError, PeftkitError
from peftkit.files import staged_folder, write_text
from peftkit.record import RunRecord, bare_record, read_record

RETRIES = 3
"""Times that a cell whose worker is lost is run again."""


@dataclass(frozen=True, slots=True)
class Ray:
    """Runs cells on a Ray cluster: RAY_ADDRESS, one that runs on this machine, or one started for this call.

    Attributes:
        jobs: cells at once on processors, which share their threads; None: one a node. On GPUs each cell takes one.
    """

    jobs: int | None = None

    def check(self, conditions: Conditions) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: Ray is not installed, or nothing would run at once.
        """
        if self.jobs is not None and self.jobs < 1:
            raise InputError(f"--jobs={self.jobs} runs nothing. Give 1 or more.")
        try:
            import ray
        except ImportError as fault:
            raise InputError("--executor ray needs Ray: pip install 'peftkit[ray]'.") from fault
        assert ray is not None

    def run(self, cells: Sequence[tuple[Cell, Path]], conditions: Conditions, say: Say) -> Iterator[CellResult]:
        """Each cell's result, as they come back. Left early, the generator takes back what is running."""
        import ray

        missing = []
        for cell, folder in cells:
            done = finished(folder, cell.recipe, keep_old=conditions.keep_old)
            if done is None:
                missing.append((cell, folder))
            else:
                yield CellResult(cell, folder, done, ran=False)
        if not missing:
            return
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        waiting: dict[Any, tuple[Cell, Path]] = {}
        try:
            for cell, folder in missing:
                reference = self._submit(cell, folder, conditions)
                waiting[reference] = (cell, folder)
            say(f"{len(waiting)} cell{'s'[: len(waiting) != 1]} given to Ray: {_described(ray.cluster_resources())}")
            while waiting:
                (reference,), _ = ray.wait(list(waiting), num_returns=1)
                yield _result(reference, *waiting.pop(reference))
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if started_here:
                ray.shutdown()

    def _submit(self, cell: Cell, folder: Path, conditions: Conditions) -> Any:
        """The reference to the task's result."""
        import ray

        task = ray.remote(run_on_node)
        folder = folder.absolute()
        token = secrets.token_hex(8)
        write_text(_token_path(folder), token)
        options = {"max_retries": RETRIES, "name": cell.name, "scheduling_strategy": "SPREAD"}
        return task.options(**options, **self._resources(cell)).remote(cell, str(folder), token, conditions)

    def _resources(self, cell: Cell) -> dict[str, float]:
        """What a cell takes of a node: a GPU with its share of processors, or processors and the planned memory."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
        if with_gpu:
            return {"num_gpus": 1, "num_cpus": min(node.get("CPU", 1) // node["GPU"] for node in with_gpu)}
        processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        share = min(processors) if self.jobs is None else max(1, sum(processors) // self.jobs)
        resources: dict[str, float] = {"num_cpus": min(share, max(processors))}
        needed = _planned_bytes(cell)
        if needed is not None:  # no more than the largest node has: the cell's own plan tells what does not fit
            resources["memory"] = min(needed, int(max(node.get("memory", 0) for node in nodes)))
        return resources


def run_on_node(cell: Cell, folder: str, token: str, conditions: Conditions) -> tuple[RunRecord, str, bytes | None]:
    """Run a cell where Ray put it: its record, the node's name, and its files unless they lie in `folder` already."""
    home = Path(folder)
    settler = Settler(conditions, FreshProcess, lambda text: None, threading.Event())
    if _read(_token_path(home)) == token:
        found = settler.settle(cell, home, variables={}, wait=True)
        assert found is not None, "a settler that waits and is not called off has a result"
        return found.record, platform.node(), None
    with tempfile.TemporaryDirectory(prefix="peftkit-cell-") as own:
        found = settler.settle(cell, Path(own) / cell.name, variables={}, wait=True)
        assert found is not None, "a settler that waits and is not called off has a result"
        return found.record, platform.node(), pack(found.folder)


def pack(folder: Path) -> bytes:
    """A cell's files but for its checkpoints, as a tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(folder.iterdir()):
            if path.name != "checkpoints":
                archive.add(path, path.name)
    return packed.getvalue()


def unpack(packed: bytes, folder: Path) -> None:
    """Put a packed cell in the place of whatever is in `folder`."""
    with staged_folder(folder) as staging, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(staging, filter="data")


def _result(reference: Any, cell: Cell, folder: Path) -> CellResult:
    """What a task came back with; a cell whose worker was lost too often is a row with its reason."""
    import ray

    try:
        record, _, packed = ray.get(reference)
    except ray.exceptions.RayError as fault:
        told = " ".join(str(fault).split())[:300]
        reason = f"its Ray worker was lost {RETRIES + 1} times: {told}"
        environment = {"python": platform.python_version(), "platform": platform.platform()}
        record = bare_record(cell.recipe, "killed", reason, environment=environment)
        with holding(folder, wait=True):
            record.write(folder)
        return CellResult(cell, folder, record, ran=True)
    if packed is not None:
        with holding(folder, wait=True):
            unpack(packed, folder)
    _token_path(folder).unlink(missing_ok=True)
    return CellResult(cell, folder, read_record(folder), ran=True)


def _planned_bytes(cell: Cell) -> int | None:
    """What the cell's plan needs of this machine's kind of memory; None where it trains nothing or has no plan."""
    from peftkit.plan.answer import plan_recipe

    try:
        return plan_recipe(cell.recipe).needed_bytes
    except PeftkitError:
        return None


def _described(resources: dict[str, float]) -> str:
    parts = [f"{resources.get('CPU', 0):g} processors"]
    if resources.get("GPU"):
        parts.append(f"{resources['GPU']:g} GPUs")
    nodes = sum(name.startswith("node:") and name != "node:__internal_head__" for name in resources)
    return f"{', '.join(parts)} on {nodes} node{'s'[: nodes != 1]}"


def _token_path(folder: Path) -> Path:
    """Beside a cell's folder: what a node that sees it reads there."""
    return folder.parent / f".{folder.name}.token"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
