"""A suite on a small Ray cluster of this machine, one worker of which is lost."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from kill_bench import is_cell, outcome

from peftkit.bench import ray_tasks
from peftkit.bench.cell import run_cell
from peftkit.bench.executor import run_cells
from peftkit.bench.process import Conditions
from peftkit.bench.ray_tasks import Ray, run_on_node, unpack
from peftkit.bench.suite import Cell, build_suite
from peftkit.digests import digests_of
from peftkit.errors import InputError
from peftkit.record import bare_record

ray = pytest.importorskip("ray")
PATIENCE = 120.0
RECIPE = {
    "backbone": "minilm-l6",
    "method": {"kind": "lora", "rank": 4},
    "task": "classify",
    "data": {
        **dict.fromkeys(("train", "test"), "builtin:movie-sentiment"),
        "limit": {"train": 64, "test": 16},
    },
    "training": {"epochs": 2, "batch_size": 8, "max_tokens": 32, "checkpoint_every": 1},
}


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture
def cell() -> Cell:
    (cell,) = build_suite({"name": "tiny", "recipe": RECIPE}).cells()
    return cell


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")  # ray's own
def test_a_cell_whose_worker_is_killed_runs_again_and_ends_like_a_local_one(
    cluster: None, cell: Cell, tmp_path: Path
) -> None:
    folder = tmp_path / "ray" / cell.name
    killed: list[int] = []

    def kill_the_worker_once_training() -> None:
        tick = threading.Event()
        for _ in range(int(PATIENCE / 0.02)):
            workers = [p.parent() for p in psutil.process_iter() if is_cell(p) and str(folder) in p.cmdline()]
            if workers and any((folder / "checkpoints").glob("step-*")):
                workers[0].kill()
                killed.append(workers[0].pid)
                return
            tick.wait(0.02)

    killer = threading.Thread(target=kill_the_worker_once_training)
    killer.start()
    said: list[str] = []
    conditions = Conditions(inference=False)
    (result,) = run_cells([cell], tmp_path / "ray", executor=Ray(), conditions=conditions, say=said.append)
    killer.join()
    assert killed
    assert (result.status, result.ran) == ("ok", True), (folder / "cell.log").read_text()
    assert said[0] == "1 cell given to Ray: 2 processors on 1 node"
    assert "resumed from step" in (folder / "cell.log").read_text()
    here = tmp_path / "here" / cell.name
    here.mkdir(parents=True)
    (here / "recipe.yaml").write_text(cell.recipe.to_yaml())
    run_cell(here)
    assert outcome(folder) == outcome(here)
    (again,) = run_cells([cell], tmp_path / "ray", executor=Ray(), conditions=conditions, say=silent)
    assert not again.ran


def silent(text: str) -> None:
    """Progress that nobody reads."""


def test_files_of_a_node_that_does_not_see_the_folder_come_back_without_checkpoints(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Played:
        """A cell's process that ends at once."""

        def __init__(self, arguments: list[str], log: Path, variables: Mapping[str, str]) -> None:
            record = bare_record(cell.recipe, "ok", None, environment={})
            record.model_copy(update={"digests": digests_of(cell.recipe)}).write(log.parent)
            for path in (log.parent / "adapter" / "weights", log.parent / "checkpoints" / "step-000001"):
                path.parent.mkdir()
                path.write_bytes(b"weights")

        def wait(self, seconds: float) -> int | None:
            return 0

    monkeypatch.setattr(ray_tasks, "FreshProcess", Played)
    folder = tmp_path / cell.name
    record, _, packed = run_on_node(cell, str(folder), "a token that is not there", Conditions())
    assert not folder.exists()
    assert packed is not None
    unpack(packed, folder)
    assert {path.name for path in folder.iterdir()} == {"adapter", "digests.json", "recipe.yaml", "record.json"}
    assert (folder / "adapter" / "weights").read_bytes() == b"weights"
    assert record.status == "ok"


def test_ray_that_is_not_installed_is_told_before_anything_is_written(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'peftkit\[ray\]'"):
        run_cells([cell], tmp_path / "out", executor=Ray(), say=silent)
    assert not (tmp_path / "out").exists()
