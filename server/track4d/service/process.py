"""The broker's side of the worker: a process that is started, watched and killed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

from track4d_protocol.keys import Connection
from track4d_protocol.local import LOG_FILE


class WorkerProcess:
    """The broker's handle on the worker.

    Args:
        connection: how the worker reaches the broker.
        name: under which the broker knows its key.
    """

    def __init__(self, home: Path, work: str, connection: Connection, name: str) -> None:
        self.name = name
        self.identity: bytes | None = None  # of its socket, known from its first message
        self.state = "starting"
        setup = {"home": str(home), "work": work, "address": connection.address,
                 "server": connection.server_key.decode(), "public": connection.public_key.decode(),
                 "secret": connection.secret_key.decode()}
        flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)  # 0 outside Windows
        with open(home / LOG_FILE, "ab") as output:  # runs in the home, where no file of the user's shadows a module
            self._process = subprocess.Popen([sys.executable, "-m", "track4d.service.worker"], stdin=subprocess.PIPE,
                                             stdout=output, stderr=output, cwd=home, creationflags=flags)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(setup).encode() + b"\n")
        self._process.stdin.flush()  # and stays open: its end is the sign that the server is gone

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """The exit code (negative: the signal), or None while it lives."""
        return self._process.poll()

    def kill(self) -> None:
        """Ends it at once; `ended` tells when it has gone, which a driver may delay."""
        self._process.kill()

    def close(self) -> None:
        """Ends it at once and waits for that, a few seconds at most."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        if self._process.stdin is not None:
            self._process.stdin.close()
