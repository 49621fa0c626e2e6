"""A server on this machine: found when it runs, started when it doesn't, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .client import Client
from .errors import Track4DError, TransportError
from .filelock import FileLock, holder
from .keys import CONNECTION_FILE, Connection, default_home, read_connection

SERVER_LOCK = "server.lock"  # held by the server while it lives, with its process id as content
LOG_FILE = "server.log"
_LOG_BYTES = 5_000_000  # a log that is larger is put aside at the next start
_IDLE_MINUTES = "15"  # a server that was started for somebody ends when nobody has needed it for so long
_started: list[subprocess.Popen[bytes]] = []  # keeps the handles: a server outlives whoever started it


def ensure_server(home: Path | None = None, python: str = sys.executable, timeout: float = 30.0) -> Connection:
    """The connection to the server of a home, which is started when it doesn't run.

    It is a process of its own: it survives the caller, and writes to `server.log` in its home.

    Args:
        home: folder of jobs and keys; `default_home()` when None.
        python: interpreter that has the server installed.
        timeout: seconds to wait for a start.

    Raises:
        TransportError: `home_unwritable`, `server_not_started` with the end of the log, `server_unreachable`,
            `protocol_mismatch`.
    """
    home = Path(home) if home is not None else default_home()
    deadline = time.monotonic() + timeout
    starting = FileLock(home / "start.lock")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = starting.acquire(timeout)
    except OSError as error:
        raise TransportError("home_unwritable", f"The folder '{home}' can't be written: {error.strerror}.",
                             "Choose another folder, or free disk space.") from error
    if not free:
        raise TransportError("server_not_started",
                             f"Another program has been starting a server in '{home}' for {timeout:.0f} s.",
                             "Try again; restart this computer if it stays.")
    with starting:
        return _wait(home, python, deadline)


def stop_server(home: Path | None = None, timeout: float = 10.0) -> None:
    """Ends the server of a home, if one runs. Jobs that wait or run continue at its next start.

    Args:
        home: folder of jobs and keys; `default_home()` when None.
        timeout: seconds to wait; after half of them the process is killed, by which nothing is lost either.

    Raises:
        TransportError: `server_not_stopped`.
    """
    home = Path(home) if home is not None else default_home()
    lock = home / SERVER_LOCK
    process_id = holder(lock)
    if process_id is None:
        return
    try:
        with Client(read_connection(home / CONNECTION_FILE), timeout=2.0) as client:
            client.shutdown()
    except Track4DError:  # too old, too new or too busy to be asked
        _end(process_id, signal.SIGTERM)
    start = time.monotonic()
    while holder(lock) is not None:
        if time.monotonic() - start > timeout:
            raise TransportError("server_not_stopped", f"The server (process {process_id}) doesn't end.",
                                 "End it by hand.")
        if time.monotonic() - start > timeout / 2:
            _end(process_id, getattr(signal, "SIGKILL", signal.SIGTERM))
        time.sleep(0.05)
    _reap()


def _start(home: Path, python: str) -> subprocess.Popen[bytes]:
    (home / CONNECTION_FILE).unlink(missing_ok=True)  # of a server that was killed
    log = home / LOG_FILE
    if log.exists() and log.stat().st_size > _LOG_BYTES:
        os.replace(log, log.with_suffix(".log.1"))
    flags = sum(getattr(subprocess, name, 0) for name in ("CREATE_NO_WINDOW", "CREATE_NEW_PROCESS_GROUP"))  # Windows
    with open(log, "ab") as output:
        try:
            process = subprocess.Popen([python, "-m", "track4d", "serve", "--home", str(home), "--idle-minutes", _IDLE_MINUTES],
                                       stdin=subprocess.DEVNULL,
                                       stdout=output, stderr=output, cwd=home, start_new_session=os.name == "posix",
                                       creationflags=flags)
        except OSError as error:
            raise TransportError("server_not_started", f"The interpreter '{python}' can't be run: {error.strerror}.",
                                 "Choose the Python that Track4D is installed in.") from error
    _reap()
    _started.append(process)
    return process


def _wait(home: Path, python: str, deadline: float) -> Connection:
    """Asks until the server answers; starts one, once, when nobody holds the lock (any more)."""
    problem = TransportError("server_not_started", f"The server in '{home}' doesn't answer.",
                             f"See '{home / LOG_FILE}'.")
    process: subprocess.Popen[bytes] | None = None
    while True:
        if process is None and holder(home / SERVER_LOCK) is None:
            process = _start(home, python)
        try:
            connection = read_connection(home / CONNECTION_FILE)
            with Client(connection, timeout=min(2.0, max(0.5, deadline - time.monotonic()))) as client:
                client.hello()
            return connection
        except TransportError as error:
            if error.code == "protocol_mismatch":
                raise
            if error.code != "no_connection_file":
                problem = error
        if process is not None and process.poll() is not None:
            raise TransportError("server_not_started", f"The server ended at once: {_last_line(home / LOG_FILE)}",
                                 f"See '{home / LOG_FILE}'.")
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.03)


def _last_line(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:500] if lines else "no output."


def _end(process_id: int, how: signal.Signals) -> None:
    if process_id > 0:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, how)


def _reap() -> None:
    _started[:] = [process for process in _started if process.poll() is None]
