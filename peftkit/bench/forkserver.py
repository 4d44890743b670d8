"""A process that has imported what a cell needs and forks one for each: `python -m peftkit.bench.forkserver FD`.

A cell is as isolated as in an interpreter of its own: nothing ran in the server but imports, on one thread, and each
cell gets its own copy of that. What it saves is the imports, some seconds a cell. Linux without an accelerator only: a
driver's state does not survive a fork.

    harness --(socket: arguments; stdin, log, reply)--> server --fork--> cell
    harness <--(reply pipe: pid, then exit code)------- server
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

from peftkit.bench import cell
from peftkit.bench.process import FreshProcess, Process
from peftkit.digests import code_digest
from peftkit.files import explained

PRELOADED = (
    "peftkit.run",
    "peft",
    "datasets",
    "evaluate",
    "sklearn.metrics",
    "scipy.stats",
    "bitsandbytes.optim",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "torch._subclasses.fake_tensor",
)
READY = b"ready"
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel", "/dev/dxg")
"""Files that a driver lays."""
CHUNK = 2**16


def can_fork() -> bool:
    """Whether cells may be forked here."""
    return sys.platform == "linux" and not any(map(os.path.exists, ACCELERATORS))


COMMAND = (sys.executable, "-m", "peftkit.bench.forkserver")


class ForkServer:
    """Launches cells by forking; whenever that fails, in a new interpreter, which can tell why."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._greeted = False

    def __call__(self, arguments: list[str], log: Path, variables: Mapping[str, str]) -> Process:
        """A cell's process; `variables` are those of the first one, which the server was started with."""
        with self._lock:
            if self._server is None:
                self._start(variables)
            if not self._is_ready():
                return FreshProcess(arguments, log, variables)
            read_stdin, write_stdin = os.pipe()
            read_reply, write_reply = os.pipe()
            with explained(log), log.open("ab") as output:
                request = json.dumps([*arguments, "--with-parent"]).encode()
                socket.send_fds(self._socket, [request], [read_stdin, output.fileno(), write_reply])
            os.close(read_stdin)
            os.close(write_reply)
            return ForkedProcess(write_stdin, read_reply)

    def close(self) -> None:
        """Let the server end. Cells have their own link to the harness."""
        if self._server is not None:
            self._socket.close()
            self._server.wait()

    def _start(self, variables: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", **variables},
                process_group=0,
            )

    def _is_ready(self) -> bool:
        """Wait for the first word of the server; False when it has ended."""
        if self._server is None or self._server.poll() is not None:
            return False
        if not self._greeted:
            self._greeted = self._socket.recv(len(READY)) == READY
        return self._greeted


class ForkedProcess:
    """A cell that the server forked, leader of its own group."""

    def __init__(self, stdin: int, reply: int) -> None:
        self._stdin, self._reply = stdin, reply
        self._told = b""
        self._code: int | None = None
        while b"\n" not in self._told and self._read():
            pass
        self._pid = int(self._told.split(b"\n")[0] or 0)

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while self._code is None and select.select([self._reply], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not self._read():
                self._finish()
        return self._code

    def interrupt(self) -> None:
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _finish(self) -> None:
        words = self._told.split(b"\n")
        if len(words) < 3:  # the server was killed, and cannot say how the cell ends
            self._signal(signal.SIGKILL)
        self._code = int(words[1]) if len(words) > 2 else -signal.SIGKILL
        os.close(self._reply)
        os.close(self._stdin)

    def _signal(self, number: signal.Signals) -> None:
        if self._code is None and self._pid:
            try:
                os.killpg(self._pid, number)
            except ProcessLookupError:
                return

    def _read(self) -> bool:
        """Take in what the server tells; False when it has told everything."""
        found = os.read(self._reply, CHUNK)
        self._told += found
        return bool(found)


def serve(connection: socket.socket) -> list[str] | None:
    """Fork a cell for each request. Returns the cell's arguments in each of them, None in the server at the end."""
    running: dict[int, tuple[int, int]] = {}
    while True:
        readable, _, _ = select.select([connection.fileno(), *running], [], [])
        for handle in readable:
            if handle in running:
                pid, reply = running.pop(handle)
                _, status = os.waitpid(pid, 0)
                os.close(handle)
                _tell(reply, os.waitstatus_to_exitcode(status))
                os.close(reply)
                continue
            request, handles, _, _ = socket.recv_fds(connection, CHUNK, 3)
            if not request:
                return None
            stdin, log, reply = handles
            pid = os.fork()
            if pid == 0:
                _lead_group(0)
                for source, target in ((stdin, 0), (log, 1), (log, 2)):
                    os.dup2(source, target)
                for other in (*handles, *running, *(other for _, other in running.values())):
                    os.close(other)
                connection.close()
                arguments: list[str] = json.loads(request)
                return arguments
            os.close(stdin)
            os.close(log)
            _lead_group(pid)
            _tell(reply, pid)
            running[os.pidfd_open(pid)] = (pid, reply)


def _lead_group(pid: int) -> None:
    """In server and cell alike, whichever comes first, so that the group is there once the harness knows of it."""
    try:
        os.setpgid(pid, pid)
    except ProcessLookupError:  # it has ended already
        return


def _tell(reply: int, number: int) -> None:
    try:
        os.write(reply, b"%d\n" % number)
    except BrokenPipeError:  # the harness is gone
        return


def _sheds_threads() -> bool:
    """Whether nothing but the main thread is there once it has forked.

    OpenBLAS, which starts threads as it is imported, ends them before a fork, so this forks once for nothing. Arrow's
    jemalloc has one for housekeeping and sees to forks itself.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return len([name for name in names if name != "jemalloc_bg_thd"]) == 1


def main() -> int:
    """Import, then serve; the exit code is the cell's in the processes that became one."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # cells hear it from their first moment
    for module in PRELOADED:
        import_module(module)
    code_digest()  # of what was imported, should the files change later
    if not _sheds_threads():
        return 1
    gc.collect()
    gc.freeze()
    connection.send(READY)
    arguments = serve(connection)
    return 0 if arguments is None else cell.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
