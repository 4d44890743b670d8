"""The fork server's part: processes, exit codes and ends. Its cells are played, and nothing is imported for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from peftkit.bench.forkserver import ForkedProcess, ForkServer
from peftkit.bench.process import FreshProcess

PATIENCE = 60.0
PLAYED = """
import os, signal, subprocess, sys, time
from peftkit.bench import forkserver

def play(arguments):
    what, *_, flag = arguments
    assert flag == "--with-parent"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"{what} {os.getpid()} {os.getpgid(0)} {sorted(os.listdir('/proc/self/fd'))[:3]}", flush=True)
    if what == "sleep":
        print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
        time.sleep(600)
    return sys.stdin.read() if what == "listen" else int(what)

forkserver.PRELOADED = ()
forkserver.cell.main = play
sys.exit(forkserver.main())
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and watches them by pidfd")


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with closing(ForkServer([sys.executable, "-c", PLAYED])) as served:
        yield served


def launched(server: ForkServer, what: str, log: Path) -> ForkedProcess:
    process = server([what], log, {})
    assert isinstance(process, ForkedProcess)
    return process


def told(log: Path) -> list[str]:
    """The lines of a log that has them."""
    while not (found := log.read_text().split("\n"))[1:]:
        os.sched_yield()
    return found


def gone(pid: int) -> bool:
    """Whether a process ends; what nobody has reaped has ended."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.wait(PATIENCE) is None
    except psutil.NoSuchProcess:
        return True


def test_each_cell_is_a_process_leading_its_own_group_whose_exit_code_comes_back(
    server: ForkServer, tmp_path: Path
) -> None:
    both = [launched(server, code, tmp_path / code) for code in ("0", "75")]
    assert [process.wait(PATIENCE) for process in both] == [0, 75]
    for code in ("0", "75"):
        what, pid, group, *_ = told(tmp_path / code)[0].split()
        assert (what, pid) == (code, group)


def test_a_cell_is_killed_with_what_it_started(server: ForkServer, tmp_path: Path) -> None:
    process = launched(server, "sleep", tmp_path / "log")
    assert process.wait(0.0) is None
    while len(told(tmp_path / "log")) < 3:
        os.sched_yield()
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert gone(int(told(tmp_path / "log")[1]))


def test_an_interrupt_reaches_the_cell(server: ForkServer, tmp_path: Path) -> None:
    process = launched(server, "sleep", tmp_path / "log")
    while len(told(tmp_path / "log")) < 3:
        os.sched_yield()
    process.interrupt()
    assert process.wait(PATIENCE) == -signal.SIGINT
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()


def test_without_its_server_a_cell_counts_as_killed_and_the_next_is_started_anew(
    server: ForkServer, tmp_path: Path
) -> None:
    process = launched(server, "sleep", tmp_path / "log")
    pid = int(told(tmp_path / "log")[0].split()[1])
    parent = psutil.Process(pid).parent()
    assert parent is not None
    parent.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert gone(pid)
    parent.wait(PATIENCE)
    fresh = server([str(tmp_path / "no such cell")], tmp_path / "fresh", {})
    assert isinstance(fresh, FreshProcess)
    fresh.kill()
    fresh.wait(PATIENCE)


def test_a_server_that_cannot_start_is_done_without(tmp_path: Path) -> None:
    with closing(ForkServer([sys.executable, "-c", "raise SystemExit(1)"])) as server:
        process = server([str(tmp_path / "no such cell")], tmp_path / "log", {})
        assert isinstance(process, FreshProcess)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL


def test_a_server_ends_with_its_harness(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from peftkit.bench.forkserver import ForkServer\n"
        f"process = ForkServer([sys.executable, '-c', {PLAYED!r}])(['listen'], Path(sys.argv[1]), {{}})\n"
        "print(process._pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as harness:
        assert harness.stdout is not None
        cell = psutil.Process(int(harness.stdout.readline()))
        server = cell.parent()
        assert server is not None
        harness.kill()
    assert gone(server.pid)
    assert gone(cell.pid), "its standard input has closed"
