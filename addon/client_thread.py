"""The one background thread that talks to the server. It owns the `Client`; it never touches bpy.

The main thread puts commands into `ClientThread.commands` and takes events out of `ClientThread.events`: small
dataclasses through two queues, nothing shared. A server that goes away is looked for until it is back, and every job is
then watched again.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from track4d_protocol.errors import ServerError, Track4DError, TransportError

if TYPE_CHECKING:
    import numpy as np
    from track4d_protocol.client import Client
    from track4d_protocol.keys import Connection
    from track4d_protocol.messages import Job, Request, Result

log = logging.getLogger(__name__)

CLIENT_TIMEOUT = 3.0  # seconds without an answer after which a server counts as unreachable
SUBMIT_TRIES = 3  # a request during which the server goes silent so often is given up
AWAY = ("server_unreachable", "server_lost")  # errors that mean: look for the server again
POLL = 0.1  # seconds the thread listens to the server before it looks for commands
RETRY = 1.0  # seconds between two looks for a server that is away
HELLO = 2.0  # seconds between two questions how the server is
REQUEST = ".request"  # suffix of requests that no server has taken yet
NEAREST, CHUNK = 4, 2048  # of a coarse motion: points that a vertex follows, vertices that are looked at together


@dataclass(frozen=True)
class Source:
    """Where to find the server: a copy of the preferences, since bpy belongs to the main thread."""

    connection_file: Path | None  # of a server that somebody else runs; None for the one of this computer
    address: str  # that reaches that server from here, when it isn't the one in the file
    home: Path | None  # of this computer's server; None for the default
    python: str  # interpreter that has the server installed; "" when not set
    online: bool  # whether Blender allows traffic beyond this computer
    outbox: Path | None = None  # folder where requests lie until a server has them, so that closing Blender loses none


# Commands, main thread -> client thread


@dataclass(frozen=True)
class Attach:
    source: Source
    start: bool = False  # start this computer's server when it doesn't run


@dataclass(frozen=True)
class Submit:
    job_id: str
    request: Request


@dataclass(frozen=True)
class Cancel:
    job_id: str


@dataclass(frozen=True)
class Fetch:
    job_id: str


@dataclass(frozen=True)
class Forget:
    job_id: str


@dataclass(frozen=True)
class ListJobs:
    pass


@dataclass(frozen=True)
class Stop:
    pass


Command = Attach | Submit | Cancel | Fetch | Forget | ListJobs | Stop


# Events, client thread -> main thread


class Server(str, Enum):
    """What is known about the server."""

    UNKNOWN = "unknown"
    CONNECTING = "connecting"
    STARTING = "starting"
    CONNECTED = "connected"
    ABSENT = "absent"  # never reached
    LOST = "lost"  # reached before, silent now


@dataclass(frozen=True)
class ServerChanged:
    server: Server
    hello: dict[str, Any] | None = None
    error: Track4DError | None = None


@dataclass(frozen=True)
class JobChanged:
    job: Job


@dataclass(frozen=True)
class JobsListed:
    jobs: list[Job]


@dataclass(frozen=True)
class MotionSeen:
    """The coarse motion of a running job: moves [F, N, 3] of the vertices that were submitted."""

    job_id: str
    moves: np.ndarray


@dataclass(frozen=True)
class ResultArrived:
    job_id: str
    result: Result


@dataclass(frozen=True)
class JobFailed:
    """A command for one job was refused."""

    job_id: str
    error: Track4DError


Event = ServerChanged | JobChanged | JobsListed | MotionSeen | ResultArrived | JobFailed


class ClientThread(threading.Thread):
    """Runs until it is sent `Stop`; a daemon, so that quitting Blender never waits for it."""

    def __init__(self) -> None:
        super().__init__(name="track4d client", daemon=True)
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._source: Source | None = None
        self._outbox: Path | None = None
        self._client: Client | None = None
        self._announced: tuple[Server, str] = (Server.UNKNOWN, "")
        self._may_start = self._may_restart = False
        self._was_connected = False
        self._next_attempt = 0.0
        self._info: dict[str, Any] = {}
        self._next_hello = 0.0
        self._work: list[Command] = []  # what waits for the server, in order
        self._tries: dict[str, int] = {}
        self._watched: set[str] = set()
        self._vertices: dict[str, np.ndarray] = {}  # [N, 3] of the jobs that were submitted here, until they end

    @property
    def silence(self) -> float:
        """Seconds without a sign of the server while listening to it; for the main thread."""
        client = self._client
        return client.silence if client is not None else 0.0

    def run(self) -> None:
        from . import apply, sources  # noqa: F401 - so that the first click needn't wait for numpy and all of this

        while True:
            try:
                command = self.commands.get(timeout=None if self._source is None else 0.0 if self._client else POLL)
            except queue.Empty:
                command = None
            if isinstance(command, Stop):
                break
            try:
                self._take(command)
                self._advance()
            except Track4DError as error:
                self._disconnect(error)
            except Exception as error:  # noqa: BLE001 - a bug must reach the panel, and must not end the thread
                log.exception("The client thread met an unexpected error")
                self._disconnect(ServerError("client_failed", f"The connection to the server failed: {error!r}."))
        self._close()

    def _take(self, command: Command | None) -> None:
        if isinstance(command, Attach):
            if command.source != self._source:
                self._close()
                self._source, self._was_connected = command.source, False
            if self._outbox is None and command.source.outbox is not None:
                self._outbox = command.source.outbox
                self._unsent(self._outbox)
            if self._client is None:
                self._may_start |= command.start
                self._next_attempt, self._announced = 0.0, (Server.UNKNOWN, "")
        elif isinstance(command, Cancel):
            self._work = [item for item in self._work if getattr(item, "job_id", None) != command.job_id] + [command]
            self._watched.discard(command.job_id)
            self._vertices.pop(command.job_id, None)
            self._sent(command.job_id)
        elif command is not None:
            if isinstance(command, Submit):
                self._keep(command)
            self._work.append(command)

    def _keep(self, command: Submit) -> None:
        """Writes a request into the outbox; a disk that refuses is no reason not to send it."""
        from track4d_protocol.codec import write_file

        if self._outbox is None:
            return
        request = command.request
        try:
            self._outbox.mkdir(parents=True, exist_ok=True, mode=0o700)
            body = {"settings": request.settings.to_dict(), "objects": request.objects, "created": time.time()}
            write_file(self._outbox / f"{command.job_id}{REQUEST}", body, request.arrays)
        except OSError as error:
            log.warning("The request can't be kept in %s: %s", self._outbox, error)

    def _sent(self, job_id: str) -> None:
        if self._outbox is not None:
            (self._outbox / f"{job_id}{REQUEST}").unlink(missing_ok=True)

    def _unsent(self, outbox: Path) -> None:
        """Requests of an earlier session that no server took: they are sent now. A damaged one is put aside."""
        from track4d_protocol.codec import read_file
        from track4d_protocol.messages import Job, JobState, Request, Settings

        waiting = []
        for path in sorted(outbox.glob(f"*{REQUEST}"), key=lambda path: path.stat().st_mtime):
            try:
                content = read_file(path.read_bytes())
                request = Request(Settings.from_dict(content.body["settings"]), content.body["objects"], content.arrays)
            except (Track4DError, KeyError) as error:
                log.warning("%s can't be read: %s", path, error)
                path.replace(path.with_suffix(".damaged"))
                continue
            self._work.append(Submit(path.stem, request))
            waiting.append(Job(path.stem, JobState.QUEUED, objects=request.objects, prompt=request.settings.prompt,
                               created=float(content.body.get("created", 0.0))))  # fmt: skip
        if waiting:
            self.events.put(JobsListed(waiting))

    def _advance(self) -> None:
        """One turn: find the server, hand it what waits, listen."""
        if self._source is None:
            return
        if self._client is None:
            if time.monotonic() < self._next_attempt:
                return
            self._connect(self._source)
        assert self._client is not None
        while self._work:
            self._do(self._client, self._work[0])  # stays first in the list when the server is lost meanwhile
            del self._work[0]
        if time.monotonic() > self._next_hello:
            self._greet(self._client)
        for job in self._client.poll(POLL):
            if job.state.final:
                self._watched.discard(job.id)
                self._vertices.pop(job.id, None)
            self.events.put(JobChanged(job))
            if job.motion is not None and job.motion_points is not None and job.id in self._vertices:
                moves = spread(job.motion, job.motion_points, self._vertices[job.id])
                if moves is not None:
                    self.events.put(MotionSeen(job.id, moves))

    def _do(self, client: Client, command: Command) -> None:
        try:
            if isinstance(command, Submit):
                job = client.submit(command.job_id, command.request)
                self._watched.add(command.job_id)
                self._vertices[command.job_id] = command.request.arrays["vertices"]
                client.watch(command.job_id)
                self._sent(command.job_id)
                self.events.put(JobChanged(job))
            elif isinstance(command, Cancel):
                client.cancel(command.job_id)
            elif isinstance(command, Fetch):
                self.events.put(ResultArrived(command.job_id, client.fetch(command.job_id)))
                self._watched.discard(command.job_id)
            elif isinstance(command, Forget):
                client.forget(command.job_id)
            elif isinstance(command, ListJobs):
                self._list(client)
        except Track4DError as error:
            if error.code in AWAY and not self._give_up(command):
                raise
            if not isinstance(command, (Cancel, Forget)):  # those two leave nothing to do when the job is gone already
                self._watched.discard(getattr(command, "job_id", ""))
                if isinstance(command, Submit):
                    self._sent(command.job_id)
                self.events.put(JobFailed(getattr(command, "job_id", ""), error))

    def _give_up(self, command: Command) -> bool:
        """True when this request has broken the connection too often."""
        if not isinstance(command, Submit):
            return False
        self._tries[command.job_id] = self._tries.get(command.job_id, 0) + 1
        return self._tries[command.job_id] >= SUBMIT_TRIES

    def _list(self, client: Client) -> None:
        jobs = client.jobs()
        for job in jobs:
            if job.state.value in ("queued", "running"):
                client.watch(job.id)
        self.events.put(JobsListed(jobs))

    def _connect(self, source: Source) -> None:
        from track4d_protocol.client import Client

        unfinished = bool(self._watched) or any(isinstance(item, (Submit, Fetch)) for item in self._work)
        start = source.connection_file is None and (self._may_start or (self._may_restart and unfinished))
        self._may_start = self._may_restart = False  # a start that fails is not tried again until somebody asks
        self._announce(Server.STARTING if start else Server.LOST if self._was_connected else Server.CONNECTING)
        connection = find_connection(source, start)
        self._client = Client(connection, timeout=CLIENT_TIMEOUT)
        self._greet(self._client)
        self._may_restart = self._was_connected = True
        self._list(self._client)
        for job_id in sorted(self._watched):
            self._watch(self._client, job_id)

    def _greet(self, client: Client) -> None:
        """Say hello, now and then: what the worker does and how many jobs wait changes, and only the worker knows the device."""
        info = client.hello()
        self._next_hello = time.monotonic() + (RETRY if info.get("worker") == "starting" else HELLO)
        if info != self._info or self._announced[0] is not Server.CONNECTED:
            self._info, self._announced = info, (Server.CONNECTED, "")
            self.events.put(ServerChanged(Server.CONNECTED, info))

    def _watch(self, client: Client, job_id: str) -> None:
        try:
            self.events.put(JobChanged(client.watch(job_id)))
        except Track4DError as error:
            if error.code in AWAY:
                raise
            self._watched.discard(job_id)
            self.events.put(JobFailed(job_id, error))

    def _disconnect(self, error: Track4DError) -> None:
        self._close()
        self._next_attempt = time.monotonic() + RETRY
        self._announce(Server.LOST if self._was_connected else Server.ABSENT, error=error)

    def _announce(self, server: Server, error: Track4DError | None = None) -> None:
        told = (server, error.code if error else "")
        quiet = (
            server in (Server.CONNECTING, Server.LOST) and error is None and self._announced[0] in (Server.ABSENT, Server.LOST)
        )
        if told != self._announced and not quiet:
            self._announced = told
            self.events.put(ServerChanged(server, None, error))

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def spread(motion: np.ndarray, points: np.ndarray, vertices: np.ndarray) -> np.ndarray | None:
    """The motion of some vertices as that of all: each follows the nearest four, the nearer the more.

    Args:
        motion: [F, M, 3] places of the vertices `points` [M] over time; as it came from the server.
        vertices: [N, 3] at rest.

    Returns:
        [F, N, 3] float32 displacements; None when the motion doesn't fit the vertices.
    """
    import numpy as np  # late: Blender 4.2 doesn't have it loaded, and registering shall be quick

    fits = motion.ndim == 3 and motion.shape[1:] == (*points.shape, 3) and points.ndim == 1 and len(points) > 0
    if not fits or points.min() < 0 or points.max() >= len(vertices) or not np.isfinite(motion).all():
        return None
    rest = vertices[points]  # [M, 3]
    moves = motion.astype(np.float32) - rest  # [F, M, 3]
    if len(points) == len(vertices) and (points == np.arange(len(points))).all():
        return moves
    count = min(NEAREST, len(points))
    result = np.empty((len(motion), len(vertices), 3), np.float32)
    for start in range(0, len(vertices), CHUNK):
        part = vertices[start : start + CHUNK]
        distances = ((part**2).sum(1)[:, None] - 2 * part @ rest.T + (rest**2).sum(1)).clip(0)  # [n, M], squared
        nearest = np.argpartition(distances, count - 1, axis=1)[:, :count]  # [n, 4]
        weights = 1 / (np.take_along_axis(distances, nearest, 1) + 1e-6 * float(np.ptp(rest)) ** 2 + 1e-12)
        weights /= weights.sum(1, keepdims=True)
        result[:, start : start + CHUNK] = (moves[:, nearest] * weights[..., None]).sum(2)
    return result


def find_connection(source: Source, start: bool) -> Connection:
    """The address and keys of the server.

    Raises:
        TransportError: `server_not_running`, `server_python_missing`, `no_connection_file`,
            `offline`, or what starting the server gives.
    """
    from track4d_protocol.keys import CONNECTION_FILE, default_home, read_connection

    if source.connection_file is not None:
        connection = read_connection(source.connection_file)
        if source.address:
            address = source.address if "://" in source.address else f"tcp://{source.address}"
            if urlsplit(address).scheme != "tcp" or not re.search(r"[^/:]:\d+$", address):
                message = f"'{source.address}' is not the address of a server."
                raise TransportError("bad_address", message, "Write it like gpu.example.org:7457.")
            connection = replace(connection, address=address)
        if not source.online and urlsplit(connection.address).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise TransportError(
                "offline",
                f"The server {connection.address} is on another computer and Blender's online access is switched off.",
                "Allow online access in Preferences > System, or reach the server through an SSH tunnel.",
            )
        return connection

    home = source.home or default_home()
    if start:
        if not source.python:
            raise TransportError(
                "server_python_missing",
                "There is no Track4D server on this computer yet.",
                "Set one up, or use one that runs elsewhere.",
            )
        from track4d_protocol.local import ensure_server

        return ensure_server(home, python=source.python)
    try:
        return read_connection(home / CONNECTION_FILE)
    except TransportError as error:
        if error.code != "no_connection_file":
            raise
        if not source.python:
            return find_connection(source, start=True)
        raise TransportError("server_not_running", "The Track4D server of this computer doesn't run.", "Start it.") from error
