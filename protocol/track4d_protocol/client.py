"""The client: one encrypted connection to a server. See docs/protocol.md."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from . import __version__, codec
from .errors import TransportError, error_from_dict
from .keys import Connection
from .limits import FILE_LIMITS, LIMITS
from .messages import GLIMPSES, Job, Request, Result, check_request

_SILENCE = 5.0  # seconds without a sign of the server after which it counts as lost
_LONGEST_STEP = 2.0  # seconds of silence that one look at the socket can add (a sleeping laptop isn't a lost server)
_HEARTBEAT = 1.0  # seconds between two signs of the client
_CHUNKS_UNDERWAY = 4
_REFUSALS = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class Client:
    """One connection to a server, made at its first call. It belongs to one thread.

    Args:
        connection: from the connection file.
        timeout: seconds of silence (not of work) after which a call gives up.

    Raises:
        TransportError: this build of ZeroMQ can't encrypt.
    """

    def __init__(self, connection: Connection, timeout: float = 5.0) -> None:
        if not zmq.has("curve"):
            raise TransportError("curve_missing", "This build of ZeroMQ can't encrypt.",
                                 "Install pyzmq from its wheel.")
        self._connection, self._timeout = connection, timeout
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.maxmsgsize = LIMITS.frame_bytes + LIMITS.header_bytes
        self._socket.curve_serverkey = connection.server_key
        self._socket.curve_publickey = connection.public_key
        self._socket.curve_secretkey = connection.secret_key
        self._monitor = self._socket.get_monitor_socket(_REFUSALS | zmq.EVENT_DISCONNECTED)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._connected = False
        self._serial = 0
        self._answers: dict[int, codec.Message] = {}
        self._updates: deque[Job] = deque()
        self._silence = 0.0
        self._looked = time.monotonic()
        self._said = 0.0
        self._heard = self._cut = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hello(self) -> dict[str, Any]:
        """What the server is: server_version, protocol, device, model, licence (of the model), limits, waiting (jobs in the
        queue), worker ("starting", "ready", "busy" or "failed", then with worker_error).

        Raises:
            TransportError: `server_unreachable`, `not_authorised` or `protocol_mismatch`.
        """
        return self._ask("hello", {"client_version": __version__}).body

    def submit(self, job_id: str, request: Request) -> Job:
        """Hands a request in; when this returns, the server has it on disk.

        Args:
            job_id: made by the caller, 1 to 64 letters, digits, "-" and "_" (`uuid.uuid4().hex`). The same id again
                returns the same job, and nothing runs twice.

        Raises:
            InputError: the request can't be used, or the id is malformed.
            ServerError: the queue or the disk is full.
            TransportError: the server can't be reached.
        """
        check_request(request)
        body = {"job": job_id, "settings": request.settings.to_dict(), "objects": list(request.objects)}
        return Job.from_dict(self._ask("submit", body, request.arrays).body["job"])

    def watch(self, job_id: str) -> Job:
        """The job as it is now; its progress arrives in `poll` from now on.

        Raises:
            InputError: `unknown_job`.
        """
        return self._job("watch", job_id)

    def poll(self, timeout: float) -> list[Job]:
        """News of watched jobs, the newest of each job; waits up to `timeout` seconds for the first.

        Raises:
            TransportError: `server_lost` when there is no sign of the server for 5 seconds.
        """
        self._connect()
        deadline = time.monotonic() + timeout
        self._receive(0.0)
        while not self._updates:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._receive(min(left, 0.5))
            self._check_silence(_SILENCE)
        newest: dict[str, Job] = {}
        while self._updates:
            job = self._updates.popleft()
            before = newest.pop(job.id, None)
            for name in GLIMPSES:
                if getattr(job, name) is None and before is not None:
                    setattr(job, name, getattr(before, name))
            newest[job.id] = job
        self._check_silence(_SILENCE)
        return list(newest.values())

    def jobs(self) -> list[Job]:
        """All jobs that the server keeps, oldest first."""
        return [Job.from_dict(job) for job in self._ask("jobs", {}).body["jobs"]]

    def cancel(self, job_id: str) -> Job:
        """Stops a job. One that runs has the stage "cancelling" until its worker has stopped, a few seconds at most.

        Raises:
            InputError: `unknown_job`.
        """
        return self._job("cancel", job_id)

    def fetch(self, job_id: str) -> Result:
        """The result of a job that is done.

        Raises:
            InputError: `unknown_job`, `job_not_done`, or the error of a failed job.
            Track4DError: the error of a failed job.
        """
        size = self._ask("fetch", {"job": job_id}).body["bytes"]
        if type(size) is not int or not 0 <= size <= 2 * FILE_LIMITS.message_bytes:
            raise TransportError("too_large", f"The result has {size!r} bytes.",
                                 "Use fewer frames or a smaller object.")
        data = bytearray(size)
        starts = deque(range(0, size, LIMITS.chunk_bytes))
        underway: deque[tuple[int, int]] = deque()
        while starts or underway:
            while starts and len(underway) < _CHUNKS_UNDERWAY:
                start = starts.popleft()
                underway.append((start, self._say("chunk", {"job": job_id, "start": start})))
            start, serial = underway.popleft()
            chunk = self._answer(serial).arrays["chunk"]
            if chunk.nbytes != min(LIMITS.chunk_bytes, size - start):
                raise TransportError("bad_message", "A part of the result has the wrong size.",
                                     "Fetch the result again.")
            data[start:start + chunk.nbytes] = chunk.tobytes()
        content = codec.read_file(data)
        return Result(content.body["report"], content.arrays)

    def forget(self, job_id: str) -> None:
        """Removes a finished job and its result from the server.

        Raises:
            InputError: `unknown_job`, or `job_running` when it hasn't ended.
        """
        self._ask("forget", {"job": job_id})

    def shutdown(self) -> None:
        """Asks a server of this machine to end; jobs that wait or run continue at its next start.

        Raises:
            InputError: `not_local` for a client of another machine.
        """
        self._ask("shutdown", {})

    @property
    def silence(self) -> float:
        """Seconds of listening without a sign of the server; any thread may ask."""
        return self._silence

    def close(self) -> None:
        """Ends the connection at once; what is not sent is dropped. Jobs on the server go on."""
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)
            self._context.term()

    def _job(self, kind: str, job_id: str) -> Job:
        answer = self._ask(kind, {"job": job_id})
        return Job.from_dict(answer.body["job"], answer.arrays)

    def _connect(self) -> None:
        if not self._connected:
            self._socket.connect(self._connection.address)
            self._connected = True
            self._heartbeat()

    def _ask(self, kind: str, body: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> codec.Message:
        return self._answer(self._say(kind, body, arrays))

    def _say(self, kind: str, body: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> int:
        self._connect()
        self._serial += 1
        self._send(codec.encode(kind, body | {"serial": self._serial}, arrays))
        return self._serial

    def _answer(self, serial: int) -> codec.Message:
        self._silence, self._looked = 0.0, time.monotonic()
        while serial not in self._answers:
            self._receive(0.25)
            self._check_silence(self._timeout)
        answer = self._answers.pop(serial)
        if answer.kind == "error":
            raise error_from_dict(answer.body["error"])
        return answer

    def _send(self, frames: list[Any]) -> None:
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise self._lost() from None
        self._said = time.monotonic()

    def _heartbeat(self) -> None:
        self._send(codec.encode("heartbeat", {}))

    def _receive(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for messages and sorts all that are there."""
        now = time.monotonic()
        if now - self._said > _HEARTBEAT:
            self._heartbeat()
        self._silence += min(now - self._looked, _LONGEST_STEP)
        events = dict(self._poller.poll(int(timeout * 1000)))
        self._silence += time.monotonic() - now
        self._looked = time.monotonic()
        while self._socket in events:
            try:
                frames = self._socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            self._silence, self._heard = 0.0, True
            self._sort(codec.decode([frame.buffer for frame in frames]))
        if self._monitor in events:
            event = recv_monitor_message(self._monitor)["event"]
            if event & _REFUSALS:
                self._refused(event)
            self._cut = True

    def _sort(self, message: codec.Message) -> None:
        if message.kind == "progress":
            self._updates.append(Job.from_dict(message.body["job"], message.arrays))
        elif message.body.get("serial") is not None:
            self._answers[message.body.pop("serial")] = message
        elif message.kind == "error":
            raise error_from_dict(message.body["error"])

    def _check_silence(self, longest: float) -> None:
        if self._cut or self._silence > longest:
            raise self._lost()

    def _lost(self) -> TransportError:
        address = self._connection.address
        if self._heard:
            what = (f"The connection to the server at {address} was cut." if self._cut else
                    f"There is no sign of the server at {address} for {self._silence:.0f} s.")
            return TransportError("server_lost", what, "Start the server again; jobs that it had taken continue.")
        return TransportError("server_unreachable", f"No server answers at {address}.",
                              "Start the server, or choose the connection file of one that runs.")

    def _refused(self, event: int) -> None:
        what = ("doesn't know this client's key" if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
                else "is not the one that the connection file belongs to")
        raise TransportError("not_authorised", f"The server at {self._connection.address} {what}.",
                             "Get a new connection file from the server.")


